"""Masks for the weighted loss: how much each pixel is the face, and whether it is the subject. Pictures of mode L, white where it is.

The subject is cut out by GrabCut (Rother et al. 2004), told by the face where head and body must be. It needs no weights and errs where
figure and ground have the same colours; `Masks.quality` says how far to trust it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from charforgex.curation.items import Face

SIDE = 192  # at which the subject is looked for
ROUNDS = 4
TRUSTED = 0.72  # of `quality`: below, the subject is the shape that a person with this face mostly has


@dataclass(frozen=True)
class Masks:
    """`face` is None without a face. `subject` is the figure that was found, or a guess by the face alone if `guessed`.

    `quality` in [0, 1] is how far the figure that was found agrees with the guess: where it flows into the background, or vanishes in it,
    the two part. On drawn characters it says more of the true error (correlation 0.75) than edges under the outline do (0.03).
    """

    face: Image.Image | None
    subject: Image.Image
    quality: float
    guessed: bool


def masks(picture: Image.Image, face: Face | None, subject: tuple[float, float, float, float] | None = None) -> Masks:
    """The masks of a picture, of its size. Without a face, `subject` is the box that holds what the picture is of, or all of it does."""
    scale = min(1.0, SIDE / max(picture.size))
    size = max(8, round(picture.width * scale)), max(8, round(picture.height * scale))
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX)))
    scales = np.array([size[0] / picture.width, size[1] / picture.height])
    seeds, guess = _seeds(size, face, scales, subject)
    cv2.setRNGSeed(0)  # GrabCut's colour clusters start by chance
    found = seeds.copy()
    if np.isin((cv2.GC_BGD, cv2.GC_FGD, cv2.GC_PR_FGD), seeds).all():
        cv2.grabCut(pixels, found, None, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    inside = np.isin(found, (cv2.GC_FGD, cv2.GC_PR_FGD))
    quality = agreement(inside, guess > 0.5)
    guessed = quality < TRUSTED
    shape = (guess if guessed else cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 0.8)) * 255
    whole = Image.fromarray(shape.round().astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    return Masks(face and face_mask(picture.size, face), whole, quality, guessed)


def face_mask(size: tuple[int, int], face: Face) -> Image.Image:
    """A soft oval: 255 on the face's box but for its corners, half at the edge, 0 from a fifth of its size outside. Turned by its roll."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = x - (face.box[0] + face.box[2]) / 2, y - (face.box[1] + face.box[3]) / 2
    angle = np.deg2rad(face.roll or 0.0)
    across, down = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.hypot(across / (face.width / 2), down / (face.height / 2))
    return Image.fromarray((np.clip((1.2 - radius) / 0.4, 0, 1) * 255).round().astype(np.uint8))


def _seeds(size: tuple[int, int], face: Face | None, scales: np.ndarray, subject) -> tuple[np.ndarray, np.ndarray]:
    """What GrabCut is told (H, W), and the guess (H, W) in [0, 1] without it.

    With a face: its oval is the figure; head, neck and shoulders beneath probably are; the rest probably is not, and the upper
    corners beside the head surely not. Without: the subject's box probably is, and a rim of the picture is not.
    """
    width, height = size
    seeds = np.full((height, width), cv2.GC_PR_BGD, np.uint8)
    y, x = np.mgrid[:height, :width] + 0.5
    if face is None:
        left, top, right, bottom = (0, 0, width, height) if subject is None else (np.array(subject).reshape(2, 2) * scales).ravel()
        inner = np.hypot((x - (left + right) / 2) / (right - left), (y - (top + bottom) / 2) / (bottom - top))
        rim = np.minimum.reduce([x, y, width - x, height - y]) < 0.03 * min(size)
        seeds[inner < 0.5] = cv2.GC_PR_FGD
        seeds[rim] = cv2.GC_BGD
        seeds[inner < 0.15] = cv2.GC_FGD
        return seeds, np.clip((0.6 - inner) / 0.2, 0, 1)
    a, b = face.width * scales[0] / 2, face.height * scales[1] / 2
    x = (x - (face.box[0] + face.box[2]) / 2 * scales[0]) / a
    y = (y - (face.box[1] + face.box[3]) / 2 * scales[1]) / b
    skull = np.hypot(x / 1.3, (y + 0.35) / 1.5)  # with hair
    shoulders = np.where(y > 1.2, np.abs(x) / np.clip(1.0 + 1.4 * (y - 1.2), 0.5, 1.9), 9.0)
    neck = np.where((y > 0.5) & (y <= 1.4), np.abs(x) / 0.6, 9.0)
    nearness = np.minimum.reduce([skull, shoulders, neck])
    seeds[nearness < 1] = cv2.GC_PR_FGD
    seeds[np.where(y < 1.4, np.hypot(x / 2.6, y / 3.2), np.abs(x) / 3.2) > 1] = cv2.GC_BGD
    seeds[np.minimum(np.hypot(x / 0.8, y / 0.85), np.where(y > 1.9, np.abs(x) / 0.7, 9.0)) < 1] = cv2.GC_FGD
    return seeds, np.clip((1.15 - nearness) / 0.3, 0, 1)


def agreement(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Intersection over union of two shapes; 0 if both are empty."""
    return float((a_HW & b_HW).sum() / max(1, (a_HW | b_HW).sum()))
