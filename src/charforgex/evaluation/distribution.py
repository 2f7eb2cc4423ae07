"""How far two sets of pictures are apart, as distributions of an embedder's vectors: FID, KID, precision, recall, density, coverage.

Legend: N pictures are compared with M references, D is the width of their vectors, G counts groups of pictures (prompts).
All is float64 and goes a block of pictures at a time, whatever comes in: arrays may be memory-mapped, of any finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from charforgex.errors import DataError

BLOCK = 1024  # pictures at a time
DIGITS = 1e-9  # share of a FID by which the fast way to it may be wrong; it is taken only where that is certain
SLACK = 1e-12  # of squared lengths: what squared distances that are equal may differ by, as they are rounded


def enough(count: int, what: str, at_least: int) -> None:
    """Raises DataError for fewer. `what` names them, as "pictures" do."""
    if count < at_least:
        raise DataError(f"{what} are too few for this number: {count}, and it needs at least {at_least}")


def checked(vectors_ND: np.ndarray, what: str, at_least: int = 1) -> np.ndarray:
    """The same vectors. Raises DataError where they are fewer, or not all finite."""
    enough(len(vectors_ND), what, at_least)
    for start in range(0, len(vectors_ND), BLOCK):
        finite = np.isfinite(vectors_ND[start : start + BLOCK]).all(axis=1)
        if not finite.all():
            raise DataError(f"The vector of number {start + int(finite.argmin()) + 1} of the {what} is not finite.")
    return vectors_ND


def checked_pair(pictures_ND: np.ndarray, references_MD: np.ndarray, at_least: int = 1) -> None:
    """Raises DataError where either is too few or not finite, or they are of different widths."""
    checked(pictures_ND, "pictures", at_least)
    checked(references_MD, "references", at_least)
    widths = pictures_ND.shape[1], references_MD.shape[1]
    if widths[0] != widths[1]:
        raise DataError(f"Vectors of {widths[0]} numbers cannot be compared with references of {widths[1]}; embed both by the same model.")


def in_blocks(vectors_ND: np.ndarray, at_least: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
    """Where a block is, and its vectors in float64; all but the last have as many as `BLOCK` and as `at_least`."""
    size = max(BLOCK, at_least)
    for start in range(0, len(vectors_ND), size):
        block = slice(start, min(start + size, len(vectors_ND)))
        yield block, np.asarray(vectors_ND[block], np.float64)


# ---- FID ----


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance factor^T factor / (count - 1); `factor` is (min(count - 1, D), D)."""

    mean: np.ndarray
    factor: np.ndarray
    count: int

    @property
    def variance(self) -> float:
        """The covariance's trace."""
        return float(np.square(self.factor).sum() / (self.count - 1))


def moments(vectors_ND: np.ndarray) -> Moments:
    """Of at least two vectors. Where N > D, the triangular factor of a QR decomposition that is updated block by block: memory does not
    grow with N, and small variances keep all their digits, which a covariance matrix squares away. Otherwise the centred rows; they add up
    to 0, so a reflection puts all that they hold into the first N - 1 of them."""
    count, width = vectors_ND.shape
    if count <= width:
        rows = np.array(vectors_ND, np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        factor = rows[:-1]
        factor += rows[-1] / (math.sqrt(count) - 1)
        return Moments(mean, factor, count)
    mean = sum(block.sum(axis=0) for _, block in in_blocks(vectors_ND)) / count
    factor = np.zeros((0, width))
    for _, block in in_blocks(vectors_ND, 2 * width):
        factor = np.linalg.qr(np.concatenate([factor, block - mean]), mode="r")
    return Moments(mean, factor, count)


def frechet(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    With C = F^T F the last trace is the sum of the singular values of F1 F2^T. No D x D matrix is needed where pictures are fewer than D,
    and no root is taken of eigenvalues that are nothing but rounding: where the smallest eigenvalues of (F1 F2^T)(F1 F2^T)^T are too near
    to that, the singular values themselves are computed, which takes twice as long.
    """
    cross = one.factor @ other.factor.T / math.sqrt((one.count - 1) * (other.count - 1))
    cross = cross if len(cross) <= cross.shape[1] else cross.T
    rest = np.square(one.mean - other.mean).sum() + one.variance + other.variance
    squares = np.linalg.eigvalsh(cross @ cross.T)
    if squares[0] > 0:
        roots = np.sqrt(squares)
        error = math.sqrt(len(roots)) * np.finfo(np.float64).eps * squares[-1] * (1 / roots).sum()  # of both halves of 2 tr
        if error <= DIGITS * (rest - 2 * roots.sum()):
            return float(rest - 2 * roots.sum())
    return max(0.0, float(rest - 2 * np.linalg.svd(cross, compute_uv=False).sum()))


def fid(pictures_ND: np.ndarray, references_MD: np.ndarray) -> float:
    """Frechet distance of the sets (Heusel et al. 2017), at least 0. Exact for the numbers given, but of few pictures it is too large: the
    fewer, the larger. Raises DataError."""
    checked_pair(pictures_ND, references_MD, 2)
    return frechet(moments(pictures_ND), moments(references_MD))


# ---- KID ----


@dataclass(frozen=True)
class KernelSums:
    """Sums of a kernel over pairs, by the pictures' groups: all that KID needs, of any resampling of groups.

    `within_GG`: pairs of different pictures, in both orders. `across_G`: pictures with references. `counts_G`: pictures.
    """

    within_GG: np.ndarray
    across_G: np.ndarray
    counts_G: np.ndarray
    references: float  # mean over pairs of different references
    num_references: int

    def kid(self, weights_KG: np.ndarray | None = None) -> np.ndarray:
        """(K,): KID when groups are drawn as often as each row says; without weights (1,), of all as they are."""
        weights = np.ones((1, len(self.counts_G))) if weights_KG is None else weights_KG
        across = weights @ self.across_G / (weights @ self.counts_G * self.num_references)
        return mean_over_pairs(self.within_GG, self.counts_G, weights) + self.references - 2 * across


def mean_over_pairs(sums_GG: np.ndarray, counts_G: np.ndarray, weights_KG: np.ndarray) -> np.ndarray:
    """(K,): the mean over pairs of different pictures, when groups are drawn as often as each row says; NaN where no pair is left.

    A group that is drawn twice makes no pairs with its own copy: these would be of a picture with itself, which would bias the mean.
    """
    pairs_GG = np.outer(counts_G, counts_G) - np.diag(counts_G).astype(np.float64)
    weights = weights_KG.astype(np.float64)

    def total(values_GG: np.ndarray) -> np.ndarray:
        own = np.diag(values_GG)
        return np.einsum("kg,kg->k", weights @ (values_GG - np.diag(own)), weights) + weights @ own

    pairs = total(pairs_GG)
    return np.divide(total(sums_GG), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def kernel_sums(
    pictures_ND: np.ndarray, references_MD: np.ndarray, groups_N: np.ndarray | None = None, gamma: float | None = None
) -> KernelSums:
    """Of the kernel (gamma x.y + 1)^3, over all pairs. `groups_N` counts from 0; None is one group. `gamma`: None is 1 / D, as in the
    paper, whose vectors are about as long as the root of D; unit vectors want 1. Raises DataError."""
    checked_pair(pictures_ND, references_MD, 2)
    gamma = 1 / pictures_ND.shape[1] if gamma is None else gamma
    groups = np.zeros(len(pictures_ND), np.int64) if groups_N is None else groups_N
    counts = np.bincount(groups)
    within, across, references = np.zeros((len(counts), len(counts))), np.zeros(len(counts)), 0.0
    for rows, left in in_blocks(pictures_ND):
        for columns, right in in_blocks(pictures_ND):
            tile = _cubic(left, right, gamma)
            if rows == columns:
                np.fill_diagonal(tile, 0.0)
            within += by_group(by_group(tile, groups[rows], len(counts)).T, groups[columns], len(counts)).T
        for _, right in in_blocks(references_MD):
            across += by_group(_cubic(left, right, gamma).sum(axis=1)[:, None], groups[rows], len(counts))[:, 0]
    for rows, left in in_blocks(references_MD):
        for columns, right in in_blocks(references_MD):
            tile = _cubic(left, right, gamma)
            references += tile.sum() - (np.trace(tile) if rows == columns else 0.0)
    number = len(references_MD)
    return KernelSums(within, across, counts, references / (number * (number - 1)), number)


def _cubic(left: np.ndarray, right: np.ndarray, gamma: float) -> np.ndarray:
    return (gamma * (left @ right.T) + 1) ** 3


def by_group(rows: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(R, C) to (G, C): the sum of each group's rows."""
    order = np.argsort(groups, kind="stable")
    present, first = np.unique(groups[order], return_index=True)
    sums = np.zeros((count, rows.shape[1]))
    sums[present] = np.add.reduceat(rows[order], first, axis=0)
    return sums


def kid(pictures_ND: np.ndarray, references_MD: np.ndarray, gamma: float | None = None) -> float:
    """Kernel distance (Binkowski et al. 2018): the unbiased squared MMD of the cubic kernel over all pairs. Around 0 for sets of one
    distribution, also below, however few they are. `gamma` as for `kernel_sums`. Raises DataError."""
    return float(kernel_sums(pictures_ND, references_MD, gamma=gamma).kid()[0])


# ---- precision and recall, density and coverage ----


@dataclass(frozen=True)
class Manifold:
    """`inside_N`: does the picture lie in a reference's neighbourhood (its mean is precision). `density_N`: in how many, for each of the k
    it would be expected in (mean: density). `recalled_M`: does the reference lie in a picture's neighbourhood (mean: recall).
    `covered_M`: is a picture in the reference's neighbourhood (mean: coverage)."""

    inside_N: np.ndarray
    density_N: np.ndarray
    recalled_M: np.ndarray
    covered_M: np.ndarray


def manifold(pictures_ND: np.ndarray, references_MD: np.ndarray, k: int) -> Manifold:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020). A vector's neighbourhood is the ball that
    reaches to its k-th nearest among its own set, edge included. Raises DataError where a set has no more than k pictures."""
    checked_pair(pictures_ND, references_MD, k + 1)
    middle = references_MD.mean(axis=0, dtype=np.float64)  # distances by products keep more digits around 0
    around, reach = _reach(pictures_ND, k, middle), _reach(references_MD, k, middle)
    counts = np.zeros(len(pictures_ND), np.int64)
    recalled, nearest = np.zeros(len(references_MD), bool), np.full(len(references_MD), np.inf)
    for rows, left in in_blocks(pictures_ND):
        for columns, right in in_blocks(references_MD):
            tile = _squared(left - middle, right - middle)
            counts[rows] += (tile <= reach[columns]).sum(axis=1)
            recalled[columns] |= (tile <= around[rows][:, None]).any(axis=0)
            nearest[columns] = np.minimum(nearest[columns], tile.min(axis=0))
    return Manifold(counts > 0, counts / k, recalled, nearest <= reach)


def _squared(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.maximum(np.square(left).sum(axis=1)[:, None] + np.square(right).sum(axis=1) - 2 * left @ right.T, 0.0)


def _reach(vectors_ND: np.ndarray, k: int, middle: np.ndarray) -> np.ndarray:
    """Squared distance to the k-th nearest of the others, and a little, so that what lies on the edge does so in any order of sums."""
    found = np.zeros(len(vectors_ND))
    for rows, left in in_blocks(vectors_ND):
        left = left - middle
        best = np.full((len(left), k), np.inf)
        for columns, right in in_blocks(vectors_ND):
            tile = _squared(left, right - middle)
            if rows == columns:
                np.fill_diagonal(tile, np.inf)
            best = np.partition(np.concatenate([best, tile], axis=1), k - 1, axis=1)[:, :k]
        found[rows] = best[:, -1] + SLACK * (np.square(left).sum(axis=1) + np.square(middle).sum())
    return found
