"""How good a picture is, in a few numbers, and whether that is good enough: `measure` in a shard, `judge` knowing the settings.

Every measure is classical and reads one decoded picture. What matters at the size of training (sharpness, exposure, frames, text) is
measured on at most `WORK` pixels a side; what lives in single pixels (noise, blocks, upscaling) on the picture's own pixels, in its middle
and corners. So the cost is bounded whatever the picture's size. `ClipIqa` adds a learned opinion.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import cv2
import numpy as np
from PIL import Image

from charforgex.binding import Range
from charforgex.curation.items import Verdict
from charforgex.errors import ConfigError

WORK = 768  # the working picture's longer side; larger ones are averaged down to it
TILE = 256  # pixels a side of the tiles that are read at full size
EDGE = 32  # grey levels within 9 pixels that make an edge
STROKE = 60  # grey levels by which letters stand out
LETTERS, LINE = 512, 6  # at most that many blobs are looked at, and at least that many in a row are text
CLIPPED = 4  # grey levels from black or white that count as lost

Share = Annotated[float, Range(at_least=0, at_most=1)]
Grey = Annotated[float, Range(at_least=0, at_most=255)]


@dataclass(frozen=True)
class QualitySettings:
    """Limits of `judge`; each score is explained at the function that measures it. None switches a check off."""

    min_side: Annotated[int, Range(at_least=1)] | None = 256  # pixels of the shorter side
    min_detail_side: Annotated[int, Range(at_least=1)] | None = 160  # the same, of the size it really has detail for
    min_sharpness: Share | None = 0.42
    min_steadiness: Share | None = 0.65
    max_dark: Share | None = 0.8
    max_bright: Share | None = 0.8
    min_high: Grey | None = 50.0
    max_low: Grey | None = 190.0
    min_contrast: Grey | None = 30.0
    max_noise: Annotated[float, Range(above=0)] | None = 10.0
    max_blocks: Annotated[float, Range(above=0)] | None = 3.6
    min_jpeg_quality: Annotated[int, Range(at_least=1, at_most=100)] | None = 25
    max_border: Share | None = 0.1
    max_text: Share | None = 0.01
    assessor: str | None = None  # a CLIP for `ClipIqa`: charworld, or a folder or name of transformers
    min_assessed: Share | None = None  # of what it says of sharpness, exposure and noise

    def __post_init__(self):
        if self.min_assessed is not None and self.assessor is None:
            raise ConfigError(
                f"curation.quality.min_assessed={self.min_assessed:g} needs curation.quality.assessor, a CLIP; set that, or this to null."
            )


# ---- what is decided ----


def judge(scores: Mapping[str, float], width: int, height: int, settings: QualitySettings) -> Verdict | None:
    """The first limit that a picture of `width` x `height` falls short of, in the order of what can least be mended; None: it is good.

    Scores that are missing (a PNG has no JPEG quality, without an assessor nobody was asked) are not judged.
    """
    side = min(width, height)
    scores = {**scores, "side": side}
    if "detail" in scores:
        scores["detail_side"] = scores["detail"] * side
    checks = (
        ("too_small", "side", "its shorter side has {:.0f} pixels", settings.min_side, None),
        ("exposure", "high", "too dark: its brightest fiftieth begins at {:.0f} of 255", settings.min_high, None),
        ("exposure", "low", "too bright: its darkest fiftieth ends at {:.0f} of 255", None, settings.max_low),
        ("exposure", "dark", "too dark: black share {:.2f}", None, settings.max_dark),
        ("exposure", "bright", "too bright: white share {:.2f}", None, settings.max_bright),
        ("exposure", "contrast", "flat: its brightness spans {:.0f} of 255", settings.min_contrast, None),
        ("exposure", "assessed_exposure", "exposure assessed as {:.2f}", settings.min_assessed, None),
        (
            "blurred",
            "detail_side",
            "enlarged or out of focus: its shorter side has detail for {:.0f} pixels",
            settings.min_detail_side,
            None,
        ),
        ("blurred", "sharpness", "sharpness {:.2f}", settings.min_sharpness, None),
        ("blurred", "assessed_sharpness", "sharpness assessed as {:.2f}", settings.min_assessed, None),
        ("noisy", "noise", "noise of {:.1f} grey levels", None, settings.max_noise),
        ("noisy", "assessed_clean", "freedom from noise assessed as {:.2f}", settings.min_assessed, None),
        ("marked", "border", "a frame takes a share of {:.2f}", None, settings.max_border),
        ("marked", "text", "lines of text take a share of {:.3f}", None, settings.max_text),
        ("compressed", "blocks", "the edges of 8-pixel blocks stand out by {:.1f} grey levels", None, settings.max_blocks),
        ("compressed", "jpeg_quality", "JPEG quality {:.0f}", settings.min_jpeg_quality, None),
        ("blurred", "steadiness", "shaken: edges across one direction have {:.2f} of the others' sharpness", settings.min_steadiness, None),
    )
    for kind, name, words, least, most in checks:
        if name not in scores:
            continue
        for limit, wrong, say in ((least, lambda x, y: x < y, "at least"), (most, lambda x, y: x > y, "at most")):
            if limit is not None and wrong(scores[name], limit):
                return Verdict(kind, f"{words.format(scores[name])}; {say} {limit:g} is wanted")
    return None


PROMPTS = {
    "assessed_quality": ("Good photo.", "Bad photo."),
    "assessed_sharpness": ("Sharp photo.", "Blurry photo."),
    "assessed_exposure": ("Bright photo.", "Dark photo."),
    "assessed_clean": ("Clean photo.", "Noisy photo."),
}


class Assessor(Protocol):
    """A learned opinion of pictures. Its scores join those of `measure`."""

    name: str

    def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, float]]:
        """For each picture "assessed_quality", "assessed_sharpness", "assessed_exposure", "assessed_clean": 0 bad to 1 good."""


class ClipIqa:
    """CLIP-IQA (Wang et al. 2023): how much nearer a picture is to "Good photo." than to "Bad photo.", and so for each quality.

    Theirs drops CLIP's position embeddings to see pictures at full size; this sees them at the model's own. `clip` is one of `get_clip`.
    """

    def __init__(self, clip):
        self.name, self.clip = f"clip-iqa:{clip.name}", clip
        self.texts = clip.read([prompt for pair in PROMPTS.values() for prompt in pair])

    def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, float]]:
        if not pictures:
            return []
        logits = self.clip.scale * self.clip.see(pictures) @ self.texts.T  # (N, 2 a quality)
        good = logits.reshape(len(pictures), -1, 2).softmax(dim=-1)[..., 0]
        return [dict(zip(PROMPTS, row, strict=True)) for row in good.tolist()]


def get_assessor(source: str) -> Assessor:
    from charforgex.embedders import get_clip

    return ClipIqa(get_clip(source))


# ---- what is measured ----


def measure(pixels: np.ndarray, data: bytes | None = None) -> dict[str, float]:
    """The scores of one upright picture, uint8 (H, W, 3); `data` is its file, which tells a JPEG's quality ("jpeg_quality", 1 to 100)."""
    grey = working(pixels)
    parts = tiles(pixels)
    frame = _frame(grey)
    inner = grey[frame[0] : grey.shape[0] - frame[1], frame[2] : grey.shape[1] - frame[3]]
    scores = {
        "sharpness": sharpness(inner),
        "steadiness": steadiness(inner),
        **exposure(inner),
        "noise": noise(parts),
        "blocks": blocks(parts),
        "detail": detail(parts),
        "border": 1 - inner.size / grey.size,
        "text": text(inner),
    }
    quality = jpeg_quality(data) if data is not None else None
    return scores if quality is None else scores | {"jpeg_quality": quality}


def working(pixels: np.ndarray) -> np.ndarray:
    """What is measured at the size of training: grey (h, w), at most `WORK` pixels a side, of uint8 (H, W, 3)."""
    return cv2.cvtColor(_fit(pixels, WORK), cv2.COLOR_RGB2GRAY)


def sharpness(grey: np.ndarray) -> float:
    """How steep the steepest edges are, 0 to 1: grey levels a pixel across an edge, over the edge's height. Grey (H, W) uint8.

    How fast a blurred edge rises, in shares of its height, depends on the blur and not on what is shown; so drawings and photographs share
    one scale. A single step from black to 200 that was blurred by a Gaussian of 1, 2, 3, 4 pixels has 0.90, 0.60, 0.44, 0.34, one of half
    the height about a third less.
    The steepest fifth of the edges counts: a sharp person before a soft background is sharp.
    1 where there is no edge to tell by.
    """
    found = steepness(grey)
    return 1.0 if found is None else found


def steepness(grey: np.ndarray) -> float | None:
    """`sharpness`, but None where there is no edge to tell by."""
    if min(grey.shape) < 2:
        return None
    smooth, edge = _without_grain(grey)
    across = cv2.max(cv2.absdiff(smooth[:, :-1], smooth[:, 1:])[:-1], cv2.absdiff(smooth[:-1], smooth[1:])[:, :-1])
    return _steepness(smooth[:-1, :-1], across, np.ones((9, 9), np.uint8), edge)


def steadiness(grey: np.ndarray) -> float:
    """The sharpness across the softest of four directions, as a share of that across the sharpest: a shaken camera or a moving person blurs
    along the way alone. 0.75 and more of steady pictures, 0.6 of ones that moved by a fortieth of their longer side, 0.4 by a twentieth.
    Out of focus is steady. 1 where one direction at most has edges to tell by. Grey (H, W) uint8."""
    if min(grey.shape) < 16:
        return 1.0
    smooth, edge = _without_grain(_fit(grey, WORK // 2))
    found = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        line = np.zeros((9, 9), np.uint8)
        line[4 + down * np.arange(-4, 5), 4 + right * np.arange(-4, 5)] = 1
        height, width = smooth.shape[0] - down, smooth.shape[1] - 1
        left = max(0, -right)
        here = smooth[:height, left : left + width]
        there = smooth[down : down + height, left + right : left + right + width]
        found.append(_steepness(here, cv2.absdiff(here, there), line, edge))
    found = [value for value in found if value is not None]
    return min(found) / max(found) if found else 1.0


def _without_grain(grey: np.ndarray) -> tuple[np.ndarray, int]:
    """A little smoothed, and the grey levels that make an edge in it. Grain is steep everywhere; the median keeps steps without it."""
    edge = EDGE
    if noise([grey]) > 4:
        grey, edge = cv2.medianBlur(grey, 5), 2 * EDGE
    return cv2.GaussianBlur(grey, (3, 3), 0.6), edge


def _steepness(grey: np.ndarray, steps: np.ndarray, window: np.ndarray, edge: int) -> float | None:
    """The largest of `steps` in the window over what the window spans, mean of the steepest fifth of the edges; None without 64 of them."""
    height = cv2.subtract(cv2.dilate(grey, window), cv2.erode(grey, window))
    edges = height >= edge
    if edges.sum() < 64:
        return None
    ratio = cv2.dilate(steps, window)[edges].astype(np.float32) / height[edges]
    count = len(ratio) // 5
    return float(np.partition(ratio, -count)[-count:].mean())


def exposure(grey: np.ndarray) -> dict[str, float]:
    """`dark`, `bright`: shares of pixels lost in black and white. `low`, `high`: the 2nd and 98th percentile of brightness, 0 to 255.
    `mean`; `contrast`: `high` less `low`. Grey (H, W) uint8."""
    total = np.cumsum(np.bincount(grey.ravel(), minlength=256)) / grey.size
    low, high = (float(np.searchsorted(total, share)) for share in (0.02, 0.98))
    return {
        "dark": float(total[CLIPPED]),
        "bright": float(1 - total[254 - CLIPPED]),
        "low": low,
        "high": high,
        "mean": float(grey.mean()),
        "contrast": high - low,
    }


def noise(tiles: Sequence[np.ndarray]) -> float:
    """Standard deviation of the noise in grey levels (Immerkaer 1996), of the quietest quarter of 16-pixel squares: the rest may be
    texture. Squares that are nearly black or white show no noise and do not count. Grey tiles (H, W) uint8."""
    found = []
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    for tile in tiles:
        rows, columns = tile.shape[0] // 16, tile.shape[1] // 16
        if not rows or not columns:
            continue
        tile = tile[: rows * 16, : columns * 16]
        strength = cv2.resize(np.abs(cv2.filter2D(tile, cv2.CV_32F, kernel)), (columns, rows), interpolation=cv2.INTER_AREA)
        level = cv2.resize(tile, (columns, rows), interpolation=cv2.INTER_AREA)
        found.append(strength[(level > 16) & (level < 239)])
    values = np.concatenate(found) if found else np.zeros(0)
    return float(np.quantile(values, 0.25) * np.sqrt(np.pi / 2) / 6) if len(values) >= 4 else 0.0


def blocks(tiles: Sequence[np.ndarray]) -> float:
    """How much the grid of 8-pixel blocks stands out, in grey levels: the mean extra step at the grid's lines against their neighbours.

    Where the grid lies is tried out, so a cropped picture tells as well; one that was scaled after the compression does not. Where nothing
    changes at all, as in a drawing's flat areas, there is nothing to go by, and it does not count.
    """
    steps = []
    for axis in (0, 1):
        total, active = np.zeros(8), 0.0
        for tile in tiles:
            values = tile.astype(np.int16) if axis else tile.T.astype(np.int16)
            step = np.abs(np.diff(values, axis=1))
            extra = step[:, 1:-1] - (step[:, :-2] + step[:, 2:]) / 2
            # steps of many grey levels are edges of what is shown
            extra = np.where(step[:, 1:-1] < EDGE, extra, 0)
            width = extra.shape[1] // 8 * 8
            total += extra[:, :width].reshape(len(extra), -1, 8).sum(axis=(0, 1))
            active += np.count_nonzero(step[:, 1:-1] + step[:, :-2] + step[:, 2:]) / 8
        mean = total / max(active, 1000.0)
        steps.append(mean.max() - np.median(mean))
    return float(min(steps))


def detail(tiles: Sequence[np.ndarray]) -> float:
    """The share of its own resolution that a picture uses, up to 1: 0.5 was enlarged twofold, or could be halved without loss.

    Where the spectrum, weighted as pictures fall off (1 / f^2), sinks under a thirtieth of its level at middle frequencies. Says
    a little too much: 0.65 of pictures enlarged twofold, 0.35 of fourfold ones (medians); grain of the enlarged picture hides it.
    """
    best = 0.0
    for tile in tiles:
        if min(tile.shape) < 64:
            return 1.0
        weight, ring, count, window = _rings(*tile.shape)
        power = np.abs(np.fft.rfft2((tile - tile.mean(dtype=np.float32)) * window)) ** 2
        profile = np.bincount(ring, (power * weight).ravel(), 21)[:20] / count
        reference = profile[1:6].mean()
        if reference > 0:
            best = max(best, (np.flatnonzero(profile > reference / 30).max() + 1) / 20)
    return float(best) if best else 1.0


@functools.lru_cache(8)
def _rings(height: int, width: int) -> tuple[np.ndarray, ...]:
    """f^2 of each frequency, which of 20 rings up to the tile's own limit it lies in (20: beyond), how many do, and the window."""
    rows, columns = np.fft.fftfreq(height)[:, None] * 2, np.fft.rfftfreq(width)[None] * 2
    square = (rows**2 + columns**2).astype(np.float32)
    ring = np.minimum((np.sqrt(square) * 20).astype(np.intp), 20).ravel()
    window = (np.hanning(height)[:, None] * np.hanning(width)).astype(np.float32)
    return square, ring, np.maximum(np.bincount(ring, minlength=21)[:20], 1), window


def text(grey: np.ndarray) -> float:
    """The share of the picture's area that lies in lines of letter-like strokes: captions, signatures, watermarks with legible letters.

    Letters are small blobs that stand out from what is around them, alike in height, side by side, six at least. Does not see: logos
    without letters, faint, slanted or very small text, single large letters, short words; takes rows of alike shapes, such as pebbles,
    for text.
    """
    grey = _fit(grey, 512)
    marks = np.zeros(grey.shape, bool)
    window = cv2.getStructuringElement(cv2.MORPH_RECT, (11, 11))
    for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
        strokes = (cv2.morphologyEx(grey, operation, window) > STROKE).astype(np.uint8)
        _, _, boxes, _ = cv2.connectedComponentsWithStats(strokes, connectivity=4)
        boxes = boxes[1:]  # the first is the background
        _, _, width, height, area = boxes.T
        filled = area / (width * height)
        letters = (height >= 5) & (height <= 40) & (width <= 2.5 * height) & (filled >= 0.15) & (filled <= 0.9)
        _mark_lines(marks, boxes[letters])
    return float(marks.mean())


def _mark_lines(marks: np.ndarray, boxes: np.ndarray) -> None:
    """Marks what lies between letters that follow one another: boxes (N, 5) of left, top, width, height, area."""
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")[:LETTERS]]
    boxes = boxes[np.argsort(boxes[:, 0], kind="stable")]
    if len(boxes) < LINE:
        return
    left, top, width, height = (side.astype(np.int32) for side in boxes[:, :4].T)
    right, bottom = left + width, top + height
    gap = left[None] - right[:, None]
    follows = (gap >= -0.3 * height[:, None]) & (gap <= 1.2 * height[:, None]) & (left[None] > left[:, None])
    follows &= np.maximum(height, height[:, None]) <= 1.6 * np.minimum(height, height[:, None])
    follows &= np.abs(bottom - bottom[:, None]) <= 0.35 * np.maximum(height, height[:, None])
    line = np.arange(len(boxes))
    for letter in np.flatnonzero(follows.any(axis=1)):
        line[np.flatnonzero(follows[letter])[0]] = line[letter]
    for first in np.flatnonzero(np.bincount(line) >= LINE):
        members = line == first
        if np.ptp(np.quantile(width[members], (0.1, 0.9))) < 2:  # all of one width: the lit windows of a house
            continue
        marks[top[members].min() : bottom[members].max(), left[members].min() : right[members].max()] = True


def jpeg_quality(data: bytes) -> float | None:
    """The quality setting of the Independent JPEG Group's encoder (1 to 100) whose luminance table is nearest; None for other formats."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            table = image.quantization.get(0)
    except (OSError, SyntaxError, ValueError, KeyError):  # decoded already, by a reader that forgives more: no answer is no fault
        return None
    if not table:
        return None
    # the 16 finest steps, because the others end at 255 below quality 25; at quality 50 they add up to 246
    scale = 100 * sum(sorted(table)[:16]) / 246
    return float(np.clip(5000 / scale if scale > 100 else (200 - scale) / 2, 1, 100))


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    return cv2.resize(pixels, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)


def tiles(pixels: np.ndarray) -> list[np.ndarray]:
    """Grey tiles of the picture itself: its middle and four between there and the corners; the whole of a small one."""
    height, width = pixels.shape[:2]
    if height <= 2 * TILE and width <= 2 * TILE:
        return [cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)]
    found = []
    for y, x in ((0.5, 0.5), (0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)):
        top, left = (max(0, round(share * side - TILE / 2)) for share, side in ((y, height), (x, width)))
        top, left = min(top, max(0, height - TILE)), min(left, max(0, width - TILE))
        found.append(cv2.cvtColor(pixels[top : top + TILE, left : left + TILE], cv2.COLOR_RGB2GRAY))
    return found


def _frame(grey: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns of one grey at the top, bottom, left and right that end in a straight line: a frame or black bars.

    A plain background ends at the outline of what is shown, not in a line; it is no frame. Nor is a band on one side, such as a stripe of a
    shirt: a frame has two sides of one colour at least.
    """

    def depth(lines: np.ndarray) -> tuple[int, int]:
        colour = int(np.median(lines[0]))
        off = np.abs(lines[: len(lines) // 2].astype(np.int16) - colour) > 10
        share = off.mean(axis=1)
        bare = share < 0.01
        first = int(np.argmin(bare)) if not bare.all() else 0
        return (first if first and share[first : first + 3].max() > 0.6 else 0), colour

    def bars(lines: np.ndarray) -> tuple[int, int]:
        (one, colour), (other, opposite) = depth(lines), depth(lines[::-1])
        alike = abs(colour - opposite) <= 10 and min(one, other) >= 0.5 * max(one, other)
        return (one, other) if alike else (0, 0)

    return *bars(grey), *bars(grey.T)
