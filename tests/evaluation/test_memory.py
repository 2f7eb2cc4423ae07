"""Copies of training pictures: found through what is done to them, and told from look-alikes at a rate that holds."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.curation.fingerprints import thumbnail
from charforgex.errors import DataError
from charforgex.evaluation.memory import FEWEST, SAME, Originals, copy_limit, nearest

CHANGES = {
    "recompressed": lambda picture: saved(picture, 40),
    "mirrored": lambda picture: saved(ImageOps.mirror(picture), 80),
    "cropped": lambda picture: picture.crop((5, 2, 122, 125)).resize((128, 128), Image.Resampling.LANCZOS),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "all of it": lambda picture: ImageEnhance.Brightness(saved(ImageOps.mirror(picture.crop((4, 4, 125, 124))), 60)).enhance(0.85),
}


def saved(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def drawn(index):
    return Image.fromarray(drawing.render(held_out_character(3), world.draw_context(random.Random(f"memory {index}")), 128))


def features(count, key=0):
    found = np.random.default_rng(key).normal(size=(count, 8))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def originals():
    return Originals([thumbnail(drawn(i)) for i in range(24)], features(24))


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_whatever_was_done_to_it(originals, change):
    """By its hash alone: the vectors here are of nothing."""
    for index in (2, 11):
        match = originals.find(thumbnail(CHANGES[change](drawn(index))), features(1, 1)[0])
        assert match.index == index and match.difference < 12
        assert match.mirrored == (change in ("mirrored", "all of it"))


def test_other_pictures_of_the_character_are_farther(originals):
    found = [originals.find(thumbnail(drawn(100 + i)), features(1, i)[0]).difference for i in range(8)]
    assert min(found) > 15


def test_it_is_not_compared_with_itself(originals):
    alone = originals.differences()
    assert len(alone) == 24 and np.isfinite(alone).all() and min(alone) > SAME
    match = originals.find(thumbnail(drawn(5)), features(24)[5], but=5)
    assert match.index != 5 and match.difference in alone.tolist()
    with pytest.raises(DataError, match="no other"):
        Originals([thumbnail(drawn(0))], features(1)).find(thumbnail(drawn(0)), features(1)[0], but=0)


def test_the_order_of_training_pictures_changes_nothing(originals):
    turned = Originals([thumbnail(drawn(i)) for i in reversed(range(24))], features(24)[::-1])
    for index, own in ((200, None), (5, 5)):
        asked = thumbnail(drawn(index)), features(24)[5]
        one, other = originals.find(*asked, but=own), turned.find(*asked, but=None if own is None else 23 - own)
        assert (one.difference, one.index, one.mirrored) == (other.difference, 23 - other.index, other.mirrored)


def test_the_limit_is_a_conformal_quantile_by_hand():
    differences = np.concatenate([np.arange(20.0, 119.0), [3.0]])  # 99 different pictures, and one twice
    assert copy_limit(differences, 0.05) == (24.0, 0.05, 99, 1)  # 5 of 100 places are below 24
    assert copy_limit(differences, 0.001) == (20.0, 0.01, 99, 1), "99 pictures promise 1 % at best"


def test_the_limit_holds_what_it_promises():
    """A new picture of the same distribution, over many limits learnt from 39 pictures: 1 in 20 is a false alarm."""
    rng = np.random.default_rng(0)
    alarms = [rng.lognormal(4, 0.3) < copy_limit(rng.lognormal(4, 0.3, 39), 0.05).difference for _ in range(4000)]
    assert np.mean(alarms) == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / 4000) ** 0.5)


def test_too_few_pictures_tell_nothing():
    with pytest.raises(DataError, match=f"8 training and reference pictures are too few .* at least {FEWEST}"):
        copy_limit(np.array([30.0] * 8 + [1.0] * 5), 0.05)
    with pytest.raises(DataError, match="no training pictures"):
        Originals([], np.zeros((0, 8)))


def test_nearest_finds_the_training_picture():
    def unit(*angles):
        return torch.tensor([[np.cos(angle), np.sin(angle)] for angle in angles])

    values, indices = nearest(unit(0.1, 3.0), unit(0.0, 3.1))
    assert indices.tolist() == [0, 1]
    assert values.tolist() == pytest.approx([0.99500, 0.99500], abs=1e-4)
