"""Transformers in GGUF files: quantised weights stay packed in memory, and each layer unpacks its own when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from charforgex.errors import ModelError
from charforgex.families.layouts import Header
from charforgex.families.originals import Original
from charforgex.families.packed import PackedLinear

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

PLAIN = ("F32", "F16")


def _open(path: Path) -> GGUFReader:
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f'{path} needs the package gguf: pip install "charforgex[gguf]"') from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is not a whole .gguf file ({error}); download or copy it again.") from error


def read_gguf_header(path: Path) -> Header:
    tensors = _open(path).tensors
    return Header(
        path,
        {tensor.name: tuple(int(side) for side in reversed(tensor.shape)) for tensor in tensors},  # it counts from the fastest side
        {tensor.name: tensor.tensor_type.name for tensor in tensors},
        {tensor.name: (tensor.data_offset, tensor.data_offset + tensor.n_bytes) for tensor in tensors},
        {},
    )


def unpack(packed: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Rows of bytes (out, bytes) to rows of numbers (out, in)."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    return dequantize_gguf_tensor(GGUFParameter(packed, quant_type=kind))


class GgufLinear(PackedLinear):
    stored = ("packed",)

    def __init__(self, packed: Tensor, kind: GGMLQuantizationType, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias, dtype)
        self.kind = kind
        self.register_buffer("packed", packed)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        return unpack(packed, self.kind).to(dtype)


def read_tensors(path: Path, originals: Mapping[str, Original], dtype: torch.dtype, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name. Linear layers of `network` whose weight is quantised become packed ones, which have `packed` for `weight`."""
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    stored = {tensor.name: tensor for tensor in _open(path).tensors}
    for key, original in originals.items():
        tensor, kind = stored[original.key], stored[original.key].tensor_type
        # rows are packed one by one, so that queries, keys and values come apart without unpacking
        rows = original.read(torch.from_numpy(tensor.data[original.span(len(tensor.data))].copy()))
        if kind.name in PLAIN:
            yield key, rows.to(dtype)
            continue
        if kind not in SUPPORTED_GGUF_QUANT_TYPES:
            raise ModelError(f"{path} holds {original.key} as {kind.name}, which diffusers cannot unpack; take a GGUF of Q8_0 to Q4_K.")
        place, _, leaf = key.rpartition(".")
        module = network.get_submodule(place)
        if kind.name == "BF16" or leaf != "weight" or not isinstance(module, nn.Linear):
            yield key, unpack(rows, kind).to(dtype)
            continue
        network.set_submodule(place, GgufLinear(rows, kind, module.in_features, module.out_features, module.bias is not None, dtype))
        yield f"{place}.packed", rows
