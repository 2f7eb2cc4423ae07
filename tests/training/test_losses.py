"""The value of the loss, against numbers worked out by hand."""

import math

import pytest
import torch

from charforgex.binding import bind
from charforgex.errors import ConfigError
from charforgex.families.process import Ddpm
from charforgex.families.sdxl import Sdxl
from charforgex.training.losses import Objective, diffusion_loss
from charforgex.types import Batch, Crop, Text


def test_mse_is_the_weighted_mean_square():
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    losses = diffusion_loss(prediction, target, torch.tensor([1.0, 0.5]))
    assert losses.tolist() == [2.5, 2.25]  # (1 + 4) / 2, and half of (0 + 9) / 2


def test_pseudo_huber():
    loss = diffusion_loss(torch.tensor([[0.3]]), torch.zeros(1, 1), torch.ones(1), kind="huber", huber_delta=0.4)
    assert loss.item() == pytest.approx(2 * 0.4 * (0.5 - 0.4))  # sqrt(0.09 + 0.16) = 0.5


def test_pseudo_huber_is_the_square_for_small_errors():
    error = torch.tensor([[0.001]])
    huber = diffusion_loss(error, torch.zeros(1, 1), torch.ones(1), kind="huber", huber_delta=1.0)
    assert huber.item() == pytest.approx(1e-6, rel=1e-1)


@pytest.mark.parametrize("area", [1, 4, 16])
def test_a_masked_loss_does_not_depend_on_the_masks_area(area):
    mask = torch.zeros(1, 1, 4, 4)
    mask.view(-1)[:area] = 1
    loss = diffusion_loss(torch.full((1, 3, 4, 4), 2.0), torch.zeros(1, 3, 4, 4), torch.ones(1), mask)
    assert loss.item() == pytest.approx(4.0)


def test_a_mask_weighs_places():
    prediction, mask = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[3.0, 1.0]]]])
    assert diffusion_loss(prediction, torch.zeros_like(prediction), torch.ones(1), mask).item() == pytest.approx((3 * 1 + 1 * 9) / 4)


class Perfect(Sdxl):
    """Predicts `target + error` whatever the network is."""

    def __init__(self, prediction):
        self.prediction = prediction

    def denoise(self, denoiser, noisy, t_B, text, crop):
        return self.prediction(noisy, t_B)


def batch(count=2):
    mean = torch.linspace(-1, 1, count * 4 * 4).view(count, 4, 2, 2)
    return Batch(mean, torch.zeros_like(mean), Text(torch.zeros(count, 1, 1), torch.zeros(count, 1)), Crop.whole(count, 16, 16))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_a_constant_error_is_its_weighted_square(kind):
    """With t = 199, SNR = 3.0856 (training.md's table), so min-SNR 5 weighs 1 for epsilon and 3.0856 / 4.0856 for v."""
    process, t_B = Ddpm(kind), torch.full((2,), 199 / 999)
    objective, key = Objective(weighting="min_snr"), ("seed", 3)
    clean, noise = batch().mean_BChw, objective.noise(batch().mean_BChw.shape, *key)
    family = Perfect(lambda noisy, t: process.target(clean, noise, t) + 0.5)
    losses = objective.losses(family, torch.nn.Linear(1, 1), process, batch(), *key, t_B=t_B)
    weight = 1.0 if kind == "epsilon" else 3.0856 / 4.0856
    assert losses.tolist() == pytest.approx([0.25 * weight] * 2, rel=1e-4)


def test_min_snr_at_snr_above_gamma():
    snr = Ddpm().snr(torch.zeros(1)).item()
    assert snr == pytest.approx(1175.47, rel=1e-4)
    assert Ddpm().weight(torch.zeros(1), "min_snr", 5.0).item() == pytest.approx(5 / snr)
    assert Ddpm("v_prediction").weight(torch.zeros(1), "min_snr", 5.0).item() == pytest.approx(5 / (snr + 1))


def test_draws_depend_on_the_key_alone():
    objective, process = Objective(noise_offset=0.1), Ddpm()
    torch.manual_seed(1)
    first = objective.times(8, process, "seed", 4), objective.noise((2, 4, 3, 3), "seed", 4)
    torch.manual_seed(2)
    again = objective.times(8, process, "seed", 4), objective.noise((2, 4, 3, 3), "seed", 4)
    other = objective.times(8, process, "seed", 5), objective.noise((2, 4, 3, 3), "seed", 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_uniform_times_are_stratified():
    times = torch.stack([Objective().times(10, Ddpm(), "seed", step).sort().values for step in range(50)])
    assert ((times * 10).floor().clamp(max=9) == torch.arange(10)).float().mean() > 0.98  # snapped to the grid of 1000


def test_logit_normal_times():
    times = torch.cat([Objective(timesteps="logit_normal").times(1000, Ddpm(), step) for step in range(4)])
    assert times.median().item() == pytest.approx(0.5, abs=0.01)
    assert times.quantile(0.8413).item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)  # one standard deviation up


def test_noise_offset_adds_the_same_to_a_whole_channel():
    plain, offset = Objective().noise((1, 2, 8, 8), 1), Objective(noise_offset=0.5).noise((1, 2, 8, 8), 1)
    difference = (offset - plain).flatten(2)
    assert torch.allclose(difference, difference[..., :1].expand_as(difference), atol=1e-6)
    assert difference.abs().min() > 0


@pytest.mark.parametrize("options", [{"huber_delta": 0.2}, {"min_snr_gamma": 3.0}, {"weighting": "snr"}])
def test_an_option_that_the_objective_does_not_use_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Objective(**options).check(Ddpm())


@pytest.mark.parametrize(
    "options", [{"kind": "l1"}, {"timesteps": "sigmoid"}, {"noise_offset": 2.0}, {"huber_delta": 0.0}, {"min_snr_gamma": -1}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        bind(Objective, options, "loss")
