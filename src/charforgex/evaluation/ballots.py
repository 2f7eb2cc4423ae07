"""What stands in a study's key and in the votes of one rater: two JSON files, of which the second one comes from strangers.

The key stays with whoever asks; the page and the votes know pairs by numbers alone, so neither tells who is who.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.preference import Answer

KEY = "vote_key.json"
MOST = 8 * 2**20  # bytes of a file: 50,000 votes have 3 MB
LONGEST = 80  # letters of a rater's name
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """What was shown once. `repeats` names the pair that this one shows again, sides changed, to see whether raters repeat themselves."""

    id: str
    left: str
    right: str
    prompt: str
    seed: int | None = None
    repeats: str | None = None


@dataclass(frozen=True)
class Key:
    """A study: who is on which side, and what was planned before the first vote: `raters` that vote on all pairs, the chance `alpha` of a
    false claim, and the `margin` around a share of one half within which contestants count as equally good."""

    format: Literal["charforgex-vote-key-1"]
    study: str
    question: str
    contestants: list[str]
    raters: Annotated[int, Range(at_least=1)]
    alpha: Annotated[float, Range(above=0, below=1)]
    margin: Annotated[float, Range(above=0, below=0.5)]
    pairs: list[Pair]


@dataclass(frozen=True)
class Vote:
    pair: str
    choice: Literal["left", "right", "tie"]
    milliseconds: Annotated[int, Range(at_least=0)]  # since both pictures were seen


@dataclass(frozen=True)
class Ballot:
    """All votes of one rater, in the order in which they were cast."""

    format: Literal["charforgex-votes-1"]
    study: str
    rater: str
    saved: str  # when, in ISO 8601, by the rater's clock
    votes: list[Vote]


@dataclass(frozen=True)
class Claim:
    """Said of two contestants: which one is better, or that they are close."""

    a: str
    b: str
    answer: Answer


@dataclass(frozen=True)
class Look:
    """One analysis of votes that were not analysed before. `alpha` is what it could spend."""

    votes: int
    fraction: float
    alpha: float
    votes_sha256: str
    claims: list[Claim]


@dataclass(frozen=True)
class Looks:
    looks: list[Look]


def read_looks(path: Path, study: str) -> list[Look]:
    """Those of an earlier result in `path`; none where there is no such file, or it is of another study. Raises DataError."""
    if not path.is_file():
        return []
    found = strict_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("study"), str):
        raise DataError(f"{path} is no result of votes; move it away.")
    return _bound(path, {"looks": found.get("looks")}, Looks).looks if found["study"] == study else []


def read_key(folder: Path) -> Key:
    """Raises DataError."""
    path = folder / KEY
    if not path.is_file():
        raise DataError(
            f"{folder} has no {KEY}, so nobody knows who was on which side; say page=<the folder in which vote.html was written>."
        )
    key = _read(path, Key)
    ids = {pair.id for pair in key.pairs if pair.repeats is None}
    for pair in key.pairs:
        if {pair.left, pair.right} - set(key.contestants) or pair.left == pair.right or (pair.repeats or pair.id) not in ids:
            raise DataError(f"{path}: pair {pair.id} is not one of two contestants of this study; write the page again.")
    return key


def read_ballots(paths: Sequence[Path], key: Key) -> list[Ballot]:
    """One of each rater. Raises DataError for what is no file of votes, is of another study, or is by one rater twice."""
    known, found = {pair.id for pair in key.pairs}, {}
    for path in paths:
        if not path.is_file():
            raise DataError(f'{path} is no file; it is what the page\'s button "Save votes" makes.')
        ballot = _read(path, Ballot)
        if ballot.study != key.study:
            raise DataError(f"{path} has votes of the study {show(ballot.study)}, and the page is of {key.study}; leave it out.")
        name = ballot.rater.strip()
        if not name or len(name) > LONGEST or not name.isprintable():
            raise DataError(f"{path}: the rater's name {show(name)} is not one of 1 to {LONGEST} printable letters.")
        if name.casefold() in found:
            raise DataError(f"{path} and {found[name.casefold()][0]} are both by {name}: keep the later one, which has all votes.")
        if not ballot.votes:
            raise DataError(f"{path} has no votes; leave it out.")
        seen: set[str] = set()
        for vote in ballot.votes:
            if vote.pair not in known or vote.pair in seen:
                raise DataError(f"{path}: pair {show(vote.pair)} {'is voted on twice' if vote.pair in seen else 'is not on the page'}.")
            seen.add(vote.pair)
        found[name.casefold()] = path, ballot
    return [ballot for _, ballot in found.values()]


def show(value: str) -> str:
    """A stranger's text for one line of a terminal."""
    return ascii(value if len(value) <= LONGEST else f"{value[:LONGEST]}...")


def strict_json(path: Path) -> Any:
    """Raises DataError for what is too large, is no JSON, has a name twice, a number that is none, or is nested without end."""
    try:
        if path.stat().st_size > MOST:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes, and more than {MOST:,} are not read.")
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refused, object_pairs_hook=_once)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {type(error).__name__}: {show(str(error))}") from error


def _refused(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _read(path: Path, kind: type[T]) -> T:
    found = strict_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__} and not the object that the page saves.")
    return _bound(path, found, kind)


def _bound(path: Path, found: dict[str, Any], kind: type[T]) -> T:
    try:
        return bind(kind, found, "")
    except ConfigError as error:
        lines = str(error).splitlines()
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise DataError(f"{path} is not as it was written: {show(lines[0])}{more}") from error
