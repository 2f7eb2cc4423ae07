"""Appearance debiasing against worked numbers and its identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.families.animatediff import AnimateDiff
from charforgex.training.losses import Objective, diffusion_loss
from charforgex.training.motion import frame_indices, motion_losses, one_frame, without_appearance
from charforgex.types import Batch, Crop


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_numbers():
    """b = 3/4, whose root is 5/4: frames 4, 8, -2 with the anchor 8 are 5 - 6, 10 - 6, -2.5 - 6."""
    clip = torch.tensor([4.0, 8.0, -2.0]).view(1, 1, 3, 1, 1)
    found = without_appearance(clip, torch.tensor([1]), strength=0.75)
    assert found.flatten().tolist() == [-1.0, 4.0, -8.5]
    root = 2**0.5
    torch.testing.assert_close(
        without_appearance(clip, torch.tensor([2])).flatten(), torch.tensor([4 * root + 2, 8 * root + 2, -2 * root + 2])
    )


def test_each_clip_has_its_own_anchor():
    clips = draw(2, 4, 3, 2, 2)
    both = without_appearance(clips, torch.tensor([0, 2]))
    for i, anchor in enumerate((0, 2)):
        assert torch.equal(both[i : i + 1], without_appearance(clips[i : i + 1], torch.tensor([anchor])))


@pytest.mark.parametrize(("strength", "left"), [(0.0, 1.0), (1.0, 0.41421356), (3.0, 0.16227766)])
def test_what_all_frames_share_is_scaled_down(strength, left):
    clip, shared, anchor = draw(2, 4, 5, 3, 3), draw(2, 4, 1, 3, 3, seed=1), torch.tensor([3, 0])
    moved = without_appearance(clip + shared, anchor, strength) - without_appearance(clip, anchor, strength)
    torch.testing.assert_close(moved, left * shared.expand_as(clip))


def test_the_loss_of_a_shared_error_is_small_and_that_of_motion_is_not():
    """(sqrt 2 - 1)^2 = 0.17157 of the loss is left of an error in all frames; of one in a single frame beside the anchor, twice."""
    target, anchor, one = draw(1, 4, 4, 2, 2), torch.tensor([1]), torch.ones(1)
    shared = target + 1
    single = target.clone()
    single[:, :, 3] += 1

    def ratio(prediction):
        debiased = diffusion_loss(without_appearance(prediction, anchor), without_appearance(target, anchor), one)
        return (debiased / diffusion_loss(prediction, target, one)).item()

    assert ratio(shared) == pytest.approx(0.171573, abs=1e-5)
    assert ratio(single) == pytest.approx(2.0, abs=1e-5)


def test_the_frame_is_a_function_of_the_key_and_each_is_as_likely():
    assert torch.equal(frame_indices(6, 16, 3, "step"), frame_indices(6, 16, 3, "step"))
    assert not torch.equal(frame_indices(6, 16, 3, "step"), frame_indices(6, 16, 4, "step"))
    counts = torch.bincount(frame_indices(4000, 4, "many"), minlength=4)
    assert (counts - 1000).abs().max() < 120, counts
    clips = draw(2, 4, 3, 2, 2)
    picked = one_frame(clips, torch.tensor([2, 0]))
    assert torch.equal(picked, torch.stack([clips[0, :, 2:], clips[1, :, :1]]))


def test_the_loss_of_a_real_network_in_float64():
    """AnimateDiff's prediction given, everything else from the definitions: the linear schedule, the noise in it, both errors."""
    family = AnimateDiff()
    parts = family.tiny()
    process, objective, index, anchor = family.process(parts), Objective(), np.array([40, 700]), np.array([2, 0])
    mean, std = family.encode_pixels(parts, draw(2, 3, 3, 16, 16).float().clamp(-1, 1))
    batch = Batch(mean, std, family.encode_text(parts, ["a man", "a dog"]), Crop.whole(2, 16, 16))
    clean, noise, t_B = objective.draw(process, batch, "key", t_B=process.snap(torch.tensor(index) / 999))
    noisy = process.add_noise(clean, noise, t_B)
    with torch.no_grad():
        prediction = family.denoise(parts.denoiser, noisy, t_B, batch.text, batch.crop)
    found = motion_losses(prediction, process.target(clean, noise, t_B), process.weight(t_B, "min_snr", 5.0), torch.tensor(anchor))

    clean, noise, noisy, prediction = (tensor.double().numpy() for tensor in (clean, noise, noisy, prediction))
    power = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[index]
    for i in range(2):
        np.testing.assert_allclose(noisy[i], np.sqrt(power[i]) * clean[i] + np.sqrt(1 - power[i]) * noise[i], atol=1e-5)
        error = prediction[i] - noise[i]
        moved = [np.sqrt(2) * error[:, frame] - error[:, anchor[i]] for frame in range(3)]
        weight = min(power[i] / (1 - power[i]), 5.0) / (power[i] / (1 - power[i]))
        np.testing.assert_allclose(found[i], weight * (np.mean(error**2) + np.mean(np.square(moved))), rtol=1e-3)
    assert 0 < found[0] < found[1]
