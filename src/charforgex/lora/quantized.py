"""Factors stored in 8 or 4 bits with scales as tensors beside them. Who opens such a file gets factors, as of any other file.

fp8    float8 e4m3, a float32 scale for each direction: a row of `down`, a column of `up`
int8   symmetric, -127 to 127, the same scales
nf4    blocks of 64 values along the directions, a float32 scale for each block: its largest magnitude. Codes are the quantiles of a
       normal distribution (Dettmers et al. 2023, QLoRA, appendix E), two in a byte, the first in the upper half

`<key>` holds the codes, `<key>.scale` the scales, and the header's `charforgex.quantized` says the kind, the dtype in which the factors
were, and for nf4 their shapes, which the codes have lost. Of 2 x n factors the direction is the shorter side of the flattened matrix.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from charforgex.errors import LoraError

Kind = Literal["fp8", "int8", "nf4"]
MARK, SCALE = "charforgex.quantized", ".scale"
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK = 64
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


class Codes(NamedTuple):
    codes: Tensor
    scale: Tensor


def quantize(factor: Tensor, kind: Kind) -> Codes:
    """A finite factor of two or more dimensions. A direction, or block, of zeros stays one."""
    rows = _by_direction(factor.float())
    if kind == "nf4":
        blocks = torch.nn.functional.pad(rows.flatten(), (0, -rows.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(dim=1)
        shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(shares, (NF4[1:] + NF4[:-1]) / 2).flatten()[: rows.numel() + rows.numel() % 2].to(torch.uint8)
        return Codes(codes[::2] << 4 | codes[1::2], scale)
    scale = (rows.abs().amax(dim=1) / LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny)
    shares = (rows / scale[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    codes = shares.round().to(torch.int8) if kind == "int8" else shares.to(torch.float8_e4m3fn)
    return Codes(_from_directions(codes, factor.shape).contiguous(), scale)


def dequantize(stored: Codes, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """The factor of that shape, in float32. Raises LoraError for codes or scales that are none of it."""
    size = math.prod(shape)
    directions = min(shape[0], math.prod(shape[1:]))
    scales = -(-size // BLOCK) if kind == "nf4" else directions
    fits = stored.codes.numel() == -(-size // 2) if kind == "nf4" else tuple(stored.codes.shape) == shape
    if not fits or stored.codes.dtype != STORED[kind] or tuple(stored.scale.shape) != (scales,) or stored.scale.dtype != torch.float32:
        raise LoraError(
            f"codes {stored.codes.dtype} {tuple(stored.codes.shape)} with scales {stored.scale.dtype} {tuple(stored.scale.shape)} "
            f"are no {kind} of a factor {tuple(shape)}."
        )
    if kind == "nf4":
        codes = torch.stack([stored.codes >> 4, stored.codes & 15], dim=1).flatten()[:size]
        rows = NF4[codes.int()] * stored.scale.repeat_interleave(BLOCK)[:size]
        return _from_directions(rows.view(directions, -1), shape).contiguous()
    rows = _by_direction(stored.codes.float()) * stored.scale[:, None]
    return _from_directions(rows, shape).contiguous()


def _by_direction(factor: Tensor) -> Tensor:
    """(shorter side, longer side) of the flattened matrix."""
    matrix = factor.flatten(1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _from_directions(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (rows if shape[0] <= math.prod(shape[1:]) else rows.T).reshape(shape)


def mark(kind: Kind, dtype: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """What a file's header says of its quantised factors; `shapes` by key."""
    told = {"kind": kind, "dtype": dtype} | ({"shapes": {key: list(shape) for key, shape in shapes.items()}} if kind == "nf4" else {})
    return {MARK: json.dumps(told, sort_keys=True)}


class Quantized:
    """An open safetensors file (`safetensors.safe_open`) as if its factors were stored whole. Raises LoraError for a mark that lies."""

    def __init__(self, file: Any):
        self.file = file
        keys = set(file.keys())
        self.codes = {key for key in keys if key + SCALE in keys}
        self.others = [key for key in file.keys() if not (key.endswith(SCALE) and key.removesuffix(SCALE) in keys)]  # noqa: SIM118
        try:
            told = json.loads(file.metadata()[MARK])
            self.kind, self.dtype = told["kind"], DTYPES[told["dtype"]]
            shapes = {key: tuple(map(int, shape)) for key, shape in told.get("shapes", {}).items()}
            if self.kind not in STORED or (self.kind == "nf4" and shapes.keys() != self.codes) or any(len(s) < 2 for s in shapes.values()):
                raise ValueError(f"it says {self.kind}, and names {len(shapes)} of {len(self.codes)} quantised factors")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise LoraError(f"Its header's {MARK} cannot be understood: {error}.") from error
        self.shapes = shapes if self.kind == "nf4" else {key: tuple(file.get_slice(key).get_shape()) for key in self.codes}
        for key, shape in self.shapes.items():
            stored = math.prod(file.get_slice(key).get_shape())
            if min(shape, default=0) < 1 or len(shape) < 2 or stored != (-(-math.prod(shape) // 2) if self.kind == "nf4" else stored):
                raise LoraError(f"{key} holds {stored} codes, which are no {self.kind} of a factor {shape}.")

    def keys(self) -> list[str]:
        return self.others

    def metadata(self) -> dict[str, str]:
        """Without the mark: what is read is not quantised any more."""
        return {key: value for key, value in self.file.metadata().items() if key != MARK}

    def get_slice(self, key: str) -> Any:
        return _Shape(self.shapes[key]) if key in self.codes else self.file.get_slice(key)

    def get_tensor(self, key: str) -> Tensor:
        if key not in self.codes:
            return self.file.get_tensor(key)
        stored = Codes(self.file.get_tensor(key), self.file.get_tensor(key + SCALE))
        try:
            return dequantize(stored, self.kind, self.shapes[key]).to(self.dtype)
        except LoraError as error:
            raise LoraError(f"{key}: {error}") from error


class _Shape(NamedTuple):
    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def whole(file: Any) -> Any:
    """An open safetensors file with its factors whole, whether it is quantised or not."""
    return Quantized(file) if MARK in (file.metadata() or {}) else file
