"""The benchmarks run and report as they say. What they measure is not judged here: a test machine's speed is nobody's promise."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def small_setup(train_step, steps, family="flux"):
    return train_step.Setup(
        family, scale="quick", device="cpu", dtype="float32", resolution=64, batch_size=1, rank=4, steps=steps, rounds=1, threads=1
    )  # fmt: skip


def test_quick_train_step_reports_finite_ratios_and_names_what_it_skips():
    done = run("--quick", "--rounds", "1", "--family", "sd3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions", "skipped"}
    assert report["benchmark"] == "train_step"
    assert set(report["ratios"]) == {"step_vs_plain.sd3", "step_vs_floor.sd3"}
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in report["ratios"].values())
    assert report["skipped"] == ["step_vs_diffusers.sd3", "memory_vs_diffusers.sd3"]
    values = report["values"]["sd3"]
    assert set(values["step_seconds"]) == {"ours", "plain", "floor"}
    assert values["setup"]["scale"] == "quick" and values["setup"]["rounds"] == 1
    assert values["lora_parameters"] > 0 and values["tflop_per_step"] > 0
    # one round, so the ratio of the medians is the round's own
    assert report["ratios"]["step_vs_plain.sd3"] == pytest.approx(values["step_seconds"]["ours"] / values["step_seconds"]["plain"])
    assert report["versions"]["torch"] and report["machine"]


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        (["--quick", "--scale", "real"], "leave --scale real out"),
        (["--steps", "3"], "give at least 4"),
        (["--batch-size", "1", "4"], "give one --batch-size"),
        (["--diffusers-scripts", "nowhere"], "nowhere/train_dreambooth_lora_sdxl.py is no file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once_with_a_way_out(options, way_out):
    done = run(*options)
    assert done.returncode == 2
    assert way_out in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_real_sizes_are_refused_without_a_gpu():
    done = run("--scale", "real", "--family", "flux")
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr and "--scale mini" in done.stderr


def test_what_is_measured_on_a_gpu_runs_on_small_models_too(train_step):
    """The code of --scale real, eager, with models that a CPU can step."""
    setups = [small_setup(train_step, steps=4, family=family) for family in ("sdxl", "flux")]
    ratios, values, skipped = train_step.measure_real(setups, [64], [2], peak_tflops=0.5, ways=(False,))
    cases = {"sdxl.64px.batch2.eager", "flux.64px.batch2.eager"}
    assert set(values) == cases and not skipped
    assert set(ratios) == {f"{what}_vs_plain.{case}" for what in ("step", "memory") for case in cases}
    mine = values["flux.64px.batch2.eager"]["ours"]
    assert mine["share_of_peak"] == pytest.approx(mine["tflop_per_step"] * mine["steps_per_second"] / 0.5)


@pytest.mark.parametrize(("family", "billions"), [("sdxl", 2.567), ("flux", 11.901), ("sd3", 8.057)])
def test_real_sizes_are_real(train_step, family, billions):
    scale = train_step.SCALES["real"]
    denoiser = train_step.build_denoiser(small_setup(train_step, 4, family).get_family(), scale, torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}


def test_another_script_s_steps_and_memory_are_read_without_changing_it(train_step, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    ballast = bytearray(900_000_000)  # of the parent, which is not to be taken for the child's
    ballast[::4096] = b"x" * len(ballast[::4096])
    found = train_step.run_job(small_setup(train_step, steps=6), script, ["6"], tmp_path)
    assert 0.1 <= found["seconds"] < 1
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


def test_quick_curation_reports_ratios_stages_and_growth():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "curation.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions", "skipped"} and report["benchmark"] == "curation"
    wanted = {"scan_vs_decode", "scan_vs_imagehash", "scan_vs_imagededup", "neardup_10k_vs_numpy"}
    assert report["ratios"].keys() | report["skipped"].keys() == wanted and not report["ratios"].keys() & report["skipped"].keys()
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in report["ratios"].values())
    values = report["values"]
    assert report["ratios"]["scan_vs_decode"] == pytest.approx(values["ms_per_picture"]["scan"] / values["ms_per_picture"]["scan_decode"])
    assert [row["pairs"] >= int(count) // 20 for count, row in values["growth"].items()] == [True] * 3
    assert {"read", "sha256", "decode", "measure", "thumbnail", "fingerprint", "compare"} == set(values["pictures_per_second"])


def test_quick_lora_reports_ratios_of_files_and_names_what_it_skips():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "lora.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions", "skipped"} and report["benchmark"] == "lora"
    wanted = {"merge_vs_peft_svd", "resize_vs_full_svd", "extract_vs_full_svd", "merge_error"}
    wanted |= {"ties_vs_peft_ties_svd", "dare_vs_peft_dare_svd", "ties_error"}
    assert set(report["ratios"]) == {f"{name}.sdxl" for name in wanted}
    assert set(report["skipped"]) == {"merge_vs_kohya.sdxl", "resize_vs_kohya.sdxl"}
    values = report["values"]["sdxl"]
    jobs = {name: told for name, told in values.items() if name not in ("files", "quantized")}
    seconds = {name: told["cpu_seconds"] for name, told in jobs.items()}
    assert report["ratios"]["merge_vs_peft_svd.sdxl"] == pytest.approx(seconds["merge"] / seconds["peft_merge"])
    assert all(told["peak_bytes"] > 50e6 and told["cpu_seconds"] > 0 for told in jobs.values())
    assert seconds["svd_resize"] > max(values["svd_resize"]["seconds"].values()), "each shape counts as often as modules have it"
    assert abs(report["ratios"]["merge_error.sdxl"]) < 1e-5, "of the best of its rank; no matter of speed"
    assert values["quantized"]["nf4"]["size"] < values["quantized"]["int8"]["size"] < 0.7 and values["quantized"]["int8"]["error"] < 0.02
    assert values["files"]["resized"] < 0.6 * values["files"]["0"] and values["files"]["merged"] < 1.1 * values["files"]["0"]


def test_a_kohya_checkout_that_is_none_is_refused_at_once(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "lora.py", "--quick", "--kohya", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "networks/svd_merge_lora.py is no file" in done.stderr


def test_quick_evaluation_reports_its_ratio_and_that_both_sides_agree():
    command = [sys.executable, ROOT / "benchmarks" / "evaluation.py", "--quick", "--part", "fid"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions"} and report["benchmark"] == "evaluation"
    told = report["values"]["fid"]["500"]
    assert report["ratios"]["fid_vs_torchmetrics.500"] == pytest.approx(told["cpu_seconds"]["ours"] / told["cpu_seconds"]["torchmetrics"])
    assert told["value"]["ours"] == pytest.approx(told["value"]["torchmetrics"], rel=1e-6)


def test_quick_interpolation_reports_errors_beside_blending_and_names_what_it_skips():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "interpolate.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"benchmark", "ratios", "values", "machine", "versions", "skipped"} and report["benchmark"] == "interpolate"
    assert "network" in report["skipped"]
    for world in ("characters", "discs", "photographs"):
        told = report["values"][world]
        assert report["ratios"][f"error_vs_linear.{world}"] == pytest.approx(told["dis"]["error"] / told["linear"]["error"])
        assert told["dis"]["error"] < 0.35 * told["linear"]["error"], "no matter of speed"
        assert told["dis"]["error"] < told["plain_dis"]["error"] and told["dis"]["ssim"] > told["linear"]["ssim"]
        assert report["values"]["cuts"][world] == {"found": 1, "false": 0}


def test_the_motion_benchmark_tells_real_clips_from_spoilt_ones(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_motion", ROOT / "benchmarks" / "motion.py")
    motion = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, motion)
    spec.loader.exec_module(motion)
    monkeypatch.setattr(motion, "REFERENCES", 3)
    text, values = motion.rendered(motion.Reading(), ["sway"], 1)
    assert values["recognised"]["sway"] == {"real": 1, "through the VAE": 1, "shuffled": 0}
    told = values["measures"]
    for measure, (how, words) in motion.SPOILS.items():
        worse = (
            told["real"][measure] - told[how][measure] if measure in ("recognised", "alike") else told[how][measure] - told["real"][measure]
        )
        assert worse > 0.03 and words in text, measure
