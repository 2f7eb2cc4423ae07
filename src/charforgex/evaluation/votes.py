"""`charforgex votes`: what several people's votes say of the contestants, how far they agree, and whether it is time to stop asking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from charforgex.config import bind
from charforgex.errors import ConfigError
from charforgex.evaluation import preference
from charforgex.evaluation.ab import fewest, holm
from charforgex.evaluation.ballots import Ballot, Claim, Key, Look, Pair, read_ballots, read_key, read_looks
from charforgex.evaluation.intervals import bootstrap, group_weights, interval
from charforgex.runs import plain, write_json

RESULT = "votes_result.json"
DRAWS = 500  # for the interval of agreement, which is computed anew in each
FEW = 4  # repeated pairs, of which nothing is said of a rater


@dataclass(frozen=True, kw_only=True)
class Settings:
    votes: str | list[str]
    page: Path

    @property
    def paths(self) -> list[Path]:
        paths = [self.votes] if isinstance(self.votes, str) else self.votes
        if not paths:
            raise ConfigError("votes=[] names no file; say votes=<what the page saved>.json.")
        return [Path(path).expanduser() for path in paths]


@dataclass(frozen=True)
class Cast:
    """One vote: `chosen` is a contestant, None for a tie."""

    rater: str
    pair: Pair
    chosen: str | None

    def towards(self, a: str) -> int:
        """1 for a, -1 for the other, 0 for a tie."""
        return 0 if self.chosen is None else 1 if self.chosen == a else -1


@dataclass(frozen=True)
class Tally:
    """Votes on a and b; the arrays are int64, over prompts."""

    a: str
    b: str
    net: np.ndarray
    votes: np.ndarray
    tied: np.ndarray


def votes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Prints tables, writes votes_result.json beside the key, and returns what stands there. Raises DataError."""
    from charforgex.evaluation.votes_table import show

    settings = bind(Settings, cfg, "")
    key = read_key(settings.page)
    path = settings.page / RESULT
    found = analyse(key, read_ballots(settings.paths, key), read_looks(path, key.study))
    write_json(path, found)
    show(found, path)
    return found


def analyse(key: Key, ballots: Sequence[Ballot], earlier: Sequence[Look] = ()) -> dict[str, Any]:
    """`earlier` are the looks of the result before this one: each look at new votes spends some of the study's alpha."""
    pairs = {pair.id: pair for pair in key.pairs}
    firsts = [pair for pair in key.pairs if pair.repeats is None]
    cast = [
        Cast(ballot.rater.strip(), pair, None if vote.choice == "tie" else getattr(pair, vote.choice))
        for ballot in sorted(ballots, key=lambda ballot: ballot.rater.strip())
        for vote in ballot.votes
        for pair in [pairs[vote.pair]]
    ]
    counted = sorted((vote for vote in cast if vote.pair.repeats is None), key=lambda vote: (vote.rater, vote.pair.id))
    tallies = _tallies(key, counted)
    look = _look(key, counted, key.raters * len(firsts), tallies, earlier)
    looks = [*earlier, *([] if look in earlier else [look])]
    rows = _pairs(key, tallies, looks)
    raters = _raters(ballots, cast)
    return {
        "study": key.study, "question": key.question, "stop": all(row["state"] != "go on" for row in rows),
        "ranking": _ranking(key, tallies, counted), "pairs": rows, "raters": raters, "agreement": _agreement(counted),
        "plan": {"raters": key.raters, "votes": key.raters * len(firsts), "alpha": key.alpha, "margin": key.margin},
        "looks": [asdict(one) for one in looks], "notes": _notes(key, look, raters),
    }  # fmt: skip


# ---- the verdicts ----


def _tallies(key: Key, cast: Sequence[Cast]) -> list[Tally]:
    """Of every two contestants, in the key's order, the prompts that have votes on them."""
    found = []
    for a, b in combinations(key.contestants, 2):
        prompts: dict[str, list[int]] = {}
        for vote in cast:
            if {vote.pair.left, vote.pair.right} == {a, b}:
                prompts.setdefault(vote.pair.prompt, []).append(vote.towards(a))
        said = [np.array(prompts[prompt]) for prompt in sorted(prompts)]
        sums = [[int(one.sum()), len(one), int((one == 0).sum())] for one in said]
        found.append(Tally(a, b, *np.array(sums, np.int64).reshape(-1, 3).T))
    return found


def _look(key: Key, cast: Sequence[Cast], planned: int, tallies: Sequence[Tally], earlier: Sequence[Look]) -> Look:
    """What these votes allow to claim, given the looks before. The same votes are the same look."""
    digest = hashlib.sha256("\n".join(repr((vote.rater, vote.pair.id, vote.chosen)) for vote in cast).encode()).hexdigest()
    if same := [look for look in earlier if look.votes_sha256 == digest]:
        return same[0]
    fraction = len(cast) / planned
    alpha = preference.level_now(fraction, [look.fraction for look in earlier], key.alpha)
    answers = preference.judged([tally.net for tally in tallies], [tally.votes for tally in tallies], alpha, key.margin)
    claims = [Claim(tally.a, tally.b, answer) for tally, answer in zip(tallies, answers, strict=True) if answer]
    return Look(len(cast), fraction, alpha, digest, claims)


def _pairs(key: Key, tallies: Sequence[Tally], looks: Sequence[Look]) -> list[dict[str, Any]]:
    claims: dict[tuple[str, str], str] = {}
    for claim in (claim for look in looks for claim in look.claims):
        claims.setdefault((claim.a, claim.b), claim.answer)  # the first one stands: what later votes say was no part of its promise
    over = max(look.fraction for look in looks) >= 1
    p_values = [preference.sign_flip(tally.net) for tally in tallies]
    rows = []
    for tally, p, p_holm in zip(tallies, p_values, holm(p_values), strict=True):
        count, tied = int(tally.votes.sum()), int(tally.tied.sum())
        won = (count - tied + int(tally.net.sum())) // 2
        row: dict[str, Any] = {"a": tally.a, "b": tally.b, "prompts": len(tally.net), "votes": count}
        row |= {"a_votes": won, "tied": tied, "b_votes": count - tied - won, "share": None, "votes_needed": None}
        if count:
            row["share"] = dict(zip(("estimate", "low", "high"), preference.bootstrap_share(tally.net, tally.votes), strict=True))
            row["votes_needed"] = preference.votes_needed(tally.net, tally.votes, key.alpha / len(tallies))
        rows.append(row | {"p": p, "p_holm": p_holm} | _verdict(row, claims.get((tally.a, tally.b)), over, key.margin))
    return rows


def _verdict(row: Mapping[str, Any], claim: str | None, over: bool, margin: float) -> dict[str, Any]:
    if claim in ("a", "b"):
        return {"state": "enough", "better": row[claim], "verdict": f"{row[claim]} better"}
    if claim == "close":
        return {"state": "close", "better": None, "verdict": f"too close to call: within {margin:.0%} of even"}
    needed = (
        f"about {row['votes_needed']:,} votes would tell such a share from even" if row["votes_needed"] else "nothing points either way"
    )
    if over:
        return {"state": "close", "better": None, "verdict": f"too close to call: the planned votes are in; {needed}"}
    return {"state": "go on", "better": None, "verdict": f"go on: {needed}"}


def _ranking(key: Key, tallies: Sequence[Tally], cast: Sequence[Cast]) -> list[dict[str, Any]]:
    """Bradley-Terry strengths, strongest first; None for one without votes. A difference of 1 is a share of 73 %, of 2 is 88 %."""
    place = {name: i for i, name in enumerate(key.contestants)}
    prompts = {prompt: i for i, prompt in enumerate(sorted({vote.pair.prompt for vote in cast}))}
    wins = np.zeros((len(prompts), len(place), len(place)))
    for vote in cast:
        a, b = place[vote.pair.left], place[vote.pair.right]
        share = (1 + vote.towards(vote.pair.left)) / 2
        wins[prompts[vote.pair.prompt], a, b] += share
        wins[prompts[vote.pair.prompt], b, a] += 1 - share
    strengths = preference.bradley_terry(wins.sum(0))
    drawn = None
    if len(prompts) > 1:
        drawn = preference.bradley_terry(np.tensordot(group_weights(np.arange(len(prompts)), key="votes"), wins, 1))
    rows = []
    for name, i in place.items():
        count = sum(int(tally.votes.sum()) for tally in tallies if name in (tally.a, tally.b))
        row: dict[str, Any] = {"contestant": name, "votes": count, "share": None, "strength": None, "low": None, "high": None}
        if count:
            low, high = interval(drawn[:, i]) if drawn is not None else (None, None)
            row |= {"share": wins[:, i].sum() / count, "strength": strengths[i], "low": low, "high": high}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["strength"] is None, -(row["strength"] or 0)))


# ---- the raters ----


def _raters(ballots: Sequence[Ballot], cast: Sequence[Cast]) -> list[dict[str, Any]]:
    """Of each: how many votes and how quick, whether one side is preferred, and whether a pair seen again is answered again as before.

    Which contestant is on which side was a coin's choice and is even for every two contestants, so whoever looks at pictures alone
    chooses the left one half of the time, whatever the pictures are.
    """
    from scipy.stats import binomtest

    rows = []
    for ballot in sorted(ballots, key=lambda ballot: ballot.rater.strip()):
        name = ballot.rater.strip()
        own = [vote for vote in cast if vote.rater == name]
        sided = [vote.chosen == vote.pair.left for vote in own if vote.chosen is not None]
        said = {vote.pair.id: vote.chosen for vote in own}
        again = [vote.chosen == said[vote.pair.repeats] for vote in own if vote.pair.repeats in said]
        row = {
            "name": name, "votes": len(own), "tied": len(own) - len(sided),
            "seconds": float(np.median([vote.milliseconds for vote in ballot.votes])) / 1000,
            "left": {"count": sum(sided), "of": len(sided), "p": float(binomtest(sum(sided), len(sided)).pvalue) if sided else 1.0},
            "again": None,
        }  # fmt: skip
        if again:
            low, high = binomtest(sum(again), len(again)).proportion_ci()
            row["again"] = {"same": sum(again), "of": len(again), "low": float(low), "high": float(high)}
        rows.append(row)
    for row, p in zip(rows, holm([row["left"]["p"] for row in rows]), strict=True):
        row["left"]["p_holm"] = p
    return rows


def _agreement(cast: Sequence[Cast]) -> dict[str, Any]:
    """How often two raters say the same of a pair, and Krippendorff's alpha, which takes off what chance would give: where nearly all
    votes are for one contestant that is nearly all, and alpha is low though everybody agrees. With an interval over prompts.
    """
    raters = {name: i for i, name in enumerate(dict.fromkeys(vote.rater for vote in cast))}
    shown = {vote.pair.id: vote.pair for vote in cast}
    units = {pair: i for i, pair in enumerate(sorted(shown))}
    answers = np.full((len(raters), len(units)), np.nan)
    for vote in cast:
        answers[raters[vote.rater], units[vote.pair.id]] = vote.towards(min(vote.pair.left, vote.pair.right))
    found: dict[str, Any] = {"raters": len(raters), "pairs": int((np.isfinite(answers).sum(0) > 1).sum())}
    found |= {"same": preference.alike(answers), "alpha": preference.krippendorff(answers)}
    groups = np.array([shown[pair].prompt for pair in units])
    low, high = bootstrap(lambda chosen: preference.krippendorff(answers[:, chosen]), groups, DRAWS, "votes")
    return plain(found | {"low": low, "high": high})


def _notes(key: Key, look: Look, raters: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    prompts = len({pair.prompt for pair in key.pairs})
    if prompts < fewest(key.alpha):
        notes.append(f"The page has {prompts} prompts; with fewer than {fewest(key.alpha)} not even unanimous votes prove anything.")
    if look.alpha == 0:
        notes.append("An earlier look had seen as many votes: nothing new is claimed of these.")
    if len(raters) == 1:
        notes.append("One rater: whose taste it is cannot be told.")
    for row in raters:
        again, left = row["again"], row["left"]
        if again and again["of"] > FEW and 2 * again["same"] <= again["of"]:
            told = f"{row['name']} answered {again['of'] - again['same']} of {again['of']} pairs differently when they came again"
            notes.append(f"{told}; without that file the result may be clearer.")
        if left["p_holm"] <= key.alpha:
            side, count = ("left", left["count"]) if 2 * left["count"] > left["of"] else ("right", left["of"] - left["count"])
            notes.append(f"{row['name']} chose the {side} picture {count} of {left['of']} times; sides are even, so this only adds noise.")
    return notes
