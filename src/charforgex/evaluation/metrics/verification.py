"""Would a lock that lets few strangers in open for it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from charforgex.binding import Range
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.identity import threshold_at
from charforgex.evaluation.likeness import Likeness
from charforgex.evaluation.metric import Card, Case, Value, mean_value

SURE = 3.0  # no false accept in 3 / rate strangers says with 95 % that the rate is not larger (Jovanovic & Levy 1997)


@dataclass(frozen=True)
class Verification(Likeness):
    """Share of pictures that are more like the references than all but `false_accept` of the pictures of other people."""

    false_accept: Annotated[float, Range(above=0, below=1)] = 0.05

    name: ClassVar[str] = "verification"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="verified",
        meaning="share of pictures accepted as the character at a threshold that lets in a stated share of other people (false_accept)",
        range="[0, 1]",
        better="higher",
        source="true accept rate at a false accept rate, as in face verification (LFW, Huang et al. 2007; ISO/IEC 19795-1)",
        lies="the threshold is as good as the other people are many and alike: against strangers of another kind anybody passes",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        count = len(case.others) if case.others else 0
        needed = math.ceil(1 / self.false_accept - 1e-9)
        if count < needed:
            raise DataError(
                f"a false-accept rate of {self.false_accept:g} needs {needed} pictures of other people, and there "
                f"{'is' if count == 1 else 'are'} {count}; give more, or another false_accept"
            )
        impostors, others_notes = self.scores(case.others, case)
        impostors = impostors[np.isfinite(impostors)]
        if len(impostors) < needed:
            raise DataError(
                f"a false-accept rate of {self.false_accept:g} needs {needed} pictures of other people with faces, not {len(impostors)}"
            )
        threshold = threshold_at(impostors, self.false_accept)
        scores, notes = self.scores(gallery, case)
        rows = np.where(np.isnan(scores), 0.0, scores > threshold)  # without a face the lock stays shut
        sure = math.ceil(SURE / self.false_accept - 1e-9)
        passed = int((impostors > threshold).sum())
        told = f"accepted above a cosine of {threshold:.3f}, as {passed} of {len(impostors)} pictures of other people are"
        if len(impostors) < sure:
            told += f"; {sure} would make the rate of {self.false_accept:g} sure"
        return mean_value(rows, gallery, self.name, notes=(told, *notes, *others_notes), parts={"threshold": threshold})
