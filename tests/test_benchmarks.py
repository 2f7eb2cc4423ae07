"""The benchmarks run and report as they say. What they measure is not judged here: a test machine's speed is nobody's promise."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN_STEP = ROOT / "benchmarks" / "train_step.py"

# What the example script stands for here: two slow steps to warm up on, then steps of 0.1 CPU seconds, and 150 MB that it holds.
STEPS = """
import sys, time, torch
ballast = torch.ones(37_500_000)
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
count = int(sys.argv[1])
for step in range(count):
    until = time.process_time() + (0.5 if step < 2 else 0.1)
    while time.process_time() < until:
        pass
    weight.grad = torch.ones(2)
    optimizer.step()
"""


@pytest.fixture(scope="module")
def train_step():
    spec = importlib.util.spec_from_file_location("train_step", TRAIN_STEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_step"]


def run(*options):
    return subprocess.run([sys.executable, TRAIN_STEP, *options], capture_output=True, text=True)


def small_setup(train_step, steps):
    return train_step.Setup(
        scale="quick", device="cpu", dtype="float32", resolution=64, batch_size=1, rank=4, steps=steps, rounds=1, threads=1, compile=None
    )  # fmt: skip


def test_quick_train_step_reports_finite_ratios_and_names_what_it_skips():
    done = run("--quick", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions", "skipped"}
    assert report["benchmark"] == "train_step"
    assert set(report["ratios"]) == {"step_vs_plain.sdxl", "step_vs_floor.sdxl"}
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in report["ratios"].values())
    assert report["skipped"] == ["step_vs_diffusers.sdxl", "memory_vs_diffusers.sdxl"]
    values = report["values"]
    assert set(values["step_seconds"]) == {"ours", "plain", "floor"}
    assert values["setup"]["scale"] == "quick" and values["setup"]["rounds"] == 1
    assert values["lora_parameters"] > 0 and values["tflop_per_step"] > 0
    # one round, so the ratio of the medians is the round's own
    assert report["ratios"]["step_vs_plain.sdxl"] == pytest.approx(values["step_seconds"]["ours"] / values["step_seconds"]["plain"])
    assert report["versions"]["torch"] and report["machine"]


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        (["--scale", "real", "--device", "cpu"], "Use --scale mini"),
        (["--quick", "--scale", "real"], "leave --scale real out"),
        (["--steps", "3"], "give at least 4"),
        (["--diffusers-script", "nowhere.py"], "nowhere.py is no file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once_with_a_way_out(options, way_out):
    done = run(*options)
    assert done.returncode == 2
    assert way_out in done.stderr


def test_another_script_s_steps_and_memory_are_read_without_changing_it(train_step, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    ballast = bytearray(900_000_000)  # of the parent, which is not to be taken for the child's
    ballast[::4096] = b"x" * len(ballast[::4096])
    found = train_step.run_job(small_setup(train_step, steps=6), script, ["6"], tmp_path)
    assert 0.1 <= found["seconds"] < 0.2
    assert 150e6 < found["peak_bytes"]["to_last_step"] <= found["peak_bytes"]["whole"] < 900e6


def test_a_script_that_fails_is_not_measured(train_step, tmp_path, capsys):
    script = tmp_path / "steps.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(subprocess.CalledProcessError):
        train_step.run_job(small_setup(train_step, steps=6), script, [], tmp_path)
    assert "no such model" in capsys.readouterr().err


def test_a_script_with_too_few_steps_is_not_measured(train_step):
    clock = train_step.Clock(steps=6, on_gpu=False)
    clock()
    with pytest.raises(AssertionError, match="1 of 6 steps"):
        clock.seconds()


def test_the_first_steps_do_not_count(train_step):
    clock = train_step.Clock(steps=6, on_gpu=False)
    clock.times = [9.0, 12.0, 12.5, 13.5, 14.25, 14.75]
    assert clock.seconds() == pytest.approx(0.625)


def test_a_slow_round_is_compared_with_itself(train_step):
    assert train_step.in_turn([1.0, 4.0, 2.0], [1.0, 2.0, 1.6]) == pytest.approx(1.25)
