"""Does the character show when nobody called it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.alignment import calls
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.likeness import Likeness
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.pairs import paired


@dataclass(frozen=True)
class Leakage(Likeness):
    """Identity on the prompt pack `leakage`, which has no trigger, less that of the base's pictures of the same prompts and seeds."""

    name: ClassVar[str] = "leakage"
    pack: ClassVar[str] = "leakage"
    floor: ClassVar[str] = "everywhere"
    ceiling: ClassVar[str] = "base"
    card: ClassVar[Card] = Card(
        title="leakage",
        meaning="how much more the character shows without being called than in the base's pictures: difference of mean cosines to the "
        "references; part: the same as a share of the way from there to real pictures",
        range="difference of cosines, [-2, 2]",
        better="lower",
        source="this project; the class images of DreamBooth's language drift (Ruiz et al. 2023), section 3.2, as a measure",
        lies="says nothing of prompts unlike the pack's; below 0 the LoRA moves people away from the character, which is no merit",
    )

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        own, base, places = paired(gallery, case, self.pack)
        calling = [shot.prompt for shot in own.shots if case.trigger and calls(shot.prompt, case.trigger)]
        if calling:
            raise DataError(f'"{calling[0]}" calls the character by {case.trigger}; prompts of the pack leakage must not')
        with_lora, notes = self.scores(own, case)
        without, base_notes = self.scores(base, case)
        rows = np.full(len(gallery), np.nan)
        rows[places] = with_lora - without
        if not np.isfinite(rows).any():
            raise DataError("no prompt has a face in both the LoRA's picture and the base's")
        parts = {}
        if len(case.references) > 1:
            real, low = np.nanmean(self.scores(case.references, case)[0]), np.nanmean(without)
            if real > low:
                parts["share"] = float(np.nanmean(rows) / (real - low))
        return mean_value(rows, gallery, self.name, notes=(*notes, *(f"{note} (base)" for note in base_notes)), parts=parts)
