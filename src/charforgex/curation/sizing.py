"""How many pictures are enough: a learning curve a + b n^-c (Hestness et al. 2017) fitted to what was measured at smaller sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from charforgex.curation.analysis import vendi
from charforgex.draws import seed_of

POOL = 512  # pictures that the variety is measured on
REPEATS = 24
RESAMPLES = 200
MIN_SIZES = 5
FURTHEST = 4.0  # an answer beyond so many times the largest size measured is a guess
WIDEST = 10.0  # and so is one whose interval ends are so far apart
UNSEEN = 1e6  # pictures that are as good as no end
EXPONENTS = np.geomspace(0.02, 4, 160)


def variety_curve(features_ND: np.ndarray, repeats: int = REPEATS) -> tuple[list[int], np.ndarray]:
    """Sizes (M,) and (M, repeats): how many different pictures n random ones of the set amount to, by `analysis.vendi`.

    Of more than `POOL` pictures as many are drawn. Sizes begin at a tenth of them, because the law holds for the tail only, and end at
    80 %, because larger parts are nearly the same each time. The draws are a function of the set's size.
    """
    rng = np.random.default_rng(seed_of("variety", len(features_ND)))
    pool = np.asarray(features_ND)[np.sort(rng.permutation(len(features_ND))[:POOL])]
    sizes = sorted({round(size) for size in np.geomspace(max(2, 0.1 * len(pool)), 0.8 * len(pool), 12)}) if len(pool) >= 4 else []
    orders = [rng.permutation(len(pool)) for _ in range(repeats)]
    return sizes, np.array([[vendi(pool[order[:size]]) for order in orders] for size in sizes]).reshape(len(sizes), repeats)


def learning_curve(sizes: Sequence[int], values: np.ndarray, share: float = 0.95) -> dict[str, Any]:
    """Fit a + b n^-c to a rising curve and say at which n it reaches `share` of its limit a, with a 95 % bootstrap interval.

    `values` are (M,) or, measured R times at each size, (M, R). With three repeats and more these are resampled (as wholes: what one run
    measured at different sizes belongs together), otherwise the residuals. `enough` is False, and `why` says so, where the answer would
    be a guess: `n` is then None.
    """
    result: dict[str, Any] = {"sizes": list(map(int, sizes)), "values": [], "share": share, "enough": False, "n": None}
    if len(sizes) < MIN_SIZES:
        return result | {"why": f"it was measured at {len(sizes)} sizes; {MIN_SIZES} are needed"}
    sizes_M = np.asarray(sizes, float)
    values_MR = np.asarray(values, float).reshape(len(sizes), -1)
    mean_M = values_MR.mean(axis=1)
    result["values"] = mean_M.tolist()
    if np.ptp(mean_M) < 1e-6 * max(1.0, np.abs(mean_M).max()):
        return result | {"why": "it is the same at every size: more pictures change nothing"}
    a, b, c = fit(sizes_M, mean_M)
    fitted = a + b * sizes_M**-c
    explained = 1 - ((mean_M - fitted) ** 2).sum() / ((mean_M - mean_M.mean()) ** 2).sum()
    fits = _fit_many(sizes_M, _resample(values_MR, mean_M, fitted))
    needed = np.array([reach(*one, share) for one in fits])
    low, high = np.quantile(needed, [0.025, 0.975], method="inverted_cdf")
    result |= {"a": a, "b": b, "c": c, "explained": float(explained)}
    result["a_interval"] = np.quantile(fits[:, 0], [0.025, 0.975]).tolist()
    low, high = (math.ceil(end) if end < UNSEEN else None for end in (low, high))
    largest = max(result["sizes"])
    result["n_interval"] = [low, high]
    if b >= 0:
        return result | {"why": "it does not rise with the number of pictures"}
    if explained < 0.8:
        return result | {"why": f"the measurements scatter: the curve explains {explained:.0%} of them"}
    if low is None or low > FURTHEST * largest:
        return result | {"why": f"at {largest} pictures it still rises, with no limit in sight"}
    if high is None or high > WIDEST * low or high > FURTHEST * largest:
        return result | {"why": f"measured at up to {largest} pictures it can only be said to be {low} or more"}
    return result | {"enough": True, "n": math.ceil(reach(a, b, c, share)), "why": None}


def fit(sizes_M: np.ndarray, values_M: np.ndarray) -> tuple[float, float, float]:
    """a, b, c of a + b n^-c by least squares."""
    from scipy.optimize import curve_fit

    start = _fit_many(sizes_M, values_M[None])[0]  # near the best already, so that the search cannot go astray
    bounds = ([-np.inf, -np.inf, EXPONENTS[0]], [np.inf, np.inf, EXPONENTS[-1]])
    a, b, c = curve_fit(lambda n, a, b, c: a + b * n**-c, sizes_M, values_M, start, bounds=bounds)[0]
    return float(a), float(b), float(c)


def _fit_many(sizes_M: np.ndarray, values_KM: np.ndarray) -> np.ndarray:
    """(K, 3): a, b, c of each curve, c among `EXPONENTS`. For a given c the best a and b are a straight line's."""
    best = np.full((len(values_KM), 4), np.inf)
    for c in EXPONENTS:
        design = np.column_stack([np.ones_like(sizes_M), sizes_M**-c])
        lines = np.linalg.lstsq(design, values_KM.T, rcond=None)[0]
        errors = ((design @ lines - values_KM.T) ** 2).sum(axis=0)
        better = errors < best[:, 0]
        best[better] = np.column_stack([errors, lines.T, np.full(len(errors), c)])[better]
    return best[:, 1:]


def reach(a: float, b: float, c: float, share: float) -> float:
    """The n at which a + b n^-c is `share` of a; infinite if it never is."""
    if a <= 0 or b >= 0:
        return math.inf
    return max(1.0, (-b / ((1 - share) * a)) ** (1 / c))


def _resample(values_MR: np.ndarray, mean_M: np.ndarray, fitted_M: np.ndarray) -> np.ndarray:
    """(`RESAMPLES`, M)"""
    num_sizes, repeats = values_MR.shape
    rng = np.random.default_rng(seed_of("bootstrap", num_sizes, repeats))
    if repeats >= 3:
        return np.stack([values_MR[:, rng.integers(0, repeats, repeats)].mean(axis=1) for _ in range(RESAMPLES)])
    residuals = (mean_M - fitted_M) * math.sqrt(num_sizes / (num_sizes - 3))  # three parameters took their share
    return fitted_M + rng.choice(residuals, (RESAMPLES, num_sizes))
