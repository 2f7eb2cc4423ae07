"""Measures of clips, on clips whose motion, noise and background are known."""

import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from charforgex.charworld import drawing, world
from charforgex.embedders import CharworldEmbedder
from charforgex.errors import DataError
from charforgex.evaluation import motion

FRAMES, SIDE, FPS = 6, 64, 8
TEXTURE = sum(
    cv2.resize(np.random.default_rng(7).random((cells, cells, 3), np.float32), (160, 160), interpolation=cv2.INTER_CUBIC) * weight
    for cells, weight in ((6, 120), (24, 60), (60, 40))
)
TEXTURE = np.clip(TEXTURE, 0, 255).astype(np.uint8)


def sliding(x, y=0, side=SIDE):
    """A picture that goes by, so many pixels a frame to the left and up."""
    return np.stack([TEXTURE[40 + y * t : 40 + y * t + side, 40 + x * t : 40 + x * t + side] for t in range(FRAMES)])


@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, -3), (3, 4)])
def test_a_clip_that_slides_has_the_strength_and_direction_of_its_slide(x, y):
    clip = sliding(x, y)
    flow = motion.flow_of(clip)
    assert motion.strength(clip, FPS, flow) == pytest.approx(np.hypot(x, y) / SIDE * FPS, rel=0.02)
    assert np.median(flow.there, (0, 1, 2)) == pytest.approx([-x, -y], abs=0.05)
    assert np.median(flow.back, (0, 1, 2)) == pytest.approx([x, y], abs=0.05)
    assert motion.flicker(clip, flow) < 0.002
    assert motion.background(clip, np.zeros(clip.shape[:3], bool), flow) < 0.001


def test_strength_is_in_sides_whatever_the_size():
    assert motion.strength(sliding(2, side=32), FPS) == pytest.approx(2 / 32 * FPS, rel=0.02)
    wide = sliding(2, side=96)[:, :48]
    assert motion.strength(wide, FPS) == pytest.approx(2 / np.sqrt(96 * 48) * FPS, rel=0.02)


def test_a_still_clip_neither_moves_nor_flickers_and_noise_flickers_by_what_it_is():
    still = np.repeat(TEXTURE[None, :SIDE, :SIDE], FRAMES, 0)
    assert motion.strength(still, FPS) == motion.flicker(still) == motion.background(still, np.zeros(still.shape[:3], bool)) == 0
    for deviation in (2, 5):
        noise = np.random.default_rng(1).normal(0, deviation, still.shape)
        found = motion.flicker(np.clip(still + noise, 0, 255).round().astype(np.uint8))
        assert 0.85 * np.sqrt(2) * deviation / 255 < found < 1.01 * np.sqrt(2) * deviation / 255


def test_light_that_changes_is_flicker_and_what_is_covered_is_none():
    still = np.repeat(TEXTURE[None, :SIDE, :SIDE] // 2, FRAMES, 0)
    lit = still + np.uint8(10) * (np.arange(FRAMES, dtype=np.uint8) % 2)[:, None, None, None]
    assert motion.flicker(lit) == pytest.approx(10 / 255, rel=0.1)
    covered = np.repeat(TEXTURE[None, :SIDE, :SIDE], FRAMES, 0)
    for t, frame in enumerate(covered):
        frame[16:48, 6 * t : 6 * t + 24] = TEXTURE[100:132, 100:124]  # a card that covers and uncovers 6 pixels a frame
    bare = np.sqrt(np.mean([np.square((a - b) / 255).mean() for a, b in zip(covered[1:] * 1.0, covered[:-1] * 1.0, strict=True)]))
    assert motion.flicker(covered) < 0.4 * bare


def test_what_is_behind_is_told_from_the_camera_and_from_who_stands_before_it():
    clip = sliding(2, 1)
    subject = np.zeros(clip.shape[:3], bool)
    subject[:, 16:48, 16:48] = True
    clip[subject] = np.random.default_rng(2).integers(0, 255, (subject.sum(), 3))  # the character may do what it likes
    assert motion.background(clip, subject) < 0.002
    changed = clip.copy()
    changed[::2, :16] = np.clip(changed[::2, :16].astype(int) + 30, 0, 255)  # a quarter of the picture, of which 1/3 of what is behind
    assert 0.02 < motion.background(changed, subject) < 30 / 255
    assert np.isnan(motion.background(clip, np.ones_like(subject))), "nothing is behind"


def test_motion_is_like_itself_later_and_elsewise_coloured_and_unlike_its_reverse():
    there, aside = motion.history(sliding(2)), motion.history(sliding(0, 2))
    assert there.shape == (FRAMES - 1, 8, 8, 2) and there.mean((0, 1, 2)) == pytest.approx([-2 / SIDE, 0], abs=1e-3)
    other = motion.history(np.ascontiguousarray(255 - sliding(2)[..., ::-1]))
    assert motion.alike(there, [other]) > 0.99
    assert motion.alike(there, [aside]) == pytest.approx(0, abs=0.05)
    assert motion.alike(there, [motion.history(sliding(-2))]) < -0.95
    assert motion.alike(there, [aside, other]) == motion.alike(there, [other]), "the nearest counts"
    steps = np.zeros((8, 8, 8, 2), np.float32)
    steps[2, 4, 4], steps[5, 4, 4] = (1, 0), (-1, 0)
    assert motion.alike(steps, [np.roll(steps, 1, 0)]) == pytest.approx(1), "a quarter of the clip later"
    assert motion.alike(np.zeros_like(steps), [steps]) == 0


def test_identity_drifts_as_far_as_the_embedder_sees():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    assert motion.drift(clip, lambda pictures: vectors) == pytest.approx(1 - (0.5 + 0.5) / 2)
    assert motion.drift(clip, lambda pictures: vectors[[0, 0, 0]]) == 0
    rng, judge = random.Random(3), CharworldEmbedder()
    people, shown = [world.draw_identity(rng) for _ in range(4)], replace(world.draw_context(rng), yaw=0.0)
    talking = np.stack([drawing.render(people[0], replace(shown, talk=talk)) for talk in (0, 0.5, 1, 0.4)])
    changing = np.stack([drawing.render(who, shown) for who in people])
    assert 0 < motion.drift(talking, judge) < 0.4 < motion.drift(changing, judge)


@pytest.mark.parametrize(
    ("clip", "words"),
    [(np.zeros((1, 8, 8, 3), np.uint8), "1 frames does not move"), (np.zeros((4, 8, 8, 3), np.float32), "float32"),
     (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\)")],
)  # fmt: skip
def test_what_is_no_clip_is_refused(clip, words):
    with pytest.raises(DataError, match=words):
        motion.flow_of(clip)
    with pytest.raises(DataError, match="no reference"):
        motion.alike(np.zeros((1, 8, 8, 2)), [])
    with pytest.raises(DataError, match="mask"):
        motion.background(sliding(1), np.zeros((1, SIDE, SIDE), bool))


def test_the_page_has_the_table_of_cards():
    page = (Path(__file__).parents[2] / "docs/motion.md").read_text(encoding="utf-8")
    assert page.split("<!-- measures -->\n")[1].split("<!-- /measures -->")[0] == motion.table()
