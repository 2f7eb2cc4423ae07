"""Are pictures copies of training pictures?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from charforgex.binding import Range
from charforgex.curation.fingerprints import thumbnail
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.memory import Limit, Match, Originals, copy_limit, nearest
from charforgex.evaluation.metric import Card, Case, Value, mean_value

NAMED = 5  # copies that are told by name


@dataclass(frozen=True)
class Memorisation(Features):
    """`features` finds the training pictures that each is laid onto. `false_alarms`: share of real pictures, unlike all that training saw,
    that the limit takes for copies; a small one needs as many pictures as 1 / false_alarms to be learnt from."""

    false_alarms: Annotated[float, Range(above=0, below=1)] = 0.01

    name: ClassVar[str] = "memorisation"
    floor: ClassVar[str] = "training"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="copies",
        meaning="share of pictures that are a training picture again, be it mirrored, cropped, brightened or recompressed; parts: cosine "
        "to the nearest training picture, and the limit of the difference, in grey levels, with its share of false alarms",
        range="[0, 1]",
        better="lower",
        source="this project; extraction of training pictures as Carlini et al. 2023 and Somepalli et al. 2023 mean it, told by structure",
        lies="sees copies of whole pictures, not of a face or a pose; false alarms are of real pictures of this character, and drawn ones "
        "may be more alike",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        found, limit = self.matches(gallery, case)
        copies = np.array([match.difference < limit.difference for match in found])
        cosines, _ = nearest(self.seen(gallery, "pictures", 1), self.seen(case.training, "training pictures", 1))
        parts = {"nearest": float(cosines.mean()), "limit": limit.difference, "false_alarms": limit.false_alarms}
        named = sorted(np.flatnonzero(copies).tolist(), key=lambda i: (found[i].difference, gallery.shots[i].name))[:NAMED]
        told = (self._said(limit), *(_copy(gallery, case.training, i, found[i]) for i in named))
        shown = [case.training.shots[match.index].picture for match in found]
        files = tuple(picture if isinstance(picture, Path) else None for picture in shown)
        return mean_value(copies.astype(np.float64), gallery, self.name, notes=told, parts=parts, nearest=files)

    def matches(self, gallery: Gallery, case: Case) -> tuple[list[Match], Limit]:
        """Of each shot the training picture that it is most like, and from which difference on that is no copy. Raises DataError."""
        self.seen(gallery, "pictures", 1)
        self.seen(case.training, "training pictures", 1)
        originals, limit = _learnt(self, case.training, case.references)
        return _found(self, originals, gallery), limit

    def _said(self, limit: Limit) -> str:
        text = (
            f"a difference below {limit.difference:.1f} grey levels makes a copy: {limit.count} different real pictures promise false "
            f"alarms of {limit.false_alarms:.1%} at most"
        )
        if limit.false_alarms > self.false_alarms:
            text += f"; for {self.false_alarms:.1%} there must be {math.ceil(1 / self.false_alarms) - 1}"
        return text + (f"; {limit.left_out} more are copies of others" if limit.left_out else "")


@lru_cache(maxsize=1)
def _learnt(metric: Memorisation, training: Gallery, references: Gallery) -> tuple[Originals, Limit]:
    """The same for all contestants."""
    features = metric.seen(training, "training pictures", 1)
    originals = Originals([thumbnail(picture) for _, pictures in training.batches() for picture in pictures], features)
    held_out = _found(metric, originals, references) if len(references) else []
    differences = np.concatenate([originals.differences(), [match.difference for match in held_out]])
    return originals, copy_limit(differences, metric.false_alarms)


@lru_cache(maxsize=2)
def _found(metric: Memorisation, originals: Originals, gallery: Gallery) -> list[Match]:
    """Of each shot. The references are asked for to learn the limit, and again as what has no copies."""
    vectors = metric.seen(gallery, "pictures", 1)
    pictures = (picture for _, batch in gallery.batches() for picture in batch)
    return [originals.find(thumbnail(picture), vector) for picture, vector in zip(pictures, vectors, strict=True)]


def _copy(gallery: Gallery, training: Gallery, index: int, match: Match) -> str:
    original = training.shots[match.index].name + (", mirrored" if match.mirrored else "")
    return f"{gallery.shots[index].name} is training picture {original}: {match.difference:.1f} grey levels apart"
