"""sdxl.py against diffusers' own StableDiffusionXLPipeline, on the tiny model."""

from __future__ import annotations

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.families.sdxl import TARGETS, Sdxl
from charforgex.types import Components, Crop

FAMILY = Sdxl()
LONG = "a woman with red hair, " * 40
CAPTIONS = ["a photo of a man with short black hair", "xyzzy & \N{SNOWMAN}!", LONG]


@pytest.fixture(scope="module")
def parts() -> Components:
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def pipeline(parts):
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_scheduler(parts, scheduler) -> Components:
    return Components(parts.source, parts.denoiser_name, parts.modules | {"scheduler": scheduler}, parts.config)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_tiny_is_frozen_deterministic_and_small(parts):
    again, other = FAMILY.tiny(), FAMILY.tiny(seed=1)
    for name, network in parts.networks().items():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert sum(parameter.numel() for parameter in network.parameters()) < 50_000
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, again[name].state_dict()[key])
        assert any(not torch.equal(tensor, other[name].state_dict()[key]) for key, tensor in network.state_dict().items())


def test_tiny_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    FAMILY.tiny()
    assert torch.equal(torch.rand(3), expected)


def test_encode_text_is_the_pipelines(parts, pipeline):
    text = FAMILY.encode_text(parts, CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        tokens, _, pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(text.tokens_BLD[i : i + 1], tokens, rtol=0, atol=1e-6)
        torch.testing.assert_close(text.pooled_BD[i : i + 1], pooled, rtol=0, atol=1e-6)
        alone = FAMILY.encode_text(parts, [caption])
        assert torch.equal(alone.tokens_BLD, tokens), "one at a time they are the same bits"
        assert torch.equal(alone.pooled_BD, pooled)


def test_the_empty_caption_is_the_pipelines_unconditional_text(parts, pipeline):
    text = FAMILY.encode_text(parts, ["a cat", "", "  "])
    _, tokens, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, negative_prompt=None)
    for i in (1, 2):
        assert torch.equal(text.tokens_BLD[i : i + 1], tokens)
        assert torch.equal(text.pooled_BD[i : i + 1], pooled)
    assert not text.tokens_BLD[1].any()
    assert text.tokens_BLD[0].any()


def test_the_empty_caption_is_encoded_where_the_base_says_so(parts):
    honest = Components(parts.source, "unet", parts.modules, parts.config | {"force_zeros_for_empty_prompt": False})
    pipeline = FAMILY.pipeline(honest)
    _, tokens, _, pooled = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    text = FAMILY.encode_text(honest, [""])
    assert torch.equal(text.tokens_BLD, tokens)
    assert torch.equal(text.pooled_BD, pooled)
    assert tokens.any()


def test_seen_text_tells_what_was_cut(parts):
    assert FAMILY.seen_text(parts, "a photo of a man") == [("a photo of a man", 0)] * 2
    whole = len(parts["tokenizer"](LONG).input_ids)
    for kept, cut in FAMILY.seen_text(parts, LONG):
        assert cut == whole - 77 > 0
        assert LONG.replace(",", " ,").startswith(kept)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_denoise_and_to_clean_are_one_step_of_the_pipeline(parts, sampler, prediction):
    """With a single step at index 999 the pipeline returns its estimate of the clean latent."""
    import diffusers

    options = {"set_alpha_to_one": True, "clip_sample": False} if sampler == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, sampler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        **options,
    )
    parts = with_scheduler(parts, scheduler)
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    noise, text = draw(2, 4, 6, 8), FAMILY.encode_text(parts, CAPTIONS[:2])
    theirs = pipeline(
        CAPTIONS[:2], height=48, width=64, num_inference_steps=1, guidance_scale=1.0, latents=noise.clone(), output_type="latent"
    ).images

    process, t = FAMILY.process(parts), torch.ones(2)
    noisy = noise
    if sampler == "EulerDiscreteScheduler":  # it starts from noise * sigma and scales to unit variance for the network
        sigma = ((1 - process.alphas_cumprod[-1]) / process.alphas_cumprod[-1]).sqrt()
        noisy = noise * pipeline.scheduler.init_noise_sigma / (sigma**2 + 1).sqrt()
    ours = process.to_clean(noisy, FAMILY.denoise(parts.denoiser, noisy, t, text, Crop.whole(2, 48, 64)), t)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_time_ids_are_the_pipelines(parts, pipeline):
    crop = Crop(torch.tensor([[900.0, 1400.0]]), torch.tensor([[12.0, 340.0]]), torch.tensor([[768.0, 1023.0]]))
    expected = pipeline._get_add_time_ids((900, 1400), (12, 340), (768, 1023), torch.float32, text_encoder_projection_dim=32)
    seen = []
    handle = parts.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        text = FAMILY.encode_text(parts, ["a cat"])
        t = torch.tensor([321 / 999])
        full = FAMILY.denoise(parts.denoiser, draw(1, 4, 4, 4), t, text, crop)
        half = FAMILY.denoise(parts.denoiser.bfloat16(), draw(1, 4, 4, 4).bfloat16(), t, text, crop)
    finally:
        handle.remove()
        parts.denoiser.float()
    for args, kwargs in seen:
        assert torch.equal(kwargs["added_cond_kwargs"]["time_ids"], expected), "1023 pixels must not become 1024 in bfloat16"
        assert torch.equal(args[1], torch.tensor([321]))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.05)


def test_each_condition_matters(parts):
    """A family that forgot the crop, the pooled text or the time would pass every shape test."""
    text, noisy, t, crop = FAMILY.encode_text(parts, CAPTIONS[:1]), draw(1, 4, 4, 4), torch.tensor([0.5]), Crop.whole(1, 32, 32)
    base = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
    other = FAMILY.encode_text(parts, ["a dog"])
    shifted = Crop(crop.original_B2, crop.top_left_B2 + 16, crop.target_B2)
    changes = {
        "time": (noisy, t + 0.1, text, crop),
        "tokens": (noisy, t, type(text)(other.tokens_BLD, text.pooled_BD), crop),
        "pooled": (noisy, t, type(text)(text.tokens_BLD, other.pooled_BD), crop),
        "crop": (noisy, t, text, shifted),
    }
    for what, arguments in changes.items():
        assert (FAMILY.denoise(parts.denoiser, *arguments) - base).abs().max() > 1e-5, what


def test_pixels_are_encoded_to_the_scaled_posterior(parts):
    pixels = draw(2, 3, 48, 64).clamp(-1, 1)
    mean, std = FAMILY.encode_pixels(parts, pixels)
    with torch.no_grad():
        posterior = parts["vae"].encode(pixels).latent_dist
    torch.testing.assert_close(mean, 0.13025 * posterior.mean)
    torch.testing.assert_close(std, 0.13025 * posterior.std)


def test_decode_is_the_pipelines(parts, pipeline):
    latents = draw(2, 4, 6, 8)
    expected = pipeline(
        CAPTIONS[:2], height=48, width=64, num_inference_steps=1, latents=latents.clone(), generator=torch.manual_seed(0), output_type="pt"
    ).images
    final = pipeline(
        CAPTIONS[:2], height=48, width=64, num_inference_steps=1, latents=latents.clone(), generator=torch.manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(FAMILY.decode_latents(parts, final) / 2 + 0.5, expected, rtol=0, atol=1e-6)


def test_pipeline_lives_without_encoders_and_vae(parts):
    """Training drops them once all is cached, and still makes previews."""
    text, nothing = FAMILY.encode_text(parts, ["a cat"]), FAMILY.encode_text(parts, [""])
    light = Components("tiny", "unet", {name: parts[name] for name in ("unet", "scheduler")}, parts.config)
    calls = dict(
        prompt_embeds=text.tokens_BLD, pooled_prompt_embeds=text.pooled_BD, negative_prompt_embeds=nothing.tokens_BLD,
        negative_pooled_prompt_embeds=nothing.pooled_BD, height=48, width=64, num_inference_steps=2, output_type="latent",
    )  # fmt: skip
    pictures = []
    for some in (light, parts):
        pipeline = FAMILY.pipeline(some)
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline(**calls, latents=draw(1, 4, 6, 8)).images)
    assert pictures[0].shape == (1, 4, 6, 8)
    assert torch.equal(*pictures)


def test_lora_targets_exist(parts):
    modules = [name for name, _ in parts.denoiser.named_modules()]
    for preset in TARGETS:
        for target in FAMILY.lora_targets(preset, {}):
            assert any(name.endswith(f".{target}") for name in modules), target
    with pytest.raises(ConfigError, match=r"lora\.targets=attn.*attention"):
        FAMILY.lora_targets("attn", {})


def test_sizes(parts):
    assert (FAMILY.latent_stride(parts), FAMILY.pixel_multiple(parts), FAMILY.default_size(parts)) == (8, 16, 64)
    real = FAMILY.facts(
        {"unet": {"block_out_channels": [320, 640, 1280], "sample_size": 128}, "vae": {"block_out_channels": [128, 256, 512, 512]}}
    )
    assert real == {"latent_stride": 8, "pixel_multiple": 32, "default_size": 1024}
