"""Which pictures are held out: by content, whole groups, strata in proportion, and what tiny sets get."""

import hashlib
import random
from collections import Counter

import pytest

from charforgex.curation.split import Part, SplitSettings, group, rank, sizes, split
from charforgex.errors import ConfigError, DataError


def parts(count, start=0, **more):
    return [Part(hashlib.sha256(str(number).encode()).hexdigest(), **more) for number in range(start, start + count)]


def sides(pictures, **settings):
    return dict(zip([part.sha256 for part in pictures], split(pictures, SplitSettings(**settings)).sides, strict=True))


def test_the_first_validate_and_the_last_are_kept_for_the_end():
    pictures = parts(20)
    ranked = sorted((part.sha256 for part in pictures), key=rank)
    found = sides(pictures, val=0.15, test=4)
    assert {sha for sha, side in found.items() if side == "val"} == set(ranked[:3])
    assert {sha for sha, side in found.items() if side == "test"} == set(ranked[-4:])
    random.Random(0).shuffle(pictures)
    assert sides(pictures, val=0.15, test=4) == found


def test_new_pictures_move_few_and_none_from_val_to_test():
    before, after = sides(parts(100), test=0.1), sides(parts(110), test=0.1)
    moved = [(side, after[sha]) for sha, side in before.items() if after[sha] != side]
    assert len(moved) <= 4 and ("val", "test") not in moved and ("test", "val") not in moved


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [
        (0, {}, (0, 0)), (1, {}, (0, 0)), (2, {"test": 0.1}, (0, 0)), (3, {"test": 0.1}, (1, 0)), (4, {"test": 0.1}, (1, 1)),
        (20, {}, (3, 0)), (20, {"val": 0, "test": 0.1}, (0, 2)), (20, {"val": 1, "test": 5}, (1, 5)), (5, {"val": 3}, (3, 0)),
    ],
)  # fmt: skip
def test_sizes(count, settings, expected):
    assert sizes(count, SplitSettings(**settings)) == expected
    found = Counter(sides(parts(count), **settings).values())
    assert (found["val"], found["test"]) == expected


def test_what_cannot_be_had():
    with pytest.raises(DataError, match=r"split.val=4 of 5 pictures: choose at most 3"):
        split(parts(5), SplitSettings(val=4))
    with pytest.raises(DataError, match=r"split.test=2 of 5 pictures: choose at most 1 beside 2 in val"):
        split(parts(5), SplitSettings(val=2, test=2))
    with pytest.raises(ConfigError, match=r"split.val=2.5"):
        SplitSettings(val=2.5)
    with pytest.raises(ConfigError, match="leave nothing"):
        SplitSettings(val=0.5, test=0.5)


def test_groups_stay_together():
    pictures = [part._replace(group=number // 3) for number, part in enumerate(parts(60))]
    found = split(pictures, SplitSettings(val=0.2, test=0.2))
    assert all(len({found.sides[i] for i in range(first, first + 3)}) == 1 for first in range(0, 60, 3))
    assert Counter(found.sides) == {"train": 36, "val": 12, "test": 12} and found.notes == []


def test_a_group_that_is_too_large_trains_and_is_told():
    found = split([part._replace(group=0) for part in parts(10)], SplitSettings())
    assert found.sides == ["train"] * 10
    assert found.notes == ["0 instead of 2 pictures are in val: groups of nearly the same pictures are not torn apart."]


def test_strata_have_their_part():
    pictures = parts(30, stratum="close-up") + parts(10, 30, stratum="full") + parts(1, 40, stratum="portrait")
    found = split(pictures, SplitSettings(val=8)).sides
    held = Counter(part.stratum for part, side in zip(pictures, found, strict=True) if side == "val")
    assert held["close-up"] == 6 and held["full"] == 2
    ranked = sorted(pictures, key=lambda part: rank(part.sha256))
    plain = sides(pictures, val=8, stratify=False)
    assert {sha for sha, side in plain.items() if side == "val"} == {part.sha256 for part in ranked[:8]}


def test_groups_of_clusters_and_scenes():
    names = ["a.png", "b.png", "v.mp4!/000001.000s", "v.mp4!/000009.500s", "v.mp4!/000030.000s", "w.mp4!/000009.000s", "c.png"]
    assert group(names, [[0, 1], [6, 4]], scene_gap=10) == [0, 0, 2, 2, 4, 5, 4]
    assert group(names, [], scene_gap=0) == list(range(7))
    assert group(names, [[1, 2], [0, 1]], scene_gap=10) == [0, 0, 0, 0, 4, 5, 6]
