"""Families by name. Each is imported only when it is asked for."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from charforgex.families.base import Family
    from charforgex.lora.names import Spelling

FAMILIES = {
    "sdxl": "charforgex.families.sdxl:Sdxl",
    "flux": "charforgex.families.flux:Flux",
    "sd3": "charforgex.families.sd3:Sd3",
    "animatediff": "charforgex.families.animatediff:AnimateDiff",
    "animatediff_sdxl": "charforgex.families.animatediff_sdxl:AnimateDiffSdxl",
}

SPELLED = {"sd15": "charforgex.families.spelled:Sd15"}  # their LoRA files alone


def check(name: str) -> None:
    """Raises ConfigError for a name that is none."""
    if name in SPELLED:
        raise ConfigError(f"family.name={name}: its LoRA files are understood, and no base of it is run; there are {', '.join(FAMILIES)}.")
    if name not in FAMILIES:
        near = get_close_matches(str(name), FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FAMILIES)}."
        raise ConfigError(f"family.name={name} is unknown; {hint}")


def get(name: str) -> Family:
    """The family of that name. Raises ConfigError for any other name."""
    check(name)
    module, _, cls = FAMILIES[name].partition(":")
    return getattr(import_module(module), cls)()


def refuse_clips(family: Family, doing: str, way_out: str) -> None:
    """Raises ConfigError where a family of clips is asked for what is done with pictures: "training on a character"."""
    if family.is_video:
        raise ConfigError(f"family={family.name} makes clips, and {doing} is for families that make pictures; {way_out}")


def spelling(name: str) -> Spelling:
    """What a family tells about its LoRA files, also of those that nothing else is known of."""
    module, _, cls = (FAMILIES | SPELLED)[name].partition(":")
    return getattr(import_module(module), cls)()
