"""Poses are read off pictures, and motions off poses: on clips whose every moment is known."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from charforgex.charworld import clips, poses, world
from charforgex.charworld.assets import load_pose_reader
from charforgex.charworld.clips import Motion

SETTING = replace(clips.draw_setting(random.Random(5)), yaw=0.1, tilt=1.0, dx=0.01, dy=-0.02)


def number(trajectory, name):
    return trajectory[:, list(poses.POSE).index(name)]


@pytest.fixture(scope="module")
def reader():
    return load_pose_reader()


def test_a_pose_is_what_the_context_says():
    told = dict(zip(poses.POSE, poses.pose_of(replace(SETTING, wave=0.8, zoom=1.5, roll=-4.0)).tolist(), strict=True))
    wanted = {"yaw": 0.1, "tilt": 1.0, "dx": 0.01, "dy": -0.02, "raised": 1.0, "hand": 0.8, "zoom": math.log(1.5), "roll": -4.0, "nod": 0.0}
    assert {name: told[name] for name in wanted} == pytest.approx(wanted)
    assert poses.pose_of(SETTING)[list(poses.POSE).index("hand")] == 0.5, "of an arm that hangs"


def test_a_pose_that_was_read_is_drawn_again():
    for index in range(30):
        _, moment = poses.Moments(30, seed=2).scene(index)
        again = poses.posed(replace(SETTING, scale=1.02), poses.pose_of(moment))
        assert poses.pose_of(again) == pytest.approx(poses.pose_of(moment), abs=1e-5) and again.scale == 1.02
    beyond = poses.posed(SETTING, np.full(len(poses.POSE), -1.0, np.float32))
    assert (beyond.talk, beyond.blink, beyond.wave, beyond.zoom) == (0, 0, 0, 1)


@pytest.mark.parametrize("frames", [8, 16])
def test_true_trajectories_of_every_motion_are_recognised(frames):
    for name in poses.KNOWN:
        rng = random.Random(name)
        for _ in range(6):
            true = poses.trajectory_of(clips.draw_setting(rng), clips.draw_motion(rng, name), frames)
            assert true.shape == (frames, len(poses.POSE)) and poses.recognise(true) == name
            assert poses.distances(true)[name] < 0.12


def test_distances_are_in_units_and_do_not_count_where_the_setting_rests():
    still = poses.trajectory_of(SETTING, Motion("still"), 8)
    assert poses.distances(still)["still"] == pytest.approx(0, abs=1e-6)
    talking, aside = still.copy(), still.copy()
    number(talking, "talk")[:] += 2 * poses.POSE["talk"]
    assert poses.distances(talking)["still"] == pytest.approx(2 / math.sqrt(len(poses.POSE)), rel=1e-5)
    number(aside, "dx")[:] += 0.2
    assert poses.distances(aside)["still"] == pytest.approx(0, abs=1e-6)
    assert min(distance for name, distance in poses.distances(still).items() if name != "still") > 0.15


def test_moments_are_the_same_again_and_stay_inside_the_scene():
    moments = poses.Moments(40, seed=3)
    assert len(moments) == 40 and np.array_equal(moments.picture(4), poses.Moments(40, seed=3).picture(4))
    seen = [moments.scene(index)[1] for index in range(40)]
    assert all(moment.zoom >= 1 and abs(moment.pan) <= 0.5 * (1 - 1 / moment.zoom) + 1e-9 for moment in seen[::2])
    assert len({moment.nod for moment in seen}) > 10 and len({moment.wave for moment in seen}) > 5
    who, _ = poses.Moments(40, seed=3, held_out=True).scene(0)
    assert (who.hair, who.hair_colour) in world.HELD_OUT_HAIR


def test_the_embedded_reader_reads_poses_of_unseen_characters(reader):
    moments = poses.Moments(120, seed=11, held_out=True)
    frames = range(1, 120, 2)
    found = reader.read(np.stack([moments.picture(index) for index in frames]))
    errors = (found - np.stack([poses.pose_of(moments.scene(index)[1]) for index in frames])) / poses.UNITS
    assert np.sqrt(np.square(errors).mean()) < 0.3
    large = np.repeat(np.repeat(moments.picture(1)[None], 2, 1), 2, 2)
    assert (reader.read(large)[0] - found[0]) / poses.UNITS == pytest.approx(0, abs=0.3), "of any size"


def test_the_embedded_reader_tells_motions_of_unseen_characters_and_not_of_shuffled_frames(reader):
    right, shuffled = [], []
    for name in poses.KNOWN:
        for count in range(2):
            rng = random.Random(f"test/{name}/{count}")
            who, setting = world.draw_identity(rng, held_out=True), clips.draw_setting(rng)
            clip = clips.draw_clip(who, setting, clips.draw_motion(rng, name))
            trajectory = reader.read(clip)
            right.append(poses.recognise(trajectory) == name)
            shuffled.append(poses.distances(trajectory[rng.sample(range(8), 8)])[name] - poses.distances(trajectory)[name])
    assert np.mean(right) >= 0.9
    assert np.mean(shuffled) > 0.05, "another order of the same poses is another motion"
