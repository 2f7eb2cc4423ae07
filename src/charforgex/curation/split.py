"""Which pictures train and which are held out, as a function of what the pictures are.

Pictures are ranked by a hash of their content: the first validate (`val`), the last are kept for the end (`test`), the rest trains. Adding
pictures therefore moves few of the others, and none from `val` to `test`. What is nearly the same picture, or of one scene of a video,
goes to one side as a whole: a validation picture whose twin was trained on measures memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from charforgex.binding import Range
from charforgex.errors import ConfigError, DataError

MIN_TRAIN = 2
FRAME = re.compile(r"(?P<video>.+)!/(?P<seconds>\d+\.\d+)s")


@dataclass(frozen=True)
class SplitSettings:
    """Below 1 a share of the pictures, from 1 on a number of them."""

    val: Annotated[float, Range(at_least=0)] = 0.15
    test: Annotated[float, Range(at_least=0)] = 0.0
    scene_gap: Annotated[float, Range(at_least=0)] = 10.0
    stratify: bool = True

    def __post_init__(self):
        for name in ("val", "test"):
            if (size := getattr(self, name)) >= 1 and not float(size).is_integer():
                raise ConfigError(
                    f"curation.split.{name}={size:g} is neither a share below 1 nor a whole number of pictures; try {round(size)}."
                )
        if self.val < 1 and self.test < 1 and self.val + self.test >= 1:
            raise ConfigError(
                f"curation.split.val={self.val:g} and curation.split.test={self.test:g} leave nothing for training; keep their sum below 1."
            )


class Part(NamedTuple):
    """One picture to be placed. Those of one `group` stay together (None: alone); `stratum` is what each side should have its share of."""

    sha256: str
    group: int | None = None
    stratum: str = ""


class Split(NamedTuple):
    """ "train", "val" or "test" for each picture, and sentences on what could not be done as asked."""

    sides: list[str]
    notes: list[str]


def rank(sha256: str) -> str:
    """Where a picture stands in the order in which pictures are held out."""
    return hashlib.sha256(f"split/{sha256}".encode()).hexdigest()


def split(parts: Sequence[Part], settings: SplitSettings) -> Split:
    """Deterministic, and the same whatever order the pictures come in. Raises DataError if asked for more pictures than can be spared.

    Of three and more pictures at least one is held out for a share above 0, two always train. Sizes are met as nearly as whole groups
    allow without exceeding them. A stratum gets its proportional part if that is a whole picture at least; smaller ones share one.
    """
    num_val, num_test = sizes(len(parts), settings)
    units = _units(parts)
    if not settings.stratify:
        units = [unit._replace(stratum="") for unit in units]
    val = _take(sorted(units), num_val)
    taken = {unit.rank for unit in val}
    test = _take([unit for unit in sorted(units, reverse=True) if unit.rank not in taken], num_test)

    sides = ["train"] * len(parts)
    notes = []
    for name, wanted, chosen in (("val", num_val, val), ("test", num_test, test)):
        for unit in chosen:
            for index in unit.members:
                sides[index] = name
        if (found := sum(len(unit.members) for unit in chosen)) < wanted:
            notes.append(f"{found} instead of {wanted} pictures are in {name}: groups of nearly the same pictures are not torn apart.")
    return Split(sides, notes)


def sizes(count: int, settings: SplitSettings) -> tuple[int, int]:
    """How many of `count` pictures validate and how many are kept for the end."""
    spare = max(0, count - MIN_TRAIN)
    numbers = []
    for name in ("val", "test"):
        size = getattr(settings, name)
        if size >= 1 and size > spare:
            held = f" beside {numbers[0]} in val" if numbers else ""
            raise DataError(
                f"curation.split.{name}={size:g} of {count} pictures: choose at most {spare}{held}, so that {MIN_TRAIN} can train."
            )
        number = int(size) if size >= 1 else min(max(1, round(size * count)), spare) if size else 0
        numbers.append(number)
        spare -= number
    return numbers[0], numbers[1]


class _Unit(NamedTuple):
    rank: str  # the lowest of its members'
    members: tuple[int, ...]
    stratum: str


def _units(parts: Sequence[Part]) -> list[_Unit]:
    grouped: dict[object, list[int]] = {}
    for index, part in enumerate(parts):
        grouped.setdefault(part.group if part.group is not None else ("alone", index), []).append(index)
    units = []
    for members in grouped.values():
        strata = Counter(parts[index].stratum for index in members)
        common = min(strata, key=lambda stratum: (-strata[stratum], stratum))
        units.append(_Unit(min(rank(parts[index].sha256) for index in members), tuple(members), common))
    return units


def _take(units: Sequence[_Unit], count: int) -> list[_Unit]:
    """Whole units in the order given, `count` pictures at most: each stratum its quota, and what they leave open to the next in order."""
    quotas = _quotas(units, count)
    chosen: set[str] = set()

    def take(candidates: Iterable[_Unit], room: int) -> int:
        for unit in candidates:
            if unit.rank not in chosen and len(unit.members) <= room:
                chosen.add(unit.rank)
                room -= len(unit.members)
        return room

    room = sum(take((unit for unit in units if unit.stratum in strata), quota) for strata, quota in quotas.items())
    take(units, room)
    return [unit for unit in units if unit.rank in chosen]


def _quotas(units: Sequence[_Unit], count: int) -> dict[tuple[str, ...], int]:
    """Largest remainders over strata whose fair part is a picture at least; the other strata are one."""
    numbers: Counter[str] = Counter()
    for unit in units:
        numbers[unit.stratum] += len(unit.members)
    total = numbers.total()
    if not total:
        return {}
    large = [stratum for stratum in sorted(numbers) if numbers[stratum] * count >= total]
    small = tuple(stratum for stratum in sorted(numbers) if stratum not in large)
    fair = {(stratum,): count * numbers[stratum] / total for stratum in large}
    if small:
        fair[small] = count * sum(numbers[stratum] for stratum in small) / total
    quotas = {strata: math.floor(part) for strata, part in fair.items()}
    for strata in sorted(fair, key=lambda strata: (quotas[strata] - fair[strata], strata))[: count - sum(quotas.values())]:
        quotas[strata] += 1
    return quotas


def group(names: Sequence[str], clusters: Iterable[Sequence[int]], scene_gap: float) -> list[int]:
    """A group number for each picture: what is in one cluster of near-duplicates, or at most `scene_gap` seconds apart in a video, joined.

    `clusters` hold indices into `names`; names of frames are `clip.mp4!/000012.480s`.
    """
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    for cluster in clusters:
        for index in cluster[1:]:
            join(cluster[0], index)
    for frames in _videos(names).values():
        for (before, a), (after, b) in itertools.pairwise(frames):
            if after - before <= scene_gap:
                join(a, b)
    return [root(index) for index in range(len(names))]


def _videos(names: Sequence[str]) -> Mapping[str, list[tuple[float, int]]]:
    """Video -> its frames' seconds and indices, in time."""
    found: dict[str, list[tuple[float, int]]] = {}
    for index, name in enumerate(names):
        if match := FRAME.fullmatch(name):
            found.setdefault(match["video"], []).append((float(match["seconds"]), index))
    return {video: sorted(frames) for video, frames in found.items()}
