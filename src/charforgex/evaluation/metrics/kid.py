"""Kernel distance: as FID asks, but without its error for few pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.distribution import kernel_sums
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.intervals import blocks, group_weights, interval
from charforgex.evaluation.metric import Card, Case, Value

GROUPS = 500  # of which sums are kept


@dataclass(frozen=True)
class Kid(Features):
    """Over all pairs, not over random subsets. The interval draws prompts anew; the references are taken as they are."""

    name: ClassVar[str] = "kid"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "training"
    card: ClassVar[Card] = Card(
        title="KID",
        meaning="distance between the pictures and the references, as two sets of vectors; around 0 where both are of one kind",
        range="around 0 and up, at most 16",
        better="lower",
        source="Binkowski et al. 2018, the unbiased estimate; of unit vectors, with the kernel (x.y + 1)^3",
        lies="uncertain for few pictures, so read the interval; a background that the references share counts as much as the character",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        pictures, references, notes = self.both(gallery, case, 2)
        groups = blocks(gallery.groups, GROUPS)
        sums = kernel_sums(pictures, references, groups, gamma=1.0)
        low = high = float("nan")
        if len(sums.counts_G) > 1:
            drawn = sums.kid(group_weights(groups, key=self.name))
            low, high = interval(drawn[np.isfinite(drawn)])  # a draw of one picture only, again and again, has no pairs
        return Value(float(sums.kid()[0]), low, high, len(pictures), notes=notes)
