"""Charworld's own question list: is each thing that the prompt names in the picture?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.alignment import answers
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.sight import get_judge


@dataclass(frozen=True)
class Attributes:
    """Share of what a prompt asks for that charworld's judge reads off the picture."""

    name: ClassVar[str] = "attributes"
    floor: ClassVar[str] = "shuffled"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="attributes",
        meaning="share of what the prompt asks for (expression, clothes, scene, framing) that charworld's judge sees; parts: each alone",
        range="[0, 1]",
        better="higher",
        source="this project; as TIFA's questions (Hu et al. 2023), with a classifier for the answers",
        lies="of drawn characters alone, in charworld's words; the judge itself is wrong now and then, see the ceiling",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        judge, rows, by_name = get_judge(), np.full(len(gallery), np.nan), defaultdict(list)
        at = 0
        for shots, pictures in gallery.batches():
            for right in answers(judge, pictures, [shot.prompt for shot in shots]):
                if right:
                    rows[at] = np.mean([*right.values()])
                for name, is_right in right.items():
                    by_name[name].append(is_right)
                at += 1
        if not by_name:
            raise DataError("no prompt asks for anything in charworld's words (docs/charworld.md)")
        return mean_value(rows, gallery, self.name, parts={name: float(np.mean(right)) for name, right in sorted(by_name.items())})
