"""DoRA, LoHa and LoKr in files, by the words of LyCORIS that ComfyUI and Forge read, and DoRA by peft's as well.

kohya        as a LoRA's names; a module that is joined with others in the original network is `lycoris_<our path with _>`, because only
             products of two factors can be joined exactly. `.dora_scale`, `.hada_w1_a` ..., `.lokr_w1` ..., `.alpha`
diffusers    DoRA alone: `.lora_magnitude_vector` beside lora_A and lora_B, and use_dora in the header

Magnitudes are float32 in every file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.names import Parts
from charforgex.lora.state import Layer, LohaLayer, LokrLayer, LoraLayer

KINDS = {"hada_": LohaLayer, "lokr_": LokrLayer}
PARTS = {"hada_": ("w1_a", "w1_b", "w2_a", "w2_b"), "lokr_": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
SIDES = {".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude"}
SIDES |= {f".{prefix}{part}": prefix + part for prefix, parts in PARTS.items() for part in parts}
WRITABLE = {"kohya": {"dora", "loha", "lokr"}, "diffusers": {"dora"}}  # besides lora


def check_kinds(kinds: Collection[str], format: str) -> None:
    """Raises LoraError if the format cannot hold layers of these kinds."""
    lost = set(kinds) - {"lora"} - WRITABLE.get(format, set())
    if lost:
        able = [name for name, kinds in WRITABLE.items() if lost <= kinds]
        raise LoraError(f"The format {format} cannot hold {' and '.join(sorted(lost))}; write {' or '.join(able)}.")


def check_mixed(kinds: Mapping[str, str], format: str) -> None:
    """Raises LoraError if the format cannot say which layers are of which kind; `kinds` are by layer."""
    found: dict[str, set[str]] = {}
    for name, kind in kinds.items() if format == "diffusers" else ():
        found.setdefault(name.partition(".")[0], set()).add(kind)
    if mixed := [component for component, some in found.items() if len(some) > 1]:
        raise LoraError(f"{mixed[0]} is partly DoRA, which the format diffusers cannot say; write kohya.")


def is_whole(sides: Collection[str]) -> bool:
    """Whether these are the factors of one layer."""
    return {"down", "up"} <= set(sides) or any(side.startswith(tuple(KINDS)) for side in sides)


def layer_of(parts: Parts, sides: Mapping[str, Tensor], alpha: float | None) -> Layer:
    """The layer of a name in a file that holds more than a LoRA. `alpha` None means the rank. Raises LoraError."""
    place = parts[0][1]
    if place.rows is not None or place.swapped:
        raise LoraError("DoRA, LoHa and LoKr of a weight that joins several of ours cannot be read.")
    prefix = next((prefix for prefix in KINDS if any(side.startswith(prefix) for side in sides)), None)
    if prefix is None:
        down, up = sides["down"].float(), sides["up"].float()
        return LoraLayer(down, up, float(down.shape[0] if alpha is None else alpha), _magnitude(sides, len(up)))
    factors = {side.removeprefix(prefix): tensor.float() for side, tensor in sides.items() if side != "alpha"}
    missing = {"w1_a", "w1_b", "w2_a", "w2_b"} - factors.keys() if prefix == "hada_" else set()
    strange = factors.keys() - set(PARTS[prefix])
    if missing or strange:
        raise LoraError(f"its factors are {', '.join(sorted(sides))}, of which no layer can be made.")
    layer = KINDS[prefix](alpha=1.0, **factors)
    return KINDS[prefix](alpha=float(layer.rank if alpha is None else alpha), **factors)


def _magnitude(sides: Mapping[str, Tensor], out: int) -> Tensor:
    """(out,). A dora_scale is (out, 1[, 1, 1]); early versions of LyCORIS had (1, in[, 1, 1]), the norms of columns."""
    if "magnitude" in sides:
        return sides["magnitude"].float().flatten()
    scale = sides["dora_scale"].float()
    if scale.ndim > 1 and scale.shape[0] != out:
        raise LoraError(f"its dora_scale {tuple(scale.shape)} is of columns; only DoRA of rows, ({out}, 1), can be read.")
    return scale.flatten()


def tensors_of(layers: Mapping[str, Layer], format: str, alone: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file for layers that are no plain LoRA, by key. `alone`: our name -> the file's, of modules that are one in both."""
    tensors = {}
    for name, layer in layers.items():
        module = alone.get(name) or f"lycoris_{name.partition('.')[2].replace('.', '_')}"
        ends = (
            {"down": ".lora_A.weight", "up": ".lora_B.weight"}
            if format == "diffusers"
            else {"down": ".lora_down.weight", "up": ".lora_up.weight"}
        )
        prefix = {"loha": ".hada_", "lokr": ".lokr_"}.get(layer.kind)
        for part, value in layer.tensors().items():
            value = value.detach().cpu()
            if part == "magnitude":
                convolved = layer.down.ndim == 4
                if format == "diffusers":
                    tensors[module + ".lora_magnitude_vector"] = value.float().view(1, -1, 1, 1) if convolved else value.float()
                else:
                    tensors[module + ".dora_scale"] = value.float().view(-1, *[1] * (3 if convolved else 1))
            else:
                tensors[module + (prefix + part if prefix else ends[part])] = value.to(dtype).contiguous()
        if format == "kohya":
            tensors[module + ".alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors
