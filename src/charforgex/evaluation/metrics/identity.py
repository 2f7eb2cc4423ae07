"""Is it the character?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.likeness import Likeness
from charforgex.evaluation.metric import Card, Case, Value, mean_value


@dataclass(frozen=True)
class Identity(Likeness):
    """Mean cosine to the references."""

    name: ClassVar[str] = "identity"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="identity",
        meaning="how alike the character in each picture and in the references are: mean cosine of an embedder's vectors",
        range="cosine, [-1, 1]",
        better="higher",
        source="as CLIP-I and DINO of DreamBooth (Ruiz et al. 2023), section 4.2; with faces as ArcFace (Deng et al. 2019)",
        lies="embedders of whole pictures take clothes, framing and style for the person; of several faces the largest counts; copies of "
        "training pictures score best",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        rows, notes = self.scores(gallery, case)
        return mean_value(rows, gallery, self.name, notes=notes)
