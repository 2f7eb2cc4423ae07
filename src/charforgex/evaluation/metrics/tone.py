"""Has the LoRA changed how bright, contrasty and colourful pictures are?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.appearance import tones
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.pairs import paired


@dataclass(frozen=True)
class Tone:
    """Drift of brightness, contrast and colourfulness from the base's pictures of the same prompts and seeds."""

    name: ClassVar[str] = "tone"
    floor: ClassVar[str] = "noise"
    ceiling: ClassVar[str] = "base"
    card: ClassVar[Card] = Card(
        title="tone drift",
        meaning="mean change of brightness (mean grey), contrast (standard deviation of grey) and saturation against the base's picture, "
        "in shares of the full range; parts: each with its sign",
        range="[0, 1]",
        better="lower",
        source="this project",
        lies="a character with dark hair darkens pictures rightly; a strong style asked for in captions is drift as well",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        own, base, places = paired(gallery, case)
        drift = tones(own) - tones(base)
        rows = np.full(len(gallery), np.nan)
        rows[places] = np.abs(drift).mean(1)
        parts = dict(zip(("brightness", "contrast", "saturation"), drift.mean(0).tolist(), strict=True))
        return mean_value(rows, gallery, self.name, parts=parts)
