"""Killed at any moment, with any number of workers, a run ends in the very bits of one that was not disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from charforgex.lora.checkpoints import saved_steps
from charforgex.training.checkpoints import SafeCheckpointIO
from tests.data.conftest import draw

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
SETTINGS = [
    "debug=tiny", f"trainer.steps={STEPS}", "trainer.checkpoint_every=3", "trainer.accumulate=2", "evaluation.every=12", "sampling.steps=1",
    "evaluation.prompts=['a portrait of a {trigger}, smiling']", "evaluation.times=1", "logger.tensorboard=false",
]  # fmt: skip


class Runner:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CHARFORGEX_DEBUG": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.runner"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, run_dir: Path, *overrides: str, **how) -> dict:
        cache = run_dir.parent / "cache"
        job = {"overrides": [*SETTINGS, f"run_dir={run_dir}", f"cache_dir={cache}", *overrides], **how}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runner():
    started = Runner()
    yield started
    started.process.stdin.close()
    started.process.wait()


@pytest.fixture(scope="module")
def undisturbed(runner, tmp_path_factory):
    """The run folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert runner(folder / "first")["status"] == 0
    return folder / "first"


def evidence(run_dir: Path, steps: int = STEPS) -> dict[str, bytes]:
    """The loss log, the LoRA files, and the last checkpoint: weights, EMA, optimizer and step."""
    last = saved_steps(run_dir / "checkpoints")[0]
    assert SafeCheckpointIO().load_checkpoint(last)["step"] == steps
    files = [run_dir / "metrics.csv", run_dir / "debug.safetensors", run_dir / "debug_diffusers.safetensors", last / "tensors.safetensors"]
    files += [last / "state.json", run_dir / "debug_motion.safetensors", run_dir / "debug_look.safetensors"]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def test_equal_runs_are_equal(runner, undisturbed):
    assert runner(undisturbed.parent / "again")["status"] == 0
    assert evidence(undisturbed.parent / "again") == evidence(undisturbed)
    tensors = SafeCheckpointIO().load_checkpoint(saved_steps(undisturbed / "checkpoints")[0])["tensors"]
    kinds = {name.split("/")[0] for name in tensors}
    assert kinds == {"weights", "ema", "optimizer"}
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.startswith("weights/") and name.endswith(".up"))


def test_twenty_kills_change_nothing(runner, undisturbed, tmp_path):
    """SIGKILL at 20 random moments: 12 in or after a step, 6 in the middle of writing a checkpoint, 2 before training begins."""
    rng = random.Random(20)
    plan = [{"signal_at_step": [rng.randint(1, 6), rng.uniform(0, 2), signal.SIGKILL]} for _ in range(12)]
    plan += [{"kill_at_save": rng.randint(1, 6)} for _ in range(6)] + [{"kill_after": rng.uniform(0.05, 0.6)} for _ in range(2)]
    rng.shuffle(plan)
    run_dir, done = tmp_path / "killed", []
    for number, how in enumerate(plan):
        if (run_dir / "result.json").exists():
            done, run_dir = [*done, run_dir], tmp_path / f"killed-{number}"
        status = runner(run_dir, **how)["status"]
        assert status == -signal.SIGKILL or (run_dir / "result.json").exists(), (how, status)
    if not (run_dir / "result.json").exists():
        assert runner(run_dir)["status"] == 0
    for path in [*done, run_dir]:
        assert evidence(path) == evidence(undisturbed)
    assert len(done) <= 4, f"of 20 kills, {len(done)} came after the run was done"


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_kills_change_nothing_in_any_family(runner, tmp_path, family):
    """Twice in the middle of writing a checkpoint and twice in the middle of a step: SIGKILL, and on with it."""
    settings = [f"family={family}", "trainer.steps=6", "trainer.checkpoint_every=2", "evaluation.every=6"]
    assert runner(tmp_path / "whole", *settings)["status"] == 0
    for how in (
        {"kill_at_save": 5},  # 3 files each: step 0 is whole, step 2 is not
        {"signal_at_step": [4, 0.3, signal.SIGKILL]},  # step 2 is whole
        {"kill_at_save": 2},  # step 4 is not
        {"signal_at_step": [1, 0.3, signal.SIGKILL]},
    ):
        assert runner(tmp_path / "killed", *settings, **how)["status"] == -signal.SIGKILL, how
    assert runner(tmp_path / "killed", *settings)["status"] == 0
    assert evidence(tmp_path / "killed", 6) == evidence(tmp_path / "whole", 6)


@pytest.mark.parametrize(
    "options",
    [
        ["lora.kind=lokr", "lora.ranks={to_q:2}", "optimizer=prodigy"],
        ["lora.init=pissa", "lora.up_ratio=16", "optimizer=schedule_free", "trainer.ema=0"],
    ],
    ids=lambda options: options[0],
)
def test_kills_change_nothing_for_any_adapter_and_optimizer(runner, tmp_path, options):
    settings = ["trainer.steps=6", "trainer.checkpoint_every=2", "evaluation.every=6", *options]
    assert runner(tmp_path / "whole", *settings)["status"] == 0
    assert runner(tmp_path / "killed", *settings, signal_at_step=[4, 0.3, signal.SIGKILL])["status"] == -signal.SIGKILL
    assert runner(tmp_path / "killed", *settings)["status"] == 0
    found = evidence(tmp_path / "killed", 6)
    assert found == evidence(tmp_path / "whole", 6) and "debug.safetensors" in found
    assert ("debug_diffusers.safetensors" in found) == (options[0] != "lora.kind=lokr")


def found_in(path: Path) -> tuple[list[str], dict[str, str]]:
    """A file's keys and metadata."""
    with safe_open(path, "pt") as file:
        return list(file.keys()), file.metadata()


def test_a_kill_changes_nothing_where_two_optimizers_learn_a_motion(runner, tmp_path):
    settings = ["experiment=animatediff_motion", "trainer.steps=4", "trainer.checkpoint_every=2", "evaluation.every=4", "data.val_count=1"]
    settings.append("evaluation.prompts=['a man']")
    assert runner(tmp_path / "whole", *settings)["status"] == 0
    assert runner(tmp_path / "killed", *settings, signal_at_step=[4, 0.3, signal.SIGKILL])["status"] == -signal.SIGKILL
    assert runner(tmp_path / "killed", *settings)["status"] == 0
    found = evidence(tmp_path / "killed", 4)
    assert found == evidence(tmp_path / "whole", 4)
    for half, family in (("motion", "animatediff"), ("look", "sd15")):
        keys, told = found_in(tmp_path / "whole" / f"debug_{half}.safetensors")
        assert {".motion_modules." in key for key in keys} == {half == "motion"}
        assert told["charforgex.family"] == family and told["modelspec.title"] == f"debug_{half}"


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_nothing(runner, undisturbed, tmp_path, workers):
    assert runner(tmp_path / "workers", f"data.num_workers={workers}")["status"] == 0
    expected, found = evidence(undisturbed), evidence(tmp_path / "workers")
    for name in ("metrics.csv", "tensors.safetensors"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_says_so(runner, undisturbed, tmp_path, number, code):
    run_dir = tmp_path / "asked"
    assert runner(run_dir, signal_at_step=[5, 0.2, number])["status"] == code
    step = SafeCheckpointIO().load_checkpoint(saved_steps(run_dir / "checkpoints")[0])["step"]
    assert 5 <= step <= 7  # at the next step boundary, not at the next interval
    assert runner(run_dir)["status"] == 0
    assert evidence(run_dir) == evidence(undisturbed)


def test_a_broken_last_checkpoint_falls_back_to_the_one_before(runner, undisturbed, tmp_path):
    run_dir = tmp_path / "broken"
    assert runner(run_dir, kill_at_save=14)["status"] == -signal.SIGKILL  # 3 files each: steps 0, 3, 6, 9 are whole
    newest = saved_steps(run_dir / "checkpoints")[0]
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    assert runner(run_dir)["status"] == 0
    assert evidence(run_dir) == evidence(undisturbed)


def test_with_text_encoders_a_prior_and_regularisation(runner, tmp_path):
    """One run in one piece, one killed in the middle of a checkpoint and gone on with: with all that can learn and be held still."""
    for number in range(3):
        draw(tmp_path / "others" / f"{number}.png", number)
        (tmp_path / "others" / f"{number}.txt").write_text("a portrait of a woman")
    settings = [
        "trainer.steps=4", "trainer.checkpoint_every=1", "trainer.accumulate=1", "evaluation.every=4", "text_encoder.lr=1e-3",
        "text_encoder.tokens=2", "loss.prior_weight=1", "data.regularisation.weight=0.5",
        f"data.regularisation.source={tmp_path / 'others'}",
    ]  # fmt: skip
    assert runner(tmp_path / "whole", *settings)["status"] == 0
    assert runner(tmp_path / "killed", *settings, kill_at_save=8)["status"] == -signal.SIGKILL  # 3 files each: steps 0 and 1 are whole
    assert runner(tmp_path / "killed", *settings)["status"] == 0
    assert evidence(tmp_path / "killed", 4) == evidence(tmp_path / "whole", 4)
    tokens = [(tmp_path / run / "debug_tokens.safetensors").read_bytes() for run in ("killed", "whole")]
    assert tokens[0] == tokens[1]
    checkpoint = SafeCheckpointIO().load_checkpoint(saved_steps(tmp_path / "whole" / "checkpoints")[0])
    encoders = {name.split(".")[0] for name in checkpoint["tensors"] if "text_encoder" in name}
    assert encoders == {f"{kind}/{name}" for kind in ("weights", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step")
                        for name in ("text_encoder", "text_encoder_2")}  # fmt: skip
    rates = {group["lr"] for group in checkpoint["optimizer"]["groups"]}
    assert max(rates) / min(rates) == pytest.approx(2e-3 / 1e-3)  # the denoiser's and the encoders'
