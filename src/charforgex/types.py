"""What crosses module borders, and the one convention of it.

Shape legend: B batch, P 3 colour channels, H W pixels, C latent channels, T frames, h w the latent grid, L text tokens, D width.
Pixels are in [-1, 1]. Latents are already shifted and scaled. Time t is float32 in [0, 1], 1 is pure noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn


def _map(item, change):
    """`item` (a dataclass of tensors, None and dataclasses) with every tensor changed."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    out = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            out[name] = change(value)
        elif hasattr(value, "__dataclass_fields__"):
            out[name] = _map(value, change)
    return replace(item, **out)


class Movable:
    def to(self, *args, **kwargs):
        return _map(self, lambda tensor: tensor.to(*args, **kwargs))


@dataclass(frozen=True)
class Text(Movable):
    """Encoded captions: per-token states for cross-attention, and one pooled vector for families that use it."""

    tokens_BLD: Tensor
    pooled_BD: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens_BLD)

    def __getitem__(self, index) -> Text:
        return _map(self, lambda tensor: tensor[index])

    @staticmethod
    def stack(texts: list[Text]) -> Text:
        """Texts of batch size one or more, joined along the batch."""
        pooled = None if texts[0].pooled_BD is None else torch.cat([text.pooled_BD for text in texts])
        return Text(torch.cat([text.tokens_BLD for text in texts]), pooled)


@dataclass(frozen=True)
class Crop(Movable):
    """How a picture was cut, in pixels: size of the file, top-left of the cut in the resized picture, size of the cut.

    Each is float32 (B, 2), height before width: SDXL's micro-conditioning.
    """

    original_B2: Tensor
    top_left_B2: Tensor
    target_B2: Tensor

    @staticmethod
    def whole(batch: int, height: int, width: int) -> Crop:
        """The crop of a picture that was neither cut nor resized: what generation asks for."""
        size = torch.tensor([[height, width]], dtype=torch.float32).expand(batch, 2)
        return Crop(size, torch.zeros_like(size), size)


@dataclass(frozen=True)
class Prior(Movable):
    """What prior preservation holds still: captions with the class in the trigger's place, as the trained and the base model see them."""

    text: Text
    base_text: Text
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch(Movable):
    """One training batch. Latents are a posterior's mean and standard deviation, so that every step samples afresh; those of clips are
    (B, C, T, h, w)."""

    mean_BChw: Tensor
    std_BChw: Tensor
    text: Text
    crop: Crop
    mask_B1hw: Tensor | None = None  # loss weights on the latent grid, None for even
    keys: tuple[str, ...] = ()  # the records' content hashes
    captions: tuple[str, ...] = ()  # what `text` was made of
    weight_B: Tensor | None = None  # loss weights of whole pictures, None for 1
    prior: Prior | None = None
    place: tuple[int, int] | None = None  # cut out of a larger batch: the first row there, and how many that one has

    def __len__(self) -> int:
        return len(self.mean_BChw)

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` to before `last`, which know where they came from: see `drawn`."""
        cut = _map(self, lambda tensor: tensor[first:last])
        prior = cut.prior and replace(cut.prior, captions=cut.prior.captions[first:last])
        begin, whole = self.place or (0, len(self))
        told = {"keys": self.keys[first:last], "captions": self.captions[first:last], "prior": prior}
        return replace(cut, **told, place=(begin + first, whole))

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """`draw(n)`, random numbers for a whole batch of n, for these rows: the same ones however a batch is cut."""
        first, whole = self.place or (0, len(self))
        return draw(whole)[first : first + len(self)]


@dataclass
class Components:
    """The loaded parts of a base model under diffusers' own names (`unet`, `vae`, `text_encoder_2`, `scheduler`, ...)."""

    source: str
    denoiser_name: str
    modules: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # model_index.json's plain values

    def __getitem__(self, name: str) -> Any:
        if name not in self.modules:
            raise KeyError(f"{name} of {self.source} is not loaded; loaded are {', '.join(self.modules)}")
        return self.modules[name]

    def __contains__(self, name: str) -> bool:
        return self.modules.get(name) is not None

    @property
    def denoiser(self) -> nn.Module:
        return self[self.denoiser_name]

    def drop(self, *names: str) -> None:
        """Forget parts, so that their memory is free once nobody else holds them."""
        for name in names:
            self.modules.pop(name, None)

    def networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.modules.items() if isinstance(part, nn.Module)}
