"""How far two files of one LoRA differ in what the base draws: the denoiser's outputs on the embedded base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from charforgex.errors import LoraError

if TYPE_CHECKING:
    from torch import Tensor

    from charforgex.families.bases import Base

EMBEDDED = "charworld"
PROMPTS = ("a girl with red hair", "a boy in a blue shirt, smiling", "a person in a park, from the side", "")
TIMES = (0.9, 0.6, 0.3)
SIDE = 64  # pixels


def check_base(base: Base) -> None:
    """Raises LoraError for a base whose weights are not in the package: published bases are too large, and others are of other shapes."""
    if not base.name.startswith(EMBEDDED):
        raise LoraError(
            f"functional=true compares outputs of the embedded base, and this LoRA is for {base.name}, whose layers have other sizes; "
            "leave it out, or look at pictures: charforgex generate."
        )


def difference(base: Base, before: Path, after: Path) -> dict[str, float]:
    """`relative_error`s of the outputs over prompts and times, against two things.

    `output_error`: against the outputs with the LoRA as it was. `effect_error`: against what that LoRA does to the outputs; 1 is a LoRA
    that is as far off as none at all.
    """
    import torch

    from charforgex.draws import torch_generator
    from charforgex.lora.formats import open_lora
    from charforgex.lora.inject import load_adapter, set_scales
    from charforgex.types import Crop

    check_base(base)
    family = base.spelling
    parts = family.load(EMBEDDED)
    for name, path in {"before": before, "after": after}.items():
        with open_lora(path, base.names) as file:
            load_adapter(parts, file.load(), name)
    grid = SIDE // family.latent_stride(parts)
    channels = parts.denoiser.config.in_channels // family.channels_per_latent
    noisy = torch.randn(len(PROMPTS), channels, grid, grid, generator=torch_generator("functional error"))
    crop = Crop.whole(len(PROMPTS), SIDE, SIDE)

    @torch.no_grad()
    def outputs(**scales: float) -> list[torch.Tensor]:
        set_scales(parts, scales)
        text = family.encode_text(parts, PROMPTS)
        return [family.denoise(parts.denoiser, noisy, torch.full((len(PROMPTS),), t), text, crop) for t in TIMES]

    sides = outputs(before=0, after=0), outputs(before=1, after=0), outputs(before=0, after=1)
    changed, output, effect = (
        sum(energy(pick(*side)) for side in zip(*sides, strict=True))
        for pick in (lambda bare, was, now: now - was, lambda bare, was, now: was, lambda bare, was, now: was - bare)
    )
    return {"output_error": relative_error(changed, output), "effect_error": relative_error(changed, effect)}


def energy(outputs: Tensor) -> float:
    """Sum of squares, in float64."""
    return outputs.double().square().sum().item()


def relative_error(missed: float, whole: float) -> float:
    """sqrt(sum |found - wanted|^2 / sum |what counts|^2), of two energies: 0 is no difference, 1 as much as there is. 0 where there is
    nothing."""
    return math.sqrt(missed / whole) if whole else 0.0
