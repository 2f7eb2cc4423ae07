import random

import pytest

from charforgex.curation.manifest import Record
from charforgex.data.captions import has_trigger, shuffled, tag_frequency, variants, with_trigger
from charforgex.errors import ConfigError, DataError


def record(*captions, path="a.png"):
    return Record(path, "0" * 64, 8, 8, captions)


def captions(records, trigger="zkx", add=False, default=None):
    return [r.captions for r in with_trigger(records, trigger, add, ",", default)]


@pytest.mark.parametrize(
    ("caption", "there"),
    [("zkx", True), ("a photo of zkx.", True), ("(zkx:1.2)", True), ("zkxy", False), ("xzkx", False), ("Zkx", False), ("", False)],
)
def test_the_trigger_is_a_word(caption, there):
    assert has_trigger(caption, "zkx") is there


def test_triggers_with_signs_are_taken_literally():
    assert has_trigger("a <z.k>, b", "<z.k>") and not has_trigger("a <zzk>, b", "<z.k>")


def test_placeholder_default_and_adding():
    assert captions([record("a {trigger} b", "zkx c")]) == [("a zkx b", "zkx c")]
    assert captions([record()], default="photo of {trigger}") == [("photo of zkx",)]
    assert captions([record("a hat", "zkx")], add=True) == [("zkx, a hat", "zkx")]
    assert captions([record("a")], trigger=None) == [("a",)]
    assert captions([record("a {trigger}", "a zkx")]) == [("a zkx",)]


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match=r"2 of 3 pictures have no caption: b\.png, c\.png.*\.txt.*default_caption"):
        captions([record("zkx"), record(path="b.png"), record(path="c.png")])
    with pytest.raises(DataError, match=r'"zkx" is absent from 1 captions: a\.png \("a hat"\).*add_trigger=true'):
        captions([record("zkx, b", "a hat")])
    with pytest.raises(ConfigError, match="add_trigger"):
        captions([record("a")], trigger=None, add=True)
    with pytest.raises(ConfigError, match=r"data\.trigger is not set"):
        captions([record("a {trigger}")], trigger=None)


def test_shuffling_keeps_the_first_tags_and_loses_none():
    rng = random.Random(1)
    seen = {shuffled("zkx, a, b,c , d", ",", 2, rng) for _ in range(200)}
    assert seen == {f"zkx, a, {x}, {y}, {z}" for x in "bcd" for y in "bcd" for z in "bcd" if len({x, y, z}) == 3}


def test_variants_depend_on_the_caption_and_seed_alone():
    first = variants("zkx, a, b, c, d", 4, ",", 1, seed=5)
    assert first[0] == "zkx, a, b, c, d" and len(set(first)) == 4
    assert variants("zkx, a, b, c, d", 4, ",", 1, seed=5) == first
    assert variants("zkx, a, b, c, d", 2, ",", 1, seed=5) == first[:2]
    assert variants("zkx, a, b, c, d", 4, ",", 1, seed=6) != first
    assert variants("one sentence", 4, ",", 0, seed=5) == ["one sentence"]


def test_tag_frequency_counts_pictures():
    records = [record("zkx, hat", "zkx, hat, sea"), record("zkx,sea"), record("zkx")]
    assert tag_frequency(records, ",") == {"zkx": 3, "sea": 2, "hat": 1}
