"""The same picture twice: the same file, or nearly the same picture, however it was recompressed, scaled, brightened, mirrored, turned or
cropped a little.

`fingerprint` and `thumbnail` in a shard, `clusters` knowing all. A fingerprint is the signs of the 64 lowest frequencies of a cosine
transform (after pHash, Zauner 2010), of the picture and of windows in it. Mirroring and turning flip and swap these signs, so the hashes
of all eight orientations follow from one. `pairs` finds all hashes within a Hamming radius without comparing all with all. What is found
so is a candidate only: `difference` aligns the two thumbnails and looks for the place where they differ most, because two drawings of one
character have hashes as near as two copies of one drawing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import cv2
import numpy as np
from PIL import Image

from charforgex.binding import Range
from charforgex.curation.items import Finding
from charforgex.errors import ConfigError

SIDE = 96  # pixels of a thumbnail, and of the square that is transformed
# (u, v) of the lowest frequencies by u + v but the mean; without (5, 5) they are 64, and swapping u and v keeps the set
FREQUENCIES = [(u, v) for u in range(11) for v in range(11) if 0 < u + v <= 10 and (u, v) != (5, 5)]
SPANS = ((0.0, 1.0), (0.0, 0.92), (0.08, 1.0), (0.05, 0.95))  # parts of a side; windows are all pairs of them, the first is the whole
ORIENTATIONS = [(swap, rows, columns) for swap in (False, True) for rows in (False, True) for columns in (False, True)]
CANDIDATES = 1 << 21  # pairs that are compared at once: 50 MB


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


class Fingerprint(NamedTuple):
    """The hash of the picture, then of its other windows: uint64 (16,)."""

    hashes: np.ndarray

    @property
    def hex(self) -> str:
        return "".join(f"{int(value):016x}" for value in self.hashes)

    @staticmethod
    def from_hex(text: str) -> Fingerprint:
        return Fingerprint(np.array([int(text[at : at + 16], 16) for at in range(0, len(text), 16)], np.uint64))


class Cluster(NamedTuple):
    """Indices of findings that show one picture: the one to keep, and the others with the reason for each, of which one is enough."""

    kept: int
    others: dict[int, str]

    @property
    def members(self) -> list[int]:
        return [self.kept, *self.others]


# ---- one picture ----


def thumbnail(pixels: np.ndarray | Image.Image) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): the picture squeezed into a square, averaged down. `pixels` is uint8 (H, W, 3) or (H, W), or PIL."""
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    times = min(height, width) // (2 * SIDE)
    if times > 1:  # whole numbers of pixels are averaged several times as fast
        kept = pixels[: height // times * times, : width // times * times]
        pixels = cv2.resize(kept, (width // times, height // times), interpolation=cv2.INTER_AREA)
    small = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA if min(height, width) >= SIDE else cv2.INTER_LINEAR)
    return small if small.ndim == 3 else np.repeat(small[..., None], 3, axis=2)


def fingerprint(pixels: np.ndarray | Image.Image) -> Fingerprint:
    """Of a picture, or of its `thumbnail`, which gives the same."""
    pixels = np.asarray(pixels)
    small = pixels if pixels.shape == (SIDE, SIDE, 3) else thumbnail(pixels)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    transform = _transform()
    spectra = transform @ (grey - grey.mean()) @ transform.T  # all spans of rows by all spans of columns
    rows = len(transform) // len(SPANS)
    spectra = spectra.reshape(len(SPANS), rows, len(SPANS), rows).transpose(0, 2, 1, 3).reshape(-1, rows, rows)
    u, v = np.array(FREQUENCIES).T
    return Fingerprint(_pack(spectra[:, u, v] > 0))


@functools.cache
def _transform() -> np.ndarray:
    """(spans x 11, SIDE): stretch each span of a line to SIDE pixels, then take the 11 lowest of its cosine frequencies (DCT-II)."""
    at = np.arange(SIDE) + 0.5
    cosine = np.cos(np.pi * np.arange(11)[:, None] * at / SIDE)
    parts = []
    for start, end in SPANS:
        source = np.clip((start + (end - start) * at / SIDE) * SIDE - 0.5, 0, SIDE - 1)
        left = np.minimum(source.astype(int), SIDE - 2)
        stretch = np.zeros((SIDE, SIDE))
        stretch[np.arange(SIDE), left] = left + 1 - source
        stretch[np.arange(SIDE), left + 1] = source - left
        parts.append(cosine @ stretch)
    return np.concatenate(parts).astype(np.float32)


def _pack(bits: np.ndarray) -> np.ndarray:
    """Booleans (N, 64) to uint64 (N,)."""
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view("<u8")[:, 0].astype(np.uint64)


def _bits(hashes: np.ndarray) -> np.ndarray:
    return np.unpackbits(hashes.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").astype(bool)


def turned_hashes(hashes: np.ndarray, orientation: int) -> np.ndarray:
    """The hashes that the same pictures have when turned by `turned`. Exact but for frequencies that are zero."""
    swap, rows, columns = ORIENTATIONS[orientation]
    places = [FREQUENCIES.index((v, u)) if swap else at for at, (u, v) in enumerate(FREQUENCIES)]
    signs = np.array([(rows and u % 2) != (columns and v % 2) for u, v in FREQUENCIES])
    return _pack(_bits(hashes)[:, places] ^ signs)


def turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """One of the eight orientations of an array (H, W, ...): rows and columns swapped or not, then each reversed or not; 0 is as it was."""
    swap, rows, columns = ORIENTATIONS[orientation]
    picture = picture.swapaxes(0, 1) if swap else picture
    return np.ascontiguousarray(picture[:: -1 if rows else 1, :: -1 if columns else 1])


# ---- all pairs within a radius ----


def pairs(hashes: np.ndarray, radius: int, others: np.ndarray | None = None) -> np.ndarray:
    """All (i, j) with at most `radius` different bits between hashes[i] and hashes[j], i < j; with `others`, hashes[i] and others[j].

    Exact: int64 (M, 2), sorted. Bits are split into bands; by the pigeonhole principle two hashes within the radius agree in some band up
    to few bits, so only pairs that share such a band are compared (multi-index hashing, Norouzi et al. 2012, with the thresholds of Qin
    et al. 2018). Time grows a little faster than the number of hashes; memory with them and with the pairs found.
    """
    mine, own = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    theirs, other = (mine, own) if others is None else np.unique(np.asarray(others, np.uint64), return_inverse=True)
    found = [np.zeros((0, 2), np.int64), *(_near(mine, radius) if others is None else _near(theirs, radius, mine))]
    near = np.concatenate(found)
    if others is None:
        near = np.concatenate([near, near[:, ::-1], np.repeat(np.arange(len(mine)), 2).reshape(-1, 2)])
    result = _expand(near, _groups(own, len(mine)), _groups(other, len(theirs)))
    result = result[result[:, 0] < result[:, 1]] if others is None else result
    return np.unique(result, axis=0) if len(result) else result


def _groups(inverse: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices in the order of their group, and where each group begins."""
    return np.argsort(inverse, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(inverse, minlength=count))])


def _expand(near: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Pairs of groups to pairs of their members."""
    (order, start), (other, begin) = rows, columns
    width = np.diff(begin)[near[:, 1]]
    total = np.diff(start)[near[:, 0]] * width
    which = np.repeat(np.arange(len(near)), total)
    inside = np.arange(len(which)) - np.repeat(np.cumsum(total) - total, total)
    left, right = np.divmod(inside, width[which])
    return np.stack([order[start[near[which, 0]] + left], other[begin[near[which, 1]] + right]], axis=1)


def _near(table: np.ndarray, radius: int, queries: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Blocks of (query, entry) indices within the radius, some twice; without `queries` pairs of entries, in one direction."""
    count = len(table) if queries is None else len(queries)
    for shift, width, reach in _bands(len(table), count, radius):
        keys = (table >> np.uint64(shift)).astype(np.int64) & ((1 << width) - 1)
        order = np.argsort(keys, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << width))]).astype(np.int32)
        entries = table[order]
        if queries is None:
            own, asked, asking = order, entries, keys[order]
        else:
            wanted = (queries >> np.uint64(shift)).astype(np.int64) & ((1 << width) - 1)
            own = np.argsort(wanted, kind="stable")
            asked, asking = queries[own], wanted[own]
        asking = asking.astype(np.int32)
        for top in range(-1, width):  # the highest bit that is flipped; -1 flips none
            part = np.flatnonzero(asking >> top & 1 == 0) if queries is None and top >= 0 else np.arange(len(asking))
            base = asking[part]
            lower = itertools.chain.from_iterable(itertools.combinations(range(top), flips - 1) for flips in range(1, reach + 1))
            for flipped in [()] if top < 0 else lower:
                mask = sum(1 << bit for bit in flipped) + (1 << top if top >= 0 else 0)
                first = start[base ^ mask]
                size = start[(base ^ mask) + 1] - first
                hit = np.flatnonzero(size)
                for block in _blocks(size[hit]):
                    some = hit[block]
                    repeats = size[some]
                    query = np.repeat(part[some], repeats)
                    entry = np.arange(len(query)) + np.repeat(first[some] - np.cumsum(repeats) + repeats, repeats)
                    near = np.bitwise_count(asked[query] ^ entries[entry]) <= radius
                    if queries is None and top < 0:
                        near &= query < entry
                    if near.any():
                        yield np.stack([own[query[near]], order[entry[near]]], axis=1)


def _blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Slices of `sizes` that add up to about CANDIDATES each."""
    if not len(sizes):
        return
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = np.searchsorted(ends, np.arange(CANDIDATES, ends[-1], CANDIDATES), side="right")
    edges = np.unique(np.concatenate([[0], cuts, [len(sizes)]]))
    yield from itertools.starmap(slice, itertools.pairwise(edges.tolist()))


def _bands(entries: int, queries: int, radius: int) -> list[tuple[int, int, int]]:
    """(shift, width, reach) of bands: whatever differs in at most `radius` bits differs in at most `reach` bits of one of them.

    If every band i had more than reach_i differing bits, there were at least sum(reach_i + 1) in all; that is made radius + 1. A reach of
    -1 is a band that need not be searched. The number of bands is the one that costs least: a look-up a neighbouring key, a
    comparison a candidate.
    """

    def plan(number: int) -> tuple[float, list[tuple[int, int, int]]]:
        cuts = np.linspace(0, 64, number + 1).round().astype(int).tolist()
        total = radius - number + 1
        bands, cost = [], 0.0
        for index, (low, high) in enumerate(itertools.pairwise(cuts)):
            reach = (total + number - 1 - index) // number if total >= 0 else (0 if index < radius + 1 else -1)
            if reach >= 0:
                keys = sum(math.comb(high - low, flips) for flips in range(reach + 1))
                cost += keys * queries * (1 + 2 * entries / 2 ** (high - low)) + 4 * 2 ** (high - low)
                bands.append((low, high - low, reach))
        return cost, bands

    return min(plan(number) for number in range(3, 17))[1]


# ---- is a candidate the same picture? ----


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Grey levels by which two aligned thumbnails differ where they differ most, over 7 x 7 of their pixels; 0 to about 255.

    The brightness of the one is first bent to the other's by the best parabola, either way round as fits better (what one has lost in white
    the other cannot get back), and half of what neighbouring pixels differ by is forgiven, for no alignment is perfect. The result is
    scaled to a picture whose brightness varies by 50.
    """
    return min(_difference(one, other), _difference(other, one))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float32), other.astype(np.float32)
    shown = (one > 4) & (one < 251) & (other > 4) & (other < 251)  # what is clipped has no brightness to go by
    if shown.mean() < 0.1:
        shown[:] = True
    x, y = other[shown][::5] / 255, one[shown][::5]
    powers = np.stack([np.ones_like(x), x, x * x])
    # a trace of ridge, for pictures of one or two brightnesses
    curve = np.linalg.solve((powers @ powers.T).astype(np.float64) + 1e-4 * len(x) * np.eye(3), powers @ y)
    fitted = np.clip(curve[0] + other / 255 * (curve[1] + other / 255 * curve[2]), 0, 255)
    smooth, fitted = cv2.GaussianBlur(one, (0, 0), 0.6), cv2.GaussianBlur(fitted, (0, 0), 0.6)
    window = np.ones((3, 3), np.uint8)
    above = smooth - (fitted + cv2.dilate(fitted, window)) / 2
    below = (fitted + cv2.erode(fitted, window)) / 2 - smooth
    beyond = np.maximum(np.maximum(above, below), 0).mean(axis=2)
    return float(cv2.blur(beyond, (7, 7)).max() * 50 / max(one.std(), 10.0))


def aligned_difference(one: np.ndarray, other: np.ndarray, orientation: int = 0, window: int = 0) -> float:
    """The least `difference` of two thumbnails when `other` is turned, and cut to the window that its hash speaks for.

    Where that falls short, the cut is refined by enhanced correlation (Evangelidis and Psarakis 2008).
    """
    (top, bottom), (left, right) = SPANS[window // len(SPANS)], SPANS[window % len(SPANS)]
    warp = np.array([[right - left, 0, left * SIDE], [0, bottom - top, top * SIDE]], np.float32)
    other = turned(other, orientation)

    def cut(warp: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(other, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)

    direct = difference(one, cut(warp) if window else other)
    if direct < 3 or orientation:  # cropped copies are looked for upright only
        return direct
    grey, target = cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), cv2.cvtColor(other, cv2.COLOR_RGB2GRAY)
    steps = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
    try:
        _, refined = cv2.findTransformECC(grey, target, warp.copy(), cv2.MOTION_AFFINE, steps, None, 3)
    except cv2.error:  # it does not converge: these two are not alike
        return direct
    skew = abs(refined[0, 1]) + abs(refined[1, 0])
    scale = refined[[0, 1], [0, 1]]
    if skew > 0.04 or scale.min() < 0.75 or scale.max() > 1.1:
        return direct
    return min(direct, difference(one, cut(refined)))


# ---- which of all are the same ----


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
    found: dict[int, dict[int, str]] = {}
    taken: set[int] = set()
    for kept in order.tolist():
        if kept in taken:
            continue
        ways, others = near.of(kept), alike.get(kept, {})
        reasons = {}
        for i in sorted(index for index in ways.keys() | others.keys() if rank[index] > rank[kept] and index not in taken):
            if i in others:
                reasons[i] = f"embeddings agree by {others[i]:.3f} (limit {settings.similarity:g})"
            elif reason := _compare(ways[i], thumbnails(kept), thumbnails(i), settings):
                reasons[i] = reason
        taken |= reasons.keys()
        name = findings[kept].name
        reasons = {i: f"nearly the same as {name}: {reason}" for i, reason in reasons.items()}
        for through in list(reasons):  # a cropped or turned copy of a copy may be too far from the kept one to be seen as its own
            for i, ways in near.of(through).items():
                if rank[i] <= rank[kept] or i in taken or min(ways)[1:3] == (0, 0):
                    continue
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
    """Which of a group to keep: the most detail, then one with a caption, then the sharpest and cleanest, the largest, the first."""
    return min(group, key=lambda i: (_worth(findings[i]), i))


def _worth(finding: Finding) -> tuple[float, ...]:
    """Smaller is better."""
    scores = finding.scores
    area = max(1, finding.width * finding.height)
    used = area * min(1.0, scores.get("detail", 1.0)) ** 2  # an enlarged copy is no better
    clean = scores.get("sharpness", 0.0) - scores.get("blocks", 0.0) / 10 - scores.get("noise", 0.0) / 50
    return -round(math.log(used) * 5), not finding.captions, -round(clean, 2), -area


class _Columns:
    """What is needed of all findings at once, as arrays: findings may lie on disk, and memory holds a few numbers for each."""

    def __init__(self, findings: Sequence[Finding]):
        count, size = len(findings), len(SPANS) ** 2
        worth, usable = np.zeros((count, 4)), np.zeros(count, bool)
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

    def of(self, index: int) -> dict[int, list[tuple[int, int, int, bool]]]:
        """By the other of the pair: bits that differ, orientation, window, and whether it is the other that is cropped."""
        first, end = np.searchsorted(self.rows["one"], [index, index + 1])
        found: dict[int, list[tuple[int, int, int, bool]]] = defaultdict(list)
        for _, other, *way in self.rows[first:end].tolist():
            found[other].append(tuple(way))
        return found


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


def _compare(ways: Sequence[tuple[int, int, int, bool]], kept: np.ndarray, other: np.ndarray, settings: DuplicateSettings) -> str | None:
    """Why the two are the same, by the likeliest ways that they fit in, or None. Windows near one another are refined to the same cut."""
    likeliest: dict[tuple[int, bool], tuple[int, int, int, bool]] = {}
    for way in sorted(ways):
        for swapped in (False, True) if way[2] == 0 and not way[1] else (way[3],):  # of equal hashes either may be the cropped one
            likeliest.setdefault((way[1], swapped), way)
    for (orientation, swapped), (bits, _, window, _) in list(likeliest.items())[:4]:
        one, two = (other, kept) if swapped else (kept, other)
        value = aligned_difference(one, two, orientation, window)
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
