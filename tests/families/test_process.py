"""The mathematics of the noise processes, against diffusers and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.errors import ConfigError, ModelError
from charforgex.families.process import Ddpm

KINDS = [
    pytest.param(dict(prediction=prediction, beta_schedule=schedule, zero_snr=zero), id=f"{prediction}-{schedule}{'-zero' if zero else ''}")
    for prediction in ("epsilon", "v_prediction")
    for schedule in ("scaled_linear", "linear")
    for zero in (False, True)
    if not (zero and prediction == "epsilon")
]


def times(*indices: int) -> torch.Tensor:
    return torch.tensor(indices) / 999


def diffusers_scheduler(prediction: str, beta_schedule: str, zero_snr: bool):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule, prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1000, 4, 3, 2, generator=generator)
    return clean, noise, torch.arange(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers_at_every_index(kind, draws):
    clean, noise, index = draws
    process, scheduler = Ddpm(**kind), diffusers_scheduler(**kind)
    assert torch.equal(process.alphas_cumprod, scheduler.alphas_cumprod)
    assert torch.equal(process.index(index / 999), index), "every index must survive the way through t"
    noisy = process.add_noise(clean, noise, index / 999)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, index), rtol=0, atol=1e-6)
    target = process.target(clean, noise, index / 999)
    theirs = noise if kind["prediction"] == "epsilon" else scheduler.get_velocity(clean, noise, index)
    torch.testing.assert_close(target, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_to_clean_inverts_add_noise(kind, draws):
    clean, noise, index = (tensor.double() for tensor in draws)
    process = Ddpm(**kind)
    t = index.float() / 999
    back = process.to_clean(process.add_noise(clean, noise, t), process.target(clean, noise, t), t)
    # epsilon divides by the signal, 0.068 at t = 1; the factors are float32
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-4 if kind["prediction"] == "epsilon" else 1e-6)


@pytest.mark.parametrize(
    ("schedule", "snr"),
    [
        ("scaled_linear", {0: 1175.47, 147: 4.9535, 199: 3.0856, 499: 0.38441, 799: 0.03863, 999: 0.00468}),
        ("linear", {0: 1175.47, 147: 3.5621, 199: 2.0802, 499: 0.19305, 799: 0.01431, 999: 0.00158}),
    ],
)
def test_snr_table(schedule, snr):
    """Signal-to-noise ratios in float64 from the definition of the betas, and the published numbers."""
    ends = (0.00085, 0.012)
    betas = np.linspace(*ends, 1000) if schedule == "linear" else np.linspace(*np.sqrt(ends), 1000) ** 2
    power = np.cumprod(1 - betas)
    ours = Ddpm(beta_schedule=schedule).snr(times(*range(1000))).double().numpy()
    np.testing.assert_allclose(ours, power / (1 - power), rtol=2e-4)
    for index, value in snr.items():
        assert ours[index] == pytest.approx(value, rel=1.5e-3), index
    crossing = 147 if schedule == "scaled_linear" else 120
    assert ours[crossing - 1] > 5 > ours[crossing]


def test_min_snr_weights():
    """min(SNR, 5) / SNR for epsilon; min(SNR, 5) / (SNR + 1) for v, where base + 1 would be wrong."""
    epsilon, velocity = Ddpm("epsilon"), Ddpm("v_prediction")
    t = times(0, 147, 200, 999)
    snr = epsilon.snr(t).double()
    assert snr[2] == pytest.approx(3.06, abs=0.01)
    expected = np.minimum(snr.numpy(), 5) / snr.numpy()
    np.testing.assert_allclose(epsilon.weight(t, "min_snr", 5.0), expected, rtol=1e-6)
    assert expected[0] == pytest.approx(5 / 1175.47, rel=1e-3)
    assert epsilon.weight(t, "min_snr", 5.0)[1:].tolist() == [1, 1, 1], "no weight is above 1"
    weights = velocity.weight(t, "min_snr", 5.0)
    assert weights[2] == pytest.approx(0.754, abs=1e-3)
    assert weights[0] == pytest.approx(5 / 1176.47, rel=1e-3)
    zero = Ddpm("v_prediction", zero_snr=True).weight(times(999), "min_snr", 5.0)
    assert zero.tolist() == [0], "no signal, no weight, and not a division by zero"
    assert epsilon.weight(t, "none", 5.0).tolist() == [1] * 4
    with pytest.raises(ConfigError, match=r"loss\.weighting=debiased.*min_snr"):
        epsilon.weight(t, "debiased", 5.0)


def test_zero_snr_ends_in_pure_noise(draws):
    clean, noise, _ = draws
    process = Ddpm("v_prediction", zero_snr=True)
    assert torch.equal(process.add_noise(clean[:1], noise[:1], torch.ones(1)), noise[:1])
    first = Ddpm("v_prediction").alphas_cumprod[0]
    torch.testing.assert_close(process.alphas_cumprod[0], first, rtol=1e-6, atol=0)


def test_noise_vanishes(draws):
    clean, noise, _ = draws
    noisy = Ddpm().add_noise(clean, noise, torch.zeros(1000))
    assert (noisy - clean).square().mean().sqrt() == pytest.approx(0.0292, abs=1e-3), "the first index already holds sqrt(0.00085) of noise"


def test_snap_gives_known_times_in_float32():
    snapped = Ddpm().snap(torch.tensor([0.0, 0.0004, 0.0006, 0.5, 1.0], dtype=torch.float64))
    assert snapped.dtype == torch.float32
    assert (snapped * 999).round(decimals=3).tolist() == [0, 0, 1, 500, 999]


def test_half_precision_latents_keep_their_dtype():
    clean = torch.ones(2, 4, 2, 2, dtype=torch.bfloat16)
    assert Ddpm().add_noise(clean, clean, times(3, 800)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_from_config_of_any_sampler(name):
    import diffusers

    config = getattr(diffusers, name)(beta_start=0.001, beta_end=0.01, beta_schedule="linear", prediction_type="v_prediction").config
    assert Ddpm.from_config(config) == Ddpm("v_prediction", 0.001, 0.01, "linear")


def test_from_config_keeps_zero_snr():
    scheduler = diffusers_scheduler("v_prediction", "scaled_linear", True)
    process = Ddpm.from_config(scheduler.config)
    assert process.zero_snr
    assert process.describe() == "DDPM v_prediction, scaled_linear betas, zero terminal SNR"


def test_refusals():
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    with pytest.raises(ModelError, match="has no prediction_type, beta_start"):
        Ddpm.from_config(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ModelError, match="trained_betas"):
        Ddpm.from_config(DDPMScheduler(trained_betas=[0.1, 0.2]).config)
    with pytest.raises(ModelError, match="num_train_timesteps=100"):
        Ddpm.from_config(DDPMScheduler(num_train_timesteps=100).config)
    with pytest.raises(ConfigError, match="prediction_type=sample"):
        Ddpm("sample")
    with pytest.raises(ConfigError, match="v_prediction"):
        Ddpm("epsilon", zero_snr=True)
    with pytest.raises(ConfigError, match="beta_schedule=cosine"):
        Ddpm(beta_schedule="cosine")
