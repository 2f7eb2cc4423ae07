"""Aspect-ratio buckets, and the cut that brings a picture into one without distorting it.

A bucket is (height, width): multiples of the family's pixel multiple with at most resolution^2 pixels. diffusers'
`generate_aspect_ratio_buckets` rounds above that area, and `find_nearest_bucket` prefers small buckets (its distance grows with
the bucket), hence the two short functions here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from charforgex.errors import ConfigError

FILTER = "lanczos, reducing gap 3"  # part of cache keys: change it with `Cut.picture`
MAX_ASPECT = 2.0
MAX_ENLARGEMENT = 1.25  # beyond that a LoRA learns the blur

Bucket = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How a picture is brought to a bucket: scaled by one factor to `resized`, then cut; mirrored last.

    All sizes are (height, width) in pixels. `top` and `left` count in the resized picture before mirroring.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: Bucket
    flip: bool = False

    @property
    def scale(self) -> float:
        return max(self.size[0] / self.original[0], self.size[1] / self.original[1])

    @property
    def top_left(self) -> tuple[int, int]:
        """Where the cut begins in the resized and, if `flip`, mirrored picture."""
        return self.top, self.resized[1] - self.left - self.size[1] if self.flip else self.left

    @property
    def lost(self) -> float:
        """The share of the picture that is cut away."""
        return 1 - self.size[0] * self.size[1] / (self.scale**2 * self.original[0] * self.original[1])

    def mirrored(self) -> Cut:
        return replace(self, flip=not self.flip)

    def box(self) -> tuple[float, float, float, float]:
        """The cut in the original's pixels: left, top, right, bottom."""
        height, width = self.original
        right, bottom = (self.left + self.size[1]) / self.scale, (self.top + self.size[0]) / self.scale
        return self.left / self.scale, self.top / self.scale, min(width, right), min(height, bottom)

    def picture(self, image: Image.Image) -> Image.Image:
        """The cut of an upright picture. One resampling straight from the original, so nothing is rounded to whole pixels twice."""
        assert image.size == (self.original[1], self.original[0])
        out = image.resize((self.size[1], self.size[0]), Image.Resampling.LANCZOS, box=self.box(), reducing_gap=3.0)
        return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else out

    def mask(self, image: Image.Image, stride: int) -> Image.Image:
        """The very same cut of a mask of the original's size, averaged over areas to the latent grid; mode F, 0..255."""
        assert image.size == (self.original[1], self.original[0])
        grid = (self.size[1] // stride, self.size[0] // stride)
        out = image.convert("L").convert("F").resize(grid, Image.Resampling.BOX, box=self.box())
        return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else out


def sides(resolution: int | list[int]) -> list[int]:
    """The resolutions that are asked for, ascending. Raises ConfigError if there is none."""
    found = sorted({resolution} if isinstance(resolution, int) else set(resolution))
    if not found:
        raise ConfigError("data.resolution=[] names no resolution; give at least one.")
    return found


def make_buckets(resolution: int, multiple: int, max_aspect: float = MAX_ASPECT) -> list[Bucket]:
    """For each side that is a multiple, the longest other side within resolution^2 pixels; both orientations, sorted.

    Raises ConfigError if `resolution` is not a multiple of `multiple`.
    """
    if resolution < multiple or resolution % multiple:
        below = max(multiple, resolution // multiple * multiple)
        choices = f"{below} or {below + multiple}"
        raise ConfigError(f"data.resolution={resolution} is not a multiple of {multiple}, which this base needs; try {choices}.")
    buckets = set()
    for side in range(multiple, math.floor(resolution * max_aspect) + 1, multiple):
        other = resolution**2 // side // multiple * multiple
        if other and max(side, other) <= max_aspect * min(side, other):
            buckets |= {(side, other), (other, side)}
    return sorted(buckets)


def find_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of the nearest aspect ratio (as a ratio: 2:1 is as far from 1:1 as 1:2). Of equals the largest, then the tallest."""
    return min(buckets, key=lambda b: (round(abs(math.log(height * b[1] / (width * b[0]))), 9), -b[0] * b[1], -b[0]))


def make_cut(height: int, width: int, bucket: Bucket) -> Cut:
    """The centred cut of the smallest scaled picture that covers the bucket."""
    scale = max(bucket[0] / height, bucket[1] / width)
    resized = max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))
    return Cut((height, width), resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, bucket)
