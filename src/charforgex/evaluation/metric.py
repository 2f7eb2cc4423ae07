"""What a metric is: a number with an interval, read against a floor and a ceiling, that says of itself what it means and when it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from charforgex.evaluation.intervals import bootstrap_mean

if TYPE_CHECKING:
    from charforgex.evaluation.gallery import Gallery


@dataclass(frozen=True)
class Card:
    """One row of docs/metrics.md and of a report's legend."""

    title: str  # as tables head their columns
    meaning: str
    range: str  # "[0, 1]", "cosine, [-1, 1]"
    better: Literal["higher", "lower", "neither"]
    source: str  # paper, equation or project
    lies: str  # when the number misleads


@dataclass(frozen=True)
class Value:
    """`low` to `high` is the 95 % interval. `rows` has one number for each shot of the gallery, NaN for shots that were not asked; None for
    metrics of whole sets. `parts` are further numbers of the same metric, such as the loss at each noise level."""

    estimate: float
    low: float
    high: float
    count: int
    rows: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    nearest: tuple[Path | None, ...] | None = None  # a file for each shot to be looked at beside it: the training picture that it is like


@dataclass(frozen=True)
class Case:
    """Whose pictures are judged. All galleries but `references` may be lacking: a metric that needs one then raises DataError.

    `references` are pictures of the character that no training saw, `training` those that it saw, `others` show other people, and `base`
    has the base model's pictures of the same prompts and seeds, without any LoRA.
    """

    references: Gallery
    training: Gallery | None = None
    others: Gallery | None = None
    base: Gallery | None = None
    trigger: str | None = None


class Metric(Protocol):
    """Bound from conf/metric/<name>.yaml; nothing heavy happens before the first call. The same pictures give the same numbers, whatever
    the order of shots, batches and workers.

    `floor` and `ceiling` name the sets of `calibration.py` between which the number is read: "others", "real", "shuffled", "noise",
    "training", "base", "everywhere"; None where there is none. A metric about one prompt pack has its name in `pack`; others, which have
    none, are asked about the pictures for which the character was called.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    floor: ClassVar[str | None]
    ceiling: ClassVar[str | None]

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        """Raises DataError where there is too little to say anything: one line that becomes the cell of the table."""


def mean_value(rows: np.ndarray, gallery: Gallery, name: str, **more) -> Value:
    """The mean of the shots that were asked, prompts drawn anew for the interval."""
    asked = np.isfinite(rows)
    estimate, low, high = bootstrap_mean(rows[asked], gallery.groups[asked], key=name)
    return Value(estimate, low, high, int(asked.sum()), rows, **more)


Measure = Callable[["Gallery", Case], Value]
