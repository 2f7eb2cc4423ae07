"""Tools that end in every way they can, at fakes of them: what is done, and what is said."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from charforgex.backends import run
from charforgex.backends.common import Pictures
from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError, TrainingError
from charforgex.lora.formats import opened
from charforgex.lora.state import Lora, LoraLayer
from tests.backends.fakes import MAKERS

TOOLS = ("ai_toolkit", "kohya")


def read_lora(path):
    """Of a file with one layer."""
    with opened(path) as file:
        down, up = (file.get_tensor(f"layer.{side}") for side in ("down", "up"))
        if not up.isfinite().all():
            raise LoraError(f"{path}: layer.up holds values that are not finite.")
        return Lora({"unet.layer": LoraLayer(down, up, 1.0)}, file.metadata())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    for tool, make in MAKERS.items():
        make(folder / tool)
    (folder / "pictures").mkdir()
    for name in ("0.png", "0.txt"):
        (folder / "pictures" / name).write_text("a cat")
    save_file({"layer.down": torch.ones(1, 3), "layer.up": torch.ones(2, 1)}, folder / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def composed(place):
    """Settings for each tool, composed once."""
    small = ["family=sdxl_base", "trainer.steps=8", "trainer.ema=0", "trainer.checkpoint_every=3", "evaluation.every=4"]
    return {
        tool: compose("train", [f"backend={tool}", f"backend.folder={place / tool}", f"backend.python={sys.executable}", *small])
        for tool in TOOLS
    }


@pytest.fixture
def trained(composed, place, tmp_path, monkeypatch):
    """A function that lets a tool train, whose fake ends as it is told. Its attribute `logged` has what it told of its steps."""
    monkeypatch.setenv("FAKE_LORA", str(place / "lora.safetensors"))
    logged = []

    def train(tool, ends="well", seconds=0.0, **backend):
        monkeypatch.setenv("FAKE", ends)
        monkeypatch.setenv("FAKE_SECONDS", str(seconds))
        cfg = composed[tool].copy()
        for name, value in backend.items():
            cfg.backend[name] = value
        settings, _ = run.check(cfg)
        run.check_installation(settings)
        (tmp_path / "run" / "backend").mkdir(parents=True, exist_ok=True)
        job = run.Job(cfg, settings, tmp_path / "run" / "backend", Console(width=200), lambda step, numbers: logged.append(step))
        return run.train(job, [Pictures(place / "pictures")], ["a zkx"], "zkx", None, {}, read_lora)

    train.logged = logged
    return train


WHY = {
    "early": {"ai_toolkit": "exit code 0 .*left no LoRA", "kohya": "exit code 0 .*found no pictures"},
    "nan": dict.fromkeys(TOOLS, "stopped at step [23]: its loss is nan.*Lower optimizer.lr"),
    "memory": {"ai_toolkit": "out of GPU memory at step 3; set backend.quantize", "kohya": "memory at step 3; set backend.fp8_base"},
    "killed": {
        "ai_toolkit": "was killed, as systems do when memory runs out, at step 3",
        "kohya": "exit code 1 at step 3.*CalledProcessError",
    },
    "zero": dict.fromkeys(TOOLS, "what it saved is no good: All 1 layers are zero"),
    "broken": dict.fromkeys(TOOLS, "what it saved is no good: .* is damaged"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("ends", WHY)
def test_failures_are_named_whatever_the_exit_code(trained, tmp_path, tool, ends):
    with pytest.raises(TrainingError, match=WHY[ends][tool]):
        trained(tool, ends=ends)
    assert (tmp_path / "run" / "backend" / "log.txt").stat().st_size > 0


@pytest.mark.parametrize("tool", TOOLS)
def test_a_lora_counts_more_than_the_exit_code(trained, tool):
    done = trained(tool, ends="late")
    assert done.steps == 8 and "ended with exit code 1 after it had saved the LoRA" in done.notes[-1]


def test_steps_lost_to_memory_are_told(trained):
    (note,) = trained("ai_toolkit", ends="lost").notes
    assert "a step is lost" in note


def test_a_tool_that_hangs_is_stopped(trained):
    with pytest.raises(TrainingError, match=r"said nothing for 4 seconds .* and was stopped"):
        trained("kohya", ends="hang", silence=4)


@pytest.mark.parametrize("tool", TOOLS)
def test_stopped_and_gone_on_with(trained, tmp_path, tool):
    """Ctrl-C goes on to the tool; the same command goes on from its last save, and every step is told in its order."""
    output = tmp_path / "run" / "backend" / "output"

    def stop_when_saved():
        while not list(output.rglob({"ai_toolkit": "*_000000003.safetensors", "kohya": "*.pkl"}[tool])):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_saved, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        trained(tool, seconds=0.5)
    assert left.value.code == 130
    before = len(trained.logged)
    assert trained(tool).steps == 8
    again = trained.logged[before:]
    assert again == list(range(4, 9 if tool == "kohya" else 8))
    if tool == "kohya":
        assert (output / "from-00000003" / "character.safetensors").is_file()


def test_what_is_whole_is_not_trained_again(trained, tmp_path):
    first = trained("kohya")
    log = (tmp_path / "run" / "backend" / "log.txt").stat().st_size
    assert trained("kohya").file == first.file and (tmp_path / "run" / "backend" / "log.txt").stat().st_size == log


def test_what_is_not_there_is_said(trained, place):
    with pytest.raises(ConfigError, match=r"has no run\.py; name the folder of your checkout of ai-toolkit"):
        trained("ai_toolkit", folder=str(place / "pictures"))
    with pytest.raises(ConfigError, match=r"backend\.python=nowhere is not there"):
        trained("ai_toolkit", python="nowhere")
    with pytest.raises(ConfigError, match=r"no environment in venv/ or \.venv/"):
        trained("kohya", python=None)


def test_an_older_tool_is_found_out(trained, tmp_path):
    old = MAKERS["kohya"](tmp_path / "old")
    text = (old / "library/train_util.py").read_text().replace('    parser.add_argument("--min_snr_gamma")\n', "")
    (old / "library/train_util.py").write_text(text)
    with pytest.raises(ConfigError, match="this version of kohya does not know min_snr_gamma"):
        trained("kohya", folder=str(old))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["family=sdxl"], "charworld is of this program alone, and ai_toolkit cannot read it; say family=sdxl_base"),
        (["experiment=animatediff_motion"], "trains characters on pictures alone; leave motion out"),
        (["family=sdxl_base", "lora.init=pissa"], "lora.init=pissa: ai-toolkit has no equal of it"),
        (["family=flux_dev", "lora.alpha=8"], "lora.alpha=8: ai-toolkit makes it the rank for this family"),
        (["family=sdxl_base", "data.upscale=true", "trainer.compile=true"], "data.upscale=True.*\n.*trainer.compile=True"),
    ],
)
def test_what_the_tool_cannot_do_is_refused_by_name(overrides, why):
    with pytest.raises(ConfigError, match=why):
        run.check(compose("train", ["backend=ai_toolkit", "backend.folder=x", *overrides]))


def test_a_default_that_differs_is_a_note():
    _, notes = run.check(compose("train", ["backend=kohya", "backend.folder=x", "family=sdxl_base"]))
    assert [note.partition(":")[0] for note in notes] == ["trainer.ema=0.98", "lora.targets=attention"]


@pytest.mark.parametrize("tool", TOOLS)
def test_what_goes_over_whole(tool):
    """Settings that are taken care of somewhere, each once away from its default."""
    some = ["data.regularisation.source=x", "data.regularisation.weight=0.5", "data.regularisation.default_caption=woman", "data.flip=true",
            "logger=wandb", "logger.project=mine", "logger.offline=true", "data.background=[0,0,0]", "evaluation.others=y",
            "evaluation.seeds=3", "sampling.negative=blurry", "sampling.steps=9", "trainer.gradient_checkpointing=true", "curation=none",
            "loss.weighting=none", "optimizer=adafactor", "family.dtype=float32", "seed=7", "lora.targets=attention_mlp"]  # fmt: skip
    run.check(compose("train", [f"backend={tool}", "backend.folder=x", "family=sdxl_base", "trainer.ema=0", *some]))
