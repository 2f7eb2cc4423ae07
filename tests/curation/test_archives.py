"""What archives give: every picture with its sidecars, a reason for all else, and no more memory or time than is allowed."""

import gzip
import io
import lzma
import tarfile
import tracemalloc
import zipfile

import pytest
from PIL import Image

from charforgex.curation.archives import ArchiveSettings, items
from charforgex.curation.pictures import MAX_BYTES, MAX_PIXELS

from . import hostile
from .hostile import Entry

SETTINGS = ArchiveSettings()


def png(seed=0, size=(24, 18)) -> bytes:
    return hostile.encoded(hostile.picture(seed, size))


def opened(tmp_path, name, data, settings=SETTINGS, max_bytes=MAX_BYTES):
    (tmp_path / name).write_bytes(data)
    found = list(items(tmp_path / name, name, settings, max_bytes, MAX_PIXELS))
    assert len({item.name for item in found}) == len(found) and found[-1].name == name
    return {item.name.removeprefix(f"{name}!/"): item for item in found}


def packed(kind, entries):
    return hostile.zipped(entries) if kind == "zip" else hostile.PACKERS[kind](hostile.tar(entries))


@pytest.mark.parametrize("kind", ["zip", *hostile.PACKERS])
def test_pictures_come_with_their_sidecars_whatever_the_order(tmp_path, kind):
    mask = hostile.encoded(Image.new("L", (24, 18), 255))
    entries = [
        Entry("./late.txt", b"one\ntwo"), Entry("x/late.png", png(9)), Entry("late.png", png(1)), Entry("late.mask.png", mask),
        Entry("small.mask.png", png(2, (3, 3))), Entry("small.jpg", hostile.encoded(hostile.picture(3), "JPEG")),
        Entry("bad.caption", b"\xff"), Entry("bad.png", png(4)), Entry("alone.txt", b"x"), Entry("read.me", b"x"),
    ]  # fmt: skip
    found = opened(tmp_path, f"p.{kind}", packed(kind, entries))
    late = found["late.png"]
    assert late.data == png(1) and late.captions == ("one", "two") and late.mask == mask
    assert found["x/late.png"].captions == () and found["small.jpg"].mask is None and found["bad.png"].captions == ()
    assert {name: item.verdict.kind for name, item in found.items() if item.verdict} == {
        "late.txt": "sidecar", "late.mask.png": "sidecar", "small.mask.png": "corrupt", "bad.caption": "corrupt",
        "alone.txt": "unsupported", "read.me": "unsupported", f"p.{kind}": "container",
    }  # fmt: skip
    assert found[f"p.{kind}"].verdict.reason == "4 pictures in 10 members"
    assert "3 x 3, the picture's is 24 x 18" in found["small.mask.png"].verdict.reason


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_tar_that_breaks_off_gives_what_came_before(tmp_path, kind):
    entries = [Entry(f"{number}.bmp", hostile.encoded(hostile.picture(number), "BMP")) for number in range(40)]
    data = packed(kind, entries)
    found = opened(tmp_path, f"p.{kind}", data[: len(data) // 2])
    pictures = [name for name, item in found.items() if item.data]
    if kind != "tar.bz2":  # whose one block is all or nothing
        assert 5 <= len(pictures) <= 30
    for name in pictures:
        assert found[name].data == entries[int(name.removesuffix(".bmp"))].data
    verdict = found[f"p.{kind}"].verdict
    assert verdict.kind == "corrupt" and (f"{len(pictures)} pictures before that are used" in verdict.reason or not pictures)


def test_damage_inside_a_tar_is_not_its_end(tmp_path):
    data = bytearray(hostile.tar([Entry("a.png", png(1)), Entry("b.png", png(2)), Entry("c.png", png(3))], tarfile.USTAR_FORMAT))
    data[bytes(data).index(b"b.png")] ^= 0xFF  # its header's checksum is wrong now
    found = opened(tmp_path, "p.tar", bytes(data))
    assert list(found) == ["a.png", "p.tar"] and found["p.tar"].verdict.kind == "corrupt"
    assert "header" in found["p.tar"].verdict.reason


def test_a_zip_without_its_directory_says_what_may_help(tmp_path):
    data = hostile.zipped([Entry("a.png", png(1))])
    found = opened(tmp_path, "p.zip", data[:-30])
    assert found["p.zip"].verdict.kind == "corrupt" and "zip -FF" in found["p.zip"].verdict.reason


def test_one_damaged_member_of_a_zip_is_alone(tmp_path):
    data = bytearray(hostile.zipped([Entry("a.png", png(1)), Entry("b.png", png(2))], zipfile.ZIP_STORED))
    data[bytes(data).index(b"IDAT") + 6] ^= 1
    found = opened(tmp_path, "p.zip", bytes(data))
    assert found["a.png"].verdict.kind == "corrupt" and "CRC" in found["a.png"].verdict.reason
    assert found["b.png"].data == png(2) and found["p.zip"].verdict.kind == "container"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_caps(tmp_path, kind):
    entries = [Entry(f"{number}.bmp", bytes(range(256)) * 8) for number in range(6)]
    data = packed(kind, entries)
    found = opened(tmp_path, f"p.{kind}", data, ArchiveSettings(max_members=4))
    assert list(found) == ["0.bmp", "1.bmp", "2.bmp", "3.bmp", f"p.{kind}"]
    assert found[f"p.{kind}"].verdict == ("too_large", "it has more than the 4 members that are read; 4 pictures before that are used")
    found = opened(tmp_path, f"p.{kind}", data, ArchiveSettings(max_total_gib=3 * 2048 / 2**30))
    assert 1 <= sum(item.data is not None for item in found.values()) <= 3 and found[f"p.{kind}"].verdict.kind == "too_large"
    found = opened(tmp_path, f"p.{kind}", data, max_bytes=2047)
    assert {item.verdict.kind for item in list(found.values())[:-1]} == {"too_large"} and found[f"p.{kind}"].verdict.kind == "container"


def test_the_ratio_is_what_counts_for_a_bomb(tmp_path):
    flat = hostile.encoded(Image.new("RGB", (2000, 1500), "teal"), "BMP")  # 9 MB that pack to some kilobytes
    for kind in ("zip", "tar.gz"):
        data = packed(kind, [Entry("flat.bmp", flat)])
        strict = opened(tmp_path, f"p.{kind}", data)
        assert strict["flat.bmp"].verdict.kind == "unsafe"
        assert opened(tmp_path, f"p.{kind}", data, ArchiveSettings(max_ratio=1100.0))["flat.bmp"].data == flat


def test_an_encrypted_member_says_the_way_out(tmp_path):
    data = bytearray(hostile.zipped([Entry("a.png", png(1))]))
    for at in (6, data.index(b"PK\1\2") + 8):
        data[at] |= 1
    assert "with its password" in opened(tmp_path, "p.zip", bytes(data))["a.png"].verdict.reason


def test_memory_does_not_grow_with_the_archive(tmp_path):
    def peak(count):
        name = f"{count}.tar.gz"
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as archive:
            for number in range(count):
                info = tarfile.TarInfo(f"{number}.bmp")
                info.size = 2**19
                block = number.to_bytes(4, "big") * 2**10
                archive.addfile(info, io.BytesIO(block * 2**7))
        tracemalloc.start()
        for _ in items(tmp_path / name, name, ArchiveSettings(max_ratio=1e6), MAX_BYTES, MAX_PIXELS):
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(60) < peak(4) + 2**19  # 28 MiB more of pictures


def test_a_header_does_not_make_memory(tmp_path):
    claim = hostile.header(b"x", b"%011o\0" % 2**30, b"x") + bytes(2**23)
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(claim))
    tracemalloc.start()
    found = list(items(tmp_path / "p.tar.gz", "p", SETTINGS, MAX_BYTES, MAX_PIXELS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.verdict.kind for item in found] == ["unsafe"] and peak < 2**21


def test_a_zip_directory_is_bounded(tmp_path):
    entries = [Entry(f"{'n' * 200}{number}") for number in range(5000)]  # more than a megabyte of names
    found = opened(tmp_path, "p.zip", hostile.zipped(entries), ArchiveSettings(max_members=10))
    assert list(found) == ["p.zip"] and "directory" in found["p.zip"].verdict.reason and found["p.zip"].verdict.kind == "too_large"


def test_streams_after_each_other_are_one_tar(tmp_path):
    data = hostile.tar([Entry("a.png", png(1)), Entry("b.png", png(2))])
    half = len(data) // 2
    found = opened(tmp_path, "p.tar.xz", lzma.compress(data[:half]) + bytes(8) + lzma.compress(data[half:]))
    assert found["a.png"].data == png(1) and found["b.png"].data == png(2)
