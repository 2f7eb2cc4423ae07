"""A character's training by other tools, from the command's settings to result.json, against fakes; how those end: tests/backends."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import charforgex
from charforgex.charworld.demo import write_character
from charforgex.config import compose
from charforgex.evaluation.trainings import training_in
from charforgex.families import registry
from charforgex.families.loading import denoiser_config
from charforgex.generation import run as generation
from charforgex.lora.formats import read
from charforgex.lora.state import Lora, LoraLayer
from charforgex.lora.writing import write
from charforgex.training import run as training
from charforgex.training.logs import read_log
from tests.backends.fakes import MAKERS

BASE = Path(charforgex.__file__).parent / "charworld" / "assets" / "sdxl"
TOOLS = ("ai_toolkit", "kohya")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures with captions, both checkouts, a base that predicts noise, and the LoRA that is "trained"."""
    folder = tmp_path_factory.mktemp("external")
    write_character(folder / "pictures", 3, 6)
    for tool, make in MAKERS.items():
        make(folder / tool)
    shutil.copytree(BASE, folder / "base", copy_function=os.symlink)
    scheduler = folder / "base" / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    scheduler.unlink()
    scheduler.write_text(json.dumps(config))
    family, generator = registry.get("sdxl"), torch.Generator().manual_seed(0)
    denoiser = family.load(str(folder / "base"), ["denoiser"]).denoiser
    layers = {}
    for name, module in denoiser.named_modules():
        if name.endswith(("to_q", "to_v")):
            out, into = module.weight.shape
            layers[f"unet.{name}"] = LoraLayer(torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator), 2.0)
    write(Lora(layers), folder / "lora.safetensors", "kohya", family, denoiser.config, dtype=torch.float32)
    return folder


@pytest.fixture
def trained(place, tmp_path, monkeypatch):
    """A function that trains with a tool."""
    monkeypatch.setenv("FAKE_LORA", str(place / "lora.safetensors"))
    return lambda tool: training.run(settings(place, tmp_path, tool))


def settings(place, tmp_path, tool):
    given = [
        f"backend={tool}", f"backend.folder={place / tool}", f"backend.python={sys.executable}", f"family.source={place / 'base'}",
        f"data.source={place / 'pictures'}", "data.trigger=zkx", "data.add_trigger=true", "curation=none", "trainer.steps=8",
        "trainer.ema=0", "trainer.checkpoint_every=3", "evaluation.every=4", "evaluation.seeds=1", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    return compose("train", given)


def same(one, other):
    return one.layers.keys() == other.layers.keys() and all(
        torch.allclose(layer.delta(), other.layers[name].delta(), atol=2e-2) for name, layer in one.layers.items()
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_a_training_ends_in_a_lora_that_is_the_tools(trained, place, tmp_path, tool):
    result = trained(tool)
    run = tmp_path / "run"
    family, config = registry.get("sdxl"), denoiser_config(registry.get("sdxl"), str(place / "base"))
    made = read(place / "lora.safetensors", family, config)
    for key in ("lora", "lora_diffusers"):
        assert same(read(result[key], family, config), made), key
    metadata = read(result["lora"], family, config).metadata
    assert metadata["charforgex.backend"] == tool and metadata["charforgex.trigger"] == "zkx" and metadata["ss_steps"] == "8"
    assert result["steps"] == 8 and result["value"] is None and result["notes"] == []
    assert list(result["on_the_way"]) == ["3", "6"] and all(Path(path).is_file() for path in result["on_the_way"].values())
    assert json.loads((run / "result.json").read_text()) == result
    drawn = sorted(path.stem for path in (run / "samples").iterdir())
    assert len(drawn) == {"ai_toolkit": 8, "kohya": 16}[tool] and drawn[0] == "step-00000004-00"
    losses = dict(read_log(run / "metrics.csv")["loss"])
    assert losses == pytest.approx(
        {"ai_toolkit": {n: 1 / (n + 1) for n in range(1, 8)}, "kohya": {n: 1 / n for n in range(1, 9)}}[tool], rel=0.01
    )
    home = training_in(run)
    assert home.lora.name == "character.safetensors" and home.trigger == "zkx"
    held_out = len(home.manifest().of("val"))
    assert held_out == 1
    assert len(list((run / "backend" / "pictures" / "x1").glob("*.txt"))) == 6 - held_out


@pytest.mark.slow
def test_pictures_are_made_with_it(trained, tmp_path):
    lora = trained("kohya")["lora"]
    generation.generate(compose("generate", [f"lora={lora}", "prompt=a zkx", "count=1", "steps=1", f"out={tmp_path / 'out'}"]))
    assert list((tmp_path / "out").glob("*.png"))
