"""Do the pictures lie among the references, and do they reach all of them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from charforgex.binding import Range
from charforgex.evaluation.distribution import manifold
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value


@dataclass(frozen=True)
class ManifoldMetric(Features):
    """Density, with the precision, recall and coverage as parts. `k`: a picture's neighbourhood reaches to its k-th nearest."""

    k: Annotated[int, Range(at_least=1)] = 5

    name: ClassVar[str] = "manifold"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "training"
    card: ClassVar[Card] = Card(
        title="density",
        meaning="in how many references' neighbourhoods a picture lies, 1 being as many as a real one; parts: precision, the share of "
        "pictures in any; recall, the share of references among the pictures; coverage, the share of references with a picture near them",
        range="[0, M / k] of M references; parts [0, 1]",
        better="higher",
        source="density and coverage: Naeem et al. 2020; precision and recall: Kynkaanniemi et al. 2019",
        lies="above 1 where pictures crowd in the most usual place: read coverage beside it; few references reach far, so that all lies "
        "among them",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        pictures, references, notes = self.both(gallery, case, self.k + 1)
        found = manifold(pictures, references, self.k)
        parts = {
            "precision": float(found.inside_N.mean()),
            "recall": float(found.recalled_M.mean()),
            "coverage": float(found.covered_M.mean()),
        }
        return mean_value(found.density_N, gallery, self.name, notes=notes, parts=parts)
