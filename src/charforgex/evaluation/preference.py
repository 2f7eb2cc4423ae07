"""The statistics of votes: who is preferred, do raters agree, is it enough. Arrays in, numbers out.

A vote for `a` counts +1, one for `b` -1 and a tie 0; a prompt's net is their sum over pictures and raters, an int. Prompts are the unit:
what raters say of one prompt, and what its seeds have in common, is summed before anything is tested, so no independence is assumed
within it. A claim is thus about further prompts in the eyes of these raters. Shapes: G prompts, K contestants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from charforgex.evaluation.ab import fewest, holm
from charforgex.evaluation.intervals import group_weights, interval

PRIOR = 0.5  # of a win each way between any two contestants: strengths stay finite where one never lost
Answer = Literal["a", "b", "close"]


# ---- strengths ----


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths (..., K) of mean 0 from `wins` (..., K, K), where wins[i, j] counts votes for i over j and ties as half a win each way.

    Hunter's MM algorithm (2004, eq. 3). Halves rather than Davidson's (1970) parameter for ties: what is then modelled is the share of
    votes with ties halved, which is what the verdicts test; and how readily people say "equal" differs from rater to rater, which one
    parameter for all would misfit. Intervals come from drawing prompts anew and never from the curvature, which halves would distort.
    """
    count = wins.shape[-1]
    wins = (wins + PRIOR) * (1 - np.eye(count))
    together = wins + wins.swapaxes(-1, -2)
    won = wins.sum(-1)
    strength = np.ones(won.shape)
    for _ in range(10_000):
        new = won / (together / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        moved = np.abs(np.log(new / strength)).max()
        strength = new
        if moved < 1e-9:
            break
    return np.log(strength)


# ---- raters ----


def krippendorff(answers: np.ndarray, nominal: bool = False) -> float:
    """Agreement of `answers` (raters, units), NaN where there is none: 1 is full, 0 is chance, below 0 against each other.

    Krippendorff's alpha (Content Analysis, 2004, ch. 11): answers may be missing, of any number of raters. Answers are points on a line (b,
    tie, a: to say "equal" against "a" is a smaller quarrel than "b"), or mere names if `nominal`. NaN where no two differ or meet.
    """
    answers = answers[:, np.isfinite(answers).sum(0) > 1]
    if not answers.size:
        return math.nan
    values = np.unique(answers[np.isfinite(answers)])
    counts = (answers[:, :, None] == values).sum(0).astype(np.float64)  # (units, values)
    apart = (values[:, None] != values).astype(np.float64) if nominal else (values[:, None] - values) ** 2
    weights = 1 / (counts.sum(1) - 1)
    observed = np.einsum("uc,uk,ck,u->", counts, counts, apart, weights)
    totals = counts.sum(0)
    expected = totals @ apart @ totals / (totals.sum() - 1)
    return float(1 - observed / expected) if expected > 0 else math.nan


def alike(answers: np.ndarray) -> float:
    """How often two raters say the same of a unit that both answered, over all such twos; NaN where there are none."""
    values = np.unique(answers[np.isfinite(answers)])
    counts = (answers[:, :, None] == values).sum(0)
    both = (counts.sum(1) * (counts.sum(1) - 1)).sum()
    return float((counts * (counts - 1)).sum() / both) if both else math.nan


# ---- is it enough ----


def sign_flip(net: np.ndarray) -> float:
    """Two-sided exact p of prompts' nets (G,), int: how often coins for their signs make the sum so far from 0 (Fisher 1935, Pitman 1937).

    Exact where a prompt is as likely to favour one contestant as the other, by as much. All 2^G signs are counted: a coin's characteristic
    function is a cosine, that of the sum is their product, and its Fourier transform has the chances, to the rounding of float64.
    """
    sizes, times = np.unique(np.abs(net[net != 0]), return_counts=True)
    span = 2 * int(sizes @ times) + 1
    angles = 2 * np.pi / span * np.arange(span // 2 + 1)
    product = np.ones_like(angles)
    for size, count in zip(sizes.tolist(), times.tolist(), strict=True):
        product *= np.cos(size * angles) ** count
    chances = np.fft.irfft(product, span)  # of the sums 0, 1, ..., span // 2, -span // 2, ..., -1
    far = np.minimum(np.arange(span), span - np.arange(span)) >= abs(int(net.sum()))
    return float(np.clip(chances[far].sum(), 0.5 ** (times.sum() - 1), 1))


def share_interval(net: np.ndarray, votes: np.ndarray, alpha: float) -> tuple[float, float]:
    """Where the share of votes for a lies, ties halved, but for a chance of `alpha`: Student's t on prompts (G,), a ratio of sums."""
    from scipy.special import stdtrit

    mean, spread = _ratio(net, votes)
    if not math.isfinite(spread):
        return 0.0, 1.0
    reach = float(stdtrit(len(net) - 1, 1 - alpha / 2)) * spread / math.sqrt(len(net))
    return max(0.0, (1 + mean - reach) / 2), min(1.0, (1 + mean + reach) / 2)


def bootstrap_share(net: np.ndarray, votes: np.ndarray) -> tuple[float, float, float]:
    """The share of votes for a, ties halved, and its 95 % interval over prompts (G,); NaN of a single one."""
    estimate = (1 + float(net.sum() / votes.sum())) / 2
    if len(net) < 2:
        return estimate, math.nan, math.nan
    weights = group_weights(np.arange(len(net)), key="votes")
    return estimate, *interval((1 + weights @ net / (weights @ votes)) / 2)


def _ratio(net: np.ndarray, votes: np.ndarray) -> tuple[float, float]:
    """Net per vote, and its spread between prompts: the residuals' standard deviation in units of a prompt's mean votes (Cochran 1977)."""
    if len(net) < 2:
        return (float(net.sum() / votes.sum()) if len(net) else 0.0), math.inf
    mean = float(net.sum() / votes.sum())
    return mean, float((net - mean * votes).std(ddof=1) / votes.mean())


def spent(fraction: float, alpha: float) -> float:
    """How much of `alpha` may be spent when this fraction of the planned votes is in: little early, nearly all of it at the end.

    Lan and DeMets (1983), after O'Brien and Fleming. A look tests at what was spent since the look before it; by the union bound false
    claims at all looks together then stay within `alpha` whatever the looks have in common, and however many there are.
    """
    from scipy.special import ndtr, ndtri

    fraction = min(1.0, fraction)
    return float(2 * ndtr(ndtri(alpha / 2) / math.sqrt(fraction))) if fraction > 0 else 0.0


def level_now(fraction: float, earlier: Iterable[float], alpha: float) -> float:
    """What a look at this fraction of the plan may spend, after looks at earlier ones; 0 where they have spent it."""
    return max(0.0, spent(fraction, alpha) - max((spent(before, alpha) for before in earlier), default=0.0))


def judged(nets: Sequence[np.ndarray], votes: Sequence[np.ndarray], alpha: float, margin: float) -> list[Answer | None]:
    """What one look at all pairs of contestants may claim at level `alpha`; the lists are over pairs.

    "a" or "b" is preferred: the sign-flip test with Holm's correction. "close": the share of votes is within `margin` of a half, by an
    interval of level alpha / pairs, both ends at once (the two one-sided tests of Schuirmann 1987). Each kind of claim keeps to `alpha`.
    """
    found: list[Answer | None] = []
    for net, count, p in zip(nets, votes, holm([sign_flip(net) for net in nets]), strict=True):
        if p <= alpha:
            found.append("a" if net.sum() > 0 else "b")
        elif alpha > 0 and len(net) >= fewest(alpha):
            low, high = share_interval(net, count, alpha / len(nets))
            found.append("close" if 0.5 - margin < low and high < 0.5 + margin else None)
        else:
            found.append(None)
    return found


def votes_needed(net: np.ndarray, votes: np.ndarray, alpha: float, power: float = 0.8) -> int | None:
    """Votes with which the share of votes so far would be told from a half with chance `power`, on prompts that differ as these do and have
    as many votes each. None where the share is a half, or there are less than two prompts."""
    from scipy.special import ndtri

    mean, spread = _ratio(net, votes)
    if not math.isfinite(spread) or mean == 0:
        return None
    # coins for the signs spread as far as the nets do around 0, and the nets themselves around their mean
    prompts = ((ndtri(1 - alpha / 2) * math.hypot(spread, mean) + ndtri(power) * spread) / mean) ** 2
    return math.ceil(max(prompts, fewest(alpha)) * votes.mean())
