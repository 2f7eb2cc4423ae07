"""Which layers of a file count, and how much: presets, components, patterns, and gradients over depth become one weight per file and layer.

A word that chooses layers is one of three:

identity, style, composition    a preset of the family, of its denoiser's blocks alone: PRESETS says which, and who found it out
unet, text_encoder, ...         a component
up_blocks.0.*, to_q, re:...     a pattern, as in lora/targets.py; one of the whole path may leave out the component in front

Depth is the place of a layer's block among the numbered blocks of its component, in the order in which they are computed: 0 is the first,
1 the last. What comes before the blocks has 0, what comes after them 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from charforgex.errors import LoraError
from charforgex.lora.state import some
from charforgex.lora.targets import REGEX, check_patterns, fits
from charforgex.toolbox.places import OUTSIDE, place_of

STAGES = ("down_blocks", "transformer_blocks", "encoder", "mid_block", "up_blocks", "single_transformer_blocks")  # as they are computed
PARTS = ("resnets", "attentions", "motion_modules")  # of a UNet's stage, in turns; others come last
LAST = ("conv_out", "norm_out", "proj_out", "text_projection")  # all others without a block come before the first one


@dataclass(frozen=True)
class Preset:
    """Patterns, or a part of the denoiser's depth from `span[0]` to before `span[1]`. `source`: who found it out, or that nobody has."""

    source: str
    patterns: tuple[str, ...] = ()
    span: tuple[float, float] | None = None


B_LORA = "B-LoRA (Frenkel et al. 2024): of two blocks that are trained together, this one learns {}"
THIRD = "a rule of thumb, tested by nobody: the {} third of the blocks, as pictures form from coarse to fine"
THIRDS = {
    "composition": Preset(THIRD.format("first"), span=(0, 1 / 3)),
    "identity": Preset(THIRD.format("middle"), span=(1 / 3, 2 / 3)),
    "style": Preset(THIRD.format("last"), span=(2 / 3, 2)),
}
PRESETS: dict[str, dict[str, Preset]] = {
    "sdxl": {
        "identity": Preset(B_LORA.format("content"), ("unet.up_blocks.0.attentions.0.*",)),
        "style": Preset(B_LORA.format("style") + "; InstantStyle (Wang et al. 2024) found the same", ("unet.up_blocks.0.attentions.1.*",)),
        "composition": Preset("InstantStyle (Wang et al. 2024): this block carries the layout", ("unet.down_blocks.2.attentions.1.*",)),
    },
    "flux": THIRDS,
    "sd3": THIRDS,
}


def block_of(name: str) -> str:
    """The block that a layer lies in: `unet.up_blocks.0.attentions.1`, `transformer.single_transformer_blocks.7`; else the module below the
    component: `unet.conv_in`."""
    place = place_of(name)
    return f"{place.component}.{place.kind.partition('.')[0] if place.block == OUTSIDE else place.block}"


def _order(block: str) -> tuple:
    """Sorts blocks as they are computed: a stage's resnets and attentions take turns, its sampler comes last."""
    stage, *path = block.split(".")[1:]
    if stage not in STAGES:
        return (len(STAGES) if stage in LAST else -1, 0, 0, 0, block)
    part = next((PARTS.index(word) if word in PARTS else len(PARTS) for word in path if not word.isdigit()), 0)
    numbers = [int(word) for word in path if word.isdigit()]
    first, last = (numbers[0], numbers[1]) if len(numbers) == 2 else (0, numbers[0])
    return (STAGES.index(stage), first, int(part == len(PARTS)), last, part, block)


def is_numbered(block: str) -> bool:
    """Whether it is one of the blocks that a component is made of, and no module before or after them."""
    return block.split(".")[1] in STAGES


def depths(names: Sequence[str]) -> dict[str, float]:
    """The depth of each block of these layers; components as they come, their blocks in the order in which they are computed."""
    found: dict[str, float] = {}
    blocks = sorted({block_of(name) for name in names}, key=_order)
    for component in dict.fromkeys(name.partition(".")[0] for name in names):
        own = [block for block in blocks if block.partition(".")[0] == component]
        numbered = [block for block in own if is_numbered(block)]
        places = {block: index / max(1, len(numbered) - 1) for index, block in enumerate(numbered)}
        found |= {block: places.get(block, float(_order(block)[0] == len(STAGES))) for block in own}
    return found


def chosen(setting: str, word: str, names: Sequence[str], family: str, depth: Mapping[str, float], denoiser: str, file: str) -> list[str]:
    """The layers of a file that a word chooses. Raises LoraError if it chooses none, which a misspelt one does."""
    preset = PRESETS.get(family, {}).get(word)
    if preset is not None and preset.span is not None:
        low, high = preset.span
        own = [name for name in names if name.startswith(f"{denoiser}.") and is_numbered(block_of(name))]
        found = [name for name in own if low <= depth[block_of(name)] < high]
    else:
        patterns = preset.patterns if preset is not None else [word]
        check_patterns(setting, patterns)
        found = [name for name in names if any(_fits(pattern, name) for pattern in patterns)]
    if not found:
        there = some(sorted({block_of(name) for name in names}, key=lambda block: (block.partition(".")[0], _order(block))))
        told = f" ({', '.join(preset.patterns)})" if preset is not None and preset.patterns else ""
        presets = ", ".join(PRESETS.get(family, {})) or "none"
        raise LoraError(f"{setting}: {word}{told} is no layer of {file}, whose blocks are {there}; presets of {family} are {presets}.")
    return found


def _fits(pattern: str, name: str) -> bool:
    component, _, path = name.partition(".")
    if pattern == component:
        return True
    return fits(pattern, name) or ((pattern.startswith(REGEX) or "*" in pattern) and fits(pattern, path))


def factors(
    names: Sequence[str], all_names: Sequence[str], blocks: Sequence[str] | None, table: Mapping[str, float],
    gradient: tuple[float, float] | None, family: str, denoiser: str, file: str,
) -> dict[str, float]:  # fmt: skip
    """What each layer of one file is multiplied by: 0 outside of `blocks`, the last fitting number of `table`, the gradient at its depth.

    `names` are the file's layers, `all_names` the base's, of which depth is counted. Raises LoraError for a word that chooses no layer.
    """
    depth = depths(all_names)

    def layers_of(setting: str, word: str) -> list[str]:
        return chosen(setting, word, names, family, depth, denoiser, file)

    found = dict.fromkeys(names, 1.0)
    if blocks is not None:
        kept = {name for word in blocks for name in layers_of("blocks", word)}
        found = {name: float(name in kept) for name in names}
    values = dict.fromkeys(names, 1.0)
    for word, value in table.items():
        values |= dict.fromkeys(layers_of("block_weights", word), value)
    for name in names:
        found[name] *= values[name]
        if gradient is not None:
            at = depth[block_of(name)]
            found[name] *= (1 - at) * gradient[0] + at * gradient[1]
    return found


def sources(words: Sequence[str], family: str) -> dict[str, str]:
    """Of the presets among words: where they come from."""
    return {word: PRESETS[family][word].source for word in words if word in PRESETS.get(family, {})}
