"""THE table of families. A new family is one more row; `test_contract.py` then holds it to every promise of the seam."""

from __future__ import annotations

from dataclasses import dataclass

from charforgex.families import layouts
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.animatediff_sdxl import AnimateDiffSdxl
from charforgex.families.base import Family
from charforgex.families.flux import Flux
from charforgex.families.sd3 import Sd3
from charforgex.families.sdxl import Sdxl
from charforgex.lora import formats


@dataclass(frozen=True)
class Row:
    """Numbers of `family.tiny()`, written down by hand from its architecture."""

    family: Family
    tokens_LD: tuple[int, int]
    pooled_D: int | None
    latent_Chw: tuple[int, int, int]  # of a picture of `size`
    size: tuple[int, int] = (48, 64)  # pixels, not square, so that a swapped side shows
    frames: tuple[int, ...] = ()  # of a clip, for families of video: one number
    formats: tuple[str, ...] = tuple(formats.FORMATS)  # LoRA formats that hold any of its layers
    betas: tuple[str, float] = ("scaled_linear", 0.012)  # of those that have betas: how they rise, and the last one
    single_file: str | None = None  # what its own single files are, if not a whole base of the family

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of one picture or clip."""
        return (3, *self.frames, *self.size)

    @property
    def latents(self) -> tuple[int, ...]:
        return (self.latent_Chw[0], *self.frames, *self.latent_Chw[1:])

    def __str__(self) -> str:
        return self.family.name


ROWS = [
    Row(Sdxl(), tokens_LD=(77, 64), pooled_D=32, latent_Chw=(4, 6, 8)),
    Row(Flux(), tokens_LD=(24, 32), pooled_D=32, latent_Chw=(4, 6, 8)),
    Row(Sd3(), tokens_LD=(77 + 24, 64), pooled_D=64, latent_Chw=(4, 6, 8)),
    Row(
        AnimateDiff(), tokens_LD=(77, 32), pooled_D=None, latent_Chw=(4, 6, 8), frames=(3,), formats=("diffusers",),
        betas=("linear", 0.012), single_file=layouts.MOTION,
    ),
    Row(
        AnimateDiffSdxl(), tokens_LD=(77, 64), pooled_D=32, latent_Chw=(4, 4, 8), size=(32, 64), frames=(3,), formats=("diffusers",),
        betas=("scaled_linear", 0.020), single_file=layouts.MOTION_SDXL,
    ),
]  # fmt: skip

PICTURES = [row for row in ROWS if not row.family.is_video]  # for what is done with pictures alone
