"""How well the denoiser predicts the references, by noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from charforgex.binding import Range
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.intervals import bootstrap_mean
from charforgex.evaluation.metric import Card, Case, Value


@dataclass(frozen=True)
class Levels:
    """The validation loss of training, of any contestant: `evaluation.levels` measures it while the contestant is loaded."""

    name: ClassVar[str] = "levels"
    floor: ClassVar[None] = None
    ceiling: ClassVar[None] = None
    card: ClassVar[Card] = Card(
        title="loss",
        meaning="mean squared error of the prediction on the references with their captions, over noise levels from clean to noise",
        range="above 0; another scale for each base",
        better="lower",
        source="Ho et al. 2020, equation 14, at fixed noise and noise levels",
        lies="it falls for a LoRA that learnt the pictures' style or background as well as for one that learnt the character",
    )

    levels: Annotated[int, Range(at_least=1, at_most=100)] = 8

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        if gallery.losses is None:
            raise DataError("finished pictures have no denoiser whose predictions could be looked at")
        return value(gallery.losses["losses"], gallery.losses["times"])


def value(losses, times) -> Value:
    """Of losses (levels, N) of N pictures: the mean, pictures drawn anew for the interval; `parts` are the means by time."""
    table = np.asarray(losses, np.float64)
    rows = table.mean(0)
    estimate, low, high = bootstrap_mean(rows, np.arange(len(rows)), key="levels")
    by_time = {f"t={time:.3f}": float(mean) for time, mean in zip(times, table.mean(1), strict=True)}
    return Value(estimate, low, high, len(rows), parts=by_time)
