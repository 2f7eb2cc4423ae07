"""What the measures of whole sets see pictures with, and the setting that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.distribution import enough
from charforgex.evaluation.sight import clip_vectors, recogniser

if TYPE_CHECKING:
    import numpy as np

    from charforgex.evaluation.gallery import Gallery
    from charforgex.evaluation.metric import Case


@dataclass(frozen=True)
class Features:
    """`features`: charworld, the embedded CLIP's vectors of a picture, or an image model of transformers by path or hub id."""

    features: str = "charworld"

    def __post_init__(self):
        if not self.features or self.features.endswith(".onnx"):
            raise ConfigError(
                f'features="{self.features}" does not see whole pictures; give charworld, or an image model of transformers by path or '
                "hub id (facebook/dinov2-base)."
            )

    def seen(self, gallery: Gallery | None, what: str, at_least: int) -> np.ndarray:
        """float32 (N, D): unit vectors of what the pictures show. Raises DataError where there are fewer."""
        if gallery is None or not len(gallery):
            raise DataError(f"there are no {what}")
        enough(len(gallery), what, at_least)  # before a model is loaded
        if self.features == "charworld":
            return clip_vectors(gallery, self.features)
        return recogniser(self.features)(gallery)

    def both(self, gallery: Gallery, case: Case, at_least: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Vectors of the pictures and of the references, and what is to be told of them. Raises DataError."""
        pictures, references = self.seen(gallery, "pictures", at_least), self.seen(case.references, "references", at_least)
        twice = int(gallery.same(case.references).any(axis=1).sum())
        return pictures, references, (f"{twice} of the pictures are references themselves",) if twice else ()
