"""sampling.py on the tiny SDXL: equal to diffusers' own pipeline, each picture a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.errors import ConfigError, ModelError
from charforgex.families.sdxl import Sdxl
from charforgex.generation.sampling import check_size, encode_prompts, initial_noise, sample, sample_latents, to_images
from charforgex.generation.schedulers import SAMPLERS, build_scheduler, check_scheduler_name

FAMILY = Sdxl()
SETTINGS = {"size": (32, 48), "steps": 3, "guidance": 4.0}
PROMPTS = ["a man with red hair", "a woman at the beach", "a cat", "a dog in the city", "a man with red hair"]
SEEDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def parts():
    return FAMILY.tiny()


def zero_snr(parts):
    """The same networks with the embedded base's kind of scheduler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return type(parts)(parts.source, parts.denoiser_name, parts.modules | {"scheduler": scheduler}, parts.config)


def latents(parts, prompts=PROMPTS, seeds=SEEDS, **settings):
    negative = FAMILY.encode_text(parts, [""])
    return sample_latents(FAMILY, parts, encode_prompts(FAMILY, parts, prompts), seeds, negative_text=negative, **SETTINGS | settings)


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_equals_diffusers(parts, guidance):
    """Prompts in, pictures out: the same bytes as StableDiffusionXLPipeline called by hand with the same noise."""
    mine = sample(FAMILY, parts, PROMPTS[:2], SEEDS[:2], negative="a dog", **SETTINGS | {"guidance": guidance})
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS[:2], negative_prompt=["a dog"] * 2, height=32, width=48, num_inference_steps=3, guidance_scale=guidance,
        latents=initial_noise(SEEDS[:2], (4, 4, 6)),
    ).images  # fmt: skip
    assert np.array_equal(pixels(mine), pixels(theirs))
    assert pixels(mine).std() > 1


def test_equals_diffusers_with_another_scheduler(parts):
    from diffusers import DPMSolverMultistepScheduler

    mine = sample(FAMILY, parts, PROMPTS[:1], SEEDS[:1], scheduler="dpmpp_2m_karras", **SETTINGS)
    pipeline = FAMILY.pipeline(parts)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS[:1], height=32, width=48, num_inference_steps=3, guidance_scale=4.0, latents=initial_noise(SEEDS[:1], (4, 4, 6))
    ).images
    assert np.array_equal(pixels(mine), pixels(theirs))


@pytest.mark.parametrize("scheduler", ["checkpoint", "euler_a", "unipc"])
def test_batches_and_order_change_nothing(parts, scheduler):
    """Ancestral samplers draw at every step, multistep ones remember: both must keep to their own picture."""
    whole = latents(parts, scheduler=scheduler, batch_size=5)
    for size in (1, 2, 4):
        torch.testing.assert_close(latents(parts, scheduler=scheduler, batch_size=size), whole, atol=2e-5, rtol=1e-4)
    backwards = latents(parts, PROMPTS[::-1], SEEDS[::-1], scheduler=scheduler, batch_size=2).flip(0)
    torch.testing.assert_close(backwards, whole, atol=2e-5, rtol=1e-4)


def test_same_settings_same_bits(parts):
    assert torch.equal(latents(parts, scheduler="euler_a"), latents(parts, scheduler="euler_a"))


def test_seed_and_prompt_both_count(parts):
    out = latents(parts, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [5, 6, 5])
    assert (out[0] - out[1]).abs().max() > 0.1
    assert (out[0] - out[2]).abs().max() > 1e-4


def test_noise_is_a_function_of_the_seed():
    noise = initial_noise([1, 2, 1], (4, 8, 8))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("base", ["epsilon", "zero_snr"])
def test_schedulers_agree_in_the_limit(parts, base):
    """All deterministic samplers solve one equation. A lost prediction type, or betas not rescaled, would send one elsewhere."""
    parts = parts if base == "epsilon" else zero_snr(parts)
    names = [name for name in SAMPLERS if name != "euler_a" and not (base == "zero_snr" and name == "dpmpp_2m_karras")]
    found = {name: latents(parts, PROMPTS[:1], [3], steps=100, guidance=1.0, scheduler=name, size=(32, 32)) for name in names}
    scale = found["euler"].std()
    away = {name: ((value - found["euler"]).std() / scale).item() for name, value in found.items()}
    assert away.pop("ddim") < 1e-3  # DDIM is Euler in other variables
    assert max(away.values()) < 0.06, away  # second order against first


def test_zero_snr_begins_in_pure_noise(parts):
    for name in SAMPLERS:
        if name != "dpmpp_2m_karras":
            scheduler = build_scheduler(zero_snr(parts)["scheduler"], name, 10)
            scheduler.set_timesteps(10)
            assert scheduler.timesteps[0] == 999, name
            assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr, name


def test_karras_steps_refused_for_zero_snr(parts):
    with pytest.raises(ConfigError, match=r"scheduler=dpmpp_2m_karras .*zero terminal SNR.*use scheduler=dpmpp_2m"):
        latents(zero_snr(parts), scheduler="dpmpp_2m_karras")


def test_checkpoint_scheduler_is_not_touched(parts):
    parts = zero_snr(parts)  # a scheduler that no other test has used
    before = parts["scheduler"].timesteps.clone()
    latents(parts)
    assert torch.equal(parts["scheduler"].timesteps, before) and parts["scheduler"].num_inference_steps is None


def test_flow_matching_checkpoints_keep_their_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConfigError, match=r"scheduler=ddim is for diffusion models with betas.*FlowMatchEulerDiscreteScheduler"):
        build_scheduler(FlowMatchEulerDiscreteScheduler(), "ddim", 10)


@pytest.mark.parametrize("steps", [61, 103])
def test_uneven_trailing_steps_refused(parts, steps):
    """diffusers 0.42 gives 62 steps for 61, the last at index -1."""
    with pytest.raises(ConfigError, match=f"steps={steps} .*try {steps - 1} or {steps + 1}"):
        build_scheduler(zero_snr(parts)["scheduler"], "checkpoint", steps)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range(parts, steps):
    with pytest.raises(ConfigError, match=f"steps={steps} is out of range"):
        build_scheduler(parts["scheduler"], "checkpoint", steps)


def test_unknown_scheduler_names_the_nearest():
    with pytest.raises(ConfigError, match="scheduler=dpmpp2m is unknown; did you mean dpmpp_2m"):
        check_scheduler_name("dpmpp2m")


def test_sizes_name_the_nearest_that_work(parts):
    with pytest.raises(ConfigError, match="size=1000x64: 1000 is not a multiple of 16, which this base needs; try 992 or 1008"):
        check_size((1000, 64), 16)
    with pytest.raises(ConfigError, match="try 16"):
        check_size((0, 64), 16)
    with pytest.raises(ConfigError, match="40"):
        latents(parts, size=(32, 40))


def test_progress_counts_every_step(parts):
    seen = []
    latents(parts, batch_size=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_previews_need_no_text_encoders(parts):
    """As in training: encoded text, dropped encoders, the same pictures."""
    text, negative = FAMILY.encode_text(parts, PROMPTS[:2]), FAMILY.encode_text(parts, [""])
    kept = {name: part for name, part in parts.modules.items() if not name.startswith(("text", "token"))}
    without = type(parts)(parts.source, parts.denoiser_name, kept, parts.config)
    mine = sample(FAMILY, without, None, SEEDS[:2], text=text, negative_text=negative, **SETTINGS)
    assert np.array_equal(pixels(mine), pixels(sample(FAMILY, parts, PROMPTS[:2], SEEDS[:2], **SETTINGS)))


def test_runs_with_an_adapter_and_leaves_modules_as_they_were():
    """With dropout and train mode on, a preview is deterministic, and training goes on where it was."""
    from peft import LoraConfig, inject_adapter_in_model

    parts = FAMILY.tiny()
    base = latents(parts)
    config = LoraConfig(r=2, target_modules=FAMILY.lora_targets("attention", {}), lora_dropout=0.5, init_lora_weights=False)
    inject_adapter_in_model(config, parts.denoiser)
    parts.denoiser.train()
    parts.denoiser.conv_in.eval()
    modes = {name: module.training for name, module in parts.denoiser.named_modules()}
    weights = {name: value.clone() for name, value in parts.denoiser.state_dict().items()}
    one, two = latents(parts), latents(parts)
    assert torch.equal(one, two) and (one - base).abs().max() > 1e-3
    assert {name: module.training for name, module in parts.denoiser.named_modules()} == modes
    assert all(torch.equal(weights[name], value) for name, value in parts.denoiser.state_dict().items())
    assert not one.requires_grad


def test_pictures_that_are_not_finite_are_an_error():
    parts = FAMILY.tiny()
    torch.nn.init.constant_(parts.denoiser.conv_out.bias, float("nan"))
    with pytest.raises(ModelError, match=r"seed 5 is not finite in torch.float32"):
        latents(parts)


def test_decoding_in_batches_is_the_same(parts):
    values = latents(parts)
    assert np.abs(pixels(to_images(FAMILY, parts, values, 2)).astype(int) - pixels(to_images(FAMILY, parts, values, 5))).max() <= 1
    assert to_images(FAMILY, parts, values)[0].size == (48, 32)
