"""Are there sharp edges?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.appearance import sharpness
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value


@dataclass(frozen=True)
class Sharpness:
    """How steep the steepest edges are, as curation measures it."""

    name: ClassVar[str] = "sharpness"
    floor: ClassVar[None] = None
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="sharpness",
        meaning="steepness of the steepest fifth of the edges, over their height: 0.9 a hard step, 0.44 one blurred by 3 pixels",
        range="[0, 1]",
        better="higher",
        source="this project (curation.quality); after edge-width measures such as Marziliano et al. 2002",
        lies="noise, ringing and oversharpening count as sharp: more than real pictures have is no better; soft backgrounds do not count",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        if not len(gallery):
            raise DataError("there are no pictures")
        rows = sharpness(gallery)
        blank = int(np.isnan(rows).sum())
        if blank == len(rows):
            raise DataError(f"none of the {blank} pictures has edges to tell by")
        return mean_value(rows, gallery, self.name, notes=(f"{blank} of {len(rows)} pictures have no edges to tell by",) if blank else ())
