"""Blocks, grain, lost tones, and pictures that are nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from charforgex.errors import DataError
from charforgex.evaluation.appearance import flaws
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value


@dataclass(frozen=True)
class Artefacts:
    """The worst flaw of each picture, as a share of what curation would throw it out for."""

    name: ClassVar[str] = "artefacts"
    floor: ClassVar[str] = "noise"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="artefacts",
        meaning="each picture's worst flaw among blocks, noise and lost black or white; 1 is where curation throws it out, and a "
        "picture of one colour; parts: blocks and noise in grey levels, shares of dark, bright and uniform area, blank pictures",
        range="[0, 1]",
        better="lower",
        source="this project (curation.quality); noise by Immerkaer 1996; black pictures are what decoders make of NaN",
        lies="extra fingers are none of it; a night scene or white paper counts as lost tones: read it against real pictures",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        if not len(gallery):
            raise DataError("there are no pictures")
        rows, parts = flaws(gallery)
        notes = (f"{parts['blank'] * len(rows):.0f} of {len(rows)} pictures are of one colour",) if parts["blank"] else ()
        return mean_value(rows, gallery, self.name, notes=notes, parts=parts)
