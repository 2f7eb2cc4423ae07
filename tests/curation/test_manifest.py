"""Folder to manifest, manifest to file and back, and what is refused on the way."""

import hashlib
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from charforgex.curation.manifest import Manifest, from_folder, open_manifest, resolve_inside
from charforgex.errors import DataError


def draw(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        draw(tmp_path / "in" / f"{number}.png", number)
        (tmp_path / "in" / f"{number}.txt").write_text(f"zkx, picture {number}\n\n  second   line \n")
    draw(tmp_path / "in" / "deep" / "er" / "b.PNG", 9, (50, 20))
    return tmp_path / "in"


def test_a_folder_becomes_records(folder):
    manifest = from_folder(folder)
    assert [record.path for record in manifest.records] == ["0.png", "1.png", "2.png", "3.png", "deep/er/b.PNG"]
    first, last = manifest.records[0], manifest.records[-1]
    assert (first.width, first.height) == (40, 30) and (last.width, last.height) == (50, 20)
    assert first.captions == ("zkx, picture 0", "second line") and last.captions == ()
    assert first.sha256 == hashlib.sha256((folder / "0.png").read_bytes()).hexdigest()
    assert manifest.problems == ()


def test_the_split_is_a_function_of_content(folder, tmp_path):
    held = [record.sha256 for record in from_folder(folder).of("val")]
    assert len(held) == 1  # max(1, round(0.15 * 5))
    for path in list(folder.glob("*.png")):
        path.rename(path.with_name(f"renamed_{path.name}"))
    assert [record.sha256 for record in from_folder(folder).of("val")] == held
    ranked = sorted((r.sha256 for r in from_folder(folder).records), key=lambda sha: hashlib.sha256(f"split/{sha}".encode()).hexdigest())
    assert ranked[:1] == held
    assert {record.sha256 for record in from_folder(folder, val_count=3).of("val")} == set(ranked[:3])


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 0), (3, 1), (10, 2), (20, 3)])
def test_how_many_are_held_out(tmp_path, count, held):
    for number in range(count):
        draw(tmp_path / f"{number}.png", number, (16, 16))
    assert len(from_folder(tmp_path).of("val")) == held


def test_too_many_held_out(folder):
    with pytest.raises(DataError, match="choose 0 to 3"):
        from_folder(folder, val_count=4)


def test_equal_files_count_once(folder):
    (folder / "z.png").write_bytes((folder / "1.png").read_bytes())
    manifest = from_folder(folder)
    assert len(manifest.records) == 5
    assert [(p.path, "same file as 1.png" in p.reason) for p in manifest.problems] == [("z.png", True)]


def test_caption_files(folder):
    (folder / "0.caption").write_bytes("\ufeffkohya's, café\r\n".encode())
    (folder / "1.txt").write_bytes(b"latin \xe9")
    (folder / "2.txt").write_text("\n \n")
    (folder / "alone.txt").write_text("no picture")
    manifest = from_folder(folder)
    captions = {record.path: record.captions for record in manifest.records}
    assert captions["0.png"] == ("zkx, picture 0", "second line", "kohya's, café")
    assert captions["2.png"] == ()
    assert "1.png" not in captions
    assert [problem.path for problem in manifest.problems] == ["1.png", "alone.txt"]
    assert "not UTF-8 (byte 6)" in manifest.problems[0].reason


def test_accents_match_in_either_form(tmp_path):
    draw(tmp_path / (unicodedata.normalize("NFC", "é") + ".png"))
    (tmp_path / (unicodedata.normalize("NFD", "é") + ".txt")).write_text("accent")
    manifest = from_folder(tmp_path)
    assert manifest.records[0].captions == ("accent",) and manifest.problems == ()


def test_masks(folder):
    Image.new("L", (40, 30), 255).save(folder / "0.mask.png")
    Image.new("L", (4, 3), 255).save(folder / "1.mask.png")
    (folder / "2.mask.png").write_bytes(b"nothing")
    Image.new("L", (4, 3)).save(folder / "none.mask.png")
    manifest = from_folder(folder)
    assert {record.path: record.mask for record in manifest.records if record.mask} == {"0.png": "0.mask.png"}
    assert manifest.records[0].mask_sha256 == hashlib.sha256((folder / "0.mask.png").read_bytes()).hexdigest()
    assert [problem.path for problem in manifest.problems] == ["1.mask.png", "2.mask.png", "none.mask.png"]
    assert "4 x 3, the picture's is 40 x 30" in manifest.problems[0].reason
    assert len(manifest.records) == 5


def test_small_foreign_and_hidden_files(folder):
    draw(folder / "small.png", 5, (200, 15))
    (folder / "phone.HEIC").write_bytes(b"x")
    (folder / "._0.png").write_bytes(b"x")
    (folder / "notes.json").write_text("{}")
    problems = dict(from_folder(folder).problems)
    assert set(problems) == {"small.png", "phone.HEIC"}
    assert "200 x 15" in problems["small.png"] and "below 16" in problems["small.png"]
    assert "small.png" not in dict(from_folder(folder, min_side=15).problems)


def test_write_and_read(folder):
    manifest = from_folder(folder)
    manifest.write(folder / "m.jsonl")
    again = Manifest.read(folder / "m.jsonl")
    assert again.records == manifest.records and again.root == manifest.root
    assert open_manifest(folder / "m.jsonl") == again
    assert again.content_hash() == manifest.content_hash()
    first = (folder / "m.jsonl").read_bytes()
    again.write(folder / "m.jsonl")
    assert (folder / "m.jsonl").read_bytes() == first
    with pytest.raises(DataError, match="must lie in"):
        manifest.write(folder.parent / "m.jsonl")


def test_the_content_hash_sees_captions_and_split_but_not_names(folder):
    before = from_folder(folder).content_hash()
    for path in [*folder.glob("3.*")]:
        path.rename(path.with_name("three" + path.suffix))
    assert from_folder(folder).content_hash() == before
    assert from_folder(folder, val_count=2).content_hash() != before
    (folder / "0.txt").write_text("other")
    assert from_folder(folder).content_hash() != before


def lines(folder):
    from_folder(folder).write(folder / "m.jsonl")
    return [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]


BAD = {
    "unknown field": ({"captoins": []}, "unknown field captoins"),
    "version": ({"version": 2}, "version=2 must be 1"),
    "absolute": ({"path": "/etc/passwd"}, "must be relative"),
    "climbing": ({"path": "a/../../x.png"}, "must be relative"),
    "windows": ({"path": "C:/x.png"}, "must be relative"),
    "backslash": ({"path": "a\\x.png"}, "must be relative"),
    "nul": ({"path": "a\0.png"}, "must be relative"),
    "split": ({"split": "held"}, "train"),
    "width": ({"width": 1.5}, "width=1.5"),
    "bool": ({"height": True}, "height=True"),
    "captions": ({"captions": "one"}, "captions='one'"),
    "blank caption": ({"captions": [" "]}, "captions"),
    "hash": ({"sha256": "abc"}, "sha256='abc'"),
    "half a mask": ({"mask": "m.png"}, "go together"),
    "changed": ({"sha256": "0" * 64}, "its content has changed"),
    "gone": ({"path": "gone.png"}, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests(folder, name):
    change, message = BAD[name]
    items = lines(folder)
    items[1] |= change
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, items)))
    with pytest.raises(DataError, match=message) as caught:
        Manifest.read(folder / "m.jsonl")
    assert "m.jsonl" in str(caught.value)
    if name not in ("changed", "gone"):
        assert "line 2" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000, "\n\n"])
def test_lines_that_are_no_records(folder, text):
    (folder / "m.jsonl").write_text(text)
    with pytest.raises(DataError):
        Manifest.read(folder / "m.jsonl")


def test_a_missing_field_and_a_twin(folder):
    items = lines(folder)
    (folder / "m.jsonl").write_text(json.dumps({k: v for k, v in items[0].items() if k != "width"}))
    with pytest.raises(DataError, match="the field width is missing"):
        Manifest.read(folder / "m.jsonl")
    (folder / "m.jsonl").write_text(json.dumps(items[0]) + "\n" + json.dumps(items[0]))
    with pytest.raises(DataError, match="twice"):
        Manifest.read(folder / "m.jsonl")


def test_links_may_not_lead_out(folder):
    outside = folder.parent / "secret.png"
    draw(outside, 77)
    (folder / "link.png").symlink_to(outside)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "around").symlink_to(folder, target_is_directory=True)
    (folder / "inner.png").symlink_to("deep/er/b.PNG")  # stays inside: read, and the same file as the other
    problems = dict(from_folder(folder).problems)
    assert "leads out" in problems["link.png"] and "not followed" in problems["around"]
    assert set(problems) == {"link.png", "loop.png", "around", "inner.png"} and "same file" in problems["inner.png"]
    with pytest.raises(DataError, match="leads out"):
        resolve_inside(folder, "link.png")


def test_a_caption_link_may_not_lead_out(folder):
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to(folder.parent / "secret.txt")
    manifest = from_folder(folder)
    assert "secret" not in str([record.captions for record in manifest.records])
    assert dict(manifest.problems).keys() == {"0.png"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "3.caption")
    problems = dict(from_folder(folder).problems)
    assert "not a regular file" in problems["pipe.png"] and "3.png" in problems


def test_sources_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"no folder or manifest .*set data\.source"):
        open_manifest(tmp_path / "absent")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="neither a folder"):
        open_manifest(tmp_path / "a.csv")
    with pytest.raises(DataError, match="not a folder"):
        from_folder(tmp_path / "a.csv")
    assert from_folder(tmp_path).records == ()


def test_val_count_and_a_manifest_contradict(folder):
    lines(folder)
    with pytest.raises(DataError, match="val_count=2 has no effect"):
        open_manifest(folder / "m.jsonl", val_count=2)
