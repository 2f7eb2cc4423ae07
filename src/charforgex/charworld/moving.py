"""Scenes that move, known at every time between two: what frames between frames are learnt on.

Either layers (a background, and textured shapes and characters in front of it, each moving, turning and growing on its own), of which it
is also known where each pixel goes; or one character that moves and turns its head as charworld draws it. Frames are uint8 (S, S, 3);
times are in [0, 1].
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image, ImageDraw

from charforgex.charworld import drawing, world
from charforgex.charworld.crowds import Cast, background

FASTEST = 1 / 6  # of the side, between the two times
OVERSAMPLE = 2
DRAWN = 0.15  # share of scenes that charworld draws anew for each time
FIELDS = {"dx": 0.1, "dy": 0.1, "scale": 0.1, "tilt": 10.0, "yaw": 0.4, "detail": 0.2}  # most that a drawn character's context changes


@dataclass(frozen=True)
class Layer:
    """`picture`: uint8 (h, w, 4), colours times alpha. `start` and `change`: the middle's x and y in pixels of the frame, the angle in
    radians, and the logarithm of the zoom, at time 0 and until time 1.
    """

    picture: np.ndarray
    start: np.ndarray
    change: np.ndarray
    edge: int = cv2.BORDER_CONSTANT

    def placing(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """A (2, 2) and b (2,): the point q of the picture is at A q + b in the frame."""
        x, y, angle, zoom = self.start + time * self.change
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * math.exp(zoom)
        return turn, np.array([x, y]) - turn @ (np.array(self.picture.shape[1::-1]) / 2)

    def seen(self, time: float, size: int) -> np.ndarray:
        """Float32 (size, size, 4)."""
        turn, shift = (OVERSAMPLE * part for part in self.placing(time))
        matrix = np.column_stack([turn, turn @ (0.5, 0.5) + shift - 0.5])  # of pixels' places, whose middles are at a half
        large = cv2.warpAffine(self.picture, matrix, (OVERSAMPLE * size,) * 2, flags=cv2.INTER_LINEAR, borderMode=self.edge)
        return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)

    def flow(self, time: float, size: int) -> np.ndarray:
        """Float32 (size, size, 4): from a pixel of the frame at `time` to the same point of the layer at time 0 (x, y), and at 1."""
        turn, shift = self.placing(time)
        points, found = np.arange(size, dtype=np.float32) + 0.5, []
        for then, there in (self.placing(0), self.placing(1)):
            way = then @ np.linalg.inv(turn)
            rest, way = (there - way @ shift).astype(np.float32), (way - np.eye(2)).astype(np.float32)
            found += [way[axis, 0] * points + (way[axis, 1] * points + rest[axis])[:, None] for axis in range(2)]
        return np.stack(found, -1)


@dataclass(frozen=True)
class Layers:
    layers: tuple[Layer, ...]  # from behind to before
    size: int

    def frame(self, time: float) -> np.ndarray:
        found = np.zeros((self.size, self.size, 3), np.float32)
        for layer in self.layers:
            seen = layer.seen(time, self.size)
            found = found * (1 - seen[..., 3:] / 255) + seen[..., :3]
        return found.clip(0, 255).round().astype(np.uint8)

    def flow(self, time: float) -> np.ndarray:
        """Of what is seen at each pixel: see `Layer.flow`."""
        found = np.zeros((self.size, self.size, 4), np.float32)
        for layer in self.layers:
            found = np.where(layer.seen(time, self.size)[..., 3:] > 127, layer.flow(time, self.size), found)
        return found


@dataclass(frozen=True)
class Drawn:
    """A window of `size` at `corner` (left, top) of a picture that charworld draws `whole` pixels large."""

    identity: world.Identity
    context: world.Context
    change: dict[str, float]
    whole: int
    corner: tuple[int, int]
    size: int

    def frame(self, time: float) -> np.ndarray:
        moved = {name: getattr(self.context, name) + time * step for name, step in self.change.items()}
        left, top = self.corner
        return drawing.render(self.identity, replace(self.context, **moved), self.whole)[top : top + self.size, left : left + self.size]

    def flow(self, time: float) -> np.ndarray:
        """Unknown: NaN."""
        return np.full((self.size, self.size, 4), np.nan, np.float32)


def scene(rng: random.Random, cast: Cast, size: int, strange: bool = False) -> Layers | Drawn:
    """A scene of `size` pixels a side. With `strange`, textures of a kind that no other scene has."""
    if rng.random() < DRAWN:
        return _drawn(rng, cast, size)
    layers = [_behind(rng, size, strange)]
    for _ in range(rng.choices((0, 1, 2, 3), (15, 35, 30, 20))[0]):
        layers.append(_before(rng, cast, size, strange))
    return Layers(tuple(layers), size)


def _drawn(rng: random.Random, cast: Cast, size: int) -> Drawn:
    identity, context = cast.scene(rng.randrange(len(cast)))
    share = rng.random()
    change = {name: share * rng.uniform(-most, most) for name, most in FIELDS.items()}
    begin = {name: getattr(context, name) - change[name] / 2 for name in FIELDS}
    whole = rng.randint(size, size * 7 // 4)
    corner = rng.randint(0, whole - size), rng.randint(0, (whole - size) // 2)  # rather the face than the clothes
    return Drawn(identity, replace(context, **begin), change, whole, corner, size)


def _change(rng: random.Random, size: int) -> np.ndarray:
    """Mostly slow."""
    speed, towards = FASTEST * size * rng.random() ** 1.5, rng.uniform(0, 2 * math.pi)
    return np.array([speed * math.cos(towards), speed * math.sin(towards), rng.gauss(0, 0.08), rng.gauss(0, 0.05)])


def _behind(rng: random.Random, size: int, strange: bool) -> Layer:
    picture = _texture(rng, strange)
    zoom = math.log(size / picture.shape[0]) + rng.uniform(0, 0.7)
    start = np.array([size / 2, size / 2, rng.choice((0, rng.uniform(-math.pi, math.pi))), zoom])
    change = _change(rng, size) * rng.choice((0, 0.4, 1, 1))
    return Layer(np.dstack([picture, np.full_like(picture[..., :1], 255)]), start - change / 2, change, cv2.BORDER_REFLECT_101)


def _before(rng: random.Random, cast: Cast, size: int, strange: bool) -> Layer:
    if rng.random() < 0.35:
        picture = np.asarray(cast.figure(rng.randrange(len(cast)))[0]).astype(np.uint16)
        angle, extent = rng.gauss(0, 0.3), rng.uniform(0.5, 1.4)
    else:
        texture = _texture(rng, strange)
        picture = np.dstack([texture, _shape(rng, texture.shape[0])]).astype(np.uint16)
        angle, extent = rng.uniform(-math.pi, math.pi), 0.15 * 6 ** rng.random()
    picture[..., :3] = (picture[..., :3] * picture[..., 3:] + 127) // 255
    start = np.array([rng.uniform(0, size), rng.uniform(0, size), angle, math.log(extent * size / picture.shape[0])])
    change = _change(rng, size)
    return Layer(picture.astype(np.uint8), start - change / 2, change)


def _shape(rng: random.Random, side: int) -> np.ndarray:
    """The alpha of an oval, or of a polygon with 3 to 12 corners, uint8 (side, side)."""
    large, around = Image.new("L", (4 * side, 4 * side)), rng.choice((40, rng.randint(3, 12)))
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(around)) if around < 40 else np.linspace(0, 2 * math.pi, 41)[:-1]
    radii = [rng.uniform(0.4, 1) if around < 40 else 1.0 for _ in angles]
    width = rng.uniform(0.25, 1)
    places = [
        (2 * side * (1 + 0.98 * r * math.cos(a)), 2 * side * (1 + 0.98 * r * width * math.sin(a)))
        for a, r in zip(angles, radii, strict=True)
    ]
    ImageDraw.Draw(large).polygon(places, fill=255)
    return np.asarray(large.reduce(4))


def _texture(rng: random.Random, strange: bool) -> np.ndarray:
    """Uint8 (h, w, 3): what faces are found before; or, `strange`, smooth fields of several finenesses and stripes across them."""
    if not strange:
        return np.asarray(background(rng))
    draw, side = np.random.default_rng(rng.getrandbits(32)), 128
    parts = [cv2.resize(draw.random((n, n, 3), np.float32), (side, side), interpolation=cv2.INTER_CUBIC) / n**0.8 for n in (4, 12, 40)]
    total = sum(parts)
    picture = (total - total.min()) / (total.max() - total.min())
    if rng.random() < 0.5:
        y, x = np.mgrid[:side, :side]
        angle, wave = rng.uniform(0, math.pi), rng.uniform(8, 40)
        stripes = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / wave)[..., None] > 0
        picture = np.where(stripes, picture, picture[::-1] * rng.uniform(0.2, 1))
    return (picture * 255).astype(np.uint8)
