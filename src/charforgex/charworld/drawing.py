"""Draws a character: polygons on a four times larger canvas, averaged down. Pillow only, a millisecond or two a picture.

Everything on the figure is in head units: (0, 0) is between the eyes' height and the chin, the skull's half width is
about 0.8, y points down. `Canvas` carries the transform from there to pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from charforgex.charworld.world import Context, Identity

OVERSAMPLE = 4

SKIN = {"pale": (252, 224, 204), "tan": (222, 168, 120), "brown": (158, 100, 62), "dark": (96, 60, 44),
        "green": (140, 200, 110), "blue": (118, 172, 226)}  # fmt: skip
HAIR = {"black": (38, 34, 44), "brown": (112, 66, 36), "blonde": (242, 204, 92), "red": (206, 70, 30), "white": (238, 238, 244),
        "blue": (52, 96, 220), "pink": (248, 128, 184), "green": (52, 166, 80), "purple": (140, 68, 186)}  # fmt: skip
EYE = {"brown": (110, 62, 26), "blue": (36, 116, 228), "green": (36, 156, 70), "purple": (150, 66, 208)}
COLOUR = {"red": (212, 44, 48), "orange": (244, 138, 36), "yellow": (250, 214, 60), "green": (56, 160, 80), "blue": (48, 92, 212),
          "purple": (130, 64, 176), "white": (242, 242, 240), "black": (42, 42, 50)}  # fmt: skip
DARK = (44, 30, 34)
WHITE = (252, 252, 252)

RGB = tuple[float, float, float]


def shade(colour: RGB, factor: float) -> RGB:
    """Darker below 1, lighter above (2 would be white)."""
    if factor <= 1:
        return tuple(c * factor for c in colour)
    return tuple(c + (255 - c) * (factor - 1) for c in colour)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    return tuple(x * (1 - share) + y * share for x, y in zip(a, b, strict=True))


def curve(start, *pieces, steps: int = 8) -> np.ndarray:
    """A path as points: each piece is an end point, a (control, end) pair or a (control, control, end) triple, flattened."""
    points = [np.array(start, float)[None]]
    t = np.linspace(0, 1, steps + 1)[1:, None]
    for piece in pieces:
        p0 = points[-1][-1]
        p = np.array(piece, float).reshape(-1, 2)
        if len(p) == 1:
            points.append(p)
        elif len(p) == 2:
            points.append((1 - t) ** 2 * p0 + 2 * t * (1 - t) * p[0] + t**2 * p[1])
        else:
            points.append((1 - t) ** 3 * p0 + 3 * t * (1 - t) ** 2 * p[0] + 3 * t**2 * (1 - t) * p[1] + t**3 * p[2])
    return np.concatenate(points)


_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 28)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 28)[:-1])], 1)


class Canvas:
    """A picture of `size` pixels, drawn in units of its width; `move` sets the transform for what follows."""

    def __init__(self, size: int, mode: str = "RGB"):
        self.pixels = size * OVERSAMPLE
        self.image = Image.new(mode, (self.pixels, self.pixels))
        self.pen = ImageDraw.Draw(self.image)
        self.move()

    def move(self, x: float = 0, y: float = 0, unit: float = 1, degrees: float = 0, pivot=(0.0, 0.0)) -> None:
        """Coordinates now count in `unit` picture widths from (x, y), turned by `degrees` about `pivot`."""
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn = np.array([[cos, sin], [-sin, cos]])
        self.unit = unit * self.pixels
        self.matrix = turn * self.unit
        pivot = np.array(pivot, float)
        self.offset = (np.array([x, y]) + (pivot - pivot @ turn) * unit) * self.pixels

    def _at(self, points) -> list[tuple[float, float]]:
        return [tuple(p) for p in (np.asarray(points, float) @ self.matrix + self.offset).tolist()]

    def fill(self, points, colour: RGB) -> None:
        self.pen.polygon(self._at(points), fill=tuple(int(c) for c in colour))

    def oval(self, x, y, rx, ry, colour: RGB) -> None:
        self.fill(_CIRCLE * (rx, ry) + (x, y), colour)

    def box(self, left, top, right, bottom, colour: RGB) -> None:
        self.fill([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def stroke(self, points, width: float, colour: RGB, closed: bool = False) -> None:
        points = self._at([*points, points[0]] if closed else points)
        width = max(1, round(width * self.unit))
        fill = tuple(int(c) for c in colour)
        self.pen.line(points, fill=fill, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            r = width / 2
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def ring(self, x, y, rx, ry, width: float, colour: RGB) -> None:
        self.stroke(_CIRCLE * (rx, ry) + (x, y), width, colour, closed=True)

    def gradient(self, top: float, bottom: float, start: RGB, end: RGB) -> None:
        a, b = round(top * self.pixels), round(bottom * self.pixels)
        ramp = np.linspace(0, 1, max(2, b - a))[:, None, None]
        column = np.asarray(start) * (1 - ramp) + np.asarray(end) * ramp
        self.image.paste(Image.fromarray(column.astype(np.uint8)).resize((self.pixels, len(column))), (0, a))

    def finish(self, camera: np.ndarray | None = None) -> np.ndarray:
        """The picture; with `camera`, as it sees the canvas."""
        image = self.image
        if camera is not None:
            where = (camera * (1, 1, self.pixels)).ravel().tolist()
            image = image.transform(image.size, Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)
        return np.asarray(image.reduce(OVERSAMPLE))


def camera_of(context: Context) -> np.ndarray | None:
    """Where each point of the picture lies on the canvas, (2, 3) in picture widths. None where the camera is at rest."""
    if (context.pan, context.zoom, context.roll) == (0.0, 1.0, 0.0):
        return None
    angle = math.radians(context.roll)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / context.zoom
    return np.concatenate([turn, (np.array([0.5 + context.pan, 0.5]) - turn @ (0.5, 0.5))[:, None]], 1)


def scenery(canvas: Canvas, context: Context) -> None:
    d = context.detail
    match context.scene:
        case "plain":
            colour = COLOUR[context.scene_colour]
            canvas.gradient(0, 1, shade(colour, 1.2), shade(colour, 0.85))
        case "beach":
            canvas.gradient(0, 0.55, (110, 190, 245), (200, 232, 250))
            canvas.oval(0.14 if d < 0.5 else 0.86, 0.15, 0.08, 0.08, (255, 240, 150))
            canvas.gradient(0.55, 0.72, (30, 130, 190), (70, 180, 205))
            canvas.gradient(0.72, 1, (246, 224, 168), (226, 196, 130))
        case "forest":
            canvas.gradient(0, 1, (160, 212, 150), (70, 140, 70))
            for i in range(4):
                x = 0.08 + 0.28 * i + 0.06 * (d - 0.5)
                canvas.box(x - 0.035, 0.1, x + 0.035, 0.9, (92, 62, 40))
                canvas.oval(x, 0.12, 0.16, 0.2, (40, 124, 58) if i % 2 else (52, 142, 66))
            canvas.box(0, 0.85, 1, 1, (50, 110, 52))
        case "city":
            canvas.gradient(0, 1, (16, 18, 56), (64, 42, 100))
            for i, height in enumerate((0.3, 0.16, 0.4, 0.22, 0.34)):
                x = i * 0.21 - 0.03 + 0.05 * (d - 0.5)
                canvas.box(x, height, x + 0.18, 1, (36, 38, 68))
                for row in range(5):
                    for column in range(2):
                        left, top = x + 0.03 + 0.075 * column, height + 0.05 + 0.12 * row
                        canvas.box(left, top, left + 0.045, top + 0.05, (255, 220, 110))
        case "mountains":
            canvas.gradient(0, 0.8, (130, 180, 235), (220, 236, 250))
            for x, top in ((0.12 + 0.08 * (d - 0.5), 0.18), (0.88 + 0.08 * (d - 0.5), 0.26)):
                canvas.fill([(x - 0.42, 0.8), (x, top), (x + 0.42, 0.8)], (112, 124, 154))
                canvas.fill([(x - 0.15, top + 0.22), (x, top), (x + 0.15, top + 0.22), (x, top + 0.15)], (250, 250, 255))
            canvas.box(0, 0.78, 1, 1, (240, 245, 252))
        case "desert":
            canvas.gradient(0, 0.6, (250, 206, 130), (252, 232, 184))
            canvas.gradient(0.6, 1, (226, 168, 92), (194, 128, 64))
            for x in (0.1, 0.9):
                x += 0.06 * (d - 0.5)
                canvas.stroke([(x, 0.34), (x, 0.8)], 0.06, (60, 134, 70))
                canvas.stroke([(x - 0.07, 0.44), (x - 0.07, 0.56), (x, 0.56)], 0.04, (60, 134, 70))
        case "space":
            canvas.gradient(0, 1, (8, 6, 26), (34, 16, 62))
            for i in range(16):
                canvas.oval((0.07 + 0.618 * i + 0.1 * d) % 1, (0.11 + 0.382 * i * 1.7) % 1, 0.011, 0.011, (255, 255, 240))
            canvas.oval(0.85, 0.2, 0.1, 0.1, (240, 150, 70))
            canvas.ring(0.85, 0.2, 0.16, 0.03, 0.018, (236, 222, 190))
        case "sunset":
            canvas.gradient(0, 0.4, (92, 52, 124), (240, 110, 80))
            canvas.gradient(0.4, 0.7, (240, 110, 80), (255, 206, 110))
            canvas.oval(0.2 if d < 0.5 else 0.8, 0.62, 0.13, 0.13, (255, 236, 150))
            canvas.gradient(0.7, 1, (74, 38, 62), (42, 22, 42))
        case "underwater":
            canvas.gradient(0, 1, (72, 192, 222), (12, 54, 126))
            for i in range(6):
                canvas.ring((0.1 + 0.618 * i) % 1, (0.15 + 0.382 * i + 0.1 * d) % 1, 0.025, 0.025, 0.012, (210, 245, 255))
            for x in (0.08, 0.92):
                canvas.stroke(curve((x, 1), (x - 0.06, 0.88, x, 0.78), (x + 0.06, 0.68, x, 0.58)), 0.035, (38, 136, 84))


def render(identity: Identity, context: Context, size: int = 64) -> np.ndarray:
    """The picture, uint8 (size, size, 3)."""
    canvas = Canvas(size)
    scenery(canvas, context)
    return draw_figure(canvas, identity, context)


def cut_out(identity: Identity, context: Context, size: int = 64) -> np.ndarray:
    """The character alone, uint8 (size, size, 4): RGB, and alpha that is 0 where nothing of it is."""
    return draw_figure(Canvas(size, "RGBA"), identity, context)


def placing(context: Context) -> tuple[dict[str, float], dict]:
    """Where `Canvas.move` puts the body, and the head."""
    unit, y = {"portrait": (0.27, 0.47), "close-up": (0.35, 0.52)}[context.frame]
    place = {"x": 0.5 + context.dx, "y": y + context.dy, "unit": unit * context.scale}
    head = place | {"y": place["y"] + 0.05 * unit * context.nod}
    return place, head | {"degrees": context.tilt, "pivot": (0.0, 0.9)}


def face_of(identity: Identity, context: Context, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Where `render` draws the face, in pixels: its box (left, top, right, bottom) from brow to chin and ear to ear, without hair,
    and (5, 2) points: left and right eye, nose, left and right mouth corner as the viewer sees them.
    """
    canvas, figure = Canvas(1), Figure(identity, context)
    canvas.move(**placing(context)[1])
    mouth, half = figure.mouth_place()
    points = [(-figure.eye_x + figure.dx, figure.eye_y), (figure.eye_x + figure.dx, figure.eye_y), (figure.dx * 1.25, figure.nose_y),
              (mouth[0] - half, mouth[1]), (mouth[0] + half, mouth[1])]  # fmt: skip
    top, bottom = figure.eye_y - 0.5, figure.height
    oval = _CIRCLE * (figure.width, (bottom - top) / 2) + (0, (top + bottom) / 2)
    outline, points = (_seen(np.array(canvas._at(p)) / OVERSAMPLE, camera_of(context)) * size for p in (oval, points))
    return np.concatenate([outline.min(0), outline.max(0)]), points


def _seen(points: np.ndarray, camera: np.ndarray | None) -> np.ndarray:
    """Points of the canvas where the camera shows them."""
    return points if camera is None else (points - camera[:, 2]) @ np.linalg.inv(camera[:, :2]).T


def draw_figure(canvas: Canvas, identity: Identity, context: Context) -> np.ndarray:
    place, head = placing(context)
    figure = Figure(identity, context)
    canvas.move(**head)
    figure.back_hair(canvas)
    canvas.move(**place)
    figure.body(canvas)
    canvas.move(**head)
    figure.head(canvas)
    figure.eyes(canvas)
    figure.mouth(canvas)
    figure.front_hair(canvas)
    figure.glasses(canvas)
    figure.hat(canvas)
    return canvas.finish(camera_of(context))


class Figure:
    """The measures of one character in one pose, and a method for each layer, back to front."""

    def __init__(self, identity: Identity, context: Context):
        self.i, self.c = identity, context
        self.skin = shade(SKIN[identity.skin], 1 + 0.1 * identity.skin_tone)
        self.hair = shade(HAIR[identity.hair_colour], 1 + 0.16 * identity.hair_tone)
        self.hair_dark, self.hair_light = shade(self.hair, 0.74), shade(self.hair, 1.25)
        self.cloth = COLOUR[context.garment_colour]
        self.width = 0.78 + 0.07 * identity.face_width
        self.height = 0.92
        self.volume = 0.16 + 0.05 * identity.hair_volume
        self.dx = 0.24 * context.yaw  # how far the face's features shift when the head turns
        self.down = 0.16 * context.nod  # and when it nods
        self.eye_x = 0.35 + 0.05 * identity.eye_spacing
        self.eye_y = 0.1 + 0.06 * identity.eye_height + self.down
        self.nose_y = 0.36 + 0.05 * identity.nose_length + 1.25 * self.down

    def mouth_place(self) -> tuple[tuple[float, float], float]:
        """The mouth's middle and half its width."""
        y = 0.62 + 0.03 * self.i.nose_length + (0.0 if self.i.beard == "none" else 0.04)
        return (self.dx * 1.05, y + 1.05 * self.down), 0.25 + 0.05 * self.i.mouth_width

    def back_hair(self, canvas: Canvas) -> None:
        w, h, dark = self.width, self.height, self.hair_dark
        e = w + self.volume
        match self.i.hair:
            case "long":
                canvas.fill(curve((-e, 0), (-e, -h - 0.35, e, -h - 0.35, e, 0), (e + 0.1, 1.7), (-e - 0.1, 1.7)), dark)
            case "bob":
                canvas.fill(curve((-e, 0), (-e, -h - 0.35, e, -h - 0.35, e, 0), (e + 0.12, 0.75), (0, 0.95, -e - 0.12, 0.75)), dark)
            case "curly":
                for k in range(11):
                    a = math.pi * (0.82 + 1.36 * k / 10)
                    canvas.oval((w + 0.1) * math.cos(a), -0.08 + (h + 0.04) * math.sin(a), 0.3, 0.3, dark if k % 2 else self.hair)
                for side in (-1, 1):
                    canvas.oval(side * (w + 0.08), 0.5, 0.27, 0.27, dark)
            case "bun":
                canvas.oval(0, -h - 0.36, 0.42, 0.38, dark)
                canvas.oval(0, -h - 0.4, 0.32, 0.28, self.hair)
            case "pigtails":
                for s in (-1, 1):
                    x = s * (w + 0.1)
                    canvas.fill(
                        curve(
                            (x, -0.5),
                            (x + s * 0.85, -0.75, x + s * 0.6, 0.6),
                            (x + s * 0.3, 1.2, x + s * 0.1, 0.9),
                            (x + s * 0.25, 0.3, x, -0.15),
                        ),
                        dark,
                    )
                    canvas.oval(x + s * 0.05, -0.4, 0.15, 0.15, COLOUR["red"])
            case "spiky":
                points = []
                for k in range(13):
                    a, radius = math.pi * (1 + k / 12), 1.5 if k % 2 else 1.12
                    points.append((w * radius * math.cos(a), -0.1 + h * radius * math.sin(a)))
                canvas.fill(points, dark)
            case "mohawk":
                canvas.fill(curve((-0.26, -0.5), (-0.4, -h - 0.75, 0, -h - 0.78), (0.4, -h - 0.75, 0.26, -0.5)), dark)

    def body(self, canvas: Canvas) -> None:
        cloth, dark = self.cloth, shade(self.cloth, 0.74)
        if self.c.garment_colour == "black":
            dark = shade(cloth, 1.25)
        sw = 1.12 if self.i.kind == "woman" else 1.32
        for side in (-1, 1):
            if self.c.wave and side == 1:
                a = (self.c.wave - 0.5) * 1.2
                elbow, hand = (1.4, 1.8), (1.4 + 1.15 * math.sin(a), 1.8 - 1.3 * math.cos(a))
                canvas.stroke([(sw - 0.15, 1.5), elbow, hand], 0.36, dark)
                canvas.oval(*hand, 0.26, 0.26, self.skin)
            else:
                canvas.stroke([(side * (sw - 0.15), 1.55), (side * (sw + 0.14), 2.7)], 0.42, dark)
        canvas.box(-0.28, 0.6, 0.28, 1.35, shade(self.skin, 0.82))
        canvas.fill(curve((-0.3, 1.06), (-sw, 1.12, -sw, 1.62), (-sw + 0.12, 4), (sw - 0.12, 4), (sw, 1.62), (sw, 1.12, 0.3, 1.06)), cloth)
        match self.c.garment:
            case "t-shirt":
                canvas.oval(0, 1.08, 0.4, 0.24, self.skin)
                canvas.stroke(curve((-0.42, 1.1), (0, 1.55, 0.42, 1.1)), 0.1, dark)
            case "hoodie":
                canvas.stroke(curve((-0.58, 1.02), (-0.5, 1.5, 0, 1.54), (0.5, 1.5, 0.58, 1.02)), 0.3, dark)
                for side in (-1, 1):
                    canvas.stroke(
                        [(side * 0.2, 1.62), (side * 0.2, 2.05)],
                        0.09,
                        (240, 240, 240) if self.c.garment_colour != "white" else (120, 120, 130),
                    )
            case "suit":
                canvas.fill([(-0.36, 1.02), (0.36, 1.02), (0, 2.4)], (248, 248, 248))
                canvas.fill(
                    [(-0.12, 1.2), (0.12, 1.2), (0.15, 2.0), (0, 2.3), (-0.15, 2.0)],
                    (176, 30, 42) if self.c.garment_colour != "red" else (40, 40, 60),
                )
                for side in (-1, 1):
                    canvas.fill([(side * 0.3, 1.02), (side * 0.68, 1.2), (side * 0.5, 1.6), (0, 2.5)], dark)
            case "striped shirt":
                stripe = (70, 70, 150) if self.c.garment_colour == "white" else (248, 248, 248)
                for k in range(3):
                    top = 1.36 + 0.36 * k
                    canvas.box(-sw + 0.03, top, sw - 0.03, top + 0.17, stripe)
                canvas.oval(0, 1.08, 0.38, 0.2, self.skin)
            case "overalls":
                canvas.oval(0, 1.08, 0.38, 0.22, self.skin)
                denim = (58, 92, 160) if self.c.garment_colour != "blue" else (40, 50, 90)
                canvas.box(-0.62, 1.66, 0.62, 4, denim)
                for side in (-1, 1):
                    canvas.stroke([(side * 0.5, 1.12), (side * 0.5, 1.8)], 0.2, denim)
                    canvas.oval(side * 0.5, 1.78, 0.1, 0.1, (250, 214, 80))

    def head(self, canvas: Canvas) -> None:
        w, h, dx, skin = self.width, self.height, self.dx, self.skin
        for side in (-1, 1):
            x = side * (w + 0.03) - 0.1 * self.c.yaw
            canvas.oval(x, 0.16, 0.16, 0.22, shade(skin, 0.82))
        jaw, low = 0.6 + 0.16 * self.i.jaw, 0.62 + 0.1 * self.i.jaw
        self.face = curve(
            (-w, 0),
            (-w, -h * 0.62, -w * 0.6, -h, 0, -h),
            (w * 0.6, -h, w, -h * 0.62, w, 0),
            (w, low, jaw * w, h, 0, h),
            (-jaw * w, h, -w, low, -w, 0),
        )
        canvas.fill(self.face, skin)
        blush = mix(skin, (240, 80, 80), 0.28)
        for side in (-1, 1):
            canvas.oval(side * 0.5 + dx, 0.42 + self.down, 0.16, 0.1, blush)
        if self.i.beard == "full beard":
            inner = curve((w, 0.1), (w, low, jaw * w, h + 0.04, 0, h + 0.06), (-jaw * w, h + 0.04, -w, low, -w, 0.1))
            canvas.fill(
                np.concatenate([inner, curve((-w, 0.1), (-w * 0.7, 0.46, dx - 0.2, 0.42), (dx + 0.2, 0.42), (w * 0.7, 0.46, w, 0.1))]),
                self.hair_dark,
            )
        if self.i.mark == "freckles":
            colour = mix(skin, (110, 46, 20), 0.7)
            for side in (-1, 1):
                for k in range(4):
                    canvas.oval(dx + side * (0.34 + 0.13 * (k % 2)), 0.34 + 0.13 * (k // 2) + self.down, 0.045, 0.045, colour)

    def eyes(self, canvas: Canvas) -> None:
        expression, dx = self.c.expression, self.dx
        rx, ry = 0.2 + 0.025 * self.i.eye_size, 0.24 + 0.04 * self.i.eye_size
        ry *= {"surprised": 1.2, "laughing": 0.8, "angry": 0.8}.get(expression, 1)
        y = self.eye_y
        brow_colour = mix(self.hair_dark, (40, 30, 30), 0.4)
        for side in (-1, 1):
            x = side * self.eye_x + dx
            q = 1 - 0.2 * max(0.0, side * self.c.yaw)  # the far eye is foreshortened
            closed = expression == "sleeping" or (expression == "winking" and side == 1)
            if closed or self.c.blink > 0.75:
                canvas.stroke(curve((x - rx * q, y), (x, y + 0.18, x + rx * q, y)), 0.08, DARK)
            else:
                open_ry = ry * (1 - self.c.blink)
                canvas.oval(x, y, rx * q, open_ry, WHITE)
                canvas.oval(x + 0.06 * self.c.yaw, y + 0.01, 0.14 * q, min(0.16, open_ry * 0.95), EYE[self.i.eye_colour])
                canvas.oval(x + 0.06 * self.c.yaw, y + 0.01, 0.07 * q, min(0.085, open_ry * 0.7), (18, 14, 18))
                canvas.oval(x - 0.05, y - 0.07, 0.045, 0.045, WHITE)
                top = curve((x - rx * q, y), (x - rx * q, y - open_ry * 1.25, x + rx * q, y - open_ry * 1.25, x + rx * q, y))
                canvas.stroke(top, 0.085 if self.i.kind == "woman" else 0.05, DARK)
                if self.i.kind == "woman":
                    canvas.stroke([(x + side * rx * q, y - 0.03), (x + side * (rx * q + 0.1), y - 0.12)], 0.06, DARK)
            height = y - ry - 0.16 - (0.09 if expression == "surprised" else 0)
            inner = {"angry": 0.14, "sad": -0.13}.get(expression, 0)
            arch = 0.05 + 0.04 * self.i.brow
            thick = (0.06 if self.i.kind == "woman" else 0.1) + 0.025 * self.i.brow
            canvas.stroke(
                curve((x - side * 0.19, height + inner), (x, height - arch + inner * 0.3, x + side * 0.21, height + 0.03 - inner * 0.5)),
                thick,
                brow_colour,
            )
        canvas.oval(dx * 1.25, self.nose_y, 0.085, 0.06 + 0.02 * self.i.nose_length, shade(self.skin, 0.7))

    def mouth(self, canvas: Canvas) -> None:
        (x, y), half = self.mouth_place()
        woman = self.i.kind == "woman"
        lip = (200, 44, 60) if woman else shade(self.skin, 0.45)
        if self.i.beard != "none":
            above = y - 0.04
            canvas.fill(
                curve(
                    (x, above - 0.16),
                    (x + 0.3, above - 0.2, x + 0.46, above + 0.03),
                    (x, above - 0.04),
                    (x - 0.46, above + 0.03),
                    (x - 0.3, above - 0.2, x, above - 0.16),
                ),
                shade(self.hair_dark, 0.8),
            )
        if self.c.expression == "surprised" or self.c.talk > 0.05:
            size = 0.16 if self.c.expression == "surprised" else 0.16 * self.c.talk
            canvas.oval(x, y + 0.05, 0.13, size, (96, 20, 32))
            canvas.ring(x, y + 0.05, 0.13, size, 0.05, lip)
        elif self.c.expression == "laughing":
            shape = curve(
                (x - half, y - 0.06),
                (x + half, y - 0.06),
                (x + half * 0.8, y + 0.34, x, y + 0.34),
                (x - half * 0.8, y + 0.34, x - half, y - 0.06),
            )
            canvas.fill(shape, (116, 24, 36))
            canvas.fill([(x - half, y - 0.07), (x + half, y - 0.07), (x + half * 0.85, y + 0.06), (x - half * 0.85, y + 0.06)], WHITE)
            canvas.stroke(shape, 0.045, lip, closed=True)
        else:
            bend = {"smiling": 0.2, "winking": 0.17, "sad": -0.17, "angry": -0.11, "sleeping": 0.03, "neutral": 0.0}[self.c.expression]
            canvas.stroke(curve((x - half, y - bend * 0.4), (x, y + 1.6 * bend, x + half, y - bend * 0.4)), 0.1 if woman else 0.075, lip)
        if self.i.mark == "scar":
            canvas.stroke([(self.dx + 0.36, 0.26), (self.dx + 0.52, 0.66)], 0.075, (184, 48, 52))

    def front_hair(self, canvas: Canvas) -> None:
        w, h, dx = self.width, self.height, self.dx
        e, top = w + 0.07, -h - self.volume

        def cap(side_y: float, *hairline) -> None:
            canvas.fill(
                curve((-e, side_y), (-e, top * 0.72, -e * 0.6, top, 0, top), (e * 0.6, top, e, top * 0.72, e, side_y), *hairline), self.hair
            )

        match self.i.hair:
            case "bald":
                canvas.oval(dx - 0.25, -0.68, 0.16, 0.09, shade(self.skin, 1.3))
                return
            case "short":
                cap(0.0, (w * 0.86, -0.3), (w * 0.5 + dx, -0.62, dx - 0.1, -0.42), (-w * 0.5 + dx, -0.62, -w * 0.86, -0.3))
            case "spiky":
                cap(
                    -0.1,
                    (w * 0.8, -0.3),
                    (dx + 0.42, -0.62),
                    (dx + 0.2, -0.26),
                    (dx, -0.62),
                    (dx - 0.24, -0.26),
                    (dx - 0.42, -0.62),
                    (-w * 0.8, -0.3),
                )
            case "mohawk":
                canvas.fill(
                    curve(
                        (-w, -0.2),
                        (-w, -h * 0.68, -w * 0.6, -h - 0.02, 0, -h - 0.02),
                        (w * 0.6, -h - 0.02, w, -h * 0.68, w, -0.2),
                        (w * 0.7, -0.66, 0, -0.62),
                        (-w * 0.7, -0.66, -w, -0.2),
                    ),
                    mix(self.skin, self.hair_dark, 0.4),
                )
                canvas.fill(curve((-0.24, -0.5), (-0.3, -h - 0.5, 0, -h - 0.62), (0.3, -h - 0.5, 0.24, -0.5)), self.hair)
                return
            case "bob" | "long":
                low = 0.55 if self.i.hair == "bob" else 0.7
                if self.i.hair == "bob":
                    cap(low, (w * 0.84, low), (w * 0.86, -0.24), (dx, -0.36, -w * 0.86, -0.24), (-w * 0.84, low))
                else:
                    cap(
                        low,
                        (w * 0.86, low),
                        (w * 0.82, -0.2),
                        (w * 0.4, -0.66, dx * 0.6, -0.74),
                        (-w * 0.4, -0.66, -w * 0.82, -0.2),
                        (-w * 0.86, low),
                    )
            case "curly":
                for k in range(8):
                    a = math.pi * (1.03 + 0.94 * k / 7)
                    canvas.oval(
                        (w - 0.02) * math.cos(a) + dx * 0.2,
                        -0.2 + (h - 0.18) * math.sin(a),
                        0.28,
                        0.26,
                        self.hair if k % 2 else self.hair_light,
                    )
                return
            case "bun":
                cap(-0.05, (w * 0.84, -0.5, dx * 0.5, -0.64), (-w * 0.84, -0.5, -e, -0.05))
            case "pigtails":
                cap(0.05, (w * 0.88, -0.15), (w * 0.5, -0.3, dx, -0.62), (-w * 0.5, -0.3, -w * 0.88, -0.15))
        canvas.stroke(curve((-w * 0.5, top * 0.78), (-0.1, top * 0.97, w * 0.3, top * 0.85)), 0.09, self.hair_light)

    def glasses(self, canvas: Canvas) -> None:
        if self.i.glasses == "none":
            return
        sun = self.i.glasses == "sunglasses"
        colour = (24, 24, 30) if sun else COLOUR[self.i.glasses_colour]
        y, dx = self.eye_y, self.dx
        for side in (-1, 1):
            x = side * (self.eye_x + 0.02) + dx
            if sun:
                canvas.fill(
                    curve(
                        (x - 0.31, y - 0.2), (x + 0.31, y - 0.2), (x + 0.34, y + 0.34, x, y + 0.32), (x - 0.34, y + 0.34, x - 0.31, y - 0.2)
                    ),
                    colour,
                )
                canvas.stroke([(x - 0.15, y - 0.08), (x - 0.02, y - 0.08)], 0.06, (120, 124, 140))
            elif self.i.glasses == "round":
                canvas.ring(x, y + 0.01, 0.31, 0.31, 0.09, colour)
            else:
                canvas.stroke(
                    [(x - 0.31, y - 0.24), (x + 0.31, y - 0.24), (x + 0.31, y + 0.27), (x - 0.31, y + 0.27)], 0.09, colour, closed=True
                )
            canvas.stroke([(side * (self.eye_x + 0.32) + dx, y), (side * self.width, y + 0.02)], 0.07, colour)
        canvas.stroke([(dx - 0.06, y), (dx + 0.06, y)], 0.08, colour)

    def hat(self, canvas: Canvas) -> None:
        colour = COLOUR[self.i.hat_colour]
        dark = shade(colour, 0.72) if self.i.hat_colour != "black" else shade(colour, 1.25)
        h, e = self.height, self.width + 0.09
        match self.i.hat:
            case "cap":
                canvas.fill(curve((-e, -0.48), (-e, -h - 0.5, e, -h - 0.5, e, -0.48)), colour)
                canvas.fill(curve((-e + 0.05, -0.5), (self.dx, -0.92, e - 0.05, -0.5), (self.dx, -0.24, -e + 0.05, -0.5)), dark)
            case "beanie":
                canvas.fill(curve((-e, -0.5), (-e, -h - 0.62, e, -h - 0.62, e, -0.5)), colour)
                canvas.box(-e - 0.04, -0.74, e + 0.04, -0.42, dark)
                canvas.oval(0, -h - 0.36, 0.18, 0.18, shade(colour, 1.45))
            case "top hat":
                canvas.box(-0.6, -h - 0.82, 0.6, -0.6, colour)
                canvas.box(-0.6, -0.92, 0.6, -0.7, dark)
                canvas.oval(0, -0.62, 1.08, 0.14, colour)
            case "crown":
                canvas.fill(
                    [(-0.62, -0.6), (-0.7, -h - 0.45), (-0.34, -h - 0.1), (0, -h - 0.58), (0.34, -h - 0.1), (0.7, -h - 0.45), (0.62, -0.6)],
                    (252, 204, 44),
                )
                canvas.oval(0, -0.85, 0.1, 0.1, (212, 30, 60))
            case "cat ears":
                for side in (-1, 1):
                    canvas.fill([(side * 0.18, -h + 0.02), (side * 0.68, -h - 0.62), (side * 0.86, -0.48)], colour)
                    canvas.fill(
                        [(side * 0.36, -h + 0.06), (side * 0.63, -h - 0.34), (side * 0.72, -0.6)], mix(colour, (255, 180, 196), 0.65)
                    )
