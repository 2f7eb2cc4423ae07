"""The report: whole and well-formed, nothing hostile gets through, memory bounded, the same numbers in page, JSON and terminal."""

import base64
import io
import json
import re
import tracemalloc
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from charforgex.curation.advice import recommend
from charforgex.curation.analysis import AnalysisSettings, Limit, analyse
from charforgex.curation.facts import ANSWERS
from charforgex.curation.items import CLASSES, Face, Finding, Verdict
from charforgex.curation.manifest import Manifest, from_folder
from charforgex.curation.report import HTML, JSON, VERSION, funnel, header, read, row, select, set_captions, summary, write
from charforgex.errors import DataError
from charforgex.pages import text

EVIL = "</figcaption><script>alert(\"1\")</script><img src=x onerror=alert(2)>\u202egnp.exe\x07' onload='x"
VOID = {"meta", "img", "input", "rect", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what matters."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], Counter(), [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def kept(name, caption="zkx smiling", split="train", group=None, facts=None):
    finding = Finding(name, sha256="a" * 64, width=200, height=300, scores={"sharpness": 0.8}, faces=(Face((50, 60, 130, 160), 0.9),))
    cut = {"file": f"pictures/{name}.png", "framing": "portrait", "box": (10, 20, 190, 290), "captions": [caption], "split": split}
    return row(finding, None, [cut | {"facts": facts or {"framing": "portrait"}}], group)


def aside(name, kind="blurred", reason="sharpness 0.2, at least 0.4", group=None):
    return row(Finding(name, sha256="b" * 64, width=200, height=300), Verdict(kind, reason), (), group)


def report(rows, settings=None, notes=()):
    rows = list(rows)
    facts = [dict.fromkeys(ANSWERS, "unknown") | {"framing": "portrait", EVIL: "x"} for one in rows if one["kind"] == "kept"]
    scores, rest = {"sharpness": np.linspace(0.41, 0.9, len(facts))}, {"sharpness": np.array([0.1, 0.2])}
    features = np.random.default_rng(0).normal(size=(len(facts), 8))
    found = analyse(facts, features, scores, rest, {"sharpness": Limit(0.4, "at least")}, settings or AnalysisSettings())
    classes = Counter(one["kind"] for one in rows)
    split = Counter(cut["split"] for one in rows for cut in one["cuts"])
    return header("a <set>", classes, found, recommend(found, classes, 0, settings or AnalysisSettings()), split, notes)


def picture(name):
    return Image.new("RGB", (96, 96), (200, 30, 30))


@pytest.fixture
def mixed():
    rows = [kept(f"k{number}.png", split="val" if number == 0 else "train", group=1 if number == 3 else None) for number in range(10)]
    rows += [aside("copy.png", "duplicate", "nearly the same as k3.png", group=1)] + [aside(f"b{number}.png") for number in range(5)]
    rows += [row(Finding(EVIL), Verdict("corrupt", EVIL)), kept("evil.png", caption=EVIL)]
    return [*rows, row(Finding("k.txt"), Verdict("sidecar", ""))]


def test_the_page_is_whole_and_needs_nothing_else(tmp_path, mixed):
    page, _ = write(tmp_path, report(mixed, notes=[EVIL]), iter(mixed), picture)
    source = page.read_text(encoding="utf-8")
    found = Page(source)
    assert found.tags["script"] == found.tags["link"] == found.tags["iframe"] == 0
    assert not [item for item in found.attributes if item[1].startswith("on")]
    assert all(value.startswith("data:image/jpeg;base64,") for _, name, value in found.attributes if name == "src")
    assert {value for _, name, value in found.attributes if name == "href" and not value.startswith("#")} == {JSON}
    assert "url(" not in source and "@import" not in source and "\u202e" not in source and "\x07" not in source
    assert found.tags["img"] == 11 + 2 + 1 + 5  # kept, both of the copies, those set aside
    words = " ".join(found.words)
    assert "k3.png" in words and "zkx smiling" in words and "sharpness 0.2, at least 0.4" in words and "1 to validate" in words
    assert words.count('alert("1")') == 4  # note, name, reason, caption: all as text


def test_faces_and_crops_are_drawn_and_pictures_keep_their_aspect(tmp_path):
    rows = [kept("k.png")]
    source = write(tmp_path, report(rows), rows, picture)[0].read_text()
    assert '<rect class="face" x="50.0" y="60.0" width="80.0" height="100.0"/>' in source
    assert '<rect class="cut" x="10.0" y="20.0" width="180.0" height="270.0"/>' in source
    encoded = re.search(r"base64,([A-Za-z0-9+/=]+)", source)[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (160, 240)  # whatever the aspect of what was given


@pytest.mark.parametrize("value", ["<b>", '"', "'", "&", "\u202e", "\x00", "\ud800", "\u2028"])
def test_text(value):
    assert not set("<>\"'\u202e\x00\ud800\u2028") & set(text(value)) and text(value) != value
    assert text("woman 👩‍🚀 é") == "woman 👩‍🚀 é" and len(text("x" * 5000)) == 1201


def test_report_json(tmp_path, mixed):
    write(tmp_path, report(mixed), iter(mixed), picture, gallery=1)
    found = read(tmp_path)
    assert found["version"] == VERSION and found["classes"] == {
        "kept": 11, "sidecar": 1, "duplicate": 1, "blurred": 5, "corrupt": 1,
    }  # fmt: skip
    assert [one["name"] for one in found["pictures"]] == [one["name"] for one in mixed]
    assert found["pictures"][0]["cuts"][0]["box"] == [10, 20, 190, 290] and found["split"] == {"val": 1, "train": 10}
    steps = {step["step"]: step["count"] for step in found["funnel"]}
    assert steps == {
        "files": 18, "are pictures": 17, "are good enough": 12, "are no copies": 11, "show one person": 11, "show the character": 11,
    }  # fmt: skip
    keys = {"version", "title", "classes", "funnel", "split", "recommendations", "notes", "analysis", "pictures"}
    assert set(found) == keys
    assert set(found["pictures"][0]) == {"name", "kind", "reason", "sha256", "width", "height", "scores", "faces", "group", "cuts"}


def test_what_json_has_no_word_for(tmp_path):
    odd = kept("a.png") | {"scores": {"sharpness": float("nan"), "noise": np.float32(2)}, "name": "lone \udc80"}
    write(tmp_path, report([odd]), [odd], picture)
    (one,) = read(tmp_path)["pictures"]
    assert one["scores"] == {"sharpness": None, "noise": 2.0} and one["name"] == "lone \udc80"


def test_the_funnel_ends_with_what_is_kept():
    every = {kind: 1 for kind in CLASSES}
    assert funnel(every)[0]["count"] == len(CLASSES) - 2 and funnel(every)[-1]["count"] == 1


def test_the_page_shows_some_and_says_how_many_more(tmp_path):
    rows = [aside(f"b{number}.png") for number in range(30)] + [kept(f"k{number}.png") for number in range(30)]
    source = write(tmp_path, report(rows), iter(rows), picture, gallery=5)[0].read_text()
    assert Page(source).tags["img"] == 5 + 15
    assert "The first 5 of 30" in source and "The first 15 of 30" in source


def test_memory_does_not_grow_with_the_files(tmp_path):
    def peak(count):
        told = report([aside("b.png"), kept("k.png")])
        tracemalloc.start()
        write(tmp_path, told, (aside(f"b{number}.png", "duplicate", group=number // 2) for number in range(count)), lambda name: None)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10)
    small, large = peak(500), peak(5000)
    assert large < 1.3 * small
    assert len(read(tmp_path)["pictures"]) == 5000


def test_an_unfinished_report_leaves_the_old_one(tmp_path, mixed):
    write(tmp_path, report(mixed), iter(mixed), picture)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks():
        yield mixed[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, report(mixed), breaks(), picture)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and set(before) == {JSON, HTML}


def test_nothing_kept(tmp_path):
    rows = [aside("a.png")]
    told = report(rows)
    Page(write(tmp_path, told, rows, picture)[0].read_text())
    assert "No picture was kept" in told["recommendations"][0]["text"]


def test_the_summary_is_one_screen(tmp_path, mixed):
    console = Console(file=io.StringIO(), width=100)
    told = report(mixed) | {"recommendations": [{"text": f"[red]{number} of 30"} for number in range(9)]}
    summary(console, told, tmp_path / HTML)
    shown = console.file.getvalue()
    assert "11 of 18 files are kept (1 val, 10 train)" in shown and "[red]4 of 30" in shown and "and 4 more" in shown
    assert "blurred" in shown and "sidecar" not in shown and len(shown.splitlines()) <= 24


def test_reports_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / JSON).write_text(json.dumps({"version": 99}))
    with pytest.raises(DataError, match="version 1"):
        read(tmp_path)


def test_select(mixed):
    assert [one["name"] for one in select(mixed, kind="duplicate")] == ["copy.png"]
    assert [one["name"] for one in select(mixed, split="val")] == ["k0.png"]
    assert [one["name"] for one in select(mixed, text="ALERT(2)")] == [EVIL, "evil.png"]
    assert len(list(select(mixed, framing="portrait"))) == 11 and not list(select(mixed, framing="full"))


def test_captions_can_be_changed(tmp_path):
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    from_folder(tmp_path).write(tmp_path / "m.jsonl")
    before = Manifest.read(tmp_path / "m.jsonl")
    set_captions(tmp_path / "m.jsonl", "1.png", ["  zkx\n smiling ", "", "zkx smiling", "zkx"])
    after = Manifest.read(tmp_path / "m.jsonl")
    assert after.records[1].captions == ("zkx smiling", "zkx")
    assert (tmp_path / "1.txt").read_text() == "zkx smiling\nzkx\n", "other trainers read it there"
    assert [after.records[i] for i in (0, 2)] == [before.records[i] for i in (0, 2)]
    with pytest.raises(DataError, match=r"no picture 9\.png"):
        set_captions(tmp_path / "m.jsonl", "9.png", ["x"])
