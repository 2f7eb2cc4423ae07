"""What is known of one window: where its crop is, how it moves, how sharp and how bright it is.

Pixels are uint8 RGB (H, W, 3) or (T, H, W, 3); boxes are (left, top, right, bottom) in pixels of the upright frame.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from charforgex.curation import crops, fingerprints, quality
from charforgex.curation.clips.settings import MULTIPLE, FrameSettings
from charforgex.curation.clips.windows import Window
from charforgex.curation.crops import Box, CropSettings
from charforgex.curation.faces import Detector
from charforgex.curation.items import Face
from charforgex.curation.shards import bounded

SEEN = 384  # pixels of the longer side of what face detectors see: four frames a clip, and faces that count are large
LEAST = 16  # pixels of a crop's shorter side; below that nothing can be measured
BLUR = 2.0  # pixels: grain of 8 grey levels then moves nothing by more than 5.5
MOVED = 99.7  # percentile over the pixels: a mouth that talks in a portrait takes a two-hundredth
SHOWN, HEIGHT = 8, 96  # frames in a strip, and its pixels
TILE = 48  # pixels of a mosaic's tiles


class Measured(NamedTuple):
    """`row` is plain data, without `scores` where frames are missing; `mosaic` is what clips are compared by, `strip` a JPEG for people."""

    row: dict[str, Any]
    mosaic: np.ndarray
    strip: bytes


def measure(window: Window, settings: FrameSettings, detector: Detector) -> Measured:
    row = {
        "shot": window.shot,
        "start": float(window.start),
        "indices": [window.moments[place].index for place in sorted(window.moments)],
        "missing": window.num_missing,
    }
    small = window.small
    if window.num_missing:
        return Measured(row, mosaic(small), strip(small))
    looks = [window.looks[place] for place in sorted(window.looks)]
    width, height = looks[0].size
    face, num_faces = followed([detect(detector, look) for look in looks])
    crop = crop_of(width, height, face, settings)
    box = crop[0] if crop else (0, 0, width, height)
    parts = [np.asarray(look.crop(box)) for look in looks]
    small = cropped(small, box, (width, height))
    grey = smoothed(small)
    row |= {
        "source": [width, height],
        "box": list(box),
        "size": list(crop[1]) if crop else None,
        "face": list(face.box) if face else None,
        "seen": [num_faces, len(looks)],
        "scores": {
            "motion": motion(grey),
            "jump": jump(grey),
            "sharpness": max(quality.sharpness(quality.working(part)) for part in parts),
            **{name: max(found) if name == "high" else min(found) for name, found in light(parts).items()},
        },
        "sha256": hashlib.sha256(small.tobytes()).hexdigest(),
    }
    return Measured(row, mosaic(small), strip(small))


# ---- where the crop is ----


def detect(detector: Detector, picture: Image.Image) -> list[Face]:
    """In pixels of `picture`, which the detector sees smaller."""
    if min(picture.size) < LEAST:
        return []
    seen = bounded(picture, SEEN)
    return [face.scaled(picture.width / seen.width) for face in detector.detect(np.asarray(seen))]


def followed(found: Sequence[Sequence[Face]]) -> tuple[Face | None, int]:
    """The face that is largest in any of the looks, as the box of all its places, and in how many looks it is; None if in fewer than half.

    From look to look it is the nearest one, at most one and a half of its widths away.
    """
    chosen: dict[int, Face] = {}
    faces = [(face.width * face.height, -look, face) for look, faces in enumerate(found) for face in faces]
    if not faces:
        return None, 0
    _, first, largest = max(faces, key=lambda item: item[:2])
    for direction in (range(-first, len(found)), range(-first - 1, -1, -1)):
        last = largest
        for look in direction:
            near = min(found[look], key=lambda face: _apart(face, last), default=None)
            if near is not None and _apart(near, last) <= 1.5 * last.width:
                chosen[look] = last = near
    if 2 * len(chosen) < len(found):
        return None, len(chosen)
    lefts, tops, rights, bottoms = zip(*(face.box for face in chosen.values()), strict=True)
    box = (min(lefts), min(tops), max(rights), max(bottoms))
    return Face(box, min(face.score for face in chosen.values())), len(chosen)


def _apart(one: Face, other: Face) -> float:
    across, down = ((one.box[i] + one.box[i + 2] - other.box[i] - other.box[i + 2]) / 2 for i in (0, 1))
    return float(np.hypot(across, down))


def crop_of(width: int, height: int, face: Face | None, settings: FrameSettings) -> tuple[tuple[int, ...], tuple[int, int]] | None:
    """The box that is cut out of every frame, and the size (width, height) that it becomes; None if there is none to cut.

    A face that goes further than the ratio can show is in the middle of its way in the middle of the largest crop.
    """
    whole: Box = (0.0, 0.0, float(width), float(height))
    if face is None and settings.without_face != "centre":
        return None if settings.without_face == "aside" else sized(whole, settings.max_side)
    planned = CropSettings((settings.framing,), (settings.ratio,), settings.head_margin, LEAST)
    cuts = crops.plan(width, height, face, planned) if face else []
    cuts = cuts or crops.plan(width, height, None, replace(planned, framings=("full",)), subject=face.box if face else whole)
    return sized(cuts[0].box, settings.max_side) if cuts else None


def sized(box: Box, max_side: int) -> tuple[tuple[int, ...], tuple[int, int]] | None:
    """A box of whole pixels, cut off evenly on both sides to what can have sides that are multiples of 8; scaled only if it is larger than
    `max_side`. None if a side is below `LEAST`."""
    left, top, right, bottom = (round(edge) for edge in box)
    width, height = right - left, bottom - top
    scale = min(1.0, max_side / max(width, height))
    size = tuple(int(side * scale + 1e-6) // MULTIPLE * MULTIPLE for side in (width, height))
    if min(size) < LEAST:
        return None
    kept = [min(whole, round(side / scale)) for side, whole in zip(size, (width, height), strict=True)]
    left, top = left + (width - kept[0]) // 2, top + (height - kept[1]) // 2
    return (left, top, left + kept[0], top + kept[1]), size


def cropped(small_THWP: np.ndarray, box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The same part of smaller frames; `size` (width, height) is that of the frames which `box` is of."""
    height, width = small_THWP.shape[1:3]
    left, top, right, bottom = (edge * (width / size[0], height / size[1])[place % 2] for place, edge in enumerate(box))
    left, top = int(left), int(top)
    return small_THWP[:, top : max(top + 1, round(bottom)), left : max(left + 1, round(right))]


# ---- how it moves, and in what light ----


def smoothed(small_THWP: np.ndarray) -> np.ndarray:
    """float32 (T, h, w): brightness without grain, each frame less its mean, so that a lamp that flickers is no motion."""
    grey = np.stack([cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), BLUR) for pixels in small_THWP])
    return grey - grey.mean(axis=(1, 2), keepdims=True)


def motion(grey_Thw: np.ndarray) -> float:
    """Grey levels over which brightness varies in time at the place where it varies most."""
    return float(np.percentile(np.ptp(grey_Thw, axis=0), MOVED))


def jump(grey_Thw: np.ndarray) -> float:
    """How many times as large the largest step from frame to frame is as the clip's large steps are (a quarter is larger), which count as
    one grey level at least. A step is the mean of the absolute differences. 1 to 2 of what moves, 3 where half a second is missing of a
    pan, 10 and more at a cut."""
    steps = np.abs(np.diff(grey_Thw, axis=0)).mean(axis=(1, 2))
    return float(steps.max() / max(1.0, np.percentile(steps, 75)))


def light(parts: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """`high` and `low` of `quality.exposure`, of each picture."""
    found = [quality.exposure(quality.working(part)) for part in parts]
    return {name: [one[name] for one in found] for name in ("high", "low")}


# ---- pictures of it ----


def mosaic(small_THWP: np.ndarray) -> np.ndarray:
    """uint8 (96, 96, 3): four frames out of its quarters, squeezed into squares. Clips whose mosaics look alike are alike in time, too."""
    chosen = [small_THWP[int((2 * k + 1) * len(small_THWP) / 8)] for k in range(4)]
    a, b, c, d = (cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA) for pixels in chosen)
    return fingerprints.thumbnail(np.vstack([np.hstack([a, b]), np.hstack([c, d])]))


def strip(small_THWP: np.ndarray) -> bytes:
    """JPEG: frames side by side, evenly out of all, the first and the last among them."""
    places = np.linspace(0, len(small_THWP) - 1, min(SHOWN, len(small_THWP))).round().astype(int)
    height, width = small_THWP.shape[1:3]
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    tiles = [np.asarray(Image.fromarray(small_THWP[place]).resize(size, Image.Resampling.BICUBIC)) for place in places]
    file = io.BytesIO()
    Image.fromarray(np.hstack(tiles)).save(file, "JPEG", quality=80)
    return file.getvalue()
