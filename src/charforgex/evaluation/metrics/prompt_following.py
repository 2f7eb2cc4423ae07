"""Does the picture show what the prompt says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.alignment import clip_score
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.sight import check_source, clip_vectors, get_clip


@dataclass(frozen=True)
class PromptFollowing:
    """CLIP score by any CLIP."""

    clip: str = "charworld"

    name: ClassVar[str] = "prompt_following"
    floor: ClassVar[str] = "shuffled"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="CLIP score",
        meaning="how alike a CLIP finds picture and prompt: 100 max(cosine, 0)",
        range="[0, 100]",
        better="higher",
        source="CLIPScore (Hessel et al. 2021), eq. 1, scaled as in torchmetrics",
        lies="CLIP counts badly, mixes up whose colour is whose, and knows no trigger words; scores of two CLIPs cannot be compared",
    )

    def __post_init__(self):
        check_source(self.clip, "clip")

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        clip = get_clip(self.clip)
        asked = [i for i, shot in enumerate(gallery.shots) if shot.prompt.strip()]
        if not asked:
            raise DataError("no picture has a prompt or a caption")
        prompts = sorted({gallery.prompts[i] for i in asked})
        read = dict(zip(prompts, clip.read(prompts).numpy().astype(np.float64), strict=True))
        rows = np.full(len(gallery), np.nan)
        rows[asked] = clip_score(
            clip_vectors(gallery, self.clip)[asked].astype(np.float64), np.stack([read[gallery.prompts[i]] for i in asked])
        )
        if not np.isfinite(rows[asked]).all():
            raise DataError(f"the CLIP {self.clip} makes vectors that are not finite of prompts; use another")
        cut = sum(len(ids) > clip.length for ids in clip.tokenizer(prompts).input_ids)
        notes = (f"of {cut} of {len(prompts)} prompts this CLIP reads the first {clip.length} tokens alone",) if cut else ()
        return mean_value(rows, gallery, self.name, notes=notes)
