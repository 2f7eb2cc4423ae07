"""Where in a network a layer stands: its component, its block and what kind of layer it is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

BLOCKS = (  # path -> block and kind
    r"((?:down|up)_blocks\.\d+\.[a-z_]+\.\d+|mid_block\.[a-z_]+\.\d+)\.(?:transformer_blocks\.\d+\.)?(.+)",  # UNets
    r"((?:single_)?transformer_blocks\.\d+)\.(.+)",  # Flux, SD3
    r"(?:text_model\.)?(encoder\.(?:layers|block)\.\d+)\.(?:layer\.\d+\.)?(.+)",  # CLIP, T5
)
OUTSIDE = "outside"  # of all blocks: the first and last layers, times and pooled texts


class Place(NamedTuple):
    """`unet`, `down_blocks.1.attentions.0` and `attn2.to_k`, for example."""

    component: str
    block: str
    kind: str


def place_of(name: str) -> Place:
    component, _, path = name.partition(".")
    for pattern in BLOCKS:
        if found := re.fullmatch(pattern, path):
            return Place(component, found[1], found[2])
    return Place(component, OUTSIDE, path)


STAGES = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks", "encoder", OUTSIDE)


def in_order(blocks: Iterable[str]) -> list[str]:
    """Names such as unet.mid_block.attentions.0 in the order in which networks run them, the denoiser's before the text encoders'."""

    def rank(block: str) -> tuple:
        component, stage, *rest = block.split(".")
        numbers = [int(part) for part in rest if part.isdecimal()]
        kind = next((part for part in rest if not part.isdecimal()), "")
        # of a UNet's block: its down- and upsamplers come last, and the n-th resnet before the n-th attention
        behind = kind.endswith("samplers")
        place = (numbers[:-1], behind, numbers[-1:]) if kind else (numbers, behind, [])
        return component.startswith("text_encoder"), component, STAGES.index(stage), *place, kind != "resnets"

    return sorted(blocks, key=rank)
