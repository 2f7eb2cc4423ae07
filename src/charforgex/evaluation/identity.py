"""Numbers made from embedders' vectors: how alike, how varied, how near to a training picture."""

from __future__ import annotations

from torch import Tensor


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
