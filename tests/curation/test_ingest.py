"""Every file of a folder is a unit, every unit gives pictures or says why not, and nothing in a file can do harm."""

import hashlib
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from charforgex.binding import bind
from charforgex.curation.ingest import IngestSettings, Unit, content_hashes, items, units
from charforgex.curation.items import CLASSES
from charforgex.curation.pictures import decode_picture, verdict_of
from charforgex.errors import ConfigError, DataError

from . import hostile

SETTINGS = IngestSettings()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def png(seed=0, size=(24, 18)) -> bytes:
    return hostile.encoded(hostile.picture(seed, size))


def classes(root, settings=SETTINGS) -> dict[str, str]:
    """Class by item name, as a shard finds it: `picture` for what decodes."""
    found = {}
    for unit in units(root, settings):
        for item in items(root, unit, settings):
            assert item.name not in found, item.name
            found[item.name] = kind_of(item, settings)
    return found


def kind_of(item, settings=SETTINGS) -> str:
    assert sum(value is not None for value in (item.data, item.picture, item.verdict)) == 1
    verdict = item.verdict
    if item.data is not None:
        try:
            image = decode_picture(item.data, settings.background, settings.max_pixels)
            assert image.mode == "RGB" and min(image.size) >= 1
        except DataError as error:
            verdict = verdict_of(error)
    if verdict is None:
        return "picture"
    assert verdict.kind in CLASSES and verdict.reason
    return verdict.kind


def tree(root) -> dict[str, tuple]:
    return {str(p.relative_to(root)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*")}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    write(root / "b.png", png(1))
    write(root / "b.txt", b"one\n\ntwo\n")
    write(root / "b.caption", "\ufeffthree".encode())
    write(root / "b.mask.png", hostile.encoded(Image.new("L", (24, 18), 255)))
    write(root / "a" / "z.JPG", hostile.encoded(hostile.picture(2), "JPEG"))
    write(root / "a" / "pack.zip", hostile.zipped([hostile.Entry("in.png", png(3))]))
    write(root / "notes.pdf", b"%PDF")
    write(root / ".cache" / "x.png", png(4))
    return root


def test_units_are_every_file_in_order(folder):
    found = units(folder, SETTINGS)
    assert [(u.path, u.kind) for u in found] == [
        ("a/pack.zip", "archive"), ("a/z.JPG", "picture"), ("b.caption", "sidecar"), ("b.mask.png", "sidecar"), ("b.png", "picture"),
        ("b.txt", "sidecar"), ("notes.pdf", "other"),
    ]  # fmt: skip
    picture = found[4]
    assert picture.captions == ("b.txt", "b.caption") and picture.mask == "b.mask.png" and picture.verdict is None
    assert picture.size == len(png(1)) and picture.mtime_ns == (folder / "b.png").stat().st_mtime_ns
    assert picture.files == ("b.png", "b.txt", "b.caption", "b.mask.png") and len(picture.stamps) == 4
    assert found[3].owner == "b.png" and found[3].files == ("b.mask.png", "b.png")
    assert [Unit.from_json(json.loads(json.dumps(u.to_json()))) for u in found] == found
    assert units(folder, SETTINGS) == found


def test_a_unit_changes_with_its_sidecars(folder):
    before = {u.path: u for u in units(folder, SETTINGS)}
    (folder / "b.txt").write_text("another")
    after = {u.path: u for u in units(folder, SETTINGS)}
    assert {path for path in before if before[path] != after[path]} == {"b.png", "b.txt"}


def test_what_is_left_out(folder):
    names = [u.path for u in units(folder, SETTINGS, [folder / "a", folder / "b.txt"])]
    assert names == ["b.caption", "b.mask.png", "b.png", "notes.pdf"]


def test_items_of_a_folder(folder):
    found = {item.name: item for unit in units(folder, SETTINGS) for item in items(folder, unit, SETTINGS)}
    assert {name: kind_of(item) for name, item in found.items()} == {
        "a/pack.zip": "container", "a/pack.zip!/in.png": "picture", "a/z.JPG": "picture", "b.caption": "sidecar", "b.mask.png": "sidecar",
        "b.png": "picture", "b.txt": "sidecar", "notes.pdf": "unsupported",
    }  # fmt: skip
    assert found["b.png"].captions == ("one", "two", "three") and found["b.png"].data == png(1)
    assert found["b.png"].mask == (folder / "b.mask.png").read_bytes()
    assert found["b.txt"].verdict.reason == "the caption of b.png" and found["b.mask.png"].verdict.reason == "the mask of b.png"


def test_sidecars_that_cannot_be_used_leave_the_picture(folder):
    write(folder / "b.txt", b"latin \xe9")
    write(folder / "b.mask.png", png(5, (4, 3)))
    write(folder / "lonely.txt", b"x")
    found = {item.name: item for unit in units(folder, SETTINGS) for item in items(folder, unit, SETTINGS)}
    assert found["b.png"].captions == ("three",) and found["b.png"].mask is None
    assert found["b.txt"].verdict.kind == "corrupt" and "not UTF-8 (byte 6)" in found["b.txt"].verdict.reason
    assert found["b.mask.png"].verdict.kind == "corrupt" and "4 x 3, the picture's is 24 x 18" in found["b.mask.png"].verdict.reason
    assert found["lonely.txt"].verdict == ("unsupported", "no picture has this name")


@pytest.mark.parametrize("name", ["a/pack.zip", "b.png", "notes.pdf"])
def test_a_root_that_is_one_file(folder, name):
    root = folder / name
    (unit,) = units(root, SETTINGS)
    assert unit.path == root.name and unit.captions == ()
    expected = {"pack.zip": "container", "b.png": "picture", "notes.pdf": "unsupported"}[root.name]
    assert [kind_of(item) for item in items(root, unit, SETTINGS)][-1] == expected


@pytest.mark.parametrize("root", ["http://a.example/x.zip", "https:/a.example/x", "s3://bucket/x", "FTP://a/b"])
def test_addresses_are_refused(root):
    with pytest.raises(ConfigError, match="download it"):
        units(root, SETTINGS)


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        units(tmp_path / "absent", SETTINGS)


def test_links_and_odd_names(folder):
    write(folder.parent / "secret.png", png(7))
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "inner.png").symlink_to("b.png")
    (folder / "around").symlink_to(folder, target_is_directory=True)
    write(folder / "back\\slash.png", png(8))
    write(folder / "a" / "pack.zip!" / "in.png", png(9))
    found = classes(folder)
    expected = {"out.png": "unsafe", "loop.png": "unsafe", "inner.png": "picture", "around": "unsafe", "back\\slash.png": "unsupported"}
    expected |= {"dangling.png": "unsafe", "a/pack.zip!/in.png": "picture", "a/pack.zip\\x21/in.png": "unsupported"}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_do_not_hang(folder):
    for name in ("pipe.png", "pipe.zip", "pipe.mp4", "pipe", "b2.txt"):
        os.mkfifo(folder / name)
    write(folder / "b2.png", png(6))
    found = classes(folder)
    assert {found[name] for name in ("pipe.png", "pipe.zip", "pipe.mp4", "pipe", "b2.txt")} == {"unsupported"}
    assert found["b2.png"] == "picture"


def test_a_file_that_vanishes_or_may_not_be_read(folder):
    found = {u.path: u for u in units(folder, SETTINGS)}
    (folder / "b.png").unlink()
    (item,) = items(folder, found["b.png"], SETTINGS)
    assert item.verdict.kind == "corrupt" and "No such file" in item.verdict.reason


def test_content_hashes_open_only_what_may_be_opened(folder):
    (folder / "out.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.zip").write_bytes(b"x")
    found = {u.path: u for u in units(folder, SETTINGS)}
    (folder / "gone.zip").unlink()
    told = {path: content_hashes(folder, unit) for path, unit in found.items()}
    assert told["b.png"] == [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("b.png", "b.txt", "b.caption", "b.mask.png")
    ]
    assert told["out.png"][0] == "unsafe" and "not a regular file" in told["pipe.png"][0] and told["gone.zip"][0].startswith("unreadable")
    (unit,) = units(folder / "b.png", SETTINGS)
    assert content_hashes(folder / "b.png", unit) == told["b.png"][:1]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="three numbers"):
        bind(IngestSettings, {"background": [1, 2]}, "ingest")
    with pytest.raises(ConfigError, match=r"ingest\.background"):
        bind(IngestSettings, {"background": [1, 2, 256]}, "ingest")
    with pytest.raises(ConfigError, match=r"ingest\.archives\.max_ratio"):
        bind(IngestSettings, {"archives": {"max_ratio": 1}}, "ingest")


def test_the_background_and_the_caps_are_obeyed(tmp_path):
    glass = np.zeros((4, 4, 4), np.uint8)
    write(tmp_path / "glass.png", hostile.encoded(Image.fromarray(glass)))
    settings = IngestSettings(background=(1, 2, 3), max_pixels=16, max_bytes=2000)
    (unit,) = units(tmp_path, settings)
    (item,) = items(tmp_path, unit, settings)
    assert decode_picture(item.data, settings.background, settings.max_pixels).getpixel((0, 0)) == (1, 2, 3)
    write(tmp_path / "glass.png", png(1, (5, 4)))
    assert classes(tmp_path, settings) == {"glass.png": "too_large"}
    write(tmp_path / "glass.png", bytes(2001))
    assert classes(tmp_path, settings) == {"glass.png": "too_large"}


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_thousand_hostile_files(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "in", tmp_path / "cwd"
    elsewhere.mkdir()
    made = {}
    for file in hostile.files():
        assert file.name not in made
        write(root / file.name, file.data)
        made[file.name] = file
    assert len(made) >= 1000
    monkeypatch.chdir(elsewhere)
    before = tree(tmp_path)

    started = time.process_time()
    found = classes(root)
    assert time.process_time() - started < 60
    assert tree(tmp_path) == before  # nothing was written, not even the time of a file changed

    assert set(made) <= set(found)
    wrong = []
    for name, kind in found.items():
        outer, _, inner = name.partition("!/")
        wanted = made[outer].classes
        allowed = wanted[""] if not inner else next((wanted[end] for end in wanted if end and name.endswith(end)), wanted.get("?"))
        if allowed is not None and kind not in allowed:  # a damaged archive may give members of any name
            wrong.append((name, kind, sorted(allowed)))
    assert not wrong
    for file in made.values():  # and where nothing is damaged, every member is told of
        if file.name.startswith(("good", "form", "long", "outside", "link", "nested", "bomb", "locked", "crc", "twice", "hidden")):
            ends = [end for end in file.classes if end not in ("", "?")]
            assert all(any(name.startswith(f"{file.name}!/") and name.endswith(end) for name in found) for end in ends), file.name
    assert {"picture", "corrupt", "unsupported", "too_large", "unsafe", "container", "sidecar"} <= set(found.values())
