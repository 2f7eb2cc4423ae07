"""Which contestant a metric prefers: scores of the same prompt and seed against each other, and how sure that is.

The unit is the prompt. Pictures of one prompt share what is easy or hard about it, so five seeds of one prompt are not five witnesses; a
test that counts them as such claims too much (pseudoreplication, Hurlbert 1984). The sign test therefore asks each prompt once, by its mean
difference over seeds, and the bootstrap draws whole prompts. Wins of single pictures are counted, too, to be read and not tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from charforgex.evaluation.intervals import bootstrap_mean

ALPHA = 0.05
Place = tuple[str, int | None]  # prompt and seed
Better = Literal["higher", "lower", "neither"]


def compare(
    scores: Mapping[str, Mapping[str, Mapping[Place, float]]], better: Mapping[str, Better], alpha: float = ALPHA
) -> dict[str, Any] | None:
    """All pairs of contestants by all metrics, as `comparison` of result.json. `scores` is {metric: {contestant: {(prompt, seed): score}}}.

    `better` is each metric's direction. The chance that any of the claims is false is at most `alpha`: Holm's correction (1979) counts
    every pair and metric that was tested. None where there are no two contestants.
    """
    pairs = {name: list(combinations(contestants, 2)) for name, contestants in scores.items()}
    if not any(pairs.values()):
        return None
    rows = [
        {"metric": name, **_pair(name, first, second, scores[name], better[name], alpha)}
        for name in scores
        for first, second in pairs[name]
    ]
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
        row["better"], row["verdict"] = _verdict(row, alpha)
    return {
        "alpha": alpha, "tests": len(tested), "rows": rows,
        "method": "exact sign test over prompts, Holm's correction over all pairs and metrics; intervals: bootstrap over prompts",
    }  # fmt: skip


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p that a fair coin falls so unevenly or more. Ties are left out (Dixon and Mood 1946)."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): those below alpha are claims of which any is false with a chance of at most alpha."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def fewest(alpha: float) -> int:
    """Prompts without which even a unanimous sign test says nothing at this level: 6 at 0.05."""
    return 1 + int(np.ceil(np.log2(1 / alpha) - 1e-12))


def _pair(
    metric: str, first: str, second: str, scores: Mapping[str, Mapping[Place, float]], better: Better, alpha: float
) -> dict[str, Any]:
    """Counts and sizes of one pair; its `p` is None where nothing can be tested, and the verdict says why."""
    one, other = scores[first], scores[second]
    common = sorted((place for place in one if np.isfinite(one[place]) and np.isfinite(other.get(place, np.nan))), key=repr)
    row: dict[str, Any] = {"a": first, "b": second, "pictures": len(common), "prompts": len({prompt for prompt, _ in common})}
    row |= {"p": None, "p_holm": None, "better": None}
    if not common:
        return row | {"verdict": "not comparable: no picture of the same prompt and seed has a score in both"}
    gained = np.array([one[place] - other[place] for place in common], np.float64)
    _, groups = np.unique([prompt for prompt, _ in common], return_inverse=True)
    estimate, low, high = bootstrap_mean(gained, groups, key=f"{metric}/paired")
    row["difference"] = {"estimate": estimate, "low": low, "high": high}  # a - b, in the metric's own units
    if better == "neither":
        return row | {"verdict": "not comparable: neither direction of this metric is better"}
    gained = gained if better == "higher" else -gained
    row |= _counted("pictures", gained) | _counted("prompts", np.bincount(groups, gained) / np.bincount(groups))
    if row["prompts"] < fewest(alpha):
        told = f"{row['prompts']} prompts in common, and {fewest(alpha)} are the fewest of which a unanimous result is no chance"
        return row | {"verdict": f"not comparable: {told}"}
    return row | {"p": sign_test(row["prompts_won"], row["prompts_lost"])}


def _counted(name: str, gained: np.ndarray) -> dict[str, int]:
    """Differences that are nothing but the rounding of a sum are ties."""
    close = np.isclose(gained, 0, atol=1e-12)
    won, lost = int((gained[~close] > 0).sum()), int((gained[~close] < 0).sum())
    return {f"{name}_won": won, f"{name}_tied": int(close.sum()), f"{name}_lost": lost}


def _verdict(row: Mapping[str, Any], alpha: float) -> tuple[str | None, str]:
    if row["p_holm"] > alpha:
        return None, "too close to call"
    name = row["a"] if row["prompts_won"] > row["prompts_lost"] else row["b"]
    return name, f"{name} better"
