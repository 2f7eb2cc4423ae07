"""Copies of training pictures among others of the same character."""

import math
import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metric import Case
from charforgex.evaluation.metrics.memorisation import Memorisation
from charforgex.evaluation.results import spread
from tests.evaluation.test_memory import CHANGES

TRAINING, HELD_OUT, DRAWN, COPIES = 40, 19, 60, 10


def picture(index):
    return Image.fromarray(drawing.render(held_out_character(7), world.draw_context(random.Random(f"memorisation {index}")), 128))


def gallery(name, pictures):
    return Gallery(name, [Shot(one, f"{name} {i}") for i, one in enumerate(pictures)])


@pytest.fixture(scope="module")
def case():
    return Case(
        gallery("references", [picture(1000 + i) for i in range(HELD_OUT)]),
        gallery("training", [picture(i) for i in range(TRAINING)]),
    )


def test_planted_copies_are_found_and_named(case):
    """Every sixth picture is a copy, changed in one of five ways."""
    changes = list(CHANGES.values())
    pictures = [
        changes[i % len(changes)](picture(i // 6)) if i % 6 == 0 else picture(2000 + i) for i in range(DRAWN)
    ]  # fmt: skip
    value = Memorisation(false_alarms=0.05)(gallery("drawn", pictures), case)
    planted = np.arange(DRAWN) % 6 == 0
    assert value.rows[planted].sum() == COPIES
    assert value.rows[~planted].sum() <= 5, "1 in 20 is promised at most"
    assert value.estimate == value.rows.mean() and value.low < value.estimate < value.high
    assert value.parts["limit"] > 8 and value.parts["false_alarms"] == 3 / 60
    assert "59 different real pictures promise false alarms of 5.0% at most" in value.notes[0]
    assert len(value.notes) == 6 and " is training picture " in value.notes[1]


def test_training_pictures_are_copies_and_held_out_ones_are_not(case):
    metric = Memorisation(false_alarms=0.05)
    assert metric(case.training, case).estimate == 1
    assert metric(case.references, case).rows.sum() <= 2, "of the 59 that the limit is learnt from, two are below it"


def test_the_training_picture_is_told_of_each_shot(case, tmp_path):
    shots = []
    for i, shot in enumerate(case.training.shots):
        shot.picture.save(tmp_path / f"{i}.png")
        shots.append(Shot(tmp_path / f"{i}.png"))
    filed = Case(case.references, Gallery("training", shots))
    value = Memorisation(false_alarms=0.05)(gallery("drawn", [picture(7), ImageOps.mirror(picture(9))]), filed)
    assert value.nearest == (tmp_path / "7.png", tmp_path / "9.png")
    whole = spread(value, [2, 0], 3)
    assert whole.nearest == (tmp_path / "9.png", None, tmp_path / "7.png") and whole.rows[[0, 2]].tolist() == [1, 1]


def test_a_rate_that_needs_more_pictures_is_told(case):
    value = Memorisation(false_alarms=0.001)(gallery("drawn", [ImageOps.mirror(picture(3)), picture(5000)]), case)
    assert value.rows.tolist() == [1, 0] and value.parts["false_alarms"] > 1 / 70
    assert "for 0.1% there must be 999" in value.notes[0] and "mirrored" in value.notes[1]


def test_what_it_cannot_do_without(case):
    with pytest.raises(DataError, match="there are no training pictures"):
        Memorisation()(case.references, Case(case.references))
    with pytest.raises(DataError, match="there are no pictures"):
        Memorisation()(gallery("drawn", []), case)
    few = Case(gallery("references", []), gallery("training", [picture(i) for i in range(3)]))
    with pytest.raises(DataError, match="3 training and reference pictures are too few"):
        Memorisation()(case.references, few)
    alone = Memorisation(false_alarms=0.05)(gallery("drawn", [picture(3)]), case)
    assert alone.estimate == 1 and math.isnan(alone.low)
