"""The mathematics of the noise processes, against diffusers and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.errors import ConfigError, ModelError
from charforgex.families.process import Ddpm, FlowMatching, shifted

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
    with pytest.raises(ConfigError, match=r"loss\.weighting=cosmap.*min_snr"):
        epsilon.weight(t, "cosmap", 5.0)


def test_debiased_weights():
    """1 / sqrt(min(SNR, 1000)): at index 0 SNR is 1175.47, so 0.031623; at 499 it is 0.38441, so 1.61288, and 0.44784 for v."""
    t = times(0, 499, 999)
    assert Ddpm("epsilon").weight(t, "debiased", 5.0).tolist() == pytest.approx([0.031623, 1.61288, 0.00468**-0.5], rel=2e-3)
    weight = Ddpm("v_prediction").weight(t, "debiased", 5.0)
    assert weight[1] == pytest.approx(1.61288 * 0.38441 / 1.38441, rel=1e-3)
    assert Ddpm("v_prediction", zero_snr=True).weight(times(999), "debiased", 5.0).tolist() == [0]


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_a_weighted_loss_is_the_same_for_epsilon_and_v(weighting, draws):
    """The same estimate of the clean latent, said as epsilon or as v: one loss."""
    clean, noise, index = (tensor[::50] for tensor in draws)
    clean, noise, t = clean.double(), noise.double(), index / 999
    losses = []
    for process in (Ddpm("epsilon"), Ddpm("v_prediction")):
        right = process.target(clean, noise, t)
        power = process.alphas_cumprod[index].double().view(-1, 1, 1, 1)
        guess_clean = clean + 0.1  # the error in epsilon is then - 0.1 sqrt(SNR)
        guess_noise = (process.add_noise(clean, noise, t) - power.sqrt() * guess_clean) / (1 - power).sqrt()
        prediction = process.target(guess_clean, guess_noise, t)
        losses.append(process.weight(t, weighting, 5.0) * (prediction - right).square().mean((1, 2, 3)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


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


# ---- flow matching ----


def test_flow_by_hand():
    """x = 2, n = -1, t = 1/4: noisy 3/4 * 2 - 1/4 = 1.25, velocity -3, and back 1.25 + 3/4 = 2."""
    process, t = FlowMatching(), torch.tensor([0.25])
    clean, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    noisy, target = process.add_noise(clean, noise, t), process.target(clean, noise, t)
    assert (noisy.item(), target.item(), process.to_clean(noisy, target, t).item()) == (1.25, -3.0, 2.0)
    assert process.weight(t, "none", 5.0).tolist() == [1.0]


def test_flow_adds_noise_as_diffusers_at_every_index(draws):
    from diffusers import FlowMatchEulerDiscreteScheduler

    clean, noise, _ = draws
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(FlowMatching().add_noise(clean, noise, scheduler.sigmas), scheduler.scale_noise(clean, scheduler.timesteps, noise))
    torch.testing.assert_close(scheduler.sigmas, scheduler.timesteps / 1000, rtol=2e-7, atol=0)  # t is sigma


def test_flow_keeps_times_in_float32():
    """Latents of half precision take the factors in their own dtype, the times stay what they are."""
    t = torch.tensor([0.7001, 0.7003])
    assert torch.equal(FlowMatching().snap(t.double()), t)
    clean = torch.ones(2, 4, 2, 2, dtype=torch.bfloat16)
    assert FlowMatching().add_noise(clean, clean, t).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("t", "sigma_sqrt", "cosmap"), [(1.0, 1.0, 0.63662), (0.5, 4.0, 1.27324), (0.1, 100.0, 0.77637), (0.0, 1e6, 0.63662)]
)
def test_flow_weights(t, sigma_sqrt, cosmap):
    """t^-2, and 2 / (pi (1 - 2 t + 2 t^2)): 2 / pi at the ends, 4 / pi in the middle; as diffusers has them."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    process, t_B = FlowMatching(), torch.tensor([t])
    for weighting, value in (("sigma_sqrt", sigma_sqrt), ("cosmap", cosmap)):
        weight = process.weight(t_B, weighting, 5.0)
        assert weight.item() == pytest.approx(value, rel=1e-4)
        torch.testing.assert_close(weight, compute_loss_weighting_for_sd3(weighting, t_B.clamp(min=1e-3)), rtol=2e-3, atol=0)
    with pytest.raises(ConfigError, match=r"loss\.weighting=min_snr has no meaning for rectified flow.*cosmap"):
        process.weight(t_B, "min_snr", 5.0)


def test_the_common_scripts_loss_has_a_factor_of_t_squared(draws):
    """They turn the prediction into a clean estimate and compare that; their sigma_sqrt weight gives the velocity's own loss back."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    clean, noise, index = (tensor.double() for tensor in draws)
    process, sigma = FlowMatching(), (index + 1).view(-1, 1, 1, 1) / 1000
    t, velocity = sigma.flatten(), torch.sin(3 * clean + noise)  # any prediction
    noisy = (1 - sigma) * clean + sigma * noise
    theirs = (noisy - sigma * velocity - clean).square()  # precondition_outputs=1
    ours = (velocity - process.target(clean, noise, t)).square()
    torch.testing.assert_close(theirs, sigma**2 * ours)
    restored = compute_loss_weighting_for_sd3("sigma_sqrt", sigma).double() * theirs  # they round the weight to float32
    torch.testing.assert_close(restored, ours, rtol=1e-6, atol=1e-12)
    plain = compute_loss_weighting_for_sd3("logit_normal", sigma) * theirs  # their default does not
    assert (plain.mean() / ours.mean()).item() == pytest.approx(1 / 3, rel=0.05), "uniform times: the mean of t^2"


MU = {512: 0.6300, 640: 0.7275, 768: 0.8467, 896: 0.9875, 1024: 1.1500, 1280: 1.5400, 1536: 2.0167}


@pytest.mark.parametrize(("side", "mu"), MU.items())
def test_flux_shift_table(side, mu):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = (side // 16) ** 2
    assert FlowMatching().resolution_shift(tokens) == pytest.approx(np.exp(mu), rel=1e-4)
    assert FlowMatching().resolution_shift(tokens) == pytest.approx(np.exp(calculate_shift(tokens)))


def test_shift_of_1024_is_the_well_known_number():
    assert FlowMatching().resolution_shift(4096) == pytest.approx(3.1582, abs=1e-4)
    with pytest.raises(ConfigError, match=r"loss\.shift=resolution.*DDPM"):
        Ddpm().resolution_shift(4096)


@pytest.mark.parametrize("shift", [1.0, 1.8776, 3.0, 7.5132])
def test_shifted_times_are_the_schedulers(shift):
    """Both spellings of training.md 2.1, which the scheduler has as constant and as dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    t = torch.linspace(1 / 1000, 1, 1000, dtype=torch.float64).float()
    constant = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(np.log(shift), 1.0, t)
    torch.testing.assert_close(shifted(t, shift), constant, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shifted(t, shift), dynamic, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, FlowMatching(3.0)),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2},
         FlowMatching(None, base_mu=0.4, max_mu=1.2)),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, FlowMatching(2.0)),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 2.5}, FlowMatching(2.5)),
    ],
)  # fmt: skip
def test_flow_from_config_of_any_sampler(name, options, expected):
    import diffusers

    assert FlowMatching.from_config(getattr(diffusers, name)(**options).config) == expected


def test_flow_refusals():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    for scheduler, words in (
        (DDIMScheduler(), "not for a flow matching model"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps=100"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ):
        with pytest.raises(ModelError, match=words):
            FlowMatching.from_config(scheduler.config)


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
