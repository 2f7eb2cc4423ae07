"""Embedded bases in float32 as a folder and as a single file, and LoRAs for them: for the tools that read a base's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from charforgex.charworld import assets
from charforgex.families import bases
from charforgex.lora.state import LoraLayer
from charforgex.lora.writing import write_layers
from tests.families.conftest import original_tensors


def folder_of(family: str, folder: Path, dtype=torch.float32) -> Path:
    """The embedded base of a family, saved in `dtype`."""
    shutil.copytree(Path(assets.__file__).parent / family, folder)
    for path in folder.rglob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def single_of(family: str, folder: Path, path: Path, *components: str) -> Path:
    """The same weights in the spelling of single files, of all components if none is named; tensors of no network besides."""
    spelling, tensors = bases.get(f"charworld_{family}").spelling, {"model_ema.decay": torch.ones(())}
    for component in components or spelling.original:
        (weights,) = (folder / component).glob("*.safetensors")
        config = json.loads((folder / component / "config.json").read_text())
        tensors |= original_tensors(spelling, component, load_file(weights), config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"modelspec.title": "a base"})
    return path


def layer_for(shape: tuple[int, ...], rank: int, seed: int, strength: float = 0.02) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *([1, 1] if len(shape) == 4 else []), generator=generator) * strength
    return LoraLayer(down, up, alpha=rank / 2)


def lora_for(family: str, path: Path, format: str = "kohya", rank: int = 3, seed: int = 0, pick=lambda name: True, make=layer_for) -> Path:
    """A LoRA of that rank on those modules of the embedded base that `pick` chooses, in float32."""
    base = bases.get(f"charworld_{family}")
    names = [name for name in base.shapes if name.partition(".")[2] in base.names.modules[name.partition(".")[0]] and pick(name)]
    layers = {name: make(base.shapes[name], rank, seed + number) for number, name in enumerate(names)}
    write_layers(layers.get, names, path, format, base.names, torch.float32, {"charforgex.family": family})
    return path


def home_of(family: str, home: Path, pick=lambda name: True) -> Path:
    """`base/`, `base.safetensors`, and `lora.safetensors` on those of their modules that `pick` chooses."""
    single_of(family, folder_of(family, home / "base"), home / "base.safetensors")
    lora_for(family, home / "lora.safetensors", pick=lambda name: name != "text_encoder.text_projection" and pick(name))  # SD3's has none
    return home
