"""sampling.py on the tiny models: equal to diffusers' own pipelines, each picture a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.errors import ConfigError, ModelError
from charforgex.families.flux import Flux
from charforgex.families.process import FlowMatching, shifted
from charforgex.families.sd3 import Sd3
from charforgex.families.sdxl import Sdxl
from charforgex.generation.sampling import (
    check_sampling,
    check_size,
    encode_prompts,
    initial_noise,
    needs_negative,
    sample,
    sample_latents,
    to_images,
)
from charforgex.generation.schedulers import FLOW_SAMPLERS, SAMPLERS, build_scheduler, check_scheduler_name
from charforgex.generation.settings import SamplingSettings
from charforgex.types import Components

FAMILY = Sdxl()
FLOW = {"flux": Flux(), "sd3": Sd3()}
SETTINGS = {"size": (32, 48), "steps": 3, "guidance": 4.0}
PROMPTS = ["a man with red hair", "a woman at the beach", "a cat", "a dog in the city", "a man with red hair"]
SEEDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def parts():
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def flow_parts():
    return {name: family.tiny() for name, family in FLOW.items()}


def with_scheduler(parts, scheduler):
    return Components(parts.source, parts.denoiser_name, parts.modules | {"scheduler": scheduler}, parts.config)


def flow_pipeline(name, parts):
    """diffusers' own, put together by hand."""
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    names = [part for group in FLOW[name].components.values() for part in group]
    pipeline = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}[name](**{part: parts[part] for part in [*names, "scheduler"]})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow_latents(name, parts, prompts=PROMPTS, seeds=SEEDS, **settings):
    text, negative = encode_prompts(FLOW[name], parts, prompts), FLOW[name].encode_text(parts, ["a dog"] * len(prompts))
    settings = {"size": (32, 48), "steps": 3, "guidance": 4.0} | settings
    return sample_latents(FLOW[name], parts, text, seeds, negative_text=negative, **settings)


def zero_snr(parts):
    """The same networks with the embedded base's kind of scheduler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return with_scheduler(parts, scheduler)


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flux", {"guidance": 1.0}),
        ("flux", {"guidance": 3.5}),
        ("flux", {"guidance": 3.5, "true_guidance": 2.0}),
        ("sd3", {"guidance": 1.0}),
        ("sd3", {"guidance": 4.5}),
    ],
)
def test_flow_equals_diffusers(flow_parts, name, settings):
    """Prompts in, latents out: the same bits as the pipelines of diffusers called by hand with the same noise."""
    family, parts = FLOW[name], flow_parts[name]
    mine = flow_latents(name, parts, PROMPTS[:2], SEEDS[:2], **settings)
    theirs = flow_pipeline(name, parts)(
        PROMPTS[:2], negative_prompt=["a dog"] * 2, height=32, width=48, num_inference_steps=3, guidance_scale=settings["guidance"],
        latents=family.pack(initial_noise(SEEDS[:2], (4, 4, 6))), max_sequence_length=24, output_type="latent",
        **({"true_cfg_scale": settings.get("true_guidance", 1.0)} if name == "flux" else {}),
    ).images  # fmt: skip
    assert torch.equal(mine, family.unpack(theirs, 4, 6))
    plain = flow_latents(name, parts, PROMPTS[:2], SEEDS[:2], guidance=1.0)
    assert (settings == {"guidance": 1.0}) == torch.equal(mine, plain)  # each of the guidances has an effect


@pytest.mark.parametrize("name", FLOW)
def test_flow_pictures_equal_diffusers(flow_parts, name):
    family, parts = FLOW[name], flow_parts[name]
    mine = sample(family, parts, PROMPTS[:1], SEEDS[:1], size=(32, 48), steps=2, guidance=3.5)
    theirs = flow_pipeline(name, parts)(
        PROMPTS[:1], height=32, width=48, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=24,
        latents=family.pack(initial_noise(SEEDS[:1], (4, 4, 6))),
    ).images  # fmt: skip
    assert np.abs(pixels(mine).astype(int) - pixels(theirs)).max() <= 1  # rounding to bytes
    assert pixels(mine).std() > 1


@pytest.mark.parametrize("scheduler", ["checkpoint", "dpmpp_2m"])
@pytest.mark.parametrize("name", FLOW)
def test_flow_batches_and_order_change_nothing(flow_parts, name, scheduler):
    settings = {"scheduler": scheduler} | ({"true_guidance": 2.0} if name == "flux" else {})
    whole = flow_latents(name, flow_parts[name], batch_size=5, **settings)
    backwards = flow_latents(name, flow_parts[name], PROMPTS[::-1], SEEDS[::-1], batch_size=2, **settings).flip(0)
    torch.testing.assert_close(backwards, whole, atol=2e-5, rtol=1e-4)
    assert (whole[0] - whole[4]).abs().max() > 0.1  # one prompt, two seeds


def flow_schedulers():
    """As Flux-dev, SD3 and schnell have them, and one by resolution whose line is its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    dev = {"shift": 3.0, "use_dynamic_shifting": True}
    return [Euler(**dev), Euler(shift=3.0), Euler(shift=1.0), Euler(**dev, base_shift=0.9, max_shift=2.0, base_image_seq_len=2)]


@pytest.mark.parametrize("name", FLOW)
def test_flow_schedulers_agree_in_the_limit(flow_parts, name):
    """All solve one equation. Another prediction type, or a time on another scale, would send one elsewhere."""
    found = {
        each: flow_latents(name, flow_parts[name], PROMPTS[:1], [3], steps=60, guidance=1.0, scheduler=each)
        for each in ("checkpoint", *FLOW_SAMPLERS)
    }
    own = found.pop("checkpoint")
    moved = (own - initial_noise([3], (4, 4, 6))).std() / own.std()
    away = {each: ((value - own).std() / own.std()).item() for each, value in found.items()}
    assert away.pop("euler") == 0 and max(away.values()) < 0.01 and moved > 0.3, (away, moved)


@pytest.mark.parametrize("scheduler", range(4))
@pytest.mark.parametrize("name", FLOW)
def test_flow_schedulers_shift_as_the_checkpoint_does(flow_parts, name, scheduler):
    """Through the pipelines, which work out the shift by resolution: 6 tokens at this size."""
    own = flow_schedulers()[scheduler]
    parts = with_scheduler(flow_parts[name], own)
    process = FlowMatching.from_config(own.config)
    shift = process.resolution_shift(6) if process.shift is None else process.shift
    found = {}
    for each in ("checkpoint", *FLOW_SAMPLERS):
        pipeline = flow_pipeline(name, parts)
        pipeline.scheduler = build_scheduler(own, each, 5)
        pipeline("a", height=32, width=48, num_inference_steps=5, max_sequence_length=24, output_type="latent")
        found[each] = pipeline.scheduler.sigmas
    assert torch.equal(found["euler"], found["checkpoint"])
    even = torch.linspace(1, 0, 6)
    for each in ("dpmpp_2m", "unipc"):  # which begin at 0.999, or end there
        torch.testing.assert_close(found[each], shifted(even, shift), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m_karras"])
def test_flow_checkpoints_refuse_schedulers_of_betas(scheduler):
    with pytest.raises(ConfigError, match=rf"scheduler={scheduler} is for .*betas.*use one of checkpoint, euler, dpmpp_2m, unipc"):
        build_scheduler(flow_schedulers()[0], scheduler, 10)


def test_flow_schedulers_that_no_seed_decides_or_that_space_otherwise_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    with pytest.raises(ConfigError, match="draws noise that no seed decides; use scheduler=euler"):
        build_scheduler(Euler(stochastic_sampling=True), "checkpoint", 4)
    assert not build_scheduler(Euler(stochastic_sampling=True), "euler", 4).config.stochastic_sampling
    with pytest.raises(ConfigError, match="does not know how this checkpoint spaces its steps; use scheduler=checkpoint"):
        build_scheduler(Euler(shift_terminal=0.1), "unipc", 4)


def test_solvers_begin_with_the_first_of_many_steps(flow_parts):
    """diffusers rounds their times to whole numbers, and would begin at the second of two that are equal."""
    with pytest.raises(ConfigError, match=r"steps=600 cannot be spaced"):
        build_scheduler(flow_schedulers()[1], "dpmpp_2m", 600)
    build_scheduler(flow_schedulers()[1], "euler", 600)


def test_guidance_of_no_effect_is_refused(flow_parts):
    flux, sd3 = FLOW["flux"], FLOW["sd3"]
    schnell = Components("schnell", "transformer", flow_parts["flux"].modules, flow_parts["flux"].config | {"guidance_embeds": False})
    assert not needs_negative(flux, schnell, 1.0) and needs_negative(flux, schnell, 1.0, 2.0)
    assert not needs_negative(flux, flow_parts["flux"], 3.5) and needs_negative(flux, flow_parts["flux"], 3.5, 1.5)
    assert not needs_negative(sd3, flow_parts["sd3"], 1.0) and needs_negative(sd3, flow_parts["sd3"], 4.5)
    with pytest.raises(ConfigError, match=r"guidance=3.5 has no effect: schnell .*Set guidance=1, or true_guidance=3.5"):
        needs_negative(flux, schnell, 3.5)
    with pytest.raises(ConfigError, match=r"true_guidance=2 has no meaning for sd3"):
        needs_negative(sd3, flow_parts["sd3"], 4.5, 2.0)
    for name, family in FLOW.items():
        with pytest.raises(ConfigError, match=rf"guidance_rescale=0.7 has no meaning for {name}"):
            needs_negative(family, flow_parts[name], 1.0, guidance_rescale=0.7)


def test_settings_are_checked_without_networks(flow_parts):
    """As before a training, and before a base is loaded."""
    bare = {name: parts if name == "scheduler" else None for name, parts in flow_parts["sd3"].modules.items()}
    bare = Components("sd3", "transformer", bare, flow_parts["sd3"].config)
    asked = {"steps": 5, "guidance": 4.5, "true_guidance": 1.0}
    assert type(check_sampling(FLOW["sd3"], bare, SamplingSettings(**asked, scheduler="unipc"))).__name__ == "UniPCMultistepScheduler"
    with pytest.raises(ConfigError, match="scheduler=ddim is for"):
        check_sampling(FLOW["sd3"], bare, SamplingSettings(**asked, scheduler="ddim"))
    with pytest.raises(ConfigError, match="negative=a dog has no effect with guidance=1; guidance must be above 1"):
        check_sampling(FLOW["sd3"], bare, SamplingSettings(**asked | {"guidance": 1.0}, negative="a dog"))


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
