"""A folder as people have them: a held-out character's pictures, and between them all that curation is to find.

Each file is a function of (character, kind, number). The names in the folder tell nothing; `write_mess` returns which class of
`curation.items.CLASSES` each file belongs to.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import TRIGGER, UNSEEN_SCENES, held_out_character

Made = tuple[str, bytes]  # suffix of the file and its content


class Maker:
    """Draws of one character. `number` is the demo's."""

    def __init__(self, number: int, size: int):
        self.number, self.size, self.identity = number, size, held_out_character(number)

    def context(self, rng: random.Random) -> world.Context:
        context = world.draw_context(rng)
        while context.scene in UNSEEN_SCENES:
            context = world.draw_context(rng)
        return context

    def good(self, rng: random.Random) -> Image.Image:
        return Image.fromarray(drawing.render(self.identity, self.context(rng), self.size))

    def original(self, index: int) -> Image.Image:
        """Picture `index` of those that are kept: what duplicates are made of."""
        return self.good(rng_of(self, "kept", index))

    def scenery(self, rng: random.Random, width: int, height: int) -> Image.Image:
        canvas = drawing.Canvas(max(width, height))
        drawing.scenery(canvas, replace(self.context(rng), scene=rng.choice(("beach", "forest", "mountains", "desert", "city"))))
        return Image.fromarray(canvas.finish()).crop((0, 0, width, height))

    def figure(self, rng: random.Random, identity: world.Identity, size: int) -> Image.Image:
        context = replace(self.context(rng), frame="portrait", dx=0.0, dy=0.0)
        return Image.fromarray(drawing.cut_out(identity, context, size), "RGBA")

    def stranger(self, rng: random.Random) -> world.Identity:
        """Somebody whose hair, skin and sex differ; look-alikes are another question."""
        while True:
            other = world.draw_identity(rng)
            if all(getattr(other, name) != getattr(self.identity, name) for name in ("hair", "hair_colour", "skin")):
                return other


def rng_of(maker: Maker, kind: str, index: int) -> random.Random:
    return random.Random(f"mess {maker.number} {kind} {index}")


def png(picture: Image.Image) -> Made:
    return encoded(picture, "PNG")


def encoded(picture: Image.Image, form: str, **options) -> Made:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}[form], file.getvalue()


# ---- one function for each kind of file ----


def kept(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(maker.original(index))


def photo_like(maker: Maker, rng: random.Random, index: int) -> Made:
    return encoded(maker.good(rng), "JPEG", quality=rng.choice((85, 92)))


def animated(maker: Maker, rng: random.Random, index: int) -> Made:
    frames = [maker.good(rng).convert("P", palette=Image.Palette.ADAPTIVE, colors=255) for _ in range(2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def see_through(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(maker.figure(rng, maker.identity, maker.size))


def copied(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(maker.original(index))


def recompressed(maker: Maker, rng: random.Random, index: int) -> Made:
    return encoded(maker.original(index), "JPEG", quality=rng.randint(55, 80))


def resized(maker: Maker, rng: random.Random, index: int) -> Made:
    side = round(maker.size * rng.uniform(0.82, 0.95))
    return png(maker.original(index).resize((side, side), Image.Resampling.LANCZOS))


def turned(maker: Maker, rng: random.Random, index: int) -> Made:
    turn = rng.choice((Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270))
    return png(maker.original(index).transpose(turn))


def mirrored(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(maker.original(index).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def trimmed(maker: Maker, rng: random.Random, index: int) -> Made:
    left, top, right, bottom = (round(maker.size * rng.uniform(0.01, 0.04)) for _ in range(4))
    return png(maker.original(index).crop((left, top, maker.size - right, maker.size - bottom)))


def brightened(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(ImageEnhance.Brightness(maker.original(index)).enhance(rng.choice((0.85, 1.15))))


def blurred(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(maker.good(rng).filter(ImageFilter.GaussianBlur(maker.size * rng.uniform(0.018, 0.035))))


def shaken(maker: Maker, rng: random.Random, index: int) -> Made:
    values = np.asarray(maker.good(rng), np.float32)
    steps = round(maker.size * rng.uniform(0.06, 0.1))
    return png(Image.fromarray(np.mean([np.roll(values, shift, 1) for shift in range(steps)], 0).astype(np.uint8)))


def dark(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(Image.fromarray((np.asarray(maker.good(rng), np.float32) * rng.uniform(0.03, 0.1)).astype(np.uint8)))


def bright(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(Image.fromarray(np.clip(np.asarray(maker.good(rng), np.float32) * 2 + rng.uniform(190, 215), 0, 255).astype(np.uint8)))


def noisy(maker: Maker, rng: random.Random, index: int) -> Made:
    values = np.asarray(maker.good(rng), np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(35, 60), values.shape)
    return png(Image.fromarray(np.clip(values + noise, 0, 255).astype(np.uint8)))


def compressed(maker: Maker, rng: random.Random, index: int) -> Made:
    return encoded(maker.good(rng), "JPEG", quality=rng.randint(3, 9))


def saved_again(maker: Maker, rng: random.Random, index: int) -> Made:
    """The blocks of strong compression, in a file that has none."""
    return png(Image.open(io.BytesIO(encoded(maker.good(rng), "JPEG", quality=rng.randint(3, 8))[1])).convert("RGB"))


def framed(maker: Maker, rng: random.Random, index: int) -> Made:
    picture, edge = maker.good(rng), round(maker.size * rng.uniform(0.1, 0.18))
    colour = rng.choice(((0, 0, 0), (255, 255, 255)))
    whole = Image.new("RGB", (maker.size, maker.size), colour)
    whole.paste(picture.crop((0, edge, maker.size, maker.size - edge)), (0, edge))
    return png(whole)


def lettered(maker: Maker, rng: random.Random, index: int) -> Made:
    from PIL import ImageFont

    picture = maker.good(rng)
    font = ImageFont.load_default(maker.size / rng.uniform(9, 13))
    words = rng.choice(("stock photo sample", "do not copy 2024", "www.pictures.example"))
    place = (maker.size * 0.04, maker.size * rng.choice((0.04, 0.85)))
    ImageDraw.Draw(picture).text(
        place, words, fill=(255, 255, 255), font=font, stroke_width=max(1, maker.size // 160), stroke_fill=(0, 0, 0)
    )
    return png(picture)


def small(maker: Maker, rng: random.Random, index: int) -> Made:
    side = rng.randint(20, 60)
    return png(maker.good(rng).resize((side, side), Image.Resampling.LANCZOS))


def landscape(maker: Maker, rng: random.Random, index: int) -> Made:
    """A part of a scene with balloons in front of it: scenes are few, and no two of these shall be the same picture."""
    side = rng.randint(maker.size, 2 * maker.size)
    left, top = (rng.randint(0, 2 * maker.size - side) for _ in range(2))
    picture = maker.scenery(rng, 2 * maker.size, 2 * maker.size).crop((left, top, left + side, top + side))
    picture = picture.resize((2 * maker.size, 2 * maker.size), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(4, 8)):
        radius = rng.uniform(0.1, 0.3) * maker.size
        x, y = (rng.uniform(0, 2 * maker.size) for _ in range(2))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(rng.randrange(256) for _ in range(3)))
    return png(picture.resize((maker.size, maker.size), Image.Resampling.BOX))


def stranger(maker: Maker, rng: random.Random, index: int) -> Made:
    return png(Image.fromarray(drawing.render(maker.stranger(rng), maker.context(rng), maker.size)))


def couple(maker: Maker, rng: random.Random, index: int) -> Made:
    """The character and somebody else, side by side: each can be cut out."""
    return _together(maker, rng, [maker.identity, maker.stranger(rng)], apart=1.0)


def crowd(maker: Maker, rng: random.Random, index: int) -> Made:
    """Heads that overlap: nobody can be cut out alone."""
    return _together(maker, rng, [maker.stranger(rng), maker.identity, maker.stranger(rng)], apart=0.45)


def _together(maker: Maker, rng: random.Random, people: list[world.Identity], apart: float) -> Made:
    step = round(maker.size * apart)
    whole = maker.scenery(rng, maker.size + step * (len(people) - 1), maker.size)
    for place, identity in enumerate(people):
        figure = maker.figure(rng, identity, maker.size)
        whole.paste(figure, (place * step, 0), figure)
    return png(whole)


def truncated(maker: Maker, rng: random.Random, index: int) -> Made:
    suffix, data = (photo_like if index % 2 else kept)(maker, rng, index + 10**6)
    return suffix, data[: round(len(data) * rng.uniform(0.1, 0.8))]


def empty(maker: Maker, rng: random.Random, index: int) -> Made:
    return rng.choice((".png", ".jpg")), b""


def garbage(maker: Maker, rng: random.Random, index: int) -> Made:
    return rng.choice((".png", ".jpg", ".webp")), rng.randbytes(rng.randint(100, 4000))


def document(maker: Maker, rng: random.Random, index: int) -> Made:
    return rng.choice((".pdf", ".psd", ".svg", ".docx")), b"%PDF-1.7\n" + rng.randbytes(500)


def bomb(maker: Maker, rng: random.Random, index: int) -> Made:
    """A PNG of a few bytes that claims more pixels than anybody has memory for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = rng.randint(30000, 60000)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return ".png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# kind -> (class that curation should find, what makes it)
KINDS: dict[str, tuple[str, Callable[[Maker, random.Random, int], Made]]] = {
    "kept": ("kept", kept), "photo_like": ("kept", photo_like), "animated": ("kept", animated), "see_through": ("kept", see_through),
    "couple": ("kept", couple), "copied": ("duplicate", copied), "recompressed": ("duplicate", recompressed),
    "resized": ("duplicate", resized), "turned": ("duplicate", turned), "mirrored": ("duplicate", mirrored),
    "trimmed": ("duplicate", trimmed), "brightened": ("duplicate", brightened), "blurred": ("blurred", blurred),
    "shaken": ("blurred", shaken), "dark": ("exposure", dark), "bright": ("exposure", bright), "noisy": ("noisy", noisy),
    "compressed": ("compressed", compressed), "saved_again": ("compressed", saved_again), "framed": ("marked", framed),
    "lettered": ("marked", lettered), "small": ("too_small", small), "landscape": ("no_face", landscape),
    "stranger": ("wrong_person", stranger), "crowd": ("several_people", crowd), "truncated": ("corrupt", truncated),
    "empty": ("corrupt", empty), "garbage": ("unsupported", garbage), "document": ("unsupported", document), "bomb": ("too_large", bomb),
}  # fmt: skip
DEMO = {
    "kept": 30, "copied": 1, "recompressed": 2, "mirrored": 1, "blurred": 2, "dark": 1, "noisy": 1, "compressed": 1, "lettered": 1,
    "small": 1, "landscape": 1, "stranger": 2, "truncated": 1, "empty": 1,
}  # fmt: skip


def order(number: int, counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """(kind, index) of each file, by the number that its name begins with."""
    files = [(kind, index) for kind, count in counts.items() for index in range(count)]
    random.Random(f"order {number}").shuffle(files)
    return files


def write_mess(folder: Path, number: int, counts: Mapping[str, int] = DEMO, size: int = 192, captions: bool = True) -> dict[str, str]:
    """Writes `counts[kind]` files of each kind of `KINDS`, in an order that tells nothing. Returns file name -> class.

    With `captions`, what is kept has a caption beside it, which calls the character by the demo's name.
    """
    maker = Maker(number, size)
    folder.mkdir(parents=True, exist_ok=True)
    classes = {}
    for place, (kind, index) in enumerate(order(number, counts)):
        rng = rng_of(maker, kind, index)
        suffix, data = KINDS[kind][1](maker, rng, index)
        name = f"{place:04d}{suffix}"
        (folder / name).write_bytes(data)
        classes[name] = KINDS[kind][0]
        if captions and kind == "kept":
            text, _ = world.caption(maker.identity, maker.context(rng_of(maker, kind, index)), name=TRIGGER)
            (folder / f"{place:04d}.txt").write_text(text + "\n", encoding="utf-8")
            classes[f"{place:04d}.txt"] = "sidecar"
    return classes


def write_archive(path: Path, number: int, count: int, size: int = 192) -> dict[str, str]:
    """A zip with `count` good pictures and a member that climbs out of it. Returns item name -> class, its own included."""
    maker = Maker(number, size)
    classes = {path.name: "container"}
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            name = f"pictures/{index:03d}.png"
            archive.writestr(name, png(maker.good(rng_of(maker, "archived", index)))[1])
            classes[f"{path.name}!/{name}"] = "kept"
        archive.writestr("../escape.png", b"x")
        classes[f"{path.name}!/../escape.png"] = "unsafe"
    return classes
