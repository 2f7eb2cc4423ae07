"""Masks: the face a soft oval, the figure found, or guessed and said so."""

import random

import numpy as np
import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.curation.items import Face
from charforgex.curation.masks import TRUSTED, agreement, face_mask, masks


def drawn(seed, size=160):
    rng = random.Random(seed)
    identity, context = world.draw_identity(rng, held_out=True), world.draw_context(rng)
    face = Face(tuple(drawing.face_of(identity, context, size)[0]), 1.0)
    truth = drawing.cut_out(identity, context, size)[..., 3] > 127
    return Image.fromarray(drawing.render(identity, context, size)), face, truth


def test_the_figure_is_found_and_doubt_is_said():
    overlaps, guessed = [], 0
    for seed in range(8):
        picture, face, truth = drawn(seed)
        found = masks(picture, face)
        assert found.subject.mode == "L" and found.subject.size == picture.size == found.face.size
        assert found.guessed == (found.quality < TRUSTED)
        overlaps.append(agreement(np.asarray(found.subject) > 127, truth))
        guessed += found.guessed
    assert np.mean(overlaps) > 0.75 and min(overlaps) > 0.5


def test_the_same_picture_has_the_same_mask():
    picture, face, _ = drawn(5)
    first, again = masks(picture, face), masks(picture, face)
    assert np.array_equal(first.subject, again.subject) and first.quality == again.quality


def test_where_nothing_can_be_told_apart_it_is_a_guess():
    found = masks(Image.new("RGB", (120, 120), (90, 120, 150)), Face((50, 30, 70, 54), 1.0))
    assert found.guessed and found.quality < TRUSTED
    guess = np.asarray(found.subject)
    assert guess[42, 60] == 255 and guess[110, 60] == 255 and guess[5, 5] == 0, "head and body, and not the corner"


def test_without_a_face_the_subject_is_what_stands_out():
    pixels = np.full((100, 140, 3), 200, np.uint8)
    pixels[30:70, 50:90] = (180, 30, 40)
    found = masks(Image.fromarray(pixels), None, (46, 26, 94, 74))
    assert found.face is None
    inside = np.asarray(found.subject) > 127
    assert agreement(inside, pixels[..., 1] == 30) > 0.9 or found.guessed
    assert inside[50, 70] and not inside[5, 5]


def test_the_face_is_a_soft_oval_that_leans_as_it_does():
    face = Face((40, 20, 80, 80), 1.0)
    mask = np.asarray(face_mask((120, 100), face)).astype(int)
    assert mask[50, 60] == 255 and mask[2, 2] == 0 and mask[50, 79] == pytest.approx(128, abs=20)
    leaning = np.asarray(face_mask((120, 100), Face(face.box, 1.0, roll=90.0))).astype(int)
    assert leaning[50, 30] == pytest.approx(128, abs=20) and leaning[22, 60] == 0, "as wide as it was high"
