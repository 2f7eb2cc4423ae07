"""The voting page: blind, even, the same every time; and a whole vote by keyboard in a browser, saved and analysed."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from charforgex.config import bind
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.ballots import read_ballots, read_key
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.votes import analyse
from charforgex.evaluation.voting import write_page
from tests.evaluation import browser

NAMES = ("cunning_plan", "other_plan", "third_plan")


def drawn(folder, name, prompts=8, seeds=2, colour=0):
    """A contestant's pictures, files that say in every way whose they are."""
    shots = []
    for prompt in range(prompts):
        for seed in range(seeds):
            told = PngInfo()
            told.add_text("parameters", name)
            path = folder / name / f"{name}-{prompt}-{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((48, 40, 3), (colour, 20 * prompt, 100 * seed), np.uint8)
            Image.fromarray(pixels).save(path, pnginfo=told)
            shots.append(Shot(path, f"prompt {prompt}", "sheet", seed))
    return Gallery(name, shots)


@pytest.fixture
def galleries(tmp_path):
    return [drawn(tmp_path / "pictures", name, colour=80 * i) for i, name in enumerate(NAMES)]


def study_of(page: Path):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', page.read_text(), re.S)[1])


def test_the_page_does_not_tell_who_is_who(tmp_path, galleries):
    page = write_page(galleries, galleries[0], tmp_path / "out")
    text = page.read_text()
    study = study_of(page)
    decoded = b"".join(base64.b64decode(source.partition(",")[2]) for source in study["pictures"].values())
    for name in NAMES:
        assert name not in text and name.encode() not in decoded
    assert "http:" not in text and "https:" not in text and "src=" not in text  # nothing is loaded
    assert set(study) == {"id", "question", "pairs", "references", "pictures"}
    assert set(study["pairs"][0]) == {"id", "prompt", "left", "right"}
    # ids are numbers of appearance: the order in which things are shown, and nothing else
    assert [pair["id"] for pair in study["pairs"]] == [f"p{i + 1:03}" for i in range(len(study["pairs"]))]
    seen = dict.fromkeys(picture for pair in study["pairs"] for picture in (pair["left"], pair["right"]))
    assert list(seen) == [f"i{i + 1:03}" for i in range(len(seen))]
    assert len(study["references"]) == 6


def test_pairs_are_even_and_repeated_ones_come_swapped_and_late(tmp_path, galleries):
    write_page(galleries, None, tmp_path, pairs=30, repeats=0.2, seed=3)
    key = read_key(tmp_path)
    firsts = [pair for pair in key.pairs if pair.repeats is None]
    assert len(firsts) == 30 and len(key.pairs) == 36 and key.contestants == sorted(NAMES)
    places = {pair.id: i for i, pair in enumerate(key.pairs)}
    for i, pair in enumerate(key.pairs):
        if pair.repeats:
            earlier = key.pairs[places[pair.repeats]]
            assert (pair.left, pair.right) == (earlier.right, earlier.left) and (pair.prompt, pair.seed) == (earlier.prompt, earlier.seed)
            assert i - places[pair.repeats] > 6
    for start in range(0, 30, 3):  # whoever stops early has seen as much of each two
        assert len({frozenset((pair.left, pair.right)) for pair in firsts[start : start + 3]}) == 3
    for a, b in {(pair.left, pair.right) for pair in firsts}:
        both = [pair for pair in firsts if {pair.left, pair.right} == {a, b}]
        assert len(both) == 10 and sum(pair.left == a for pair in both) == 5
        assert len({pair.prompt for pair in both[:8]}) == 8  # each prompt before any comes again
    assert len({(pair.prompt, pair.seed, frozenset((pair.left, pair.right))) for pair in firsts}) == 30


def test_the_same_seed_makes_the_same_page_and_another_one_another(tmp_path, galleries):
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    write_page(galleries, None, first)
    write_page(list(reversed(galleries)), None, second)
    write_page(galleries, None, third, seed=1)
    assert (first / "vote.html").read_bytes() == (second / "vote.html").read_bytes()
    assert (first / "vote_key.json").read_bytes() == (second / "vote_key.json").read_bytes()
    assert read_key(first).study != read_key(third).study
    sides = [[pair.left for pair in read_key(folder).pairs] for folder in (first, third)]
    assert sides[0] != sides[1]
    old = read_key(first)
    write_page(galleries, None, first, seed=2)  # votes on the page of before can still be counted
    (first / f"vote_key_{old.study}.json").rename(first / "vote_key.json")
    assert read_key(first) == old


def test_pictures_beside_the_page_have_names_that_tell_nothing(tmp_path, galleries):
    (tmp_path / "vote_pictures").mkdir()
    (tmp_path / "vote_pictures/i999.jpg").write_bytes(b"of an earlier page")
    page = write_page(galleries[:2], None, tmp_path, embed=False, pairs=4, repeats=0, side=64)
    files = sorted(path.name for path in (tmp_path / "vote_pictures").iterdir())
    assert files == [f"i{i + 1:03}.jpg" for i in range(8)]
    assert study_of(page)["pictures"]["i001"] == "vote_pictures/i001.jpg"
    assert Image.open(tmp_path / "vote_pictures/i001.jpg").size == (40, 48)
    write_page(galleries[:2], None, tmp_path, pairs=4)
    assert not list((tmp_path / "vote_pictures").iterdir())


def test_large_pictures_are_reduced_and_comments_left_out(tmp_path):
    comment = Image.new("RGB", (300, 200))
    comment.info["comment"] = b"whose it is"
    galleries = [Gallery(name, [Shot(comment.copy(), "p", seed=0)]) for name in "ab"]
    for gallery in galleries:
        gallery.shots[0].picture.info["comment"] = b"whose it is"
    write_page(galleries, None, tmp_path, embed=False, side=150)
    data = (tmp_path / "vote_pictures/i001.jpg").read_bytes()
    assert b"whose" not in data and Image.open(tmp_path / "vote_pictures/i001.jpg").size == (150, 100)


def test_what_cannot_be_compared_is_told(tmp_path, galleries):
    with pytest.raises(DataError, match="two contestants or more"):
        write_page(galleries[:1], None, tmp_path)
    with pytest.raises(DataError, match="names of their own"):
        write_page([galleries[0], galleries[0]], None, tmp_path)
    strange = Gallery("strange", [Shot(shot.picture, shot.prompt, seed=7) for shot in galleries[0].shots])
    with pytest.raises(DataError, match="no picture of the same prompt and seed"):
        write_page([galleries[0], strange], None, tmp_path)
    galleries[1].shots[0].picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"other_plan-0-0\.png cannot be read"):
        write_page(galleries[:2], None, tmp_path)
    assert not (tmp_path / "vote.html").exists()


def test_its_signature_is_the_schema_of_its_settings(tmp_path, galleries):
    given = {"galleries": galleries, "references": None, "out": tmp_path}
    bind(write_page, {"pairs": 3, "question": "Who?", "raters": 5, "margin": 0.05}, "vote", **given)
    key = read_key(tmp_path)
    assert (key.question, key.raters, key.margin, len(key.pairs)) == ("Who?", 5, 0.05, 3)
    with pytest.raises(ConfigError, match=r"vote\.pairs=0 is out of range"):
        bind(write_page, {"pairs": 0}, "vote", **given)


# ---- in a browser ----

needs_browser = pytest.mark.skipif(browser.found() is None, reason="no Chromium or Chrome is installed here: apt-get install chromium")
READY = "!document.getElementById('tie').disabled || !document.getElementById('end').hidden"


@needs_browser
@pytest.mark.parametrize("embed", [True, False])
def test_a_vote_by_keyboard_is_saved_and_analysed(tmp_path, galleries, embed):
    """Name, votes, undo, a reload in between, a tie, the file; all texts are hostile, and nothing is complained of."""
    evil = "</script><script>document.title = 'evil'</script><b>\u202e"
    two = [
        Gallery(gallery.name, [Shot(shot.picture, f"{evil} {shot.prompt}", seed=shot.seed) for shot in gallery.shots])
        for gallery in galleries[:2]
    ]
    page = write_page(two, galleries[2], tmp_path / "out", question=f"Which {evil}?", repeats=0.25, raters=1, embed=embed)
    key = read_key(tmp_path / "out")
    count = len(key.pairs)
    assert count == 20
    with browser.opened(page.as_uri(), tmp_path / "browser") as tab:
        tab.type('anna "the" 1st')
        tab.press("Enter")
        tab.wait(READY)
        assert tab.run("document.getElementById('left-picture').naturalWidth") == 40
        assert tab.run("document.querySelectorAll('#references img').length") == 6
        wrong = {"other_plan": "cunning_plan", "cunning_plan": "other_plan"}
        voted = 0

        def vote(winner):
            nonlocal voted
            pair = key.pairs[voted]
            tab.press(("ArrowLeft" if voted % 2 else "1") if pair.left == winner else ("ArrowRight" if voted % 2 else "2"))
            voted += 1
            tab.wait(READY)

        vote(wrong["other_plan"])
        assert tab.run("document.getElementById('place').textContent") == f"Pair 2 of {count}"
        tab.press("Backspace")
        voted -= 1
        tab.wait(READY)
        assert tab.run("document.getElementById('place').textContent") == f"Pair 1 of {count}"
        for _ in range(5):
            vote("other_plan")
        tab.go("about:blank")
        tab.go(page.as_uri())
        assert "5 of 20 votes of this name" in tab.run("document.getElementById('known').textContent")
        tab.press("Enter")
        tab.wait(READY)
        assert tab.run("document.getElementById('place').textContent") == f"Pair 6 of {count}"
        tab.press(" ")  # a tie
        tied = key.pairs[voted].id
        voted += 1
        tab.wait(READY)
        while voted < count:
            vote("other_plan")
        assert tab.run("document.title").startswith("Which </script>")
        tab.run("document.getElementById('save').click()")
        saved = tab.downloaded()
        assert saved.name == "votes-anna-the-1st.json"
        assert json.loads(saved.read_text())["votes"] == json.loads(tab.run("document.getElementById('json').value"))["votes"]
        assert tab.complaints() == []
    (ballot,) = read_ballots([saved], key)
    assert ballot.rater == 'anna "the" 1st' and [vote.choice for vote in ballot.votes if vote.pair == tied] == ["tie"]
    found = analyse(key, [ballot])
    (row,) = found["pairs"]
    assert row["better"] == "other_plan" and (row["a_votes"], row["tied"], row["b_votes"]) == (0, 1, 15)
    (rater,) = found["raters"]
    assert rater["again"]["of"] == 4 and rater["again"]["same"] >= 3 and rater["votes"] == 20


@needs_browser
def test_the_page_is_for_mouse_touch_and_screen_reader_too(tmp_path, galleries):
    page = write_page(galleries[:2], galleries[2], tmp_path / "out")
    with browser.opened(page.as_uri(), tmp_path / "browser") as tab:
        tab.type("ben")
        tab.press("Enter")
        tab.wait(READY)
        tab.run("document.getElementById('right').click()")
        tab.wait(f"{READY} && document.getElementById('place').textContent.startsWith('Pair 2')")
        assert tab.run("document.activeElement.id") == "question"  # space is "no difference" again
        tab.press(" ")
        tab.wait(f"{READY} && document.getElementById('place').textContent.startsWith('Pair 3')")
        kept = json.loads(tab.run("Object.entries(localStorage).find(([key]) => key.endsWith('/ben'))[1]"))
        assert [vote["choice"] for vote in kept] == ["right", "tie"]
        named = (
            "[...document.querySelectorAll('#vote button, #vote img')].every(one => (one.ariaLabel || one.alt || one.textContent).trim())"
        )
        assert tab.run(named) is True
        for width, height in ((390, 844), (1280, 720), (320, 568)):
            tab.looks(width, height)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
            sizes = tab.run("['left', 'right', 'tie'].map(id => document.getElementById(id).getBoundingClientRect().height)")
            assert min(sizes) >= 44
