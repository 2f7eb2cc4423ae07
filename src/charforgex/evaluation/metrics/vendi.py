"""How many different pictures the pictures amount to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.intervals import jackknife
from charforgex.evaluation.metric import Card, Case, Value
from charforgex.evaluation.variety import vendi


@dataclass(frozen=True)
class Vendi(Features):
    """The Vendi score of cosines; part `share`: of the number of pictures."""

    name: ClassVar[str] = "vendi"
    floor: ClassVar[None] = None
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="Vendi score",
        meaning="as how many wholly different pictures they are varied; part: the same as a share of their number",
        range="[1, N] of N pictures",
        better="higher",
        source="Friedman & Dieng 2023, eq. 2, of the cosine kernel",
        lies="grows with the number of pictures: compare equal numbers; broken pictures are varied, too: read identity beside it",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        pictures = self.seen(gallery, "pictures", 2)
        estimate = vendi(pictures)

        def without(kept: np.ndarray) -> float:
            return vendi(pictures[kept]) if len(kept) > 1 else float("nan")

        low, high = jackknife(without, gallery.groups)
        parts = {"share": estimate / len(pictures)}
        return Value(estimate, max(low, 1.0), min(high, float(len(pictures))), len(pictures), parts=parts)
