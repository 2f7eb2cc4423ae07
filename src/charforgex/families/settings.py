"""The schema of conf/family: where a base model is, and the numbers that suit it. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from charforgex.config import Range

Positive = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class Recipe:
    """A family's own numbers, from which the other groups take theirs."""

    resolution: Positive
    batch_size: Positive
    steps: Positive
    rank: Positive
    alpha: Annotated[float, Range(above=0)]
    targets: str
    lr: Annotated[float, Range(above=0)]
    evaluate_every: Positive
    weighting: str
    timesteps: str
    shift: float | str
    sampling_steps: Positive
    guidance: Annotated[float, Range(at_least=0)]
    true_guidance: Annotated[float, Range(at_least=1)]
    frames: Positive | None = None  # of a clip, of families of clips; so are the two below
    fps: Annotated[float, Range(above=0)] | None = None
    spatial_lr: Annotated[float, Range(above=0)] | None = None  # of the adapter that learns from single frames; `lr` is the motion's


@dataclass(frozen=True)
class FamilySettings:
    name: str
    source: str
    recipe: Recipe
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # in training; generate.py has a dtype of its own
