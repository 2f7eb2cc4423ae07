"""What the LoRA does to pictures that have nothing to do with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.evaluation.appearance import structure
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.pairs import paired
from charforgex.evaluation.sight import check_source, clip_vectors


@dataclass(frozen=True)
class StyleDamage:
    """Distance of a CLIP's vectors between the LoRA's and the base's pictures of the pack `unrelated`, drawn from the same noise."""

    clip: str = "charworld"

    name: ClassVar[str] = "style_damage"
    pack: ClassVar[str] = "unrelated"
    floor: ClassVar[str] = "noise"
    ceiling: ClassVar[str] = "base"
    card: ClassVar[Card] = Card(
        title="style damage",
        meaning="how far the LoRA moves pictures of unrelated prompts away from the base's of the same noise: 1 - cosine of CLIP vectors; "
        "part structure: 1 - SSIM of their grey pictures",
        range="cosine distance, [0, 2]",
        better="lower",
        source="CLIP-I (Ruiz et al. 2023) between pairs; SSIM (Wang et al. 2004)",
        lies="every change counts, for the better too; CLIP hardly sees brushwork, and structure hardly sees anything else than layout",
    )

    def __post_init__(self):
        check_source(self.clip, "clip")

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        own, base, places = paired(gallery, case, self.pack)
        cosines = (clip_vectors(own, self.clip).astype(np.float64) * clip_vectors(base, self.clip)).sum(1)
        rows = np.full(len(gallery), np.nan)
        rows[places] = np.clip(1 - cosines, 0, 2)
        return mean_value(rows, gallery, self.name, parts={"structure": float(np.mean(1 - structure(own, base)))})
