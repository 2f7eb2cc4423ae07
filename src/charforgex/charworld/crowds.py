"""Pictures of none to three characters over all sorts of backgrounds, and where their faces are: what the detector learns on."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from charforgex.charworld import drawing, world

SIZE = 128  # of the pictures
DRAWN = 80  # of the characters before they are scaled
SMALLEST = 8.0  # of a face's height in pixels
SEEN = 0.6  # of a face's box inside the picture; of less than that no answer is wrong, down to `GONE`
GONE = 0.2
BACKGROUNDS = 200  # of each sort


class Crowd(NamedTuple):
    """A picture uint8 (SIZE, SIZE, 3), boxes (N, 4), landmarks (N, 5, 2) in pixels, and which faces are too cut off to count."""

    picture: np.ndarray
    boxes: np.ndarray
    landmarks: np.ndarray
    unclear: np.ndarray


class Cast:
    """`count` characters, each drawn once when it is first needed. `held_out` ones have hair that no model was trained on."""

    def __init__(self, count: int, seed: int, held_out: bool = False):
        self.count, self.seed, self.held_out = count, seed, held_out
        self.figure = cache(self._figure)

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> tuple[world.Identity, world.Context]:
        rng = random.Random(f"cast/{self.seed}/{index}/{self.held_out}")
        identity = world.draw_identity(rng, self.held_out)
        return identity, replace(world.draw_context(rng), tilt=rng.gauss(0, 8))

    def _figure(self, index: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """The character cut out (RGBA), its face's box and points."""
        scene = self.scene(index)
        return Image.fromarray(drawing.cut_out(*scene, DRAWN)), *drawing.face_of(*scene, DRAWN)


@cache
def _scenery(number: int) -> Image.Image:
    rng = random.Random(f"scenery/{number}")
    context = replace(world.draw_context(rng), scene=world.SCENES[number % len(world.SCENES)])
    canvas = drawing.Canvas(SIZE)
    drawing.scenery(canvas, context)
    return Image.fromarray(canvas.finish())


@cache
def _noise(number: int) -> Image.Image:
    """Colour noise whose amplitude falls with frequency, as in photographs (Field 1987), or not at all."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]) + 1 / SIZE
    spectrum = np.fft.rfft2(rng.standard_normal((3, SIZE, SIZE))) / frequency ** rng.uniform(0, 1.6)
    field = np.fft.irfft2(spectrum, (SIZE, SIZE))
    field = field / field.std() * rng.uniform(10, 60) + rng.uniform(40, 215, (3, 1, 1))
    return Image.fromarray(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@cache
def _leaves(number: int) -> Image.Image:
    """Textured and shaded ovals and boxes of all sizes, each hiding those before it: what photographs of things have in common
    (dead leaves, Lee et al. 2001).
    """
    rng = random.Random(f"leaves/{number}")
    picture = _noise(number).copy()
    for _ in range(rng.randint(20, 160)):
        extent = [min(SIZE, 4 * rng.random() ** -0.7 * rng.uniform(0.5, 2)) for _ in range(2)]
        left, top = (int(rng.uniform(-extent[k] / 2, SIZE - extent[k] / 2)) for k in range(2))
        size = max(2, int(extent[0])), max(2, int(extent[1]))
        leaf = _noise(rng.randrange(BACKGROUNDS)).resize(size, box=(0, 0, SIZE * rng.uniform(0.1, 1), SIZE * rng.uniform(0.1, 1)))
        light = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
        tint = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        leaf = Image.composite(Image.blend(leaf, tint, rng.uniform(0.2, 1)), Image.blend(leaf, tint, 0.5).point(lambda v: v // 2), light)
        mask = Image.new("L", size)
        getattr(ImageDraw.Draw(mask), rng.choice(("ellipse", "rectangle")))((0, 0, size[0] - 1, size[1] - 1), fill=255)
        picture.paste(leaf, (left, top), mask)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


def _scramble(rng: random.Random, cast: Cast, picture: Image.Image) -> None:
    """Pastes a character whose face is cut into nine parts and mixed: all that a face has, and no face."""
    figure, box, _ = cast.figure(rng.randrange(len(cast)))
    figure, (left, top, right, bottom) = figure.copy(), box
    side = int((right - left) / 3), int((bottom - top) / 3)
    corners = [(int(left) + x * side[0], int(top) + y * side[1]) for y in range(3) for x in range(3)]
    tiles = [figure.crop((x, y, x + side[0], y + side[1])) for x, y in corners]
    for tile, corner in zip(rng.sample(tiles, 9), corners, strict=True):
        figure.paste(tile, corner)
    extent = int(DRAWN * SMALLEST * 12 ** rng.random() / (bottom - top))
    figure = figure.resize((extent, extent), Image.Resampling.BICUBIC)
    picture.paste(figure, (rng.randint(-extent // 3, SIZE - extent // 2), rng.randint(-extent // 3, SIZE - extent // 2)), figure)


def _shapes(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Ovals, boxes and lines in any colour, skins' among them, and some in pairs as eyes are."""
    picture, colours = picture.copy(), [*drawing.SKIN.values(), *drawing.HAIR.values(), *drawing.COLOUR.values(), drawing.DARK]
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(2, 14)):
        x, y, w, h = rng.uniform(0, SIZE), rng.uniform(0, SIZE), 2 ** rng.uniform(1, 6), 2 ** rng.uniform(1, 6)
        places = [(x, y)] if rng.random() < 0.7 else [(x, y), (x + 1.5 * w, y)]
        kind, colour = rng.choice(("ellipse", "ellipse", "rectangle", "line")), rng.choice(colours)
        for left, top in places:
            getattr(pen, kind)((left, top, left + w, top + h), fill=colour)
    return picture


def background(rng: random.Random) -> Image.Image:
    picture = rng.choices((_noise, _leaves, _scenery), (15, 40, 45))[0](rng.randrange(BACKGROUNDS))
    if rng.random() < 0.5:
        side = rng.randint(SIZE // 4, SIZE)
        left, top = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return _shapes(rng, picture) if rng.random() < 0.35 else picture.copy()


def compose(cast: Cast, rng: random.Random, people: int | None = None) -> Crowd:
    """`people` characters, drawn by lot if None, smaller ones first so that the near stand before the far."""
    people = rng.choices((0, 1, 2, 3), (25, 40, 20, 15))[0] if people is None else people
    largest = {0: 0.0, 1: 104.0, 2: 56.0, 3: 42.0}[people]
    heights = sorted(SMALLEST * (largest / SMALLEST) ** rng.random() for _ in range(people))
    picture = background(rng)
    if people == 0 and rng.random() < 0.4:
        _scramble(rng, cast, picture)
    boxes, landmarks = np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
    for height in heights:
        figure, box, points = cast.figure(rng.randrange(len(cast)))
        if rng.random() < 0.5:
            figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            box = np.array([DRAWN - box[2], box[1], DRAWN - box[0], box[3]])
            points = (np.array([DRAWN, 0]) + points * (-1, 1))[[1, 0, 2, 4, 3]]
        scale = height / (box[3] - box[1])
        side = round(DRAWN * scale)
        figure = figure.resize((side, side), Image.Resampling.BICUBIC)
        at = _place(rng, figure, box * scale, boxes)
        if at is None:
            continue
        picture.paste(figure, tuple(at), figure)
        boxes = np.concatenate([boxes, (box * scale + [*at, *at])[None]], dtype=np.float32)
        landmarks = np.concatenate([landmarks, (points * scale + at)[None]], dtype=np.float32)
    inside = np.prod(np.clip(boxes[:, 2:], 0, SIZE) - np.clip(boxes[:, :2], 0, SIZE), axis=1)
    share = inside / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    there = share > GONE
    return Crowd(_photograph(picture, rng), boxes[there], landmarks[there], share[there] < SEEN)


def _place(rng: random.Random, figure: Image.Image, box: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """Where the figure's corner goes so that it leaves all other faces free; None if eight draws find no such place."""
    alpha = figure.getchannel("A")
    for _ in range(8):
        at = np.array([rng.uniform(0, SIZE), rng.uniform(0, SIZE)]) - (box[:2] + box[2:]) / 2  # the face's middle anywhere
        if rng.random() < 0.85:  # and mostly all of it inside
            at = np.clip(at, -box[:2], SIZE - box[2:])
        at = np.round(at).astype(int)
        hidden = (np.asarray(alpha.crop(tuple(np.round(other - [*at, *at]).astype(int)))).mean() / 255 for other in others)
        if all(share < 0.1 for share in hidden):
            return at
    return None


def _photograph(image: Image.Image, rng: random.Random) -> np.ndarray:
    """Colours shifted, sometimes grey, grainy or blurred."""
    if rng.random() < 0.1:
        image = image.convert("L").convert("RGB")
    shift, levels = rng.uniform(-25, 25), np.arange(256)
    image = image.point(np.concatenate([levels * rng.uniform(0.75, 1.2) + shift for _ in range(3)]).clip(0, 255).astype(int).tolist())
    if rng.random() < 0.3:
        grain = np.roll(_grain(rng.randrange(8)), rng.randrange(SIZE), axis=rng.randrange(2)) * np.float32(rng.uniform(2, 18))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3))) if rng.random() < 0.3 else image)


@cache
def _grain(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((SIZE, SIZE, 3), np.float32)
