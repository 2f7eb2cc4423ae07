"""How sure a number is: bootstrap intervals (Efron 1979). Whole prompts are drawn anew: pictures of one prompt resemble each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from charforgex.draws import seed_of
from charforgex.errors import DataError

DRAWS = 2000
LEVEL = 0.95


def group_weights(groups: np.ndarray, draws: int = DRAWS, key: str = "") -> np.ndarray:
    """int64 (draws, G): how often each draw has each group. Rows add up to G; a function of G and `key`."""
    count = int(groups.max()) + 1
    rng = np.random.default_rng(seed_of("bootstrap", key, count))
    return rng.multinomial(count, np.full(count, 1 / count), draws)


def bootstrap_mean(rows: np.ndarray, groups: np.ndarray, draws: int = DRAWS, key: str = "") -> tuple[float, float, float]:
    """Mean of `rows` (N,) and its 95 % percentile interval over groups (N,). One group tells nothing of others: the interval is NaN.

    Raises DataError if there are no rows.
    """
    if not len(rows):
        raise DataError("no picture was asked for this")
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(groups, rows.astype(np.float64)), np.bincount(groups)
    estimate = float(sums.sum() / counts.sum())
    if len(counts) == 1:
        return estimate, float("nan"), float("nan")
    weights = group_weights(groups, draws, key)
    low, high = interval(weights @ sums / (weights @ counts))
    return estimate, low, high


def bootstrap(statistic: Callable[[np.ndarray], float], groups: np.ndarray, draws: int, key: str = "") -> tuple[float, float]:
    """95 % percentile interval of a statistic of sets, given indices of shots: each drawn group's, as often as it was drawn."""
    _, groups = np.unique(groups, return_inverse=True)
    if groups.max() == 0:
        return float("nan"), float("nan")
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    found = []
    for weights in group_weights(groups, draws, key):
        found.append(statistic(np.concatenate([np.tile(members[g], weight) for g, weight in enumerate(weights) if weight])))
    return interval(np.array(found))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Between which the middle 95 % of the values lie."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def blocks(groups: np.ndarray, at_most: int) -> np.ndarray:
    """int64 (N,), counting from 0: whole groups put together where there are more than `at_most`, so that what is done for each stays
    affordable. Blocks of independent groups are independent, too."""
    _, groups = np.unique(groups, return_inverse=True)
    count = int(groups.max()) + 1
    return groups * at_most // count if count > at_most else groups


def jackknife(statistic: Callable[[np.ndarray], float], groups: np.ndarray, at_most: int = 20) -> tuple[float, float]:
    """95 % interval (Tukey 1958, Student's t) of a statistic of sets that drawing a picture twice would bias, such as FID or how many
    different pictures there are. `statistic` is given indices of shots, with one block of groups left out each time."""
    from scipy.special import stdtrit

    left_out = blocks(groups, at_most)
    count = int(left_out.max()) + 1
    if count == 1:
        return float("nan"), float("nan")
    everything = statistic(np.arange(len(groups)))
    values = np.array([statistic(np.flatnonzero(left_out != block)) for block in range(count)])
    error = np.sqrt((count - 1) / count * np.square(values - values.mean()).sum())
    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2) * error)
    return everything - reach, everything + reach
