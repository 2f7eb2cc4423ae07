"""GIFs of one palette for all frames: what stands still keeps its colour, and no frame brings a table of its own.

Frames wait on disk until all colours are known, so memory does not depend on their number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av
    import numpy as np

SAMPLE = 64  # pixels a side of what is kept of a frame for choosing colours
MOST_SAMPLES = 256  # of a clip; of longer ones, every second frame, every fourth, ...


class Spool:
    """Frames of one size, uint8 (H, W, 3), written once and read back once."""

    def __init__(self):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.times: list[tuple[Fraction, Fraction]] = []
        self.samples: list[np.ndarray] = []
        self.step, self.shape = 1, ()

    def add(self, pixels: np.ndarray, time: Fraction, lasts: Fraction) -> None:
        import numpy as np

        if len(self.times) % self.step == 0:
            rows, columns = (np.linspace(0, side - 1, min(side, SAMPLE)).astype(int) for side in pixels.shape[:2])
            self.samples.append(pixels[rows][:, columns])
            if len(self.samples) > MOST_SAMPLES:
                self.samples, self.step = self.samples[::2], self.step * 2
        self.shape = pixels.shape
        self.file.write(pixels.tobytes())
        self.times.append((time, lasts))

    def frames(self) -> Iterator[tuple[np.ndarray, Fraction, Fraction]]:
        import numpy as np

        self.file.seek(0)
        size = int(np.prod(self.shape))
        for time, lasts in self.times:
            yield np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape), time, lasts

    def palette(self) -> Palette:
        import numpy as np

        return Palette(np.concatenate(self.samples))

    def close(self) -> None:
        self.file.close()


class Palette:
    """Up to 256 colours for pixels like these, by median cut; between them, a fixed pattern (Bayer 1973) that does not flicker."""

    def __init__(self, pixels: np.ndarray):
        import numpy as np
        from PIL import Image

        self.picture = Image.fromarray(pixels).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
        self.colours = np.array(self.picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        nearest = self.colours[np.asarray(Image.fromarray(pixels).quantize(palette=self.picture, dither=Image.Dither.NONE))]
        self.strength = 4 * float(np.abs(nearest.astype(int) - pixels).mean())  # how far apart they are, were they apart evenly
        pattern = np.zeros((1, 1))
        for _ in range(3):
            pattern = np.block([[4 * pattern, 4 * pattern + 2], [4 * pattern + 3, 4 * pattern + 1]])
        self.pattern = (pattern + 0.5) / 64 - 0.5

    def frame(self, pixels: np.ndarray) -> av.VideoFrame:
        import av
        import numpy as np
        from PIL import Image

        height, width = pixels.shape[:2]
        pattern = np.tile(self.pattern, (-(-height // 8), -(-width // 8)))[:height, :width, None] * self.strength
        mixed = np.clip(np.round(pixels + pattern), 0, 255).astype(np.uint8)
        places = np.asarray(Image.fromarray(mixed).quantize(palette=self.picture, dither=Image.Dither.NONE))
        table = np.full((256, 4), 255, np.uint8)
        table[: len(self.colours), 1:] = self.colours  # alpha first
        return av.VideoFrame.from_ndarray((places, table), format="pal8")
