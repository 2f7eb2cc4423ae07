"""Clips of charworld: the pose is known at every moment, and the captions say the motion."""

import random
from dataclasses import replace

import numpy as np
import pytest

from charforgex.charworld import clips, drawing, world


@pytest.fixture
def scene():
    rng = random.Random(5)
    return world.draw_identity(rng), clips.draw_setting(rng)


@pytest.mark.parametrize("name", clips.MOTION_WORDS)
def test_only_what_is_named_moves(scene, name):
    identity, context = scene
    motion = clips.draw_motion(random.Random(1), name)
    moments = clips.contexts(context, motion, 8)
    moved = {field for moment in moments for field in vars(moment) if getattr(moment, field) != getattr(context, field)}
    expected = {
        "still": set(), "blink": {"blink"}, "talk": {"talk"}, "nod": {"nod"}, "turn": {"yaw"}, "wave": {"wave"}, "shake": {"yaw"},
        "walk": {"dx", "dy", "tilt"}, "pan": {"pan", "zoom"}, "zoom": {"zoom"}, "roll": {"roll", "zoom"}, "jump": {"dy"},
        "sway": {"tilt", "dx"},
    }  # fmt: skip
    assert moved == expected[name]
    clip = clips.draw_clip(identity, context, motion, 8, 32)
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == np.uint8
    assert (np.abs(np.diff(clip.astype(int), axis=0)).max() > 0) == (name != "still")


def test_directions(scene):
    _, context = scene

    def ends(name, direction, field):
        found = clips.contexts(context, clips.Motion(name, direction), 8)
        return getattr(found[0], field), getattr(found[-1], field)

    assert ends("turn", 1, "yaw") == (-0.9, 0.9) and ends("turn", -1, "yaw") == (0.9, -0.9)
    assert ends("pan", 1, "pan") == (-0.12, 0.12)
    assert ends("zoom", 1, "zoom") == pytest.approx((1.4 / 1.28, 1.4 * 1.28))
    assert ends("zoom", -1, "zoom") == pytest.approx((1.4 * 1.28, 1.4 / 1.28))


def test_the_camera_never_sees_past_the_scene():
    for name in ("pan", "zoom", "roll"):
        for direction in (-1, 1):
            for moment in clips.contexts(clips.draw_setting(random.Random(2)), clips.Motion(name, direction, strength=1.2)):
                camera = drawing.camera_of(moment)
                corners = np.array([(0, 0), (0, 1), (1, 0), (1, 1)]) @ camera[:, :2].T + camera[:, 2]
                assert corners.min() >= -1e-9 and corners.max() <= 1 + 1e-9, (name, moment)


def test_landmarks_follow_the_camera_and_the_nod(scene):
    identity, context = scene[0], replace(scene[1], tilt=0.0)
    before, points = drawing.face_of(identity, context, 64)
    _, nearer = drawing.face_of(identity, replace(context, zoom=2.0), 64)
    np.testing.assert_allclose(nearer, 32 + 2 * (points - 32), atol=1e-9)
    _, panned = drawing.face_of(identity, replace(context, pan=0.1), 64)
    np.testing.assert_allclose(panned, points - (6.4, 0), atol=1e-9)
    _, nodding = drawing.face_of(identity, replace(context, nod=1.0), 64)
    assert (nodding[:, 1] > points[:, 1] + 2).all() and np.allclose(nodding[:, 0], points[:, 0])
    assert before[0] < points[0, 0]


def test_captions_name_the_motion(scene):
    identity, context = scene
    text = clips.clip_caption(identity, context, clips.Motion("turn", -1), name="zatoki")
    assert text.startswith(f"a portrait of a zatoki {identity.kind}, turning the head to the left, ")
    assert world.read_prompt(text) == world.read_prompt(world.caption(identity, context, name="zatoki")[0])
    assert not set(clips.MOTIONS) & set(clips.HELD_OUT_MOTIONS)
    assert {clips.draw_motion(random.Random(i)).name for i in range(400)} == {"still", *clips.MOTIONS}
    with pytest.raises(ValueError, match="none of still, blink"):
        clips.at(context, clips.Motion("fly"), 0.5)
