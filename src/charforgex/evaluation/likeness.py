"""How much pictures show the character of a case: what several metrics begin with, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from charforgex.curation.faces import FaceSettings
from charforgex.errors import DataError
from charforgex.evaluation.identity import similarity
from charforgex.evaluation.sight import Recogniser, check_source, recogniser

if TYPE_CHECKING:
    from charforgex.evaluation.gallery import Gallery
    from charforgex.evaluation.metric import Case


@dataclass(frozen=True)
class Likeness:
    """`embedder` says who is in a picture; `faces` finds the face that it looks at, None lets it see whole pictures."""

    embedder: str = "charworld"
    faces: FaceSettings | None = None

    def __post_init__(self):
        check_source(self.embedder, "embedder")

    def eye(self) -> Recogniser:
        return recogniser(self.embedder, self.faces)

    def scores(self, gallery: Gallery, case: Case) -> tuple[np.ndarray, tuple[str, ...]]:
        """float64 (N,): mean cosine of each picture to the references but itself, NaN without a face; and what is to be told of it.

        Raises DataError if there are no pictures, no references, or no faces among them.
        """
        vectors, notes = self.seen(gallery)
        references, missing = self.seen(case.references, "references")
        same = gallery.same(case.references) | np.isnan(references[:, 0])
        if same.all(1).any():
            raise DataError("a picture is the only reference, and nothing is compared with itself; give two references or more")
        return similarity(vectors, np.nan_to_num(references), same), (*notes, *missing)

    def seen(self, gallery: Gallery, what: str = "pictures") -> tuple[np.ndarray, tuple[str, ...]]:
        """float64 (N, D): vectors of `gallery`, NaN without a face, and a note if some lack one. Raises DataError if there are none."""
        if not len(gallery):
            raise DataError(f"there are no {what}")
        vectors = self.eye()(gallery).astype(np.float64)
        without = int(np.isnan(vectors[:, 0]).sum())
        if without == len(vectors):
            raise DataError(f"no face was found in any of the {without} {what}; choose another detector with faces.detector")
        return vectors, (f"no face was found in {without} of the {len(vectors)} {what}",) if without else ()
