"""Are two thumbnails the same picture, recompressed, scaled, brightened, mirrored, turned or cropped a little? And which of many are worth
the question?

Two drawings of one character have hashes as near as two copies of one drawing. `difference` looks for the place where two aligned
thumbnails differ most; `aligned_difference` aligns them first; `FirstLook` tells most look-alikes apart at a hundredth of that cost.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from charforgex.curation.fingerprints import SIDE, SPANS, turned

CELLS = 24  # a side of what the first look sees of a thumbnail
CENTRES = (np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS
FIRST_LOOK, SECOND_LOOK = 3.5, 4.0  # times the limit: what differs by more when looked at roughly is not looked at closely


class Way(NamedTuple):
    """How two pictures may fit: bits that differ, how the second is turned and cut, and whether the second is the one to keep."""

    bits: int
    orientation: int
    window: int
    swapped: bool


# ---- two pictures ----


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


# ---- many at once ----


class FirstLook:
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
                near[block] = self.least([pairs[place] for place in block], align) <= FIRST_LOOK * self.limit
        for place in np.flatnonzero(near).tolist():
            one, other, way = pairs[place]
            found[one][other].append(way)
        return found

    def least(self, asked: Sequence[tuple[int, int, Way]], align: bool) -> np.ndarray:
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
