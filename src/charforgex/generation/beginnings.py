"""What a clip is made from besides noise: one picture, or the frames of a video, cut to the clip's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from charforgex.errors import DataError

if TYPE_CHECKING:
    from charforgex.videos import Frame


def picture(path: Path, setting: str = "init") -> np.ndarray:
    """uint8 RGB (H, W, 3), upright, what is transparent on white. Raises DataError, as of that setting."""
    try:
        with Image.open(path) as opened:
            found = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{setting}={path} is damaged or no picture: {error}; name a picture or a video.") from error
    white = Image.new("RGBA", found.size, "white")
    return np.asarray(Image.alpha_composite(white, found).convert("RGB"))


def fitted(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resized and cut in the middle to (height, width)."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), size[::-1], Image.Resampling.LANCZOS))


def at_rate(frames: Iterable[Frame], rate: Fraction) -> Iterator[np.ndarray]:
    """The frames that are nearest to 0, 1 / rate, 2 / rate, ... seconds, until the video ends; two of them are held at a time."""
    before, number = None, 0
    for frame in frames:
        while before is not None and number / rate < (before.time + frame.time) / 2:
            yield before.pixels
            number += 1
        before = frame
    while before is not None and number / rate < before.time + before.lasts:
        yield before.pixels
        number += 1
