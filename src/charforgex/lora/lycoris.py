"""DoRA, LoHa and LoKr in files, by the words of LyCORIS that ComfyUI and Forge read, and DoRA by peft's as well.

kohya        as a LoRA's names; a module that is joined with others in the original network is `lycoris_<our path with _>`, because only
             products of two factors can be joined exactly (to divide them is another thing: others' files of joined weights are read).
             `.dora_scale`, `.hada_w1_a` ..., `.lokr_w1` ..., `.alpha`
diffusers    DoRA alone: `.lora_magnitude_vector` beside lora_A and lora_B, and use_dora in the header

Magnitudes are float32 in every file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.joined import Rows
from charforgex.lora.state import Layer, LohaLayer, LokrLayer, LoraLayer

KINDS = {"hada_": LohaLayer, "lokr_": LokrLayer}
PARTS = {"hada_": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), "lokr_": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
SIDES = {".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude", ".lora_mid.weight": "mid"}
SIDES |= {f".lora_magnitude_vector{end}": "magnitude" for end in (".weight", ".default.weight")}
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


def kind_of(sides: Collection[str]) -> str:
    """Of the layer that has these factors."""
    prefix = next((prefix for prefix in KINDS if any(side.startswith(prefix) for side in sides)), None)
    return KINDS[prefix].kind if prefix else "dora" if {"dora_scale", "magnitude"} & set(sides) else "lora"


def weight_shape(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Of the weight that factors of these shapes change; (out, in * kh * kw) for LoHa and LoKr; () if they are no factors of one."""
    try:
        kind = kind_of(shapes)
        if kind == "loha":
            return _outer(shapes, "hada_w1", "hada_t1")
        if kind == "lokr":
            sides = [_outer(shapes, "lokr_w1", None), _outer(shapes, "lokr_w2", "lokr_t2")]
            return tuple(one * two for one, two in zip(*sides, strict=True))
        kernel = shapes["mid"] if "mid" in shapes else shapes["down"]
        return (shapes["up"][0], shapes["down"][1], *kernel[2:])
    except (KeyError, IndexError):
        return ()


def _outer(shapes: Mapping[str, Sequence[int]], side: str, core: str | None) -> tuple[int, int]:
    if side in shapes:
        return (shapes[side][0], math.prod(shapes[side][1:]))
    a, b = shapes[side + "_a"], shapes[side + "_b"]
    return (a[1], b[1] * math.prod(shapes[core][2:])) if core in shapes else (a[0], math.prod(b[1:]))


def layer_of(sides: Mapping[str, Tensor], alpha: float | None) -> Layer:
    """The layer of a name in a file. `alpha` None means the rank. Raises LoraError for factors that make none.

    A convolution in three factors (Tucker's decomposition: `lora_mid`, `hada_t1` and `hada_t2`, `lokr_t2`) becomes one in two, exactly.
    """
    prefix = next((prefix for prefix in KINDS if any(side.startswith(prefix) for side in sides)), None)
    factors = {side.removeprefix(prefix or ""): tensor.float() for side, tensor in sides.items() if side != "alpha"}
    scale = {side: factors.pop(side) for side in ("dora_scale", "magnitude") if side in factors}
    if prefix is None:
        down, up = _whole_down(factors), factors["up"]
        alpha = float(down.shape[0] if down.ndim else 1) if alpha is None else alpha
        return LoraLayer(down, up, alpha, _magnitude(scale, down, up) if scale else None)
    missing = {"w1_a", "w1_b", "w2_a", "w2_b"} - factors.keys() if prefix == "hada_" else set()
    strange = factors.keys() - set(PARTS[prefix])
    if missing or strange or scale:
        raise LoraError(f"its factors are {', '.join(sorted(sides))}, of which no layer can be made.")
    for side in ("1", "2"):
        if f"t{side}" in factors:
            a, b = _two_of_three(factors.pop(f"t{side}"), factors.get(f"w{side}_a"), factors.get(f"w{side}_b"))
            factors |= {f"w{side}_a": a, f"w{side}_b": b}
    layer = KINDS[prefix](alpha=1.0, **factors)
    return KINDS[prefix](alpha=float(layer.rank if alpha is None else alpha), **factors)


def _whole_down(factors: Mapping[str, Tensor]) -> Tensor:
    """(r, in, kh, kw) of `down` (r, in, 1, 1) and `mid` (r, r, kh, kw)."""
    down, mid = factors["down"], factors.get("mid")
    if mid is None:
        return down
    if down.ndim != 4 or down.shape[2:] != (1, 1) or mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise LoraError(f"down {tuple(down.shape)} and mid {tuple(mid.shape)} are no factors of one convolution.")
    return torch.einsum("abhw,bi->aihw", mid, down[:, :, 0, 0])


def _two_of_three(core: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """_a (out, r) and _b (r, in * kh * kw) of a core (r, r, kh, kw) between _a (r, out) and _b (r, in)."""
    shapes = [() if tensor is None else tuple(tensor.shape) for tensor in (core, a, b)]
    if [len(shape) for shape in shapes] != [4, 2, 2] or (shapes[1][0], shapes[2][0]) != shapes[0][:2]:
        raise LoraError(f"{shapes[0]}, {shapes[1]} and {shapes[2]} are no three factors of one convolution.")
    return a.T.contiguous(), torch.einsum("abhw,bi->aihw", core, b).flatten(1)


# ---- weights that are rows of one in the original network ----


def split_rows(joined: Layer, rows: Rows) -> list[Layer]:
    """The layers of a joined weight's parts, exactly: each has all of the columns' factors. Raises LoraError.

    The rows of a Kronecker product are those of w1, each as often as w2 has rows: a part that ends within one has no such layer.
    """
    if joined.weight_shape[0] != rows[-1][1]:
        raise LoraError(f"it changes {joined.weight_shape[0]} rows, and the {len(rows)} modules that are one here have {rows[-1][1]}.")
    return [_rows(joined, range(start, end)) for start, end in rows]


def swapped(layer: Layer) -> Layer:
    """The same change of a weight whose two halves of rows are in the other order. Raises LoraError."""
    half, odd = divmod(layer.weight_shape[0], 2)
    if odd:
        raise LoraError(f"it changes {layer.weight_shape[0]} rows, which have no halves.")
    return _rows(layer, [*range(half, 2 * half), *range(half)])


def _rows(layer: Layer, rows: Sequence[int]) -> Layer:
    rows = torch.tensor(rows)
    if isinstance(layer, LoraLayer):
        if layer.is_by_input:
            raise LoraError("DoRA by inputs takes norms over all rows of a weight, which are several modules here.")
        return replace(layer, up=layer.up[rows], magnitude=None if layer.magnitude is None else layer.magnitude[rows])
    if isinstance(layer, LohaLayer):
        return replace(layer, w1_a=layer.w1_a[rows], w2_a=layer.w2_a[rows])
    name = "w1" if layer.w1 is not None else "w1_a"
    one = getattr(layer, name)
    height = layer.weight_shape[0] // one.shape[0]
    chosen = rows[::height] // height
    if not torch.equal((chosen[:, None] * height + torch.arange(height)).flatten(), rows):
        raise LoraError(f"a LoKr of blocks of {height} rows cannot be divided into the modules that are one here.")
    return replace(layer, **{name: one[chosen]})


def _magnitude(sides: Mapping[str, Tensor], down: Tensor, up: Tensor) -> Tensor:
    """(out,) of a dora_scale (out, 1[, 1, 1]); (1, in) of one (1, in[, 1, 1])."""
    if "magnitude" in sides:
        return sides["magnitude"].flatten()
    scale = sides["dora_scale"]
    by_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() == down.shape[1] and (len(up) != 1 or scale.numel() != 1)
    return scale.view(1, -1) if by_input else scale.flatten()


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
                if layer.is_by_input and format == "diffusers":
                    raise LoraError(f"{name} is DoRA by inputs, as OneTrainer has it, which the format diffusers cannot hold; write kohya.")
                if format == "diffusers":
                    tensors[module + ".lora_magnitude_vector"] = value.float().view(1, -1, 1, 1) if convolved else value.float()
                else:
                    shape = (1, -1) if layer.is_by_input else (-1, 1)
                    tensors[module + ".dora_scale"] = value.float().view(*shape, *[1] * (2 if convolved else 0))
            else:
                tensors[module + (prefix + part if prefix else ends[part])] = value.to(dtype).contiguous()
        if format == "kohya":
            tensors[module + ".alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors
