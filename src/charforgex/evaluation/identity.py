"""Numbers made from embedders' vectors: how alike, who of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", "Tensor", np.ndarray)


def similarity(pictures_ND: Array, references_MD: Array, same_NM: Array | None = None) -> Array:
    """Mean cosine of each picture to the references, (N,). `same_NM` are pairs that do not count: a picture and itself."""
    cosines = pictures_ND @ references_MD.T
    if same_NM is None:
        return cosines.mean(1)
    return (cosines * ~same_NM).sum(1) / (~same_NM).sum(1)


def threshold_at(impostors_N: np.ndarray, rate: float) -> float:
    """The lowest score above which at most `rate` of these scores of other people lie."""
    allowed = int(np.floor(rate * len(impostors_N) + 1e-9))
    return float(np.sort(impostors_N)[::-1][allowed])


def ranks(scores_N: np.ndarray, rivals_NR: np.ndarray) -> np.ndarray:
    """Place of each score among its rivals, (N,): 1 is above all of them. Of equals the rival is first, and NaN is no rival."""
    return 1 + (rivals_NR >= scores_N[:, None]).sum(1)


def mix_up(likeness_FP: np.ndarray, asked: Sequence[int]) -> tuple[int, int]:
    """Of F faces and P people: how many faces are one too many of whoever they resemble most, and how many of the `asked` nobody resembles.

    Each of `asked` may be there once; all others are wrong.
    """
    shown = np.bincount(likeness_FP.argmax(1), minlength=likeness_FP.shape[1])
    wanted = np.zeros_like(shown)
    wanted[list(asked)] = 1
    return int(np.maximum(shown - wanted, 0).sum()), int(np.maximum(wanted - shown, 0).sum())
