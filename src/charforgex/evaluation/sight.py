"""What metrics see with. Each model is loaded once, and named by its content: caches of what it saw go stale with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from charforgex.curation.faces import Detector, FaceSettings, get_detector
from charforgex.errors import ConfigError, DataError
from charforgex.quiet import quiet
from charforgex.runs import sha256_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from charforgex.charworld.judge import Judge
    from charforgex.embedders import Clip, Embedder
    from charforgex.evaluation.gallery import Gallery


@cache
def stamp(source: str, embedded: str) -> str:
    """A model by its address and, where that is on this machine, its content. `embedded` is the folder that "charworld" means."""
    from charforgex.charworld.assets import ROOT

    place = ROOT / embedded if source == "charworld" else Path(source).expanduser()
    return f"{source}@{sha256_path(place)}" if place.exists() else source


def check_source(source: str, setting: str) -> None:
    """Raises ConfigError for a model that names nothing or a file that is not there: before anything is drawn."""
    if not source:
        raise ConfigError(f'{setting}="" names nothing; give charworld, or a model by path or hub id.')
    if (source.endswith(".onnx") or source.startswith(("/", "~", "."))) and not Path(source).expanduser().exists():
        raise ConfigError(f"{setting}={source} does not exist; give charworld, or a model by path or hub id.")


class Recogniser:
    """Vectors of who is in a picture: of the whole of it, or of its faces where there is a detector."""

    def __init__(self, name: str, embedder: Embedder, detector: Detector | None):
        self.name, self.embedder, self.detector = name, embedder, detector

    @cached_property
    def width(self) -> int:
        """How many numbers a vector has."""
        from PIL import Image

        return self.embedder([Image.new("RGB", (112, 112))]).shape[1]

    def __call__(self, gallery: Gallery) -> np.ndarray:
        """float32 (N, D): unit vectors of the pictures or of their largest faces; NaN for pictures without a face. Raises DataError."""
        return gallery.vectors(self.name, self._see, partial=self.detector is not None)

    def faces(self, picture: Image) -> np.ndarray:
        """float32 (F, D): all faces, the largest first."""
        views = self._views(picture)
        return self._embedded(views).numpy() if views else np.zeros((0, self.width), np.float32)

    def _see(self, pictures: Sequence[Image]) -> Tensor:
        if self.detector is None:
            return self.embedder(pictures)
        import torch

        largest = [self._views(picture)[:1] for picture in pictures]
        found = torch.full((len(pictures), self.width), torch.nan)
        there = [i for i, views in enumerate(largest) if views]
        if there:
            found[there] = self._embedded([largest[i][0] for i in there])
        return found

    def _views(self, picture: Image) -> list[Image]:
        from charforgex.curation.people import view

        faces = sorted(self.detector.detect(np.asarray(picture)), key=lambda face: -face.width * face.height)
        return [view(picture, face, self.embedder) for face in faces]

    def _embedded(self, views: Sequence[Image]) -> Tensor:
        vectors = self.embedder(views).float().cpu()
        if not vectors.isfinite().all():
            raise DataError(f"{self.embedder.name} makes vectors that are not finite of faces; use another embedder.")
        return vectors


@cache
def recogniser(embedder: str, faces: FaceSettings | None = None) -> Recogniser:
    """`embedder` as of `get_embedder`. `faces` finds what is compared; None compares whole pictures, except for embedders of aligned faces,
    which get `FaceSettings()`. Raises ConfigError and ModelError."""
    from charforgex.embedders import get_embedder

    with quiet("transformers"):
        eye = get_embedder(embedder, faces=True)
    faces = FaceSettings() if faces is None and eye.aligned else faces
    name = f"identity {stamp(embedder, 'judge')}"
    if faces is None:
        return Recogniser(name, eye, None)
    told = asdict(faces) | {"model": faces.model and stamp(faces.model, "detector")}
    return Recogniser(f"{name} {json.dumps(told)} {stamp('charworld', 'detector')}", eye, get_detector(faces))


@cache
def get_clip(source: str) -> Clip:
    """As `embedders.get_clip`, once."""
    from charforgex import embedders

    with quiet("transformers"):
        return embedders.get_clip(source)


def clip_vectors(gallery: Gallery, source: str) -> np.ndarray:
    """float32 (N, D): what a CLIP sees in the pictures."""
    return gallery.vectors(f"clip {stamp(source, 'clip')}", get_clip(source).see)


@cache
def get_judge() -> Judge:
    """Charworld's, once."""
    from charforgex.charworld.assets import load_judge

    return load_judge()
