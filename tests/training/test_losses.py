"""The value of the loss, against numbers worked out by hand."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from charforgex.binding import bind
from charforgex.errors import ConfigError
from charforgex.families.flux import Flux
from charforgex.families.process import Ddpm, FlowMatching
from charforgex.families.sdxl import Sdxl
from charforgex.training.losses import Objective, by_level, diffusion_loss
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


def perfect(family: type) -> type:
    """A family that predicts what it is told, from (noisy, t), whatever the network is."""

    def denoise(self, denoiser, noisy, t_B, text, crop):
        return self.prediction(noisy, t_B)

    return type("Perfect", (family,), {"__init__": lambda self, prediction: setattr(self, "prediction", prediction), "denoise": denoise})


def batch(count=2):
    mean = torch.linspace(-1, 1, count * 4 * 4).view(count, 4, 2, 2)
    return Batch(mean, torch.zeros_like(mean), Text(torch.zeros(count, 1, 1), torch.zeros(count, 1)), Crop.whole(count, 16, 16))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_a_constant_error_is_its_weighted_square(kind):
    """With t = 199, SNR = 3.0856 (training.md's table), so min-SNR 5 weighs 1 for epsilon and 3.0856 / 4.0856 for v."""
    process, t_B = Ddpm(kind), torch.full((2,), 199 / 999)
    objective, key = Objective(weighting="min_snr"), ("seed", 3)
    clean, noise = batch().mean_BChw, objective.noise(batch().mean_BChw.shape, *key)
    family = perfect(Sdxl)(lambda noisy, t: process.target(clean, noise, t) + 0.5)
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


def test_velocity_is_the_target_at_every_time():
    """A network that gives exactly n - x has loss 0 whatever t; one that is off by 1/2 has 1/4, which nothing weighs."""
    process, key, count = FlowMatching(), ("seed", 3), 50
    objective, clean = Objective(), batch(count).mean_BChw
    noise = objective.noise(clean.shape, *key)
    for error, loss in ((0.0, 0.0), (0.5, 0.25)):
        family = perfect(Flux)(lambda noisy, t, error=error: noise - clean + error)
        losses = objective.losses(family, torch.nn.Linear(1, 1), process, batch(count), *key, t_B=torch.linspace(0, 1, count))
        assert losses.tolist() == pytest.approx([loss] * count)


def closed_form(timesteps: str, u: float) -> float:
    """Quantiles of the ways to draw times, unshifted (Esser et al. 2024, section 3.1)."""
    if timesteps == "logit_normal":
        return 1 / (1 + math.exp(-(0.3 + 0.8 * NormalDist().inv_cdf(u))))
    if timesteps == "mode":
        w = 1 - u  # the paper's runs from noise to clean
        return 1 - w - 1.29 * (math.cos(math.pi / 2 * w) ** 2 - 1 + w)
    return u


@pytest.mark.parametrize("shift", [1.0, 3.0, "resolution"])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "mode"])
def test_quantiles_of_drawn_times(timesteps, shift):
    """Of 4000 draws, against the closed forms; 1024 x 1024 pixels shift by e^1.15 = 3.1582."""
    own = {"logit_mean": 0.3, "logit_std": 0.8} if timesteps == "logit_normal" else {}
    objective = Objective(timesteps=timesteps, shift=shift, **own)
    objective.check(FlowMatching())
    times = torch.cat([objective.times(4, FlowMatching(), "seed", step, tokens=4096) for step in range(1000)])
    assert times.dtype == torch.float32
    for u in (0.05, 0.25, 0.5, 0.75, 0.95):
        t, a = closed_form(timesteps, u), 3.1582 if shift == "resolution" else shift
        assert objective.quantile(torch.tensor([u]), FlowMatching(), 4096).item() == pytest.approx(a * t / (1 + (a - 1) * t), abs=2e-5)
        assert times.quantile(u).item() == pytest.approx(a * t / (1 + (a - 1) * t), abs=0.015)


def test_the_resolution_shift_is_of_the_batchs_own_pictures():
    """512 px shift by 1.8776, 1024 by 3.1582: from the latents' sides, one token of every 2 x 2."""
    seen, objective = [], Objective(shift="resolution")
    for side in (64, 128):
        mean = torch.zeros(2, 1, side, side)
        drawn = Batch(mean, mean, Text(torch.zeros(2, 1, 1)), Crop.whole(2, 8 * side, 8 * side))
        family = perfect(Flux)(lambda noisy, t: seen.append(t) or noisy)
        objective.losses(family, torch.nn.Linear(1, 1), FlowMatching(), drawn, "key")
    unshifted = Objective().times(2, FlowMatching(), "key")
    for times, a in zip(seen, (1.8776, 3.1582), strict=True):
        torch.testing.assert_close(times, a * unshifted / (1 + (a - 1) * unshifted), rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{}, {"timesteps": "logit_normal", "shift": 3.0}, {"timesteps": "mode"}])
def test_times_are_stratified_and_float32(options):
    """One time in each equal share of the distribution, in any order."""
    objective, process = Objective(**options), FlowMatching()
    edges = objective.quantile(torch.arange(11) / 10, process)
    orders = set()
    for step in range(20):
        times = objective.times(10, process, "seed", step)
        assert times.dtype == torch.float32
        assert ((times.sort().values >= edges[:-1] - 1e-6) & (times.sort().values <= edges[1:] + 1e-6)).all()
        orders.add(tuple(times.argsort().tolist()))
    assert len(orders) == 20


@pytest.mark.parametrize("timesteps", ["logit_normal", "mode"])
def test_densities_are_diffusers(timesteps):
    """Theirs count from noise to clean, which for these two means the same."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(timesteps, 20000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator)
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(Objective(timesteps=timesteps).quantile(levels, FlowMatching()), theirs.quantile(levels), atol=0.012)


def test_noise_offset_adds_the_same_to_a_whole_channel():
    plain, offset = Objective().noise((1, 2, 8, 8), 1), Objective(noise_offset=0.5).noise((1, 2, 8, 8), 1)
    difference = (offset - plain).flatten(2)
    assert torch.allclose(difference, difference[..., :1].expand_as(difference), atol=1e-6)
    assert difference.abs().min() > 0


UNUSED_BY_BOTH = [
    ({"huber_delta": 0.2}, "set loss.kind=huber"),
    ({"min_snr_gamma": 3.0}, "set loss.weighting=min_snr"),
    ({"logit_mean": 0.5}, "set loss.timesteps=logit_normal"),
    ({"logit_std": 0.5, "timesteps": "mode"}, "set loss.timesteps=logit_normal"),
    ({"mode_scale": 1.0, "timesteps": "logit_normal"}, "set loss.timesteps=mode"),
    ({"weighting": "snr"}, "choose one of none"),
]
UNUSED_BY_DDPM = [
    ({"shift": 3.0}, "has no meaning for DDPM epsilon.*set it to 1"),
    ({"shift": "resolution"}, "has no meaning for DDPM epsilon.*set it to 1"),
    ({"weighting": "sigma_sqrt"}, "no meaning for DDPM.*min_snr, debiased"),
    ({"weighting": "cosmap"}, "no meaning for DDPM.*min_snr, debiased"),
    ({"weighting": "debiased", "min_snr_gamma": 3.0}, "set loss.weighting=min_snr"),
]
UNUSED_BY_FLOW = [
    ({"noise_offset": 0.05}, "has no meaning for rectified flow.*set it to 0"),
    ({"weighting": "min_snr"}, "no meaning for rectified flow.*sigma_sqrt, cosmap"),
    ({"weighting": "debiased"}, "no meaning for rectified flow.*sigma_sqrt, cosmap"),
    ({"weighting": "cosmap", "min_snr_gamma": 3.0}, "set loss.weighting=min_snr"),
]


@pytest.mark.parametrize(
    ("process", "options", "words"),
    [
        *((process, *case) for process in (Ddpm(), FlowMatching()) for case in UNUSED_BY_BOTH),
        *((Ddpm(), *case) for case in UNUSED_BY_DDPM),
        *((FlowMatching(), *case) for case in UNUSED_BY_FLOW),
    ],
    ids=str,
)
def test_an_option_that_the_objective_does_not_use_is_refused(process, options, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        Objective(**options).check(process)
    assert any(f"loss.{name}={value}" in str(refusal.value) for name, value in options.items())


@pytest.mark.parametrize(
    ("process", "options"),
    [
        (Ddpm(), {"weighting": "debiased", "noise_offset": 0.05, "timesteps": "mode", "mode_scale": 1.0}),
        (FlowMatching(), {"weighting": "cosmap", "shift": "resolution", "timesteps": "logit_normal", "logit_mean": 0.5}),
    ],
    ids=str,
)
def test_an_option_that_the_objective_uses_is_not(process, options):
    Objective(**options).check(process)


@pytest.mark.parametrize(
    "options", [{"kind": "l1"}, {"timesteps": "sigmoid"}, {"noise_offset": 2.0}, {"huber_delta": 0.0}, {"min_snr_gamma": -1}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        bind(Objective, options, "loss")


def test_losses_are_told_apart_by_noise():
    found = by_level([(0.0, 1.0), (0.26, 8.0), (0.2499, 3.0), (1.0, 5.0), (0.25, 2.0)])
    assert found == {"loss/t=0.00-0.25": 2.0, "loss/t=0.25-0.50": 5.0, "loss/t=0.75-1.00": 5.0}
    assert list(found) == sorted(found) and by_level([]) == {}
