"""Where one shot goes over into another is found; what moves, gets darker or is cut is none of it."""

import random
from fractions import Fraction

import numpy as np
import pytest

from charforgex.charworld import moving
from charforgex.charworld.crowds import Cast
from charforgex.curation.clips.dissolves import Dissolves

RATE, COUNT = 12, 30


@pytest.fixture(scope="module")
def films():
    """Scenes that move by up to a twelfth of their side in a second, as functions of the frame's number."""
    cast = Cast(6, 1)
    scenes = [moving.scene(random.Random(f"dissolve {number}"), cast, 64) for number in range(6)]
    return [lambda index, scene=scene: scene.frame(0.5 * index / RATE).astype(np.float32) for scene in scenes]


def found(pictures, cut_at=None):
    dissolves = Dissolves()
    for index, pixels in enumerate(pictures):
        if index == cut_at:
            dissolves.cut()
        dissolves.look(np.asarray(pixels).round().astype(np.uint8), Fraction(index, RATE))
    return dissolves.found


def share(index, first=8, count=12):
    return min(1.0, max(0.0, (index - first) / count))


def over(one, other):
    return [(1 - share(index)) * one(index) + share(index) * other(index) for index in range(COUNT)]


def test_a_dissolve_is_found_where_it_is(films):
    pairs = [(films[place], films[place - 1]) for place in range(6)]
    seen = [found(over(*pair)) for pair in pairs]
    assert sum(map(bool, seen)) >= 5
    for ((start, end),) in filter(None, seen):
        assert 0.6 <= start <= 1.2 <= end <= 1.75, "it is from 0.67 to 1.67 seconds"


def test_fades_to_and_from_one_colour(films):
    for colour in (0.0, 255.0):
        flat = np.full((64, 64, 3), colour, np.float32)
        for pair in ((films[0], lambda index, flat=flat: flat), (lambda index, flat=flat: flat, films[1])):
            ((start, end),) = found(over(*pair))
            assert 0.6 <= start < 0.9 and 1.3 < end <= 1.75


def test_what_moves_is_cut_or_gets_darker_is_no_dissolve(films):
    for film in films:
        still = film(0)
        shifted = [np.roll(still, (index, 3 * index), (0, 1)) for index in range(COUNT)]
        darker = [film(index) * (1 - 0.7 * share(index)) for index in range(COUNT)]
        for pictures in ([film(3 * index) for index in range(COUNT)], shifted, darker):
            assert found(pictures) == []
    cut = [films[0](index) if index < 14 else films[1](index) for index in range(COUNT)]
    assert found(cut) == found(cut, cut_at=14) == []


def test_dissolves_of_two_shots_are_two(films):
    pictures = over(films[0], films[1])
    dissolves = Dissolves()
    for shot in range(2):
        dissolves.cut()
        for index, pixels in enumerate(pictures):
            dissolves.look(pixels.round().astype(np.uint8), Fraction(shot * COUNT + index, RATE))
    (one, two) = dissolves.found
    assert two == pytest.approx((one[0] + COUNT / RATE, one[1] + COUNT / RATE))
