"""Frechet distance: how far the pictures as a whole are from the references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.distribution import checked_pair, frechet, moments
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.intervals import jackknife
from charforgex.evaluation.metric import Card, Case, Value

ENOUGH = 10  # pictures for each number of a vector: two sets of one Gaussian are then about a twentieth of its variance apart


@dataclass(frozen=True)
class Fid(Features):
    """Of unit vectors, so at most 4. The interval leaves out prompts; the references are taken as they are."""

    name: ClassVar[str] = "fid"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "training"
    card: ClassVar[Card] = Card(
        title="FID",
        meaning="distance between the pictures and the references, as two clouds of vectors with a mean and a spread",
        range="[0, 4], of unit vectors",
        better="lower",
        source="Heusel et al. 2017, eq. 6; not of Inception's vectors, so papers' numbers are not comparable",
        lies="too large, and the larger the fewer the pictures: compare equal numbers only; a background that the references share counts "
        "as much as the character",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        pictures, references, notes = self.both(gallery, case, 2)
        checked_pair(pictures, references, 2)
        known = moments(references)
        estimate = frechet(moments(pictures), known)

        def without(kept: np.ndarray) -> float:
            return frechet(moments(pictures[kept]), known) if len(kept) > 1 else float("nan")

        low, high = jackknife(without, gallery.groups)
        enough = ENOUGH * pictures.shape[1]
        if min(len(pictures), len(references)) < enough:
            few = (
                f"FID of {len(pictures)} pictures and {len(references)} references is too large; it needs {enough} of each with vectors of "
                f"{pictures.shape[1]} numbers. KID is right for few."
            )
            notes = (*notes, few)
        return Value(estimate, max(low, 0.0), high, len(pictures), notes=notes)
