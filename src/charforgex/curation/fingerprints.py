"""Perceptual hashes of pictures, and all pairs of them that are near each other.

A fingerprint is the signs of the 64 lowest frequencies of a cosine transform (after pHash, Zauner 2010), of the picture and of windows in
it. Mirroring and turning flip and swap these signs, so the hashes of all eight orientations follow from one. `pairs` finds all hashes
within a Hamming radius without comparing all with all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

SIDE = 96  # pixels of a thumbnail, and of the square that is transformed
# (u, v) of the lowest frequencies by u + v but the mean; without (5, 5) they are 64, and swapping u and v keeps the set
FREQUENCIES = [(u, v) for u in range(11) for v in range(11) if 0 < u + v <= 10 and (u, v) != (5, 5)]
SPANS = ((0.0, 1.0), (0.0, 0.92), (0.08, 1.0), (0.05, 0.95))  # parts of a side; windows are all pairs of them, the first is the whole
ORIENTATIONS = [(swap, rows, columns) for swap in (False, True) for rows in (False, True) for columns in (False, True)]
CANDIDATES = 1 << 21  # pairs that are compared at once: 50 MB


class Fingerprint(NamedTuple):
    """The hash of the picture, then of its other windows: uint64 (16,)."""

    hashes: np.ndarray

    @property
    def hex(self) -> str:
        return "".join(f"{int(value):016x}" for value in self.hashes)

    @staticmethod
    def from_hex(text: str) -> Fingerprint:
        return Fingerprint(np.array([int(text[at : at + 16], 16) for at in range(0, len(text), 16)], np.uint64))


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
