"""Which frames are seen together, how much each window counts, and whose noise a late frame has."""

import pytest
import torch

from charforgex.generation.windows import Windowing, in_windows, noise_order, windows


def test_windows_of_a_clip_of_ten_frames():
    """Worked by hand: pyramids of 1 2 2 1 that begin every second frame, each divided by what its frame gets in all windows."""
    found = windows(10, Windowing(4, 2))
    assert found.frames_WL.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    third = 1 / 3
    inner = [third, 2 / 3, 2 / 3, third]
    expected = [[1, 1, 2 / 3, third], inner, inner, [third, 2 / 3, 1, 1]]
    torch.testing.assert_close(found.weights_WL, torch.tensor(expected))
    even = windows(10, Windowing(4, 2, blend="uniform"))
    assert even.weights_WL.tolist() == [[1, 1, 0.5, 0.5], [0.5] * 4, [0.5] * 4, [0.5, 0.5, 1, 1]]


def test_the_last_window_ends_with_the_clip():
    assert windows(9, Windowing(4, 1)).frames_WL.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert windows(4, Windowing(4, 1)).frames_WL.tolist() == [[0, 1, 2, 3]]
    assert windows(3, Windowing(4, 1)).frames_WL.tolist() == [[0, 1, 2]]


def test_loops_reach_over_the_end():
    assert windows(6, Windowing(4, 2, loop=True)).frames_WL.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]]
    assert windows(4, Windowing(8, 2, loop=True)).frames_WL.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]  # also where one would hold all


@pytest.mark.parametrize("blend", ["pyramid", "uniform"])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    ("count", "length", "overlap"), [(1, 4, 1), (5, 16, 4), (16, 16, 4), (17, 16, 4), (33, 16, 4), (300, 16, 12), (24, 8, 0)]
)
def test_every_frames_weights_sum_to_one(count, length, overlap, loop, blend):
    found = windows(count, Windowing(length, overlap, blend, loop))
    totals = torch.zeros(count, dtype=torch.float64)
    for frames, weights in zip(found.frames_WL, found.weights_WL, strict=True):
        assert len(set(frames.tolist())) == min(length, count)
        totals[frames] += weights.double()
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-6, rtol=0)


def test_predictions_are_averaged():
    """A network that says a window's first frame of all its frames: 0, 2 and 4 below, weighed by hand for frames 2 to 5."""
    parts = windows(8, Windowing(4, 2, blend="uniform"))
    asked = []

    def predict(noisy, frames):
        assert torch.equal(noisy[:, 0, :, 0, 0], torch.cat([frames[: len(frames) // 2], frames[: len(frames) // 2] + 100]).float())
        asked.append(len(noisy))
        return frames[:, :1, None, None].expand(-1, 4, 1, 1)[:, None].float() * torch.ones_like(noisy)

    clips = torch.stack([torch.arange(8.0), torch.arange(8.0) + 100])[:, None, :, None, None]
    out = in_windows(predict, clips, parts, at_once=2)
    assert asked == [4, 2]
    assert out.shape == clips.shape and out[0].flatten().tolist() == [0, 0, 1, 1, 3, 3, 4, 4] and torch.equal(out[0], out[1])


def test_late_frames_have_the_first_windows_noise_in_another_order():
    how = Windowing(8, 3)
    order = noise_order(28, how, seed=4)
    assert order[:8] == list(range(8)) and order == noise_order(28, how, seed=4)
    assert sorted(order[8:13]) == list(range(5)) and order[8:13] != list(range(5))
    for start in range(0, 21, how.stride):  # each window has each noise once
        assert sorted(order[start : start + 8]) == list(range(8))
    assert noise_order(40, how, seed=4)[:28] == order, "a longer clip begins alike"
    assert noise_order(28, how, seed=5) != order
    assert noise_order(20, Windowing(8, 3, noise="own"), seed=4) == list(range(20))
