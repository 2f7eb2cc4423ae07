"""A frozen base whose linear layers are held in 8 or 4 bits: half, or a quarter and a bit, of bfloat16's memory.

int8   symmetric, -127 to 127, a float32 scale for each row of the weight
fp8    float8 e4m3, the same scales
nf4    blocks of 64 values along the rows, a float32 scale for each: its largest magnitude. Codes are quantiles of a normal distribution
       (Dettmers et al. 2023, QLoRA), two in a byte; 4.5 bits a value in all

Each layer unpacks its own weight when it is used, to the base's dtype, and computes in that: less memory, not less time. Only linear layers
inside the family's blocks are packed, which hold nearly all of a transformer and the larger part of a UNet; what comes before and
after them, norms and convolutions stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from charforgex.errors import ConfigError, ModelError
from charforgex.families.layouts import GGUF
from charforgex.families.packed import PackedLinear
from charforgex.families.single_file import empty
from charforgex.lora.quantized import BLOCK, LARGEST, NF4, STORED, Kind, quantize
from charforgex.runs import replace_atomic

if TYPE_CHECKING:
    from charforgex.families.base import Family

VERSION = 1  # of what is kept in files; grows when other numbers come out
CHUNK = 1 << 17  # blocks of nf4 that are unpacked at once: 32 MiB of float32


@dataclass(frozen=True)
class Packing:
    """How a base's linear layers are held, and the folder in which the packed base is kept for the next time; None keeps none."""

    kind: Kind
    folder: Path | None = None


class QuantizedLinear(PackedLinear):
    """Codes (out, in), or for nf4 (blocks, 32), with float32 scales (out,) or (blocks,)."""

    stored = ("codes", "scale")

    def __init__(self, codes: Tensor, scale: Tensor, kind: Kind, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias, dtype)
        self.kind = kind
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def unpack(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind != "nf4":
            return codes.to(dtype).mul_(scale[:, None])  # exact codes, then one rounding
        pairs = _pairs(codes.device)
        values = torch.empty(len(codes), BLOCK, dtype=dtype, device=codes.device)
        for first in range(0, len(codes), CHUNK):
            some = slice(first, first + CHUNK)
            values[some] = pairs[codes[some].int()].view(-1, BLOCK).mul_(scale[some, None])
        return values.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features)


def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values that a byte stands for, the first in its upper half."""
    table = NF4.to(device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


def pack(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight (out, in). Raises ModelError for one that is not finite."""
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        raise ModelError("it holds values that are not finite")
    if kind == "nf4":
        padded = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK))
        found = quantize(padded[None], kind)
        return found.codes.view(-1, BLOCK // 2), found.scale
    scale = (values.abs().amax(dim=1) / LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny)
    shares = (values / scale[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    return shares.round().to(torch.int8) if kind == "int8" else shares.to(STORED[kind]), scale


def blank(out_features: int, in_features: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight's size, for counting: their values are nothing's."""
    blocks = -(-out_features * in_features // BLOCK)
    codes = (blocks, BLOCK // 2) if kind == "nf4" else (out_features, in_features)
    return torch.empty(codes, dtype=STORED[kind]), torch.empty(blocks if kind == "nf4" else out_features)


def check_packing(kind: Kind | None, device: str) -> None:
    """Raises ConfigError for a kind that the device has no numbers for."""
    if kind == "fp8" and device == "mps":
        raise ConfigError("trainer.quantize=fp8: mps has no numbers of 8 bits with a point; use int8 or nf4.")


def packed_by(network: nn.Module) -> str | None:
    """How a network's linear layers are packed: a kind, None if they are not."""
    return next((module.kind for module in network.modules() if isinstance(module, QuantizedLinear)), None)


def pack_network(family: Family, network: nn.Module, kind: Kind, device: str) -> None:
    """Packs the linear layers of the network's blocks, one by one, on `device`, where the packed ones stay."""
    for path, layer in packable(family, network).items():
        try:
            codes, scale = pack(layer.weight.to(device), kind)
        except ModelError as error:
            raise ModelError(f"The weight of {path} cannot be packed as {kind}: {error}.") from error
        _put(network, path, layer, codes, scale, kind, layer.weight.dtype)


def load_packed(family: Family, base: Any, packing: Packing, dtype: torch.dtype, device: str, digest: str) -> nn.Module:
    """The denoiser of `base` (`loading.Base`), packed: from `packing.folder` if it was packed before, else packed now and kept there.

    `digest` identifies the denoiser's weights. Raises ModelError for a base whose weights are packed already, as GGUF's are.
    """
    name = family.denoiser_name
    if packed := [file for file in base.files if file.suffix == GGUF]:
        raise ModelError(f"{packed[0]} is packed already; leave trainer.quantize null, or take a source of whole weights.")
    key = hashlib.sha256(f"{VERSION} {family.name} {digest} {packing.kind} {dtype}".encode()).hexdigest()[:32]
    file = packing.folder / "quantized" / f"{key}.safetensors" if packing.folder else None
    if file is not None and file.exists():
        return _read(family, base.config(name), packing.kind, dtype, file, device)
    network = base.givers[name].load(name, dtype)
    pack_network(family, network, packing.kind, device)
    if file is not None:
        from safetensors.torch import save_file

        with replace_atomic(file) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, temporary)
    return network


def _read(family: Family, config: Mapping[str, Any], kind: Kind, dtype: torch.dtype, file: Path, device: str) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = empty(family, family.denoiser_name, config)
    try:
        state = load_file(file, device=device)
        for path, layer in packable(family, network).items():
            _put(network, path, layer, state[f"{path}.codes"], state[f"{path}.scale"], kind, dtype)
        network.load_state_dict(state, strict=True, assign=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(f"{file} is not what was kept there ({error}); delete it, and the base is packed again.") from error
    return network


def packable(family: Family, network: nn.Module) -> dict[str, nn.Linear]:
    """By path, the layers that packing packs."""
    inside = {module for block in family.blocks(network) for module in block.modules()}
    return {path: module for path, module in network.named_modules() if type(module) is nn.Linear and module in inside}


def _put(network: nn.Module, path: str, layer: nn.Linear, codes: Tensor, scale: Tensor, kind: Kind, dtype: torch.dtype) -> None:
    packed = QuantizedLinear(codes, scale, kind, layer.in_features, layer.out_features, layer.bias is not None, dtype)
    packed.bias = layer.bias
    network.set_submodule(path, packed)
