"""Galleries: opened a few at a time, seen once, and which of their shots belong together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from tests.evaluation.scenes import gallery


def shot(prompt="", seed=None, **more):
    return Shot(Image.new("RGB", (8, 8)), prompt, seed=seed, **more)


def mean_colours(pictures):
    colours = torch.tensor(np.stack([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures]))
    return colours / colours.norm(dim=1, keepdim=True)


def test_the_same_pictures_are_known_again(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    files = Gallery("files", [Shot(tmp_path / "a.png"), Shot(tmp_path / "b.png", key="k")])
    other = Gallery("other", [shot(), Shot(tmp_path / "a.png", "again", key="a"), shot(key="k")])
    assert files.same(other).tolist() == [[False, True, False], [False, False, True]]
    assert other.same(other).tolist() == np.eye(3, dtype=bool).tolist()


def test_partners_have_the_same_prompt_and_seed():
    mine = Gallery("mine", [shot("a", 1), shot("b", 1), shot("a", 2), shot("a", 1)])
    base = Gallery("base", [shot("a", 2), shot("a", 1), shot("c", 1), shot("a", 1)])
    assert mine.partners(base).tolist() == [1, -1, 0, 3]


def test_people_have_their_pictures():
    shots = [shot(people=("mivo",)), shot(), shot(people=("tesa", "mivo")), shot()]
    found = {name: places.tolist() for name, places in Gallery("some", shots).persons.items()}
    assert found == {"mivo": [0, 2], "some 1": [1], "tesa": [2], "some 3": [3]}


def test_groups_are_prompts_whatever_their_order():
    one = Gallery("one", [shot("b"), shot("a"), shot("b"), shot()])
    groups = one.groups
    assert groups[0] == groups[2] and len(set(groups.tolist())) == 3
    assert Gallery("turned", one.shots[::-1]).groups.tolist() == groups.tolist()[::-1]


def test_vectors_are_made_once_and_lie_in_the_cache(tmp_path):
    seen = []

    def see(pictures):
        seen.append(len(pictures))
        return mean_colours(pictures)

    one = gallery(1, 40)
    kept = Gallery("kept", one.shots, tmp_path)
    first = kept.vectors("colours", see)
    assert seen == [32, 8] and isinstance(first, np.memmap)
    again = Gallery("another", one.shots, tmp_path).vectors("colours", see)
    assert seen == [32, 8] and np.array_equal(first, again)
    assert np.array_equal(Gallery("nowhere", one.shots).vectors("colours", see), first)
    Gallery("another", one.shots, tmp_path).vectors("other eyes", see)
    assert len(seen) == 6


@pytest.mark.parametrize("wrong", [0.0, 1.5, float("nan")])
def test_vectors_that_are_no_unit_vectors_are_refused(wrong, tmp_path):
    def see(pictures):
        found = mean_colours(pictures)
        found[1] *= wrong
        return found

    for cache in (None, tmp_path):
        with pytest.raises(DataError, match="colours makes a vector of length"):
            Gallery("one", gallery(1, 3).shots, cache).vectors("colours@content", see)
    assert not list(tmp_path.glob("*.npy"))


def test_pictures_may_lack_what_is_looked_for():
    def see(pictures):
        found = mean_colours(pictures)
        found[1] = torch.nan
        return found

    assert np.isnan(gallery(1, 3).vectors("faces", see, partial=True)).any(1).tolist() == [False, True, False]
    with pytest.raises(DataError):
        Gallery("again", gallery(1, 3).shots).vectors("faces", see)


def test_only_some_packs():
    one = Gallery("one", [*gallery(1, 2, pack="a").shots, *gallery(1, 2, pack="b").shots, *gallery(1, 2, pack="c").shots])
    assert [shot.pack for shot in one.only("c", "a").shots] == ["a", "a", "c", "c"]


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"nothing")
    broken = Gallery("broken", [replace(shot(), picture=tmp_path / "x.jpg")])
    with pytest.raises(DataError, match=r"x\.jpg cannot be read as a picture"):
        list(broken.batches())
