"""The same picture twice: the same file, or nearly the same picture, however it was recompressed, scaled, brightened, mirrored, turned or
cropped a little. `clusters` knows all findings: hashes that are near each other (`fingerprints`) make candidates, and a comparison of their
thumbnails (`resemblance`) says which of these are copies; `best` says which copy stays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from charforgex.binding import Range
from charforgex.curation.fingerprints import ORIENTATIONS, SPANS, Fingerprint, pairs, turned_hashes
from charforgex.curation.items import Finding
from charforgex.curation.resemblance import FirstLook, Way, aligned_difference
from charforgex.errors import ConfigError

SHARP = 0.7  # sharpness from which more of it may be the ringing of compression
AT_ONCE = 32  # pictures whose candidates get a first look together


@dataclass(frozen=True)
class DuplicateSettings:
    """`exact`: files of equal content. `radius`: of 64 bits, how many may differ for two pictures to be looked at; more finds stronger
    changes and takes longer; None looks for equal files only. `turned`, `cropped`: also mirrored and turned pictures, also cropped ones
    (up to a tenth of a side). `difference`: grey levels by which two thumbnails may differ where they differ most. `similarity`:
    cosine of two embeddings, where a model gives them, from which pictures count as the same."""

    exact: bool = True
    radius: Annotated[int, Range(at_least=0, at_most=16)] | None = 10
    turned: bool = True
    cropped: bool = True
    difference: Annotated[float, Range(above=0, at_most=255)] = 8.0
    similarity: Annotated[float, Range(above=0, at_most=1)] | None = None


class Cluster(NamedTuple):
    """Indices of findings that show one picture: the one to keep, and the others with the reason for each, of which one is enough."""

    kept: int
    others: dict[int, str]

    @property
    def members(self) -> list[int]:
        return [self.kept, *self.others]


def clusters(
    findings: Sequence[Finding],
    settings: DuplicateSettings,
    thumbnails: Callable[[int], np.ndarray],
    embeddings: np.ndarray | None = None,
) -> list[Cluster]:
    """Groups of findings that show one picture, in the order of the kept ones' indices. Findings with a verdict take no part.

    `findings` are read once in order, then those of clusters; `thumbnails(i)` is finding i's `thumbnail`, asked for candidates only.
    `embeddings` are unit vectors (N, D) of the pictures, zero for those without. Every other of a cluster was compared with the kept one
    itself, or is a cropped or turned copy of one that was: a chain of small changes is no cluster.
    """
    if not len(findings):
        return []
    if settings.similarity is not None and embeddings is None:
        raise ConfigError(
            f"curation.duplicates.similarity={settings.similarity:g} compares pictures' embeddings: set curation.clip, or this to null."
        )
    columns = _Columns(findings)
    same: dict[int, list[int]] = defaultdict(list)
    order = columns.order
    if settings.exact:
        _, first, inverse = np.unique(columns.contents[order], return_index=True, return_inverse=True)
        for place in np.flatnonzero(first[inverse] != np.arange(len(order))).tolist():
            same[int(order[first[inverse[place]]])].append(int(order[place]))
        order = order[np.sort(first)]
    rank = np.full(len(findings), len(findings))
    rank[order] = np.arange(len(order))

    near = _candidates(columns, order, settings)
    alike = _similar(order, embeddings, settings.similarity) if settings.similarity is not None else {}
    look = FirstLook(thumbnails, settings.difference)
    found: dict[int, dict[int, str]] = {}
    taken: set[int] = set()
    for place, kept in enumerate(order.tolist()):
        if place % AT_ONCE == 0:
            soon = [index for index in order[place : place + AT_ONCE].tolist() if index not in taken]
            seen = look(
                {index: {i: ways for i, ways in near.of(index).items() if rank[i] > rank[index] and i not in taken} for index in soon}
            )
        if kept in taken:
            continue
        others = alike.get(kept, {})
        reasons = {}
        for i in sorted(index for index in seen[kept].keys() | others.keys() if index not in taken):
            if i in others:
                reasons[i] = f"embeddings agree by {others[i]:.3f} (limit {settings.similarity:g})"
            elif reason := _compare(seen[kept][i], thumbnails(kept), thumbnails(i), settings):
                reasons[i] = reason
        taken |= reasons.keys()
        name = findings[kept].name
        reasons = {i: f"nearly the same as {name}: {reason}" for i, reason in reasons.items()}
        for through in list(reasons):  # a cropped or turned copy of a copy may be too far from the kept one to be seen as its own
            free = {i: ways for i, ways in near.of(through).items() if rank[i] > rank[kept] and i not in taken}
            for i, ways in look({through: {i: ways for i, ways in free.items() if ways[0].orientation or ways[0].window}})[through].items():
                if reason := _compare(ways, thumbnails(through), thumbnails(i), settings):
                    reasons[i] = f"nearly the same as {findings[through].name}, which is nearly the same as {name}: {reason}"
                    taken.add(i)
        if not reasons and kept not in same:
            continue
        found[kept] = {i: f"the same file as {name}" for i in same.get(kept, ())}
        for i, reason in reasons.items():
            found[kept][i] = reason
            found[kept] |= {copy: f"the same file as {findings[i].name}, {reason}" for copy in same.get(i, ())}
    return [Cluster(kept, found[kept]) for kept in sorted(found)]


def best(group: Sequence[int], findings: Sequence[Finding]) -> int:
    """Which of a group to keep: one with a face, which a copy that was turned may lack, then the most detail, then one with a caption,
    then the least compressed, the sharpest and cleanest, the one that has lost least in black and white, has most contrast, the largest,
    the first."""
    return min(group, key=lambda i: (_worth(findings[i]), i))


def _worth(finding: Finding) -> tuple[float, ...]:
    """Smaller is better."""
    scores = finding.scores
    area = max(1, finding.width * finding.height)
    used = area * min(1.0, scores.get("detail", 1.0)) ** 2  # an enlarged copy is no better
    clean = scores.get("sharpness", 0.0) - scores.get("blocks", 0.0) / 10 - scores.get("noise", 0.0) / 50
    lost = round(5 * (scores.get("bright", 0.0) + scores.get("dark", 0.0)))  # what was brightened has less left in white
    contrast = round(scores.get("contrast", 0.0) / 8)
    coded = math.ceil(scores["jpeg_quality"] / 25) if "jpeg_quality" in scores else 5  # other formats lose nothing, or do not say
    return (
        not finding.faces,
        -round(math.log(used) * 5),
        not finding.captions,
        -round(min(clean, SHARP) * 4),
        -coded,
        lost,
        -contrast,
        -round(clean, 2),
        -area,
    )


class _Columns:
    """What is needed of all findings at once, as arrays: findings may lie on disk, and memory holds a few numbers for each."""

    def __init__(self, findings: Sequence[Finding]):
        count, size = len(findings), len(SPANS) ** 2
        worth, usable = np.zeros((count, 9)), np.zeros(count, bool)
        self.contents, self.hashes, self.hashed = np.zeros(count, "S64"), np.zeros((count, size), np.uint64), np.zeros(count, bool)
        for index, finding in enumerate(findings):
            if finding.verdict is not None:
                continue
            usable[index], worth[index] = True, _worth(finding)
            self.contents[index] = finding.sha256 or f"#{index}"
            if finding.fingerprint:
                self.hashed[index], self.hashes[index] = True, Fingerprint.from_hex(finding.fingerprint).hashes
        order = np.lexsort(worth.T[::-1])  # stable: of equals the first
        self.order = order[usable[order]]  # the best first


class _Candidates:
    """Pairs of findings with hashes within the radius, and the ways in which the two fit: rows of `WAY`, by the first of the two."""

    WAY = np.dtype([("one", "i4"), ("other", "i4"), ("bits", "i1"), ("orientation", "i1"), ("window", "i1"), ("swapped", "?")])

    def __init__(self, parts: Sequence[np.ndarray]):
        rows = np.concatenate([np.zeros(0, self.WAY), *parts])
        self.rows = rows[np.argsort(rows["one"], kind="stable")]

    def of(self, index: int) -> dict[int, list[Way]]:
        """By the other of the pair, the likeliest ways, the best first. Windows near one another are refined to the same cut: one stands
        for all."""
        first, end = np.searchsorted(self.rows["one"], [index, index + 1])
        found: dict[int, list[Way]] = defaultdict(list)
        for _, other, *way in self.rows[first:end].tolist():
            found[other].append(Way(*way))
        return {other: _likeliest(ways) for other, ways in found.items()}


def _likeliest(ways: Sequence[Way]) -> list[Way]:
    likeliest: dict[tuple[int, bool], Way] = {}
    for way in sorted(ways):
        either = way.window == 0 and not way.orientation  # of whole pictures that are alike each may be the cropped one
        for swapped in (False, True) if either else (way.swapped,):
            likeliest.setdefault((way.orientation, swapped), way._replace(swapped=swapped))
    return list(likeliest.values())[:4]


def _candidates(columns: _Columns, order: np.ndarray, settings: DuplicateSettings) -> _Candidates:
    indices = np.sort(order[columns.hashed[order]])
    if settings.radius is None or len(indices) < 2:
        return _Candidates([])
    whole = columns.hashes[indices, 0]
    ways = [(orientation, 0) for orientation in range(len(ORIENTATIONS) if settings.turned else 1)]
    ways += [(0, window) for window in range(1, columns.hashes.shape[1] if settings.cropped else 1)]
    parts = []
    for orientation, window in ways:
        others = columns.hashes[indices, window] if window else turned_hashes(whole, orientation)
        near = pairs(whole, settings.radius) if not orientation and not window else pairs(whole, settings.radius, others)
        near = near[near[:, 0] != near[:, 1]]
        for swapped in (False, True):
            part = np.zeros(len(near), _Candidates.WAY)
            part["one"], part["other"] = indices[near[:, int(swapped)]], indices[near[:, int(not swapped)]]
            part["bits"] = np.bitwise_count(whole[near[:, 0]] ^ others[near[:, 1]])
            part["orientation"], part["window"], part["swapped"] = orientation, window, swapped
            parts.append(part)
    return _Candidates(parts)


def _compare(ways: Sequence[Way], kept: np.ndarray, other: np.ndarray, settings: DuplicateSettings) -> str | None:
    """Why the two are the same, by the first of the ways that they fit in, or None."""
    for bits, orientation, window, swapped in ways:
        one, two = (other, kept) if swapped else (kept, other)
        value = aligned_difference(one, two, orientation, window, settings.difference)
        if value <= settings.difference:
            how = (", turned or mirrored" if orientation else "") + (", cropped" if window else "")
            return (
                f"{bits} of 64 bits differ (limit {settings.radius}), thumbnails by {value:.1f} grey levels at most "
                f"(limit {settings.difference:g}){how}"
            )
    return None


def _similar(order: np.ndarray, embeddings: np.ndarray, similarity: float) -> dict[int, dict[int, float]]:
    """Of each finding those after it in `order` whose embeddings agree by at least `similarity`. Compares all with all, in blocks."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    vectors = np.asarray(embeddings, np.float32)[order]
    for start in range(0, len(order), 1024):
        cosine = vectors[start : start + 1024] @ vectors[start:].T
        for row, column in np.argwhere(np.triu(cosine >= similarity, 1)).tolist():
            found[int(order[start + row])][int(order[start + column])] = float(cosine[row, column])
    return found
