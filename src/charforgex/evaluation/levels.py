"""How well a denoiser predicts held-out pictures, by noise level: what training curves and comparisons of checkpoints mean by validation.

Plain mean squared error of the prediction, whatever a training minimised, so that runs with other weightings, shifts or losses can be held
against each other. Every picture has noise of its own at each level, a function of the picture and the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.types import Batch, Crop

if TYPE_CHECKING:
    from charforgex.evaluation.gallery import Gallery
    from charforgex.families.base import Family
    from charforgex.families.process import Process
    from charforgex.types import Components

LEVELS = 8


def times(process: Process, levels: int = LEVELS) -> Tensor:
    """(levels,) in [0, 1]: the middle of equal shares, at the nearest times that the process knows."""
    return process.snap((torch.arange(levels) + 0.5) / levels)


@torch.no_grad()
def predictions(
    family: Family, denoiser: torch.nn.Module, process: Process, batch: Batch, levels: int = LEVELS
) -> Iterator[tuple[Tensor, Tensor]]:
    """At each level what is predicted and what would be right, float32 of the latents' shape. `batch.keys` name the pictures; its masks
    and weights take no part. Autocast is the caller's."""
    device = batch.mean_BChw.device

    def drawn(purpose: str, *more: object) -> Tensor:
        shape = batch.mean_BChw.shape[1:]
        return torch.stack([torch.randn(shape, generator=torch_generator("level", purpose, key, *more)) for key in batch.keys]).to(device)

    clean = batch.mean_BChw + batch.std_BChw * drawn("posterior")
    for level, t in enumerate(times(process, levels)):
        noise, t_B = drawn("noise", level), t.expand(len(batch)).to(device)
        noisy = process.add_noise(clean, noise, t_B)
        found = family.denoise(denoiser, noisy, t_B, batch.text, batch.crop)
        yield found.float(), process.target(clean, noise, t_B).float()


@torch.no_grad()
def losses(family: Family, denoiser: torch.nn.Module, process: Process, batch: Batch, levels: int = LEVELS) -> Tensor:
    """float32 (levels, B): the mean squares of `predictions`' errors."""
    found = predictions(family, denoiser, process, batch, levels)
    return torch.stack([(prediction - target).square().flatten(1).mean(1).cpu() for prediction, target in found])


@torch.no_grad()
def batches(family: Family, parts: Components, gallery: Gallery, side: int, size: int = 8, unsaid: str = "") -> Iterator[Batch]:
    """A gallery's pictures with their prompts, `unsaid` for those without, cut to squares of `side` pixels and encoded. `parts` hold VAE
    and text encoders."""
    from PIL import Image, ImageOps

    from charforgex.embedders import to_pixels

    for shots, pictures in gallery.batches(size):
        cut = [ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS) for picture in pictures]
        pixels = to_pixels(cut, side).to(next(parts["vae"].parameters()).device)
        mean, std = family.encode_pixels(parts, pixels)
        text = family.encode_text(parts, [shot.prompt or unsaid for shot in shots])
        crop = Crop.whole(len(shots), side, side).to(mean.device)
        yield Batch(mean, std, text, crop, keys=tuple(shot.key or shot.name for shot in shots))
