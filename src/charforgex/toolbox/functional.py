"""How far two files of one LoRA differ in what the base draws: the denoiser's outputs on the embedded base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from charforgex.errors import LoraError

if TYPE_CHECKING:
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
    """Means over prompts and times of the norm of the outputs' difference, as shares of two things.

    `output_error`: of the outputs with the LoRA as it was. `effect_error`: of what that LoRA does to the outputs; 1 is a LoRA that is
    as far off as none at all.
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
    norms = torch.tensor([[_norms(now - was), _norms(was), _norms(was - bare)] for bare, was, now in zip(*sides, strict=True)])
    changed, output, effect = norms.double().mean(dim=(0, 2)).tolist()
    return {"output_error": changed / output, "effect_error": changed / effect if effect else 0.0}


def _norms(outputs):
    return outputs.flatten(1).norm(dim=1).tolist()
