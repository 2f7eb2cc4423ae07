"""Does the picture show what the prompt asks for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from charforgex.charworld.world import read_prompt

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from charforgex.charworld.judge import Judge

Array = TypeVar("Array", "Tensor", np.ndarray)


def calls(prompt: str, name: str) -> bool:
    """Whether a name stands in a prompt, as words and not as a part of one; capitals do not matter."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE) is not None


def clip_score(seen_ND: Array, read_ND: Array) -> Array:
    """CLIP score (Hessel et al. 2021) of pictures and prompts, both unit vectors, (N,): 100 max(cosine, 0), as torchmetrics scales it."""
    return 100 * (seen_ND * read_ND).sum(-1).clip(min=0)


def answers(judge: Judge, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, bool]]:
    """For each picture, which of the attributes that its prompt asks for charworld's judge reads off it."""
    from charforgex.embedders import to_pixels

    shown = judge.read(to_pixels(pictures, 64))
    return [
        {name: reading[name] == value for name, value in read_prompt(prompt).items()}
        for reading, prompt in zip(shown, prompts, strict=True)
    ]


class Follower(Protocol):
    """Scores pictures against prompts, and gives the features in which their variety is measured."""

    name: str

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number a picture, larger is better."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) of what a picture shows, whoever it is."""


class ClipFollower:
    """`clip_score` by any CLIP of transformers."""

    def __init__(self, source: str):
        from charforgex.embedders import get_clip

        self.name, self.clip = source, get_clip(source)

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.clip.see(pictures)

    def clip_score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return clip_score(self.clip.see(pictures), self.clip.read(prompts)).tolist()

    score = clip_score


class CharworldFollower(ClipFollower):
    """Charworld's own: the share of what the prompt asks for (expression, clothes, scene, framing) that the judge reads
    off the picture. Readable, and in [0, 1]; features are the embedded CLIP's."""

    def __init__(self):
        from charforgex.charworld.assets import load_judge

        super().__init__("charworld")
        self.judge = load_judge()

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The share of asked attributes that are shown; a prompt that asks for none scores 1."""
        asked = answers(self.judge, pictures, prompts)
        return [sum(right.values()) / len(right) if right else 1.0 for right in asked]


def get_follower(source: str) -> Follower:
    return CharworldFollower() if source == "charworld" else ClipFollower(source)
