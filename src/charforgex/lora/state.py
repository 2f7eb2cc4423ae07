"""Adapters as data: factors by module path, with nothing of any file format or base model in them.

Shape legend: r rank, in/out the adapted layer's features or channels, kh kw its kernel, k = in * kh * kw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from charforgex.errors import LoraError

SHOWN = 5  # names in an error message


def some(names) -> str:
    """The first few of many names, and how many there are: for error messages. What a terminal would obey is escaped."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name) for name in names[:SHOWN]) + more


def shown(text: str) -> str:
    """A text from somebody's file as it can be printed: in one line of at most 200 characters."""
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def is_finite(tensor: Tensor) -> bool:
    """Several times as fast as isfinite().all(), which makes a tensor of flags: what is not a number comes out of a search for extremes."""
    if not tensor.numel():
        return True
    extremes = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return math.isfinite(extremes.min) and math.isfinite(extremes.max)


class Layer:
    """What one adapted module is changed by. A subclass's tensor fields are its factors; `alpha / rank` scales their product."""

    kind: ClassVar[str]
    alpha: float
    rank: int

    def tensors(self) -> dict[str, Tensor]:
        """Every factor by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_finite(self) -> bool:
        return all(is_finite(tensor) for tensor in self.tensors().values()) and abs(self.alpha) < float("inf")

    @property
    def is_zero(self) -> bool:
        """Whether the weight is left as it is: then one of the factors is zero."""
        return self.scale == 0 or not all(bool(tensor.any()) for tensor in self.tensors().values())

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be changed by this layer."""
        return (shape[0], math.prod(shape[1:])) == (self.weight_shape[0], math.prod(self.weight_shape[1:]))

    def change(self, weight: Tensor) -> Tensor:
        """What is added to this weight, dense, in float32."""
        return self.delta().view(weight.shape)

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        """With other factors, as rounding makes them."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def equals(self, other: Layer) -> bool:
        """Bit for bit. Alphas are compared as the float32 that files hold."""
        mine, theirs = self.tensors(), other.tensors()
        same_alpha = torch.tensor(self.alpha, dtype=torch.float32) == torch.tensor(other.alpha, dtype=torch.float32)
        same_kind = type(self) is type(other) and mine.keys() == theirs.keys()
        return same_kind and bool(same_alpha) and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@dataclass(frozen=True, eq=False)
class LoraLayer(Layer):
    """W becomes W + alpha / rank * up @ down (Hu et al. 2021). down is (r, in[, kh, kw]), up is (out, r[, 1, 1]).

    With a `magnitude` (out,) it becomes magnitude * V / |V| with V the above and |V| the norm of each of its rows (DoRA, Liu et al. 2024).
    OneTrainer and early versions of LyCORIS take the norm of all that reads one input instead, and have a `magnitude` (1, in).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self):
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or up[2:] not in ((), (1, 1)) or down[0] == 0:
            raise LoraError(f"down {down} and up {up} are no factors of one layer: (r, in[, kh, kw]) and (out, r[, 1, 1]) are.")
        if self.magnitude is not None and tuple(self.magnitude.shape) not in (up[:1], (1, down[1])):
            raise LoraError(
                f"DoRA's magnitude must have a value for each of the {up[0]} outputs, or as (1, {down[1]}) for each of the inputs; "
                f"it has the shape {tuple(self.magnitude.shape)}."
            )

    @property
    def kind(self) -> str:
        return "lora" if self.magnitude is None else "dora"

    @property
    def is_by_input(self) -> bool:
        """Whether it is DoRA of columns, which peft and diffusers do not have."""
        return self.magnitude is not None and self.magnitude.ndim == 2

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == self.weight_shape

    @property
    def is_zero(self) -> bool:
        return self.magnitude is None and super().is_zero

    def delta(self) -> Tensor:
        """alpha / rank * up @ down, dense, in float32: (out, in[, kh, kw])."""
        dense = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (dense * self.scale).view(self.weight_shape)

    def change(self, weight: Tensor) -> Tensor:
        if self.magnitude is None:
            return self.delta()
        moved = weight.float() + self.delta()
        over = [0, *range(2, moved.ndim)] if self.is_by_input else [*range(1, moved.ndim)]
        norm = torch.linalg.vector_norm(moved, dim=over, keepdim=True)
        return moved * (self.magnitude.float().view(norm.shape) / norm) - weight.float()

    def map(self, change: Callable[[Tensor], Tensor]) -> LoraLayer:
        """Magnitudes stay as they are: rounding them would move the whole weight, not just what was learnt."""
        return replace(self, down=change(self.down), up=change(self.up))


@dataclass(frozen=True, eq=False)
class LohaLayer(Layer):
    """W becomes W + alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (Hyeon-Woo et al. 2022). _a (out, r), _b (r, k)."""

    kind: ClassVar[str] = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    def __post_init__(self):
        out, rank = self.w1_a.shape if self.w1_a.ndim == 2 else (0, 0)
        inner = self.w1_b.shape[-1]
        expected = {"w1_a": (out, rank), "w1_b": (rank, inner), "w2_a": (out, rank), "w2_b": (rank, inner)}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if rank == 0 or shapes != expected:
            raise LoraError(f"{shapes} are no factors of one LoHa layer: (out, r), (r, k), (out, r), (r, k) are.")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.w1_a.shape[0], self.w1_b.shape[1])

    def delta(self) -> Tensor:
        """(out, k) in float32."""
        a, b, c, d = (tensor.float() for tensor in self.tensors().values())
        return self.scale * (a @ b) * (c @ d)


@dataclass(frozen=True, eq=False)
class LokrLayer(Layer):
    """W becomes W + scale * w1 (x) w2, Kronecker's product (Yeh et al. 2024): w1 (o1, i1), w2 (o2, i2[, kh, kw]), o1 o2 = out, i1 i2 = in.

    Either may itself be a product _a @ _b of rank r; w2's is then (o2, i2 * kh * kw). The scale is alpha / r, or 1 if neither is.
    """

    kind: ClassVar[str] = "lokr"
    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None

    def __post_init__(self):
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        for side, dimensions in (("w1", (2,)), ("w2", (2, 4))):
            whole = side in shapes and len(shapes[side]) in dimensions
            a, b = shapes.get(f"{side}_a", ()), shapes.get(f"{side}_b", ())
            product = len(a) == len(b) == 2 and a[1] == b[0] > 0
            if whole == product or (whole and (a or b)):
                raise LoraError(f"{shapes} are no factors of one LoKr layer: w1 and w2, each whole or as _a (o, r) and _b (r, i), are.")

    @property
    def rank(self) -> int:
        """1 if no side is a product: LyCORIS and ComfyUI do not scale such a layer, so its alpha is 1."""
        return next((tensor.shape[0] for tensor in (self.w1_b, self.w2_b) if tensor is not None), 1)

    @property
    def scale(self) -> float:
        return 1.0 if self.w1 is not None and self.w2 is not None else self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, int]:
        sides = [getattr(self, side) if getattr(self, side) is not None else getattr(self, side + "_b") for side in ("w1", "w2")]
        outs = [(getattr(self, side) if getattr(self, side) is not None else getattr(self, side + "_a")).shape[0] for side in ("w1", "w2")]
        return (math.prod(outs), math.prod(math.prod(tensor.shape[1:]) for tensor in sides))

    def delta(self) -> Tensor:
        """(out, k) in float32."""
        one = self.w1 if self.w1 is not None else self.w1_a.float() @ self.w1_b.float()
        two = self.w2.flatten(1) if self.w2 is not None else self.w2_a.float() @ self.w2_b.float()
        return self.scale * torch.kron(one.float(), two.float().contiguous())


@dataclass(frozen=True, eq=False)
class Lora:
    """Layers by "<component>.<module path>": `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.

    Components have diffusers' names (`unet`, `text_encoder`, `text_encoder_2`). Paths are those of the diffusers and
    transformers modules; CLIP encoders always with `text_model.` in front, as all other tools write it, although
    transformers 5 has dropped it from one of its two classes.
    """

    layers: dict[str, Layer]
    metadata: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def components(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.layers))

    def of(self, component: str) -> dict[str, Layer]:
        """The layers of one component by module path alone."""
        start = component + "."
        return {name.removeprefix(start): layer for name, layer in self.layers.items() if name.startswith(start)}

    def kinds(self) -> list[str]:
        return sorted({layer.kind for layer in self.layers.values()})

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
            for factor in layer.tensors().values():
                digest.update(f"{name} {tuple(factor.shape)} {float(layer.alpha)!r}\0".encode())
                digest.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
