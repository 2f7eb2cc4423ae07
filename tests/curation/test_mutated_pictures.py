"""Hundreds of damaged files: each is a record that can be read, or a reported problem; never another exception, never a hang."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from charforgex.curation.manifest import from_folder
from charforgex.curation.pictures import read_picture
from charforgex.data.datamodule import CharacterData
from charforgex.errors import DataError

FORMATS = {
    "png": ("PNG", {}),
    "palette.png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "tif": ("TIFF", {}),
    "deflate.tif": ("TIFF", {"compression": "tiff_deflate"}),
    "bmp": ("BMP", {}),
}
GOOD = 4


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def encoded(kind: str, seed: int) -> bytes:
    form, options = FORMATS[kind]
    image = picture(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    if form in ("JPEG", "WEBP", "PNG"):
        options = options | {"exif": exif}
    (image.quantize(32) if kind == "palette.png" else image).save(buffer, form, **options)
    return buffer.getvalue()


def mutations(data: bytes, rng: random.Random):
    """Truncations, every header byte region, random bytes, holes, repeats and noise at the end."""
    for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        yield data[: int(len(data) * share)]
    yield data[:-1]
    for place in range(0, 40, 4):
        value = bytearray(data)
        value[place] ^= 0xFF
        yield bytes(value)
    for place in (4, 8, 16, 18, 20, 24):
        yield data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]
    for count in (1, 3, 10, 50):
        value = bytearray(data)
        for _ in range(count):
            value[rng.randrange(len(value))] = rng.randrange(256)
        yield bytes(value)
    start = rng.randrange(len(data) // 2)
    yield data[:start] + data[start + 7 :]
    yield data[:start] + data[start : start + 30] + data[start:]
    yield data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield data + rng.randbytes(100)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *extra: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


CRAFTED = {
    "bomb_header.png": png(50_000, 50_000),
    "bomb_limit.png": png(2**31 - 1, 2**31 - 1),
    "bomb_middle.png": png(10_000, 9_000),
    "zero.png": png(0, 10),
    "no_rows.png": png(64, 64),
    "text_bomb.png": png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000), 9))),
    "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "negative.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0),
    "empty.png": b"",
    "empty.jpg": b"",
    "text.png": b"these are words\n" * 20,
    "page.jpg": b"<!doctype html><html><body>404</body></html>",
    "program.gif": b"#!/bin/sh\necho no\n",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
    "archive.webp": b"PK\x03\x04" + bytes(200),
    "pickle.tif": b"\x80\x04\x95\x10\0\0\0\0\0\0\0cposix\nsystem\n.",
    "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "zeros.jpg": bytes(5000),
    "loop.tif": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x40\0\0\0\x08\0\0\0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good pictures, and beside them everything bad."""
    root = tmp_path_factory.mktemp("mutated")
    for number in range(GOOD):
        picture(1000 + number).save(root / f"good_{number}.png")
        (root / f"good_{number}.txt").write_text("zkx, good")
    rng = random.Random(0)
    bad = dict(CRAFTED)
    for seed, kind in enumerate(FORMATS):
        for number, data in enumerate(mutations(encoded(kind, seed), rng)):
            bad[f"{number}.{kind}"] = data
    for name, data in bad.items():
        (root / name).write_bytes(data)
        (root / (name.rsplit(".", 1)[0] + ".txt")).write_text("zkx, mutated")
    assert len(bad) >= 300
    return root, sorted(bad)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_every_mutation_is_read_or_reported(folder):
    root, bad = folder
    manifest = from_folder(root)
    records, problems = {record.path: record for record in manifest.records}, dict(manifest.problems)
    assert all(f"good_{number}.png" in records for number in range(GOOD))
    for name in bad:
        assert (name in records) != (name in problems), name
    assert set(CRAFTED) <= set(problems)
    assert all(reason for reason in problems.values())
    for name in records:  # what passes can be read in full, at the size that was measured
        image = read_picture(root / name)
        assert image.mode == "RGB" and image.size == (records[name].width, records[name].height), name
    for name in problems:
        if "same file" not in problems[name] and "too small" not in problems[name]:
            with pytest.raises(DataError):
                read_picture(root / name)
    assert len(problems) > 150  # the mutations do damage


def test_mutated_pictures_do_not_stop_a_dataset(folder):
    root, _ = folder
    data = CharacterData(root, root.parent / "cache", 64, trigger="zkx")
    assert {f"good_{number}.png" for number in range(GOOD)} <= {r.path for r in (*data.train, *data.val)}
    assert len(data.problems) > 150


def test_only_bad_pictures_are_a_data_error(tmp_path):
    for name, data in CRAFTED.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="no usable pictures to train on") as caught:
        CharacterData(tmp_path, tmp_path / "cache", 64)
    assert "and 16 more" in str(caught.value)


def test_odd_names(tmp_path):
    picture(0).save(tmp_path / "ok.png")
    picture(1).save(tmp_path / "日本 語🙂.png")
    (tmp_path / "日本 語🙂.txt").write_text("unicode", encoding="utf-8")
    picture(2).save(tmp_path / "new\nline.png")
    (tmp_path / "folder.png").mkdir()
    picture(3).save(tmp_path / "folder.png" / "inside.jpg")
    picture(4).save(tmp_path / "really_jpeg.png", "JPEG")
    expected = {"folder.png"}
    try:
        with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as file:
            picture(5).save(file, "PNG")
        expected.add("bad\\udcff.png")
    except OSError:
        pass  # file systems that only hold Unicode names refuse it themselves
    manifest = from_folder(tmp_path)
    assert {record.path for record in manifest.records} == {
        "ok.png", "日本 語🙂.png", "new\nline.png", "folder.png/inside.jpg", "really_jpeg.png"}  # fmt: skip
    assert {problem.path for problem in manifest.problems} == expected
    manifest.write(tmp_path / "m.jsonl")
    assert manifest.read(tmp_path / "m.jsonl").records == manifest.records
