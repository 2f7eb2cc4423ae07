"""Adapters as data: pairs of low-rank factors by module path, with nothing of any file format or base model in them.

Shape legend: r rank, in/out the adapted layer's features or channels, kh kw its kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from charforgex.errors import LoraError

SHOWN = 5  # names in an error message


def some(names) -> str:
    """The first few of many names, and how many there are: for error messages."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """W becomes W + alpha / rank * up @ down (Hu et al. 2021). down is (r, in[, kh, kw]), up is (out, r[, 1, 1])."""

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self):
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or up[2:] not in ((), (1, 1)) or down[0] == 0:
            raise LoraError(f"down {down} and up {up} are no factors of one layer: (r, in[, kh, kw]) and (out, r[, 1, 1]) are.")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def is_finite(self) -> bool:
        return bool(self.down.isfinite().all() and self.up.isfinite().all()) and abs(self.alpha) < float("inf")

    @property
    def is_zero(self) -> bool:
        return self.alpha == 0 or not bool(self.down.any()) or not bool(self.up.any())

    def delta(self) -> Tensor:
        """What is added to the weight, dense, in float32: (out, in[, kh, kw])."""
        dense = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (dense * self.scale).view(self.weight_shape)

    def map(self, change: Callable[[Tensor], Tensor]) -> LoraLayer:
        return replace(self, down=change(self.down), up=change(self.up))

    def equals(self, other: LoraLayer) -> bool:
        """Bit for bit. Alphas are compared as the float32 that files hold."""
        same_alpha = torch.tensor(self.alpha, dtype=torch.float32) == torch.tensor(other.alpha, dtype=torch.float32)
        return bool(same_alpha) and torch.equal(self.down, other.down) and torch.equal(self.up, other.up)


@dataclass(frozen=True, eq=False)
class Lora:
    """Layers by "<component>.<module path>": `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.

    Components have diffusers' names (`unet`, `text_encoder`, `text_encoder_2`). Paths are those of the diffusers and
    transformers modules; CLIP encoders always with `text_model.` in front, as all other tools write it, although
    transformers 5 has dropped it from one of its two classes.
    """

    layers: dict[str, LoraLayer]
    metadata: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def components(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.layers))

    def of(self, component: str) -> dict[str, LoraLayer]:
        """The layers of one component by module path alone."""
        start = component + "."
        return {name.removeprefix(start): layer for name, layer in self.layers.items() if name.startswith(start)}

    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer in self.layers.values()})

    def alphas(self) -> list[float]:
        return sorted({layer.alpha for layer in self.layers.values()})

    def zero_layers(self) -> list[str]:
        """Layers that change nothing. A few may be; all of them is an error in `check`."""
        return [name for name, layer in self.layers.items() if layer.is_zero]

    def check(self) -> None:
        """Raises LoraError for an adapter without layers, with a value that is not finite, or that changes nothing at all."""
        if not self.layers:
            raise LoraError("The adapter has no layers.")
        broken = [name for name, layer in self.layers.items() if not layer.is_finite]
        if broken:
            raise LoraError(f"{len(broken)} of {len(self)} layers hold values that are not finite: {some(broken)}.")
        if len(self.zero_layers()) == len(self):
            raise LoraError(f"All {len(self)} layers are zero, so the adapter would change nothing: {some(self.layers)}.")

    def rounded(self, dtype: torch.dtype) -> Lora:
        """The values that a file of `dtype` can hold, in float32."""
        return replace(self, layers={name: layer.map(lambda x: x.to(dtype).float()) for name, layer in self.layers.items()})

    def sha256(self) -> str:
        """Hash of names, shapes, alphas and float32 values: equal adapters have equal hashes, whatever file they came from."""
        digest = hashlib.sha256()
        for name, layer in sorted(self.layers.items()):
            for factor in (layer.down, layer.up):
                digest.update(f"{name} {tuple(factor.shape)} {float(layer.alpha)!r}\0".encode())
                digest.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
