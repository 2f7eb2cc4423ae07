"""How pictures look, whatever they show: sharpness, flaws, tones and layout, streamed over a gallery. N shots; grey levels are 0 to 255."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from charforgex.curation import quality
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery

LIMITS = quality.QualitySettings()
BLANK = 2  # grey levels that a picture of one colour spans at most: what JPEG leaves of it
UNIFORM = 1.0  # standard deviation, in grey levels, of squares that are near-uniform
SQUARE = 16
WINDOW = 11  # pixels a side in which structure is compared
SIDE = 256  # pixels of the shorter side at which tones and layout are looked at, as Wang's own program scales pictures down


def measured(gallery: Gallery, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`measure` of each picture, uint8 (H, W, 3), stacked."""
    return np.array([measure(np.asarray(picture)) for _, pictures in gallery.batches() for picture in pictures], np.float64)


def sharpness(gallery: Gallery) -> np.ndarray:
    """(N,) as `quality.sharpness`, NaN where there are no edges to tell by."""

    def of(pixels: np.ndarray) -> float:
        found = quality.steepness(quality.working(pixels))
        return np.nan if found is None else found

    return measured(gallery, of)


def flaws(gallery: Gallery) -> tuple[np.ndarray, dict[str, float]]:
    """The worst flaw (N,) in [0, 1], of what curation's limits allow; and the mean of each measure."""
    found = measured(gallery, _flaws)
    blocks, noise, dark, bright, blank, _ = found.T
    worst = np.max([blocks / LIMITS.max_blocks, noise / LIMITS.max_noise, dark / LIMITS.max_dark, bright / LIMITS.max_bright, blank], 0)
    names = ("blocks", "noise", "dark", "bright", "blank", "uniform")
    return np.minimum(worst, 1.0), dict(zip(names, found.mean(0).tolist(), strict=True))


def _flaws(pixels: np.ndarray) -> tuple[float, ...]:
    tiles, grey = quality.tiles(pixels), quality.working(pixels)
    exposed = quality.exposure(grey)
    height, width = (side // SQUARE * SQUARE for side in grey.shape)
    squares = grey[:height, :width].reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE).swapaxes(1, 2).astype(np.float32)
    uniform = float((squares.std((2, 3)) < UNIFORM).mean()) if squares.size else 0.0
    blank = float(np.ptp(pixels, axis=(0, 1)).max() <= BLANK)
    return quality.blocks(tiles), quality.noise(tiles), exposed["dark"], exposed["bright"], blank, uniform


def tones(gallery: Gallery) -> np.ndarray:
    """(N, 3) in [0, 1]: mean grey, standard deviation of grey, mean saturation (of the largest channel, the part above the smallest)."""

    def of(pixels: np.ndarray) -> tuple[float, float, float]:
        pixels = _small(pixels)
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        largest, smallest = pixels.max(2).astype(np.float64), pixels.min(2)
        return grey.mean() / 255, grey.std() / 255, float(((largest - smallest) / np.maximum(largest, 1)).mean())

    return measured(gallery, of)


def structure(gallery: Gallery, other: Gallery) -> np.ndarray:
    """(N,) SSIM of each pair of pictures. Raises DataError for two of different sizes."""
    found = []
    for (shots, pictures), (_, others) in zip(gallery.batches(), other.batches(), strict=True):
        for shot, a, b in zip(shots, pictures, others, strict=True):
            if a.size != b.size:
                raise DataError(f"{shot.name} has {a.size} pixels and {b.size} from {other.name}: draw both at one size")
            if min(a.size) < WINDOW:
                raise DataError(f"{shot.name} has {a.size} pixels; structure is compared from {WINDOW} a side on")
            found.append(ssim(*(cv2.cvtColor(_small(np.asarray(picture)), cv2.COLOR_RGB2GRAY) for picture in (a, b))))
    return np.array(found)


def _small(pixels: np.ndarray) -> np.ndarray:
    scale = min(1.0, SIDE / min(pixels.shape[:2]))
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004, eq. 13) of grey pictures (H, W), [-1, 1]: windows of `WINDOW` with a Gaussian of 1.5
    pixels, K1 = 0.01, K2 = 0.03; only windows inside the picture count."""
    a, b, edge = a.astype(np.float64), b.astype(np.float64), WINDOW // 2

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (WINDOW, WINDOW), 1.5)[edge:-edge, edge:-edge]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(found.mean())
