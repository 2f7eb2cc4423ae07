"""What a dataset is like as a whole: how good, how varied, how one-sided, and whether more pictures would help. Numbers only; `advice`
says what follows from them, `report` shows them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from charforgex.binding import Range, not_among
from charforgex.curation.facts import ANSWERS, UNKNOWN
from charforgex.draws import seed_of
from charforgex.errors import ConfigError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 24
EXACT = 50_000  # outcomes that are still enumerated
DRAWS = 9_999
BLOCK = 4096  # pictures at a time
Share = Annotated[float, Range(at_least=0, at_most=1)]


@dataclass(frozen=True)
class AnalysisSettings:
    wished: dict[str, dict[str, Annotated[float, Range(above=0)]]] = field(default_factory=dict)
    labels: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    margin: Share = 0.5
    near: Share = 0.1
    dominant: Share = 0.7
    least: Annotated[int, Range(at_least=1)] = 15
    gallery: Annotated[int, Range(at_least=1)] = 40

    def __post_init__(self):
        options = ANSWERS | {question: tuple(answers) for question, answers in self.labels.items()}
        for question, shares in self.wished.items():
            if question not in options:
                raise ConfigError(not_among(f"curation.analysis.wished.{question}", question, list(options)))
            for answer in shares:
                if answer not in options[question]:
                    raise ConfigError(not_among(f"curation.analysis.wished.{question}.{answer}", answer, options[question]))
            if len(shares) < 2:
                raise ConfigError(f"curation.analysis.wished.{question} names {len(shares)} answer; give shares of two or more of them.")


class Limit(NamedTuple):
    value: float
    side: Literal["at least", "at most"]


def limits(settings: object) -> dict[str, Limit]:
    """The limits among the fields of a dataclass of settings: `min_sharpness=0.4` is `sharpness`, at least 0.4."""
    sides: dict[str, Literal["at least", "at most"]] = {"min_": "at least", "max_": "at most"}
    named = [(option.name, getattr(settings, option.name)) for option in fields(settings)]  # type: ignore[arg-type]
    return {name[4:]: Limit(value, sides[name[:4]]) for name, value in named if name[:4] in sides and value is not None}


def analyse(
    facts: Sequence[Mapping[str, str]],
    features_ND: np.ndarray | None,
    kept: Mapping[str, np.ndarray],
    rest: Mapping[str, np.ndarray],
    bounds: Mapping[str, Limit],
    settings: AnalysisSettings,
    answers: Mapping[str, Sequence[str]] = ANSWERS,
) -> dict[str, Any]:
    """All of it, plain enough for JSON. `facts` and `features_ND` are of the kept pictures, in one order; `kept` and `rest` are the scores
    by name, of them and of what was set aside."""
    from charforgex.curation.sizing import learning_curve, variety_curve

    found = {question: [fact.get(question, UNKNOWN) for fact in facts] for question in answers}
    diversity: dict[str, Any] = {"coverage": {question: coverage(found[question], answers[question]) for question in answers}}
    size = None
    if features_ND is not None and len(features_ND):
        diversity["vendi"] = vendi(features_ND)
        size = learning_curve(*variety_curve(features_ND)) | {"have": len(features_ND)}
    return {
        "num_pictures": len(facts),
        "quality": {name: distribution(kept[name], rest.get(name, ()), bounds.get(name), settings.near) for name in kept},
        "diversity": diversity,
        "bias": {
            question: bias(diversity["coverage"][question]["counts"], settings.wished.get(question))
            for question in _comparable(found, settings)
        },
        "size": size,
    }


def _comparable(found: Mapping[str, Sequence[str]], settings: AnalysisSettings) -> list[str]:
    """Questions that two pictures at least answer, with an answer that is wished at all."""
    return [
        question
        for question, answers in found.items()
        if sum(answer != UNKNOWN and answer in settings.wished.get(question, {answer: 1}) for answer in answers) >= 2
    ]


# ---- quality ----


def distribution(kept: Sequence[float], rest: Sequence[float] = (), limit: Limit | None = None, near: float = 0.1) -> dict[str, Any]:
    """Percentiles of the kept pictures' scores; histograms of theirs and of the others' over the same bins (outliers in the last ones); and
    how many kept ones lie within `near` of the limit, in shares of it."""
    kept_N, all_N = np.asarray(kept, float), np.concatenate([np.asarray(kept, float), np.asarray(rest, float)])
    if not len(all_N):
        return {"count": 0}
    low, high = np.percentile(all_N, [0.5, 99.5])
    if limit is not None:
        low, high = min(low, limit.value), max(high, limit.value)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    found: dict[str, Any] = {
        "count": len(kept_N),
        "edges": edges.tolist(),
        "kept": np.histogram(kept_N.clip(edges[0], edges[-1]), edges)[0].tolist(),
        "rest": np.histogram(all_N[len(kept_N) :].clip(edges[0], edges[-1]), edges)[0].tolist(),
    }
    if len(kept_N):
        found["mean"] = float(kept_N.mean())
        found["percentiles"] = dict(zip(map(str, PERCENTILES), np.percentile(kept_N, PERCENTILES).tolist(), strict=True))
    if limit is not None:
        found |= {"limit": limit.value, "side": limit.side}
        found["near"] = int((np.abs(kept_N - limit.value) <= near * abs(limit.value)).sum())
    return found


# ---- diversity ----


def vendi(features_ND: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """How many different pictures a set amounts to, 1 to N: the Vendi score (Friedman & Dieng 2023) of the cosine kernel.

    exp of the entropy of the eigenvalues of diag(p)^1/2 K diag(p)^1/2, p = 1 / N or `weights_N` normalised (their probability-weighted
    form). Exact at any N: where N > D, the same eigenvalues come from the D x D matrix.
    """
    count, width = features_ND.shape
    chances = _probabilities(count, weights_N)
    if count <= width:
        scaled = _unit(features_ND) * np.sqrt(chances)[:, None]
        return _effective(np.linalg.eigvalsh(scaled @ scaled.T))
    matrix = np.zeros((width, width))
    for start in range(0, count, BLOCK):
        unit = _unit(features_ND[start : start + BLOCK])
        matrix += (unit * chances[start : start + BLOCK, None]).T @ unit
    return _effective(np.linalg.eigvalsh(matrix))


def _unit(features_ND: np.ndarray) -> np.ndarray:
    exact = np.asarray(features_ND, np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def _probabilities(count: int, weights_N: np.ndarray | None) -> np.ndarray:
    weights = np.ones(count) if weights_N is None else np.asarray(weights_N, np.float64)
    return weights / weights.sum()


def _effective(eigenvalues: np.ndarray) -> float:
    positive = eigenvalues[eigenvalues > 1e-12]  # 0 ln 0 = 0
    return float(np.exp(-(positive * np.log(positive)).sum()))


def coverage(found: Iterable[str], options: Sequence[str]) -> dict[str, Any]:
    """Counts of each possible answer, those that no picture gives, and how even it is: entropy over the highest possible, 0 to 1."""
    counts = Counter(found)
    numbers = np.array([counts[option] for option in options], float)
    shares = numbers[numbers > 0] / max(numbers.sum(), 1)
    return {
        "counts": {option: counts[option] for option in options},
        "unknown": counts.total() - int(numbers.sum()),
        "evenness": float(-(shares * np.log(shares)).sum() / math.log(len(options))) + 0.0,
        "empty": [option for option in options if not counts[option]],
    }


# ---- bias ----


def bias(counts: Mapping[str, int], wished: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Pearson's chi-square test of the counts against the wished shares (None: all equal), and Cramer's V, sqrt(chi2 / (n (k - 1))).

    Where an expected count is below 5 the test's p means little: `p` is None, `warning` says so, and `alternative` has the p of the same
    statistic under the multinomial distribution, exact, or of `DRAWS` draws where outcomes are too many. Answers not among those wished are
    left out.
    """
    from scipy import stats

    by_wish, wished = wished is not None, wished or dict.fromkeys(counts, 1.0)
    observed = np.array([counts.get(answer, 0) for answer in wished], float)
    share = np.array(list(wished.values()), float) / sum(wished.values())
    total = int(observed.sum())
    expected = total * share
    test = stats.chisquare(observed, expected)
    result: dict[str, Any] = {
        "wished": by_wish,
        "expected": dict(zip(wished, expected.tolist(), strict=True)),
        "statistic": float(test.statistic),
        "freedom": len(share) - 1,
        "cramers_v": math.sqrt(test.statistic / (total * (len(share) - 1))),
        "p": float(test.pvalue),
    }
    if expected.min() >= 5:
        return result
    least = f"{expected.min():.1f} of {total} pictures would be expected of one answer; chi-square needs 5"
    return result | {"p": None, "warning": least, "alternative": _by_outcomes(observed, share, test.statistic)}


def p_value(result: Mapping[str, Any]) -> float:
    return result["p"] if result["p"] is not None else result["alternative"]["p"]


def _by_outcomes(observed: np.ndarray, share: np.ndarray, statistic: float) -> dict[str, Any]:
    from scipy import stats

    total, kinds = int(observed.sum()), len(share)
    expected = total * share
    least = statistic * (1 - 1e-9)  # outcomes as extreme as the one seen, in spite of rounding
    if math.comb(total + kinds - 1, kinds - 1) <= EXACT:
        bars = np.array(list(itertools.combinations(range(total + kinds - 1), kinds - 1)))  # stars and bars
        ends = np.column_stack([np.full(len(bars), -1), bars, np.full(len(bars), total + kinds - 1)])
        outcomes = np.diff(ends, axis=1) - 1
        extreme = ((outcomes - expected) ** 2 / expected).sum(axis=1) >= least
        return {"method": "exact", "p": min(1.0, float(stats.multinomial.pmf(outcomes[extreme], total, share).sum()))}
    draws = np.random.default_rng(seed_of("bias", *observed, *share)).multinomial(total, share, DRAWS)
    extreme = ((draws - expected) ** 2 / expected).sum(axis=1) >= least
    return {"method": "monte carlo", "draws": DRAWS, "p": float((extreme.sum() + 1) / (DRAWS + 1))}
