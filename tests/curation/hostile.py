"""Files that are damaged, mislabelled or made to do harm, each with the classes it may end in. `picture` is one that can be decoded.

All are small, and a function of the seed.
"""

import bz2
import gzip
import io
import lzma
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

BROKEN = frozenset({"corrupt"})
NOTHING = frozenset({"corrupt", "unsupported"})
ANY = frozenset({"picture", "corrupt", "unsupported", "too_large"})
PICTURE = frozenset({"picture"})


class File(NamedTuple):
    """`classes`: what each item that it gives may be, by how the item's name ends; "" is the file itself, "?" any other item."""

    name: str
    data: bytes
    classes: dict[str, frozenset[str]]


def picture(seed: int, size=(24, 18)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def kinds() -> dict[str, bytes]:
    """Good pictures in every format and mode, by suffix."""
    one, wide = picture(1), Image.fromarray(np.arange(432, dtype=np.uint16).reshape(18, 24) * 150)
    moving = {"save_all": True, "append_images": [picture(2), picture(3)]}
    return {
        "png": encoded(one),
        "palette.png": encoded(one.quantize(16)),
        "grey.png": encoded(one.convert("L")),
        "bilevel.png": encoded(one.convert("1")),
        "alpha.png": encoded(one.convert("RGBA")),
        "grey_alpha.png": encoded(one.convert("LA")),
        "wide.png": encoded(wide),
        "moving.png": encoded(one, **moving),
        "jpg": encoded(one, "JPEG"),
        "progressive.jpg": encoded(one, "JPEG", progressive=True),
        "cmyk.jpg": encoded(one.convert("CMYK"), "JPEG"),
        "webp": encoded(one, "WEBP"),
        "lossless.webp": encoded(one, "WEBP", lossless=True),
        "moving.webp": encoded(one, "WEBP", **moving),
        "gif": encoded(one, "GIF"),
        "moving.gif": encoded(one, "GIF", **moving),
        "tif": encoded(one, "TIFF"),
        "lzw.tif": encoded(one, "TIFF", compression="tiff_lzw"),
        "wide.tif": encoded(wide, "TIFF"),
        "cmyk.tif": encoded(one.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(one.convert("LAB"), "TIFF"),
        "bmp": encoded(one, "BMP"),
    }


def damaged(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    for tenth in range(10):
        yield f"cut{tenth}", data[: len(data) * tenth // 10]
    for number in range(12):
        value = bytearray(data)
        for _ in range(rng.choice((1, 4, 16))):
            value[rng.randrange(len(value))] = rng.randrange(256)
        yield f"flip{number}", bytes(value)
    for number in range(6):  # headers, where sizes and offsets stand
        value = bytearray(data)
        at = rng.randrange(min(60, len(data) - 4))
        value[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)))
        yield f"head{number}", bytes(value)
    half = len(data) // 2
    yield "zeros", data[:half] + bytes(len(data) - half)
    yield "hole", data[: half - 5] + data[half + 5 :]
    yield "tail", data + rng.randbytes(50)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


CRAFTED = {
    "bomb.png": (png(50_000, 50_000), {"too_large"}),
    "limit.png": (png(2**31 - 1, 2**31 - 1), {"too_large"}),
    "middle.png": (png(10_000, 9_000), {"too_large"}),
    "zero.png": (png(0, 10), {"corrupt", "unsupported"}),
    "rows.png": (png(64, 64), {"corrupt"}),
    "text.png": (png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8_000_000), 9))), {"corrupt"}),
    "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;", {"too_large"}),
    "bomb.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0), {"too_large"}),
    "loop.tif": (b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x40\0\0\0\x08\0\0\0", {"corrupt"}),
    "zeros.jpg": (bytes(5000), {"corrupt"}),
    "words.jpg": (b"these are words\n" * 20, {"unsupported"}),
    "page.jpg": (b"<!doctype html><html><body>404</body></html>", {"unsupported"}),
    "program.gif": (b"#!/bin/sh\ntouch /tmp/harm\n", {"unsupported"}),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", {"unsupported"}),
    "pickle.tif": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0cposix\nsystem\n.", {"unsupported"}),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', {"unsupported"}),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", {"unsupported"}),
    "float.tif": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), {"unsupported"}),
    "deep.tif": (encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), {"unsupported"}),
    "phone.heic": (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40), {"corrupt", "unsupported"}),
    "strip.png": (encoded(picture(4, (3000, 1))), {"picture"}),
    "column.png": (encoded(picture(5, (1, 3000))), {"picture"}),
    "dot.png": (encoded(picture(6, (1, 1))), {"picture"}),
    "layers.psd": (b"8BPS" + bytes(30), {"unsupported"}),
    "pack.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), {"unsupported"}),
    "address.url": (b"[InternetShortcut]\nURL=http://127.0.0.1/a.png\n", {"unsupported"}),
    "words.zip": (b"no zip", {"corrupt"}),
    "zeros.tar": (bytes(700), {"container"}),  # the end mark of an empty one
    "words.tar": (b"words " * 200, {"corrupt"}),
    "picture.tar.gz": (encoded(picture(7)), {"corrupt"}),
    "list.mp4": (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n", {"corrupt", "unsupported"}),
    "chain.mp4": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", {"corrupt", "unsupported"}),
    "picture.mkv": (encoded(picture(8)), {"corrupt", "unsupported"}),
    "caption.txt": (b"of nothing", {"unsupported"}),
    "alone.mask.png": (encoded(picture(9)), {"unsupported"}),
}


# ---- archives ----


class Entry(NamedTuple):
    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    target: str = ""


def tar(entries, form=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname = entry.type, entry.target
            info.size = len(entry.data) if entry.type == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(entry.data))
    return buffer.getvalue()


def zipped(entries, method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for entry in entries:
            info = zipfile.ZipInfo("?" * len(entry.name) if "\0" in entry.name else entry.name)
            info.compress_type = method
            if entry.type == tarfile.SYMTYPE:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, entry.target or entry.data)
    data = buffer.getvalue()
    for entry in entries:
        if "\0" in entry.name:
            data = data.replace(b"?" * len(entry.name), entry.name.encode())
    return data


PACKERS = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
OUTSIDE = ("../up.png", "a/../../up.png", "/abs.png", "C:/drive.png", "C:drive.png", "back\\slash.png", "..\\up.png", "nul\0.png")


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a size field as given and a right checksum."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0" + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(512 - 265)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def archives(rng: random.Random) -> Iterator[File]:
    good = [Entry("a.png", encoded(picture(20))), Entry("b/c.jpg", encoded(picture(21), "JPEG")), Entry("b/c.txt", b"a caption")]
    fine = {"a.png": PICTURE, "c.jpg": PICTURE, "c.txt": frozenset({"sidecar"}), "": frozenset({"container"})}
    every = dict.fromkeys(("a.png", "c.jpg", "c.txt", ""), ANY | {"sidecar", "container", "unsafe"})
    packs = {kind: pack(tar(good)) for kind, pack in PACKERS.items()} | {
        "zip": zipped(good),
        "stored.zip": zipped(good, zipfile.ZIP_STORED),
    }
    for kind, data in packs.items():
        yield File(f"good.{kind}", data, fine)
        for how, broken in damaged(data, rng):
            yield File(f"{how}.{kind}", broken, every)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        yield File(f"form{form}.tar", tar(good, form), fine)
    long = "n" * 180 + ".png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield File(f"long{form}.tar", tar([Entry(long, good[0].data)], form), {long: PICTURE, "": frozenset({"container"})})

    unsafe, unsupported, container = frozenset({"unsafe"}), frozenset({"unsupported"}), frozenset({"container"})
    outside = [Entry(name, good[0].data) for name in OUTSIDE]
    yield File("outside.zip", zipped(outside), {"": container, "?": unsafe})
    for number, entry in enumerate(outside):
        ends = {"": container, "?": unsafe}
        yield File(f"outside{number}.zip", zipped([entry, good[0]]), ends | {"!/a.png": PICTURE})
        if "\0" not in entry.name:
            yield File(f"outside{number}.tar", tar([entry, good[0]]), ends | {"!/a.png": PICTURE})
            yield File(f"outside{number}.tar.gz", gzip.compress(tar([entry, good[0]])), ends | {"!/a.png": PICTURE})
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        for target in ("/etc/passwd", "a.png", "../../x"):
            ends = {"": container, "!/a.png": PICTURE, "link.png": unsafe}
            name = target.replace("/", "_").replace(".", "_")
            yield File(f"link{kind.decode()}{name}.tar", tar([good[0], Entry("link.png", b"", kind, target)]), ends)
    yield File("link.zip", zipped([good[0], Entry("link.png", b"", tarfile.SYMTYPE, "/etc/passwd")]), {**ends})
    inner = zipped(good)
    yield File("nested.zip", zipped([Entry("inner.zip", inner), good[0]]), {"inner.zip": unsupported, "!/a.png": PICTURE, "": container})
    yield File("nested.tar", tar([Entry("inner.tar.gz", inner), good[0]]), {"inner.tar.gz": unsupported, "!/a.png": PICTURE, "": container})
    bomb = [good[0], Entry("bomb.png", bytes(12 * 2**20))]
    yield File("bomb.zip", zipped(bomb), {"!/a.png": PICTURE, "bomb.png": unsafe, "": container})
    for kind in ("tar.gz", "tar.bz2", "tar.xz"):
        yield File(f"bomb.{kind}", PACKERS[kind](tar(bomb)), {"!/a.png": PICTURE, "bomb.png": unsafe, "": unsafe})
    locked = bytearray(zipped(good[:1]))
    for at in (6, locked.index(b"PK\1\2") + 8):
        locked[at] |= 1
    yield File("locked.zip", bytes(locked), {"a.png": unsupported, "": container})
    yield File("method.zip", zipped(good[:1], zipfile.ZIP_LZMA), {"a.png": unsupported, "": container})
    crc = bytearray(zipped(good[:1], zipfile.ZIP_STORED))
    crc[60] ^= 1
    yield File("crc.zip", bytes(crc), {"a.png": BROKEN, "": container})
    twice = zipped([good[0], Entry("A.png", good[0].data)]).replace(b"A.png", b"a.png")
    yield File("twice.zip", twice, {"a.png": PICTURE, "a.png#2": PICTURE, "": container})
    hidden = zipped([good[0], Entry("__MACOSX/._a.png", b"x"), Entry(".hidden/b.png", b"x")])
    yield File("hidden.zip", hidden, {"!/a.png": PICTURE, "": container})
    for size in (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777", b"99", b""):
        name, classes = size.hex()[:8] or "none", BROKEN | {"too_large"} if size else container
        yield File(f"size{name}.tar", header(b"a.png", size) + bytes(2048), {"a.png": NOTHING | {"too_large"}, "": classes})
        yield File(f"pax{name}.tar", header(b"x", size, b"x") + bytes(2048), {"": classes | {"unsafe"}})
    loop = header(b"x", b"00000000013\0", b"x") + b"0 path=a.png".ljust(512, b"\0")
    yield File("pax_loop.tar", loop + bytes(1024), {"": BROKEN})
    huge = gzip.compress(header(b"x", b"%011o\0" % 2**30, b"x") + bytes(2**22))
    yield File("pax_huge.tar.gz", huge, {"": unsafe})
    yield File("sparse.tar", header(b"a.png", b"00000000000\0", b"S") + bytes(1024), {"a.png": unsupported, "": container})
    yield File("empty.zip", zipped([]), {"": container})
    yield File("empty_member.zip", zipped([Entry("a.png")]), {"a.png": BROKEN, "": container})


def files(seed: int = 0) -> Iterator[File]:
    rng = random.Random(seed)
    good = kinds()
    for kind, data in good.items():
        yield File(f"good.{kind}", data, {"": PICTURE})
        for how, broken in damaged(data, rng):
            sure = how in ("cut0", "cut1", "cut5", "cut8") and kind.endswith(("png", "jpg", "webp")) and "moving" not in kind
            yield File(f"{how}.{kind}", broken, {"": BROKEN if sure or how == "cut0" else ANY})
        for other in ("png", "jpg", "tiff", "webp", "avif", "heic"):
            yield File(f"wrong_{kind.replace('.', '_')}.{other}", data, {"": PICTURE})
        yield File(f"bare_{kind.replace('.', '_')}", data, {"": PICTURE})
    for number in range(60):
        suffix = ("png", "jpg", "webp", "gif", "tif", "bmp", "avif", "heic", "zip", "tar.gz")[number % 10]
        yield File(f"random{number}.{suffix}", rng.randbytes(rng.randrange(1, 4000)), {"": NOTHING})
    for name, (data, classes) in CRAFTED.items():
        yield File(f"crafted/{name}", data, {"": frozenset(classes)})
    yield from archives(rng)
