"""Who is it? Embedders turn pictures into unit vectors whose cosine says how much two pictures show the same character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from charforgex.errors import ConfigError, ModelError


class Embedder(Protocol):
    name: str

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), float32."""


def to_pixels(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """(N, 3, size, size) in [-1, 1]; pictures are resized whole, by Lanczos where the size differs."""
    resized = [p if p.size == (size, size) else p.resize((size, size), Image.Resampling.LANCZOS) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in resized])).permute(0, 3, 1, 2).float() / 127.5 - 1


class CharworldEmbedder:
    """The embedded judge's identity vectors: trained against look-alikes that the same words describe."""

    name = "charworld"

    def __init__(self):
        from charforgex.charworld.assets import load_judge

        self.judge = load_judge()

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.judge.embed(to_pixels(pictures, 64))


class TransformersEmbedder:
    """Any image model of transformers by path or hub id, such as facebook/dinov2-base: its pooled output, normalised."""

    def __init__(self, source: str):
        from transformers import AutoImageProcessor, AutoModel

        self.name = source
        try:
            self.processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
            self.model = AutoModel.from_pretrained(source, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"evaluation.embedder={source} cannot be loaded: {error}") from error

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        model = getattr(self.model, "vision_model", self.model)  # of CLIP-like models only the tower that sees
        return F.normalize(model(**inputs).pooler_output.float(), dim=-1)


def get_embedder(source: str) -> Embedder:
    if not source:
        raise ConfigError('evaluation.embedder="" names nothing; give charworld, or an image model of transformers by path or hub id.')
    return CharworldEmbedder() if source == "charworld" else TransformersEmbedder(source)


def similarity(pictures_ND: Tensor, references_MD: Tensor) -> Tensor:
    """Mean cosine of each picture to the references, (N,)."""
    return (pictures_ND @ references_MD.T).mean(1)


def diversity(features_ND: Tensor) -> float:
    """Mean cosine distance between different pictures, in [0, 2]: 0 means that all are the same."""
    n = len(features_ND)
    if n < 2:
        return 0.0
    cosines = features_ND @ features_ND.T
    return float(1 - (cosines.sum() - cosines.trace()) / (n * (n - 1)))


def nearest(features_ND: Tensor, training_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to, and index of, each picture's nearest training picture: near 1 means that it was learnt by heart."""
    best = (features_ND @ training_MD.T).max(1)
    return best.values, best.indices
