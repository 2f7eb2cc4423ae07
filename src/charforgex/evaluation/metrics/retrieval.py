"""Among many people, is it the character that a picture resembles most?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.identity import ranks, similarity
from charforgex.evaluation.likeness import Likeness
from charforgex.evaluation.metric import Card, Case, Value, mean_value


@dataclass(frozen=True)
class Retrieval(Likeness):
    """Share of pictures whose most similar person, among all of `others` and the character, is the character."""

    name: ClassVar[str] = "retrieval"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="recognised",
        meaning="share of pictures that resemble the character more than anybody else; parts: mean reciprocal rank, median rank",
        range="[0, 1]",
        better="higher",
        source="rank-1 identification and mean reciprocal rank (Voorhees 1999)",
        lies="chance is 1 in the number of people; against few, or very different ones, a vague likeness is enough",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        if not case.others:
            raise DataError("the character has nobody to be told from; give pictures of other people as others")
        scores, notes = self.scores(gallery, case)
        vectors, _ = self.seen(gallery)
        others, missing = self.seen(case.others, "pictures of other people")
        hidden = gallery.same(case.others) | np.isnan(others[:, 0])
        others = np.nan_to_num(others)
        with np.errstate(invalid="ignore"):  # of a rival that only this picture shows, nothing is left: NaN
            rivals = [similarity(vectors, others[places], hidden[:, places]) for places in case.others.persons.values()]
        there = np.isfinite(scores)
        places = np.where(there, ranks(scores, np.stack(rivals, 1)), np.nan)
        rows = np.where(there, places == 1, np.nan)
        parts = {
            "mean_reciprocal_rank": float(np.nanmean(1 / places)),
            "median_rank": float(np.nanmedian(places)),
            "people": float(len(rivals) + 1),
        }
        return mean_value(rows, gallery, self.name, notes=(*notes, *missing), parts=parts)
