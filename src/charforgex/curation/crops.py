"""Crops that keep the head whole and nothing stretched: portrait, upper body and full, in the shapes that training has buckets for.

A box is (left, top, right, bottom) in pixels of the picture. `plan` only reckons; `cut` gives the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from charforgex.binding import Range
from charforgex.curation.items import Face
from charforgex.errors import ConfigError

Box = tuple[float, float, float, float]
Framing = Literal["portrait", "upper", "full"]
Margin = Annotated[float, Range(at_least=0, at_most=3)]
# What a framing shows, in faces' heights from the brow: how far down, and how far to each side of the face.
REACH: dict[str, tuple[float, float]] = {"portrait": (2.0, 0.6), "upper": (4.5, 1.6)}
BESIDE = 0.3  # of a face's width on each side, and half of it below the chin, belong to the head
ALIKE = 0.75  # intersection over union at which a second crop of a picture shows nothing new


@dataclass(frozen=True)
class CropSettings:
    framings: tuple[Framing, ...] = ("portrait", "upper", "full")
    ratios: tuple[Annotated[float, Range(at_least=0.25, at_most=4)], ...] = (1.0, 0.8, 0.75, 0.667, 0.571, 1.25, 1.333, 1.5, 1.75)
    head_margin: Margin = 1.0
    min_side: Annotated[int, Range(at_least=16)] = 256
    upscale: bool = False

    def __post_init__(self):
        for name in ("framings", "ratios"):
            if not getattr(self, name):
                raise ConfigError(f"curation.crops.{name}=[] leaves no crop to make; name one at least.")


@dataclass(frozen=True)
class Cut:
    """A part of a picture, and the size (width, height) that it becomes: its own, or a larger one if upscaling was asked for."""

    framing: Framing
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def plan(
    width: int, height: int, face: Face | None, settings: CropSettings, subject: Box | None = None, others: Sequence[Face] = ()
) -> list[Cut]:
    """The crops of a picture, each framing of `settings` that shows something new, in their order.

    Of `face` all of the head is in each crop, of `others` no face. `full` is all that the shapes can show of the picture. Without a face
    there is only `full`, with the `subject` as near to its middle as the picture allows. Empty if a crop would be smaller than
    `min_side`, or the others cannot be kept out.
    """
    limits: Box | None = (0.0, 0.0, float(width), float(height))
    head = None
    if face is not None:
        head = head_box(face, settings.head_margin, limits)
        limits = free_of(others, face, head, limits)
        if limits is None:
            return []
        head = _meet(head, limits)
    cuts: list[Cut] = []
    for framing in settings.framings:
        if face is None and framing != "full":
            continue
        wanted = limits if framing == "full" else _wanted(framing, face, head, limits)
        best = _best(wanted, head, limits, settings.ratios)
        if best is None and face is not None:  # the head fills the picture, and no ratio is the picture's: its hair has to give
            best = _best(wanted, face.box, limits, settings.ratios)
        if face is None and subject is not None:
            best = _centred(best, subject, limits)
        cut = best and _sized(framing, best, settings)
        if cut and not any(_alike(cut.box, other.box) for other in cuts):
            cuts.append(cut)
    return cuts


def head_box(face: Face, margin: float, limits: Box) -> Box:
    """The face with hair and hat, `margin` faces' heights above the brow, as far as the picture shows them."""
    left, top, right, bottom = face.box
    beside = BESIDE * face.width
    return _meet((left - beside, top - margin * face.height, right + beside, bottom + BESIDE / 2 * face.height), limits)


def free_of(others: Sequence[Face], face: Face, head: Box, limits: Box) -> Box | None:
    """The largest part of `limits` around the face that no other face reaches into, by one straight cut for each; None if there is none.

    The head stays whole where that is possible; where another face is in front of its margin, the face does.
    """
    for other in sorted(others, key=lambda other: -other.width * other.height):
        left, top, right, bottom = other.box
        a, b, c, d = limits
        if left >= c or right <= a or top >= d or bottom <= b:
            continue
        parts = [(right, b, c, d), (a, b, left, d), (a, bottom, c, d), (a, b, c, top)]
        kept = [part for part in parts if _holds(part, head)] or [part for part in parts if _holds(part, face.box)]
        if not kept:
            return None
        limits = max(kept, key=_area)
    return limits


def _wanted(framing: str, face: Face, head: Box, limits: Box) -> Box:
    down, beside = REACH[framing]
    left, top, right, _ = face.box
    around = (left - beside * face.height, top, right + beside * face.height, top + down * face.height)
    return _meet(_join(around, head), limits)


def _best(wanted: Box, needed: Box | None, limits: Box, ratios: Sequence[float]) -> Box | None:
    fitted = (_fit(wanted, needed, limits, ratio) for ratio in ratios)
    return min((box for box in fitted if box), key=lambda box: _cost(box, wanted), default=None)


def _fit(wanted: Box, needed: Box | None, limits: Box, ratio: float) -> Box | None:
    """The smallest box of `ratio` (width over height) that shows `wanted`, smaller where `limits` are; None if `needed` does not fit.

    Where not all of `wanted` can be shown, its top is, because heads are there.
    """
    width = max(wanted[2] - wanted[0], (wanted[3] - wanted[1]) * ratio)
    width = min(width, limits[2] - limits[0], (limits[3] - limits[1]) * ratio)
    height = width / ratio
    left = (wanted[0] + wanted[2] - width) / 2
    top = wanted[1] if height < wanted[3] - wanted[1] else (wanted[1] + wanted[3] - height) / 2
    if needed is not None:
        if width < needed[2] - needed[0] - 0.5 or height < needed[3] - needed[1] - 0.5:
            return None
        left = min(max(left, needed[2] - width), needed[0])
        top = min(max(top, needed[3] - height), needed[1])
    left = min(max(left, limits[0]), limits[2] - width)
    top = min(max(top, limits[1]), limits[3] - height)
    return left, top, left + width, top + height


def _centred(box: Box, subject: Box, limits: Box) -> Box:
    """Moved within the limits."""
    width, height = box[2] - box[0], box[3] - box[1]
    left = min(max((subject[0] + subject[2] - width) / 2, limits[0]), limits[2] - width)
    top = min(max((subject[1] + subject[3] - height) / 2, limits[1]), limits[3] - height)
    return left, top, left + width, top + height


def _cost(box: Box, wanted: Box) -> float:
    """What is missing of the wanted weighs twice what is there besides."""
    common = _area(_meet(box, wanted))
    return 2 * (1 - common / _area(wanted)) + (1 - common / _area(box))


def _sized(framing: Framing, box: Box, settings: CropSettings) -> Cut | None:
    """In whole pixels, or None if that is too small."""
    left, top, right, bottom = (round(edge) for edge in box)
    size, least = (right - left, bottom - top), settings.min_side
    if min(size) < 1 or (min(size) < least and not settings.upscale):
        return None
    if min(size) < least:
        scale = least / min(size)
        size = max(least, round(size[0] * scale)), max(least, round(size[1] * scale))
    return Cut(framing, (left, top, right, bottom), size)


def cut(picture: Image.Image, cut: Cut) -> Image.Image:
    """The pixels, resampled only if they are scaled."""
    part = picture.crop(cut.box)
    return part if part.size == cut.size else part.resize(cut.size, Image.Resampling.LANCZOS)


def salient_box(pixels: np.ndarray, share: float = 0.9) -> Box:
    """Where a picture without a face has its subject: the rows and columns that hold `share` of what stands out.

    What stands out is the spectral residual (Hou & Zhang 2007): the log spectrum less its local mean. `pixels` is uint8 (H, W, 3).
    """
    import cv2

    height, width = pixels.shape[:2]
    grey = cv2.resize(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    spectrum = np.fft.fft2(grey.astype(np.float64))
    strength = np.log(np.abs(spectrum) + 1)
    residual = strength - cv2.blur(strength, (3, 3))
    salience = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    salience = cv2.GaussianBlur(salience, (0, 0), 2.5)
    salience = np.clip(salience - np.median(salience), 0, None) + 1e-12
    tail = (1 - share) / 2
    sides = []
    for axis, extent in ((0, width), (1, height)):
        total = np.cumsum(salience.sum(axis)) / salience.sum()
        first, last = int(np.searchsorted(total, tail)), int(np.searchsorted(total, 1 - tail))
        sides.append((first * extent / 64, min(64, last + 1) * extent / 64))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


# ---- boxes ----


def _meet(a: Box, b: Box) -> Box:
    left, top = max(a[0], b[0]), max(a[1], b[1])
    return left, top, max(left, min(a[2], b[2])), max(top, min(a[3], b[3]))


def _join(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _area(box: Box) -> float:
    return max(1e-9, (box[2] - box[0]) * (box[3] - box[1]))


def _holds(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] + 0.5 and outer[1] <= inner[1] + 0.5 and outer[2] >= inner[2] - 0.5 and outer[3] >= inner[3] - 0.5


def _alike(a: Box, b: Box) -> bool:
    common = _area(_meet(a, b))
    return common / (_area(a) + _area(b) - common) > ALIKE
