"""How different any two of the pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.distribution import checked
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.intervals import blocks, group_weights, interval
from charforgex.evaluation.metric import Card, Case, Value
from charforgex.evaluation.variety import diversities

GROUPS = 500  # of which sums are kept


@dataclass(frozen=True)
class Pairwise(Features):
    """The mean over all pairs: the same number that training tells of a checkpoint."""

    name: ClassVar[str] = "pairwise"
    floor: ClassVar[None] = None
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="diversity",
        meaning="mean distance between two of the pictures; 0: all are the same",
        range="cosine distance, [0, 2]",
        better="higher",
        source="mean pairwise distance, as in Ruiz et al. 2023, section 4.4, of this embedder's vectors",
        lies="two heaps of equal pictures are far apart on average: read the Vendi score beside it; broken pictures are varied, too",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        pictures = checked(self.seen(gallery, "pictures", 2), "pictures", 2)
        groups = blocks(gallery.groups, GROUPS)
        low = high = float("nan")
        if groups.max() > 0:
            drawn = diversities(pictures, groups, group_weights(groups, key=self.name))
            low, high = interval(drawn[np.isfinite(drawn)])  # a draw of one picture only, again and again, has no pairs
        return Value(float(diversities(pictures, groups)[0]), low, high, len(pictures))
