"""Faces: boxes where they are, poses as the head is turned, settings that make sense."""

import math
import random

import cv2
import numpy as np
import pytest
import torch

from charforgex.charworld import crowds, drawing, world
from charforgex.curation import faces
from charforgex.curation.faces import (
    MEAN_FACE,
    CharworldDetector,
    Chosen,
    DrawnOrPhotographed,
    FaceSettings,
    HaarDetector,
    get_detector,
    head_pose,
)
from charforgex.curation.items import Face
from charforgex.errors import ConfigError
from charforgex.training.detecting import match

ASTRONAUT = Face((177, 66, 272, 161), 1.0)  # the face in scikit-image's photograph


@pytest.fixture(scope="module")
def ours():
    return CharworldDetector()


@pytest.fixture(scope="module")
def haar():
    return HaarDetector()


@pytest.fixture(scope="module")
def photograph():
    return pytest.importorskip("skimage.data").astronaut()


def drawn(seed, size=192, **changes):
    rng = random.Random(seed)
    identity, context = world.draw_identity(rng, held_out=True), world.draw_context(rng)
    context = world.Context(**{**context.__dict__, **changes})
    box, points = drawing.face_of(identity, context, size)
    return drawing.render(identity, context, size), Face(tuple(box), 1.0, tuple(map(tuple, points)))


def turned(yaw, pitch, roll):
    """The mean face's points, turned and seen from afar."""
    y, p, r = map(math.radians, (yaw, pitch, roll))
    about_y = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    about_z = np.array([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return tuple(map(tuple, ((about_z @ about_y @ about_x @ MEAN_FACE.T).T[:, :2] * 40 + (100, 70)).tolist()))


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 0, 0), (-50, 10, 0), (0, 25, 0), (0, 0, -40), (20, -15, 170)])
def test_a_pose_is_read_back_from_the_points_it_makes(angles):
    assert head_pose(turned(*angles)) == pytest.approx(angles, abs=1e-6)


def test_the_signs_of_a_pose():
    looking_right, looking_up, leaning = (np.array(turned(*angles)) for angles in ((30, 0, 0), (0, 20, 0), (0, 0, 20)))
    straight = np.array(turned(0, 0, 0))
    eyes = lambda points: points[:2].mean(0)  # noqa: E731
    assert (looking_right[2] - eyes(looking_right))[0] > (straight[2] - eyes(straight))[0], "the nose goes to the viewer's right"
    assert (looking_up[2] - eyes(looking_up))[1] < (straight[2] - eyes(straight))[1], "the nose goes up"
    assert leaning[1][1] > leaning[0][1], "clockwise: the right eye is lower"


def test_no_pose_without_points_or_from_points_in_a_line():
    assert head_pose(()) is None
    assert head_pose([(k, 2 * k) for k in range(5)]) is None


def test_charworld_detector_finds_unseen_characters(ours):
    found, wanted, given, errors = 0, 0, 0, []
    for seed in range(24):
        picture, truth = drawn(seed, size=(64, 128, 200)[seed % 3])
        boxes = [face for face in ours.detect(picture) if face.score >= 0.5]
        hits = [face for face in boxes if faces.overlap(face, truth) >= 0.5]
        found, wanted, given = found + bool(hits), wanted + 1, given + len(boxes)
        if hits:
            distance = np.linalg.norm(np.array(hits[0].landmarks) - truth.landmarks, axis=1).mean()
            errors.append(distance / truth.width)
    assert found >= wanted - 1 and given <= found + 1
    assert np.mean(errors) < 0.08


def test_charworld_detector_counts_people_and_nobody(ours):
    cast, right, wanted, given = crowds.Cast(12, 5, held_out=True), 0, 0, 0
    for number in range(24):
        crowd = crowds.compose(cast, random.Random(f"test/{number}"), people=number % 4)
        found = [face for face in ours.detect(crowd.picture) if face.score >= 0.45]
        boxes = torch.tensor([face.box for face in found]).reshape(-1, 4)
        matched = match(boxes, torch.from_numpy(crowd.boxes))
        clear = [k for k in range(len(crowd.boxes)) if not crowd.unclear[k]]
        right, wanted = right + sum(k in matched for k in clear), wanted + len(clear)
        given += len(found) - sum(k in matched for k in range(len(crowd.boxes)) if k not in clear)
    assert right / wanted > 0.85 and right / given > 0.85


def test_charworld_detector_takes_pictures_of_any_shape(ours):
    picture, truth = drawn(3, 160)
    wide = np.full((160, 700, 3), 90, np.uint8)
    wide[:, 400:560] = picture
    there = Face((truth.box[0] + 400, truth.box[1], truth.box[2] + 400, truth.box[3]), 1.0)
    assert any(faces.overlap(face, there) > 0.5 for face in ours.detect(wide))
    for shape in ((1, 1), (3, 900), (41, 7)):
        ours.detect(np.zeros((*shape, 3), np.uint8))


def test_haar_finds_the_astronaut_also_when_small_and_no_one_in_the_moon(haar, photograph):
    (face,) = [face for face in haar.detect(photograph) if face.score >= 0.5]
    assert faces.overlap(face, ASTRONAUT) > 0.7 and abs(face.roll) < 15
    half = cv2.resize(photograph, (256, 256), interpolation=cv2.INTER_AREA)
    assert faces.overlap(max(haar.detect(half), key=lambda face: face.score).scaled(2), ASTRONAUT) > 0.6
    from skimage import data

    for name in ("coffee", "moon"):
        picture = getattr(data, name)()
        picture = np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture
        assert all(face.score < 0.5 for face in haar.detect(picture)), name


def test_the_default_finds_both_kinds(photograph):
    detector = get_detector(FaceSettings())
    assert detector.name == "charworld+haar"
    assert sum(faces.overlap(face, ASTRONAUT) > 0.5 for face in detector.detect(photograph)) == 1
    picture, truth = drawn(7)
    (face,) = detector.detect(picture)
    assert faces.overlap(face, truth) > 0.5 and face.yaw is not None


class Fixed:
    name = "fixed"

    def __init__(self, *found):
        self.found = list(found)

    def detect(self, picture):
        return list(self.found)


def test_where_two_detectors_see_one_face_the_first_counts():
    a, near, far = Face((10, 10, 50, 50), 0.6), Face((12, 12, 56, 52), 0.9), Face((100, 10, 140, 50), 0.7)
    assert DrawnOrPhotographed(Fixed(a), Fixed(near, far)).detect(None) == [Face(a.box, 0.9), far]


def test_in_photographs_the_detector_of_drawings_has_to_be_surer():
    person, doubtful, clear = Face((10, 10, 50, 50), 0.9), Face((100, 10, 140, 50), 0.6), Face((200, 10, 240, 50), 0.8)
    assert DrawnOrPhotographed(Fixed(doubtful, clear), Fixed(person)).detect(None) == [person, clear]
    assert DrawnOrPhotographed(Fixed(doubtful, clear), Fixed()).detect(None) == [clear, doubtful]


def test_faces_in_doubt_too_small_or_twice_are_left_out():
    picture = np.zeros((200, 300, 3), np.uint8)
    good, twin, inner = Face((10, 10, 60, 60), 0.9), Face((12, 10, 62, 60), 0.8), Face((20, 20, 40, 40), 0.7)
    doubtful, small = Face((100, 10, 150, 60), 0.4), Face((200, 100, 209, 109), 0.9)
    assert Chosen(Fixed(inner, twin, good, doubtful, small), 0.5, 0.05).detect(picture) == [good]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"detector": "haar", "model": "x.onnx"}, "no use"), ({"detector": "yunet"}, "needs weights"), ({"label": "face"}, "no use elsewhere"),
     ({"detector": "transformers", "model": "x"}, "label")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        FaceSettings(**settings)
