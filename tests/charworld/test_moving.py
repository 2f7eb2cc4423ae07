"""Scenes are what they are at each time, and go where they say they go."""

import random

import cv2
import numpy as np
import pytest

from charforgex.charworld.crowds import Cast
from charforgex.charworld.moving import FASTEST, Drawn, Layer, Layers, scene


def along(frame, flow):
    grid = np.stack(np.meshgrid(*(np.arange(side, dtype=np.float32) for side in frame.shape[1::-1])), -1)
    return cv2.remap(frame, grid + flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def square(side=16, colour=(200, 100, 50)):
    return np.full((side, side, 4), (*colour, 255), np.uint8)


def test_a_layer_moves_turns_and_grows_as_told():
    """A square of 16 pixels that goes from (20, 20) to (40, 24) and becomes twice as large."""
    behind = Layer(square(96, (0, 0, 0)), np.array([32.0, 32, 0, 0]), np.zeros(4))
    front = Layer(square(), np.array([20.0, 20, 0, 0]), np.array([20, 4, 0, np.log(2)]))
    moving = Layers((behind, front), 64)
    for time, middle, side in ((0, (20, 20), 16), (0.5, (30, 22), 16 * 2**0.5), (1, (40, 24), 32)):
        seen = moving.frame(time)[..., 0] / 200
        y, x = np.mgrid[:64, :64] + 0.5
        assert seen.sum() == pytest.approx(side**2, rel=0.06)
        assert ((seen * x).sum() / seen.sum(), (seen * y).sum() / seen.sum()) == pytest.approx(middle, abs=0.1)
    flow = moving.flow(0.5)
    assert flow[22, 30] == pytest.approx((-10, -2, 10, 2), abs=0.6) and flow[60, 60] == pytest.approx(0, abs=1e-5)
    assert flow[22, 38, 0] - flow[22, 30, 0] == pytest.approx(8 * (2**-0.5 - 1), abs=1e-3)  # at time 0 it was smaller


def test_true_flows_lead_to_the_same_thing():
    cast, found = Cast(20, seed=1), []
    for number in range(8):
        moving = scene(random.Random(number), cast, 64)
        if isinstance(moving, Layers):
            first, truth, second = (moving.frame(time).astype(np.float32) for time in (0, 0.4, 1))
            flow = moving.flow(0.4)
            right = [np.abs(along(one, part) - truth).mean(-1) for one, part in ((first, flow[..., :2]), (second, flow[..., 2:]))]
            still = [np.abs(one - truth).mean(-1) for one in (first, second)]
            found.append((np.minimum(*right).mean(), np.minimum(*still).mean()))
    right, still = np.array(found).T
    assert len(found) > 4 and right.mean() < 0.4 * still.mean()


def test_what_charworld_draws_is_a_function_of_the_key_and_has_no_flow():
    cast = Cast(20, seed=1)
    drawn = [number for number in range(24) if isinstance(scene(random.Random(number), cast, 48), Drawn)]
    assert 1 <= len(drawn) <= 10
    one, other = (scene(random.Random(drawn[0]), cast, 48) for _ in range(2))
    assert np.isnan(one.flow(0.5)).all() and one.frame(0.3).shape == (48, 48, 3)
    assert (one.frame(0.3) == other.frame(0.3)).all() and (one.frame(0) != one.frame(1)).any()


def test_nothing_is_faster_than_said_and_strange_textures_are_others():
    cast = Cast(20, seed=1)
    scenes = [scene(random.Random(number), cast, 64, strange) for strange in (False, True) for number in range(30)]
    layers = [layer for one in scenes if isinstance(one, Layers) for layer in one.layers]
    speeds = [np.hypot(*layer.change[:2]) / 64 for layer in layers]
    assert max(speeds) <= FASTEST + 1e-9 and max(speeds) > 0.7 * FASTEST
    usual, strange = (scene(random.Random(3), cast, 64, strange).frame(0) for strange in (False, True))
    assert (usual != strange).any()
