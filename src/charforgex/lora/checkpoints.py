"""What a training leaves in checkpoints/, read: whole checkpoints, and the adapter in one as its run would save it.

step-00000400/{tensors.safetensors, state.json, manifest.json}; the manifest holds the others' hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from charforgex.errors import CheckpointError, LoraError
from charforgex.lora.inject import canonical
from charforgex.lora.state import Layer, LohaLayer, LokrLayer, Lora, LoraLayer
from charforgex.lora.targets import each

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
KINDS = {"lora": LoraLayer, "dora": LoraLayer, "loha": LohaLayer, "lokr": LokrLayer}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def saved_steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first. Unfinished ones do not count."""
    return sorted(Path(folder).glob("step-*"), reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """{"tensors": {name: Tensor}, **plain values}. Raises CheckpointError if a file is missing, unreadable, or not the one whose hash the
    manifest holds."""
    try:
        hashes = json.loads((path / MANIFEST).read_bytes())
        files = {name: (path / name).read_bytes() for name in (TENSORS, STATE)}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != hashes[name]:
                raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the manifest's.")
        return {"tensors": load(files[TENSORS])} | json.loads(files[STATE])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from error


def adapter_of(checkpoint: Mapping[str, Any], component: str, settings: Mapping[str, Any]) -> tuple[Lora, dict[str, Tensor]]:
    """The adapter, and new tokens by text encoder, as the run would save them: their moving average or the optimizer's own where there is
    one. `component` is the denoiser's name and `settings` are the run's group `lora`, which says what tensors alone do not.

    Raises LoraError for `init: pissa`, whose checkpoints hold what is to be subtracted from.
    """
    if settings["init"] == "pissa":
        raise LoraError("a checkpoint of lora.init=pissa is no adapter by itself")
    factors: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    tokens = {}
    for name, value in _averaged(checkpoint).items():
        path, _, part = name.rpartition(".")
        place, inside = (path.partition(".")[::2]) if name.startswith("text_encoder") else (component, path)
        if part == "tokens":
            tokens[path] = value.float()
        else:
            factors[place, inside][part] = value.float()
    alphas = each("lora.alphas", settings["alphas"], settings["alpha"], [path for place, path in factors if place == component])
    layers = {
        f"{place}.{canonical(place, path)}": _layer(parts, alphas[path] if place == component else settings["alpha"], settings)
        for (place, path), parts in factors.items()
    }
    return Lora(layers), tokens


def _layer(factors: dict[str, Tensor], alpha: float, settings: Mapping[str, Any]) -> Layer:
    layer = KINDS[settings["kind"]](alpha=alpha, **factors)
    if isinstance(layer, LokrLayer) and layer.w1 is not None and layer.w2 is not None:
        alpha = 1.0  # nothing scales it
    elif settings["rslora"]:
        alpha *= math.sqrt(layer.rank)
    return KINDS[settings["kind"]](alpha=alpha, **factors)


def _averaged(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the run measures and saves, by parameter."""
    tensors = checkpoint["tensors"]

    def of(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

    raw, ahead = of("weights/"), of("optimizer/z/")
    if ahead:  # schedule-free (Defazio et al. 2024): it trains at y, a mean of what is good and of z
        beta = checkpoint["optimizer"]["groups"][0]["betas"][0]
        return {name: value.lerp(ahead[name], 1 - 1 / beta) if name in ahead else value for name, value in raw.items()}
    return of("ema/") or raw
