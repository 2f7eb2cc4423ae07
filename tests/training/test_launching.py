"""A command with several devices: processes of its own, which end together, and one outcome."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from charforgex import runs
from charforgex.config import compose
from charforgex.errors import ConfigError, DataError, TrainingError
from charforgex.lora.checkpoints import saved_steps
from charforgex.training import launching
from charforgex.training.launching import judge, outcome_path, outlast
from charforgex.training.logs import read_log
from charforgex.training.run import check, resumed
from charforgex.training.trial import Pruned

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "debug=tiny", "trainer.steps=4", "trainer.accumulate=2", "trainer.checkpoint_every=2", "evaluation.every=4", "sampling.steps=1",
    "trainer.threads=1", "trainer.accelerator=cpu", "evaluation.times=1", "logger.tensorboard=false", "evaluation.prompts=['a man']",
]  # fmt: skip


# ---- what came of it ----


@pytest.fixture
def left(tmp_path):
    """A folder in which processes left these outcomes, by rank."""

    def leave(*outcomes):
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                runs.write_json(outcome_path(tmp_path, rank), outcome)
        return tmp_path

    return leave


def test_the_first_ones_result_is_the_result(left):
    assert judge(left({"result": {"value": 0.5}}, {"result": {"value": 0.5}}), [0, 0], None, []) == {"value": 0.5}


def test_what_the_user_can_mend_is_raised_as_it_was(left):
    with pytest.raises(DataError, match="no pictures"):
        judge(left({"parted": "x"}, {"error": ["DataError", "no pictures"]}), [2, 2], 0, [])
    with pytest.raises(Pruned, match="ended at step 7"):
        judge(left({"pruned": [7, 0.25]}, {"parted": "x"}), [2, 2], 0, [])


@pytest.mark.parametrize(
    ("codes", "outcomes", "words"),
    [
        ([2, -9], [{"parted": "x"}, None], r"Process 1 of 2 \(counted from 0\) was killed by SIGKILL, .* The same command goes on"),
        ([1, 2], [None, {"parted": "x"}], "Process 0 of 2 .* ended with exit code 1"),
    ],
)
def test_who_ended_first_is_named(left, codes, outcomes, words):
    with pytest.raises(TrainingError, match=words):
        judge(left(*outcomes), codes, 0, [])


def test_a_stop_that_was_asked_for_is_one(left):
    for codes, asked, expected in (([130, 130], [signal.SIGINT], 130), ([143, -15], [signal.SIGTERM], 143), ([143, 143], [], 143)):
        with pytest.raises(SystemExit) as caught:
            judge(left(None, None), codes, 0, asked)
        assert caught.value.code == expected


def test_the_others_are_given_some_time(monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.3)
    processes = [subprocess.Popen([sys.executable, "-c", script]) for script in ("import time; time.sleep(60)", "raise SystemExit(3)")]
    started = time.monotonic()
    try:
        assert outlast(processes) == 1 and processes[0].poll() is None and time.monotonic() - started < 30
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---- where a run runs is no part of what it is ----


def test_the_run_folder_is_the_same_on_any_devices(tmp_path):
    alone, several = (compose("train", [*SETTINGS, *more]) for more in ([], ["trainer.devices=2", "trainer.strategy=fsdp"]))
    assert runs.config_hash(alone) == runs.config_hash(several) != runs.config_hash(compose("train", [*SETTINGS, "seed=1"]))
    runs.save_config(tmp_path, several)
    assert check(resumed(tmp_path, alone.trainer)).trainer.count == 2
    other = compose("train", ["trainer.devices=1"])
    assert check(resumed(tmp_path, other.trainer)).trainer.count == 1


def test_what_cannot_use_several_devices_says_so():
    with pytest.raises(ConfigError, match=r"trainer.devices=2: the embedded models are trained on one device"):
        check(compose("train", ["experiment=charworld_pretrain", "pretrain.stage=vae", "trainer.devices=2", "trainer.accumulate=2"]))
    with pytest.raises(ConfigError, match=r"trainer.devices=2: kohya has no equal of it"):
        check(compose("train", ["backend=kohya", "backend.folder=x", "family=sdxl_base", "trainer.devices=2", "trainer.accumulate=2"]))
    with pytest.raises(ConfigError, match=r"lora.init=pissa .* trainer.strategy=fsdp"):
        check(compose("train", [*SETTINGS, "trainer.devices=2", "trainer.strategy=fsdp", "lora.init=pissa"]))


# ---- whole commands ----


def command(folder: Path, *overrides: str, prefix: list[str] | None = None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    settings = [*SETTINGS, f"run_dir={folder}", f"cache_dir={folder.parent / 'cache'}", *overrides]
    return subprocess.Popen(
        [*(prefix or [sys.executable]), "train.py", *settings], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def train(folder: Path, *overrides: str, prefix: list[str] | None = None) -> None:
    process = command(folder, *overrides, prefix=prefix)
    told, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, told


def evidence(folder: Path) -> dict[str, bytes]:
    last = saved_steps(folder / "checkpoints")[0]
    found = [*folder.glob("debug*.safetensors"), folder / "metrics.csv", last / "tensors.safetensors", last / "state.json"]
    return {path.name: path.read_bytes() for path in found}


MOTION = ["experiment=animatediff_motion", "data.val_count=1"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "settings",
    [[], ["family=flux", "text_encoder.lr=1e-3"], ["family=sd3", "trainer.gradient_checkpointing=true"], MOTION],
    ids=lambda settings: " ".join(settings),
)
def test_two_devices_are_one_to_the_bit(tmp_path, settings):
    """With two micro-batches a step there is one sum, of two numbers: its order makes no difference."""
    train(tmp_path / "alone", *settings)
    train(tmp_path / "two", *settings, "trainer.devices=2")
    found = evidence(tmp_path / "two")
    assert found == evidence(tmp_path / "alone") and {"debug_motion.safetensors", "debug.safetensors"} & set(found)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "settings", [["text_encoder.tokens=2"], ["family=flux", "trainer.gradient_checkpointing=true"], MOTION], ids=" ".join
)
def test_a_split_base_trains_as_the_whole_one(tmp_path, settings):
    train(tmp_path / "alone", *settings)
    train(tmp_path / "two", *settings, "trainer.devices=2", "trainer.strategy=fsdp")
    alone, two = (read_log(tmp_path / name / "metrics.csv") for name in ("alone", "two"))
    assert len(alone["loss"]) == 4
    assert two["loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in alone["loss"]]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_torchrun_is_the_same(tmp_path):
    train(tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(launching.free_port())]
    train(tmp_path / "two", "trainer.devices=2", prefix=torchrun)
    assert evidence(tmp_path / "two") == evidence(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find the processes")
def test_one_is_killed_and_the_run_goes_on_on_one_device(tmp_path):
    steps = ["trainer.steps=40", "evaluation.every=40"]
    train(tmp_path / "alone", *steps)
    process = command(tmp_path / "killed", *steps, "trainer.devices=2")
    log = tmp_path / "killed" / "metrics.csv"
    while process.poll() is None and not (log.exists() and "\n4,loss," in log.read_text()):
        time.sleep(0.05)
    own = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(own[-1]), signal.SIGKILL)
    killed = time.monotonic()
    told, _ = process.communicate(timeout=300)
    assert process.returncode == runs.EXIT_ERROR and time.monotonic() - killed < launching.GRACE + 60
    assert "TrainingError: Process 1 of 2 (counted from 0) was killed by SIGKILL" in told and "Traceback" not in told
    train(tmp_path / "killed", *steps)
    assert evidence(tmp_path / "killed") == evidence(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_signal_to_the_command_saves_and_stops(tmp_path):
    process = command(tmp_path / "asked", "trainer.steps=400", "evaluation.every=400", "trainer.devices=2")
    log = tmp_path / "asked" / "metrics.csv"
    while process.poll() is None and not (log.exists() and "\n4,loss," in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == runs.EXIT_TERMINATED and "all is saved" in told, told
    last = max(int(row.partition(",")[0]) for row in log.read_text().splitlines()[1:])
    assert OmegaConf.load(saved_steps(tmp_path / "asked" / "checkpoints")[0] / "state.json").step == last
