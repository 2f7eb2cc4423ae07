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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import cv2
import numpy as np
from PIL import Image

from charforgex.binding import Range
from charforgex.curation.items import Finding
from charforgex.errors import ConfigError

SHARP = 0.7  # sharpness from which more of it may be the ringing of compression
SIDE = 96  # pixels of a thumbnail, and of the square that is transformed
# (u, v) of the lowest frequencies by u + v but the mean; without (5, 5) they are 64, and swapping u and v keeps the set
FREQUENCIES = [(u, v) for u in range(11) for v in range(11) if 0 < u + v <= 10 and (u, v) != (5, 5)]
SPANS = ((0.0, 1.0), (0.0, 0.92), (0.08, 1.0), (0.05, 0.95))  # parts of a side; windows are all pairs of them, the first is the whole
ORIENTATIONS = [(swap, rows, columns) for swap in (False, True) for rows in (False, True) for columns in (False, True)]
CANDIDATES = 1 << 21  # pairs that are compared at once: 50 MB
AT_ONCE = 32  # pictures whose candidates get a first look together
CELLS = 24  # a side of what the first look sees of a thumbnail
CENTRES = (np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS
FIRST_LOOK, SECOND_LOOK = 3.5, 4.0  # times the limit: what differs by more when looked at roughly is not looked at closely


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


class Way(NamedTuple):
    """How two pictures may fit: bits that differ, how the second is turned and cut, and whether the second is the one to keep."""

    bits: int
    orientation: int
    window: int
    swapped: bool


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
    shown = (one > 4) & (one < 251) & (other > 4) & (other < 251)  # what is clipped has no brightness to go by
    if np.count_nonzero(shown) < 0.1 * shown.size:
        shown[:] = True
    some = np.flatnonzero(shown)[::5]
    x, y = other.ravel()[some] / np.float32(255), one.ravel()[some].astype(np.float32)
    curve = _curves(x[None], y[None], np.ones((1, len(x)), np.float32))[0]
    shades = np.arange(256) / 255
    bent = np.clip(curve[0] + shades * (curve[1] + shades * curve[2]), 0, 255).astype(np.float32)
    smooth, fitted = cv2.GaussianBlur(one.astype(np.float32), (0, 0), 0.6), cv2.GaussianBlur(cv2.LUT(other, bent), (0, 0), 0.6)
    window = np.ones((3, 3), np.uint8)
    above = smooth - (fitted + cv2.dilate(fitted, window)) / 2
    below = (fitted + cv2.erode(fitted, window)) / 2 - smooth
    beyond = cv2.transform(np.maximum(np.maximum(above, below), 0), np.full((1, 3), 1 / 3, np.float32))
    return float(cv2.blur(beyond, (7, 7)).max() * 50 / max(_spread(one), 10.0))


def _curves(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (N, 3) of the parabolas that best give y from x, by weight: (N, M) each."""
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    weighted = powers * weights[:, None]
    # a trace of ridge, for pictures of one or two brightnesses
    ridge = 1e-4 * weights.sum(axis=1, dtype=np.float64)[:, None, None] * np.eye(3)
    return np.linalg.solve(weighted @ powers.transpose(0, 2, 1) + ridge, weighted @ y[..., None])[..., 0]


def _spread(picture: np.ndarray) -> float:
    """The standard deviation of all values of uint8 (H, W, 3)."""
    return float(cv2.meanStdDev(picture.reshape(-1, 1))[1][0, 0])


def aligned_difference(one: np.ndarray, other: np.ndarray, orientation: int = 0, window: int = 0, limit: float = math.inf) -> float:
    """The least `difference` of two thumbnails when `other` is turned, and cut to the window that its hash speaks for.

    Where that falls short, the cut is refined by enhanced correlation (Evangelidis and Psarakis 2008). What is nowhere near `limit` after
    a few steps of that at two thirds of the size is not taken further: the result is then just some number above it.
    """
    (top, bottom), (left, right) = SPANS[window // len(SPANS)], SPANS[window % len(SPANS)]
    warp = np.array([[right - left, 0, left * SIDE], [0, bottom - top, top * SIDE]], np.float32)
    other = turned(other, orientation)

    def refined(side: int, steps: int) -> np.ndarray | None:
        greys = (
            cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA) for picture in (one, other)
        )
        unit = np.array([1, 1, side / SIDE], np.float32)  # moves are in pixels
        until = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4)
        try:
            return cv2.findTransformECC(*greys, warp * unit, cv2.MOTION_AFFINE, until, None, 3)[1] / unit
        except cv2.error:  # it does not converge: these two are not alike
            return None

    upright = orientation == 0  # cropped copies are looked for upright only
    if upright and math.isfinite(limit) and (rough := refined(SIDE * 2 // 3, 8)) is not None:
        early = difference(one, _warped(other, rough))
        if early > SECOND_LOOK * limit:
            return early
    direct = difference(one, _warped(other, warp) if window else other)
    if not upright or direct < 3 or (better := refined(SIDE, 30)) is None:
        return direct
    skew, scale = abs(better[0, 1]) + abs(better[1, 0]), better[[0, 1], [0, 1]]
    if skew > 0.04 or scale.min() < 0.75 or scale.max() > 1.1:
        return direct
    return min(direct, difference(one, _warped(other, better)))


def _warped(picture: np.ndarray, warp: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(picture, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)


# ---- a first look at many candidates at once ----


class _FirstLook:
    """Which ways of fitting are worth a closer look. Most look-alikes are told apart here, at a hundredth of the cost.

    Works on thumbnails of CELLS x CELLS, of which the latest are kept. Were these aligned as well as can be, nothing of a copy would differ
    by more than 3.06 times the limit: a cell of 8 x 8 pixels lies in four windows of 7 x 7, so its mean is at most 4 * 49 / 64 times the
    largest of theirs. Of 6,264 copies that were changed in many ways and are found with a limit of 8, the farthest was at 23.2.
    """

    def __init__(self, thumbnails: Callable[[int], np.ndarray], limit: float):
        def small(index: int) -> tuple[np.ndarray, float]:
            thumbnail = thumbnails(index)
            return cv2.resize(thumbnail, (CELLS, CELLS), interpolation=cv2.INTER_AREA), _spread(thumbnail)

        self.small, self.limit = functools.lru_cache(1 << 15)(small), limit

    def __call__(self, asked: Mapping[int, Mapping[int, Sequence[Way]]]) -> dict[int, dict[int, list[Way]]]:
        """By the one of a pair and by the other, the ways that may fit, in their order."""
        found: dict[int, dict[int, list[Way]]] = {one: defaultdict(list) for one in asked}
        pairs = [(one, other, way) for one, several in asked.items() for other, ways in several.items() for way in ways]
        upright = np.array([way.orientation == 0 for _, _, way in pairs], bool)
        near = np.zeros(len(pairs), bool)
        for places, align in ((np.flatnonzero(upright), True), (np.flatnonzero(~upright), False)):
            for start in range(0, len(places), 128):
                block = places[start : start + 128]
                near[block] = self._least([pairs[place] for place in block], align) <= FIRST_LOOK * self.limit
        for place in np.flatnonzero(near).tolist():
            one, other, way = pairs[place]
            found[one][other].append(way)
        return found

    def _least(self, asked: Sequence[tuple[int, int, Way]], align: bool) -> np.ndarray:
        """About the `aligned_difference` of each, over cells of 8 x 8 pixels."""
        first, second, spreads, spans = [], [], [], []
        for one, other, way in asked:
            (still, spread), (moved, wide) = (self.small(at) for at in ((other, one) if way.swapped else (one, other)))
            first.append(still)
            second.append(turned(moved, way.orientation))
            spreads.append((spread, wide))
            spans.append(SPANS[way.window // len(SPANS)] + SPANS[way.window % len(SPANS)])
        ones, others = np.array(first, np.float32), np.array(second, np.float32)
        if align:
            others = _cut(others, _aligned(ones, others, np.array(spans, np.float32)))
        ones, others = (stack[:, ::2] + stack[:, 1::2] for stack in (ones, others))
        ones, others = ((stack[:, :, ::2] + stack[:, :, 1::2]) / 4 for stack in (ones, others))
        brightness = np.maximum(np.array(spreads), 10) / 50
        return np.minimum(_beyond(ones, others) / brightness[:, 0], _beyond(others, ones) / brightness[:, 1])


def _beyond(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """As `_difference`, for stacks (N, H, W, 3) of cells: the most that one of them differs by."""
    y, x = one.reshape(len(one), -1), other.reshape(len(other), -1) / 255
    shown = (np.minimum(y, 255 * x) > 4) & (np.maximum(y, 255 * x) < 251)
    shown[shown.mean(axis=1) < 0.1] = True
    curves = _curves(x, y, shown.astype(np.float32)).astype(np.float32)[..., None]
    fitted = np.clip(curves[:, 0] + x * (curves[:, 1] + x * curves[:, 2]), 0, 255).reshape(one.shape)
    above = one - (fitted + _around(fitted, np.maximum)) / 2
    below = (fitted + _around(fitted, np.minimum)) / 2 - one
    beyond = np.maximum(np.maximum(above, below), 0) @ np.full(3, 1 / 3, np.float32)
    return beyond.reshape(len(one), -1).max(axis=1)


def _around(stack: np.ndarray, choose: np.ufunc) -> np.ndarray:
    """The greatest or least of the 3 x 3 cells around each."""
    for axis in (1, 2):
        here = stack.swapaxes(0, axis)
        chosen = here.copy()
        choose(chosen[1:], here[:-1], out=chosen[1:])
        choose(chosen[:-1], here[1:], out=chosen[:-1])
        stack = chosen.swapaxes(0, axis)
    return stack


def _cut(stack: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Stretches a part of each of (N, CELLS, CELLS, C) to the whole: rows and columns from start to end, spans (N, 4) in sides."""
    at = spans[:, 0::2, None] + (spans[:, 1::2] - spans[:, 0::2])[..., None] * CENTRES
    at = np.clip(at * CELLS - 0.5, 0, CELLS - 1)[..., None]
    rows, columns = np.moveaxis(np.maximum(1 - np.abs(at - np.arange(CELLS, dtype=np.float32)), 0), 1, 0)
    return columns[:, None] @ (rows @ stack.reshape(len(stack), CELLS, -1)).reshape(stack.shape)


def _aligned(ones: np.ndarray, others: np.ndarray, spans: np.ndarray, steps: int = 4) -> np.ndarray:
    """The spans refined so that those parts of the others look like the ones, whatever their brightness and contrast.

    Gauss-Newton (Lucas and Kanade 1981) on slightly blurred grey, with the gradients of both averaged (Malis 2004).
    """
    count, first = len(ones), spans
    grey = np.array([0.299, 0.587, 0.114], np.float32)
    target, moving = (_blurred(stack @ grey) for stack in (ones, others))
    slopes = np.stack([_slope(target, 1), _slope(target, 2)])
    target = target.reshape(count, -1) - target.mean(axis=(1, 2))[:, None]
    for _ in range(steps):
        moved = _cut(moving[..., None], spans)[..., 0]
        flat = moved.reshape(count, -1) - moved.mean(axis=(1, 2))[:, None]
        contrast = np.maximum((flat * target).sum(axis=1) / np.maximum((flat * flat).sum(axis=1), 1), 0.1)[:, None]
        down, across = (slopes + contrast[..., None] * np.stack([_slope(moved, 1), _slope(moved, 2)])) / 2
        ends = CENTRES[:, None]
        motions = np.stack([down * (1 - ends), down * ends, across * (1 - CENTRES), across * CENTRES], axis=1).reshape(count, 4, -1)
        motions -= motions.mean(axis=2, keepdims=True)
        normal = motions @ motions.transpose(0, 2, 1)
        normal += (1e-3 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-3) * np.eye(4, dtype=np.float32)
        step = np.linalg.solve(normal, motions @ (target - contrast * flat)[..., None])[..., 0]
        spans = np.clip(spans + step * np.repeat(spans[:, 1::2] - spans[:, 0::2], 2, axis=1), first - 0.12, first + 0.12)
    return spans


def _blurred(stack: np.ndarray) -> np.ndarray:
    """(N, H, W) with the weights 1 2 1 along both axes."""
    padded = np.pad(stack, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, 1:-1] / 2 + (padded[:, 2:] + padded[:, :-2]) / 4
    return rows[..., 1:-1] / 2 + (rows[..., 2:] + rows[..., :-2]) / 4


def _slope(stack: np.ndarray, axis: int) -> np.ndarray:
    """Of (N, CELLS, CELLS), by sides of the picture."""
    return np.gradient(stack, np.float32(1 / CELLS), axis=axis)


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
    look = _FirstLook(thumbnails, settings.difference)
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
