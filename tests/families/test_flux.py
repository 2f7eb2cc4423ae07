"""flux.py against diffusers' own FluxPipeline, on the tiny model."""

from __future__ import annotations

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.families.flux import TARGETS, Flux
from charforgex.families.tiny import t5_tokenizer
from charforgex.lora.inject import inject
from charforgex.training.losses import computing_in
from charforgex.types import Components, Crop, Text

FAMILY = Flux()
LONG = "a woman with red hair, " * 40
CAPTIONS = ["a photo of a man with short black hair", "xyzzy & \N{SNOWMAN}!", LONG, ""]
SIZE = dict(height=48, width=64)


def dev() -> Components:
    return FAMILY.tiny()


def schnell() -> Components:
    """Without a guidance vector, and with the constant shift of its scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    parts = FAMILY.tiny()
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel.from_config({**parts.denoiser.config, "guidance_embeds": False}).eval().requires_grad_(False)
    modules = parts.modules | {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)}
    return Components(
        "tiny schnell", "transformer", modules, parts.config | FAMILY.facts({"transformer": transformer.config, "vae": parts["vae"].config})
    )


@pytest.fixture(scope="module", params=[dev, schnell], ids=lambda make: make.__name__)
def parts(request) -> Components:
    return request.param()


@pytest.fixture
def pipeline(parts):
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("make", "tokens"), [(dev, 512), (schnell, 256)])
def test_encode_text_is_the_pipelines(make, tokens):
    """T5 gives 512 tokens, 256 where there is no guidance vector, and padding is attended to; of CLIP there is the pooled vector alone."""
    parts = make()
    parts.modules["tokenizer_2"] = t5_tokenizer(512)
    pipeline = FAMILY.pipeline(parts)
    text = FAMILY.encode_text(parts, CAPTIONS)
    assert text.tokens_BLD.shape == (len(CAPTIONS), tokens, 32)
    theirs = pipeline.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=tokens)
    assert torch.equal(text.tokens_BLD, theirs[0])
    assert torch.equal(text.pooled_BD, theirs[1])
    assert not theirs[2].any(), "text has no position"
    for caption in CAPTIONS:
        alone, theirs = FAMILY.encode_text(parts, [caption]), pipeline.encode_prompt(caption, device="cpu", max_sequence_length=tokens)
        assert torch.equal(alone.tokens_BLD, theirs[0])
        assert torch.equal(alone.pooled_BD, theirs[1])


def test_seen_text_tells_what_each_encoder_cut(parts):
    assert [cut for _, cut in FAMILY.seen_text(parts, "a photo of a man")] == [0, 0]
    clip, t5 = FAMILY.seen_text(parts, LONG)
    assert clip[1] == len(parts["tokenizer"](LONG).input_ids) - 77 > 0
    assert t5[1] == len(parts["tokenizer_2"](LONG).input_ids) - 24 > clip[1]
    assert LONG.startswith(t5[0])


def test_packing_is_the_pipelines():
    """Latents numbered by (channel, row, column): a token is the 2 x 2 of each channel in turn."""
    from diffusers import FluxPipeline

    latents = draw(2, 4, 6, 8)
    packed = FAMILY.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(packed[1, 5], latents[1, :, 2:4, 2:4].reshape(-1)), "token 5 of rows of 4 is row 1, column 1"
    assert torch.equal(FAMILY.unpack(packed, 6, 8), latents)
    assert torch.equal(FAMILY.unpack(packed, 6, 8), FluxPipeline._unpack_latents(packed, 48, 64, 8))


def test_the_network_is_told_what_the_pipeline_tells_it(parts, pipeline):
    """Every argument of the network, but for guidance: 1 where the network takes one, none where it takes none."""
    seen = []
    handle = parts.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    noise, text = draw(2, 4, 6, 8), FAMILY.encode_text(parts, CAPTIONS[:2])
    try:
        pipeline(
            CAPTIONS[:2],
            **SIZE,
            num_inference_steps=1,
            guidance_scale=3.5,
            latents=FAMILY.pack(noise),
            max_sequence_length=24,
            output_type="latent",
        )
        FAMILY.denoise(parts.denoiser, noise, torch.ones(2), text, Crop.whole(2, 48, 64))
    finally:
        handle.remove()
    theirs, ours = seen
    guidance = theirs.pop("guidance"), ours.pop("guidance")
    expected = (None, None) if guidance[0] is None else ([3.5, 3.5], [1.0, 1.0])
    assert tuple(g if g is None else g.tolist() for g in guidance) == expected
    assert (guidance[0] is None) is not FAMILY.is_distilled(parts)
    theirs.pop("joint_attention_kwargs")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert value is ours[name] is False or torch.equal(value, ours[name]), name
    assert ours["img_ids"].tolist() == [[0, row, column] for row in range(3) for column in range(4)]


def test_denoise_and_to_clean_are_a_step_of_the_pipeline(parts, pipeline):
    """The last of its Euler steps goes all the way to the clean latent. First from pure noise, then from the middle."""
    noise, text = draw(2, 4, 6, 8), FAMILY.encode_text(parts, CAPTIONS[:2])
    process = FAMILY.process(parts)
    for steps in (1, 3):
        inputs = []
        handle = parts.denoiser.register_forward_pre_hook(lambda _, args, kwargs, inputs=inputs: inputs.append(kwargs), with_kwargs=True)
        try:
            theirs = pipeline(
                CAPTIONS[:2], **SIZE, num_inference_steps=steps, guidance_scale=1.0, latents=FAMILY.pack(noise), max_sequence_length=24,
                output_type="latent",
            ).images  # fmt: skip
        finally:
            handle.remove()
        noisy, t = FAMILY.unpack(inputs[-1]["hidden_states"], 6, 8), pipeline.scheduler.sigmas[steps - 1].repeat(2)
        assert (t == 1).all() if steps == 1 else (t > 0.2).all() and (t < 0.7).all()
        ours = process.to_clean(noisy, FAMILY.denoise(parts.denoiser, noisy, t, text, Crop.whole(2, 48, 64)), t)
        assert (ours - noisy).std() > 0.1
        difference = (FAMILY.pack(ours) - theirs).abs().max().item()
        assert difference == 0 if steps == 1 else difference < 1e-6, steps  # theirs goes through 1000 sigma and back


def test_times_reach_the_sinusoid_in_float32(parts):
    """diffusers casts times to the hidden states' dtype, under autocast bfloat16: 0.7001 and 0.7003 were one time, 0.7031."""
    t, crop = torch.tensor([0.7001, 0.7003]), Crop.whole(2, 48, 64)
    text, noisy = FAMILY.encode_text(parts, CAPTIONS[:1])[[0, 0]], draw(1, 4, 6, 8).repeat(2, 1, 1, 1)
    seen = []
    handle = parts.denoiser.time_text_embed.time_proj.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        with torch.no_grad():
            full = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
            parts.denoiser.bfloat16()
            with computing_in(torch.bfloat16, torch.device("cpu")):
                half = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
                per_network = len(seen) // 2
                plain = parts.denoiser.time_text_embed.time_proj((1000 * t).bfloat16())
    finally:
        handle.remove()
        parts.denoiser.float()
    assert torch.equal(seen[0][0], 1000 * t)
    assert torch.equal(seen[per_network][0], 1000 * t)
    assert torch.equal(seen[per_network][1], seen[0][1]), "the embedding is that of the float32 time"
    assert torch.equal(plain[0], plain[1]) and not torch.equal(seen[0][1][0], seen[0][1][1]), "which bfloat16 could not tell apart"
    assert not parts.denoiser.time_text_embed._forward_pre_hooks, "nothing stays behind for the pipeline"
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.05)


def test_each_condition_matters(parts):
    """A family that forgot the pooled text or the time would pass every shape test. The crop is SDXL's."""
    text, noisy, t, crop = FAMILY.encode_text(parts, CAPTIONS[:1]), draw(1, 4, 4, 4), torch.tensor([0.5]), Crop.whole(1, 32, 32)
    base, other = FAMILY.denoise(parts.denoiser, noisy, t, text, crop), FAMILY.encode_text(parts, ["a dog"])
    changes = {
        "time": (noisy, t + 0.1, text), "tokens": (noisy, t, Text(other.tokens_BLD, text.pooled_BD)),
        "pooled": (noisy, t, Text(text.tokens_BLD, other.pooled_BD)), "place": (noisy.transpose(2, 3), t, text),
    }  # fmt: skip
    for what, arguments in changes.items():
        assert (FAMILY.denoise(parts.denoiser, *arguments, crop) - base).abs().max() > 1e-5, what


def test_pixels_are_encoded_to_the_shifted_and_scaled_posterior(parts):
    from diffusers import FluxImg2ImgPipeline

    pixels = draw(2, 3, 48, 64).clamp(-1, 1)
    mean, std = FAMILY.encode_pixels(parts, pixels)
    with torch.no_grad():
        posterior = parts["vae"].encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, 1.5305 * posterior.std)
    theirs = FluxImg2ImgPipeline(**FAMILY.pipeline(parts).components)._encode_vae_image(pixels, torch.Generator().manual_seed(3))
    fresh = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean + std * fresh, theirs, rtol=0, atol=1e-5)


def test_decode_is_the_pipelines(parts, pipeline):
    calls = dict(prompt=CAPTIONS[:2], **SIZE, num_inference_steps=1, latents=FAMILY.pack(draw(2, 4, 6, 8)), max_sequence_length=24)
    final = FAMILY.unpack(pipeline(**calls, output_type="latent").images, 6, 8)
    assert torch.equal(FAMILY.decode_latents(parts, final) / 2 + 0.5, pipeline(**calls, output_type="pt").images)


def test_lora_targets_exist(parts):
    modules = {path: module for path, module in parts.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {}
    for preset in TARGETS:
        found[preset] = inject(FAMILY.tiny().denoiser, FAMILY.lora_targets(preset, parts.denoiser.config), 1, 1.0)
        assert set(found[preset]) <= set(modules)
    outer = {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"}
    left_out = {path for path in set(modules) - set(found["all"]) if not path.startswith("time_text_embed.")}
    assert left_out == outer, "all is every linear layer of the blocks"
    assert {path.split(".")[-1] for path in found["attention"]} == {
        "to_q",
        "to_k",
        "to_v",
        "0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    }
    with pytest.raises(ConfigError, match=r"lora\.targets=attn.*attention"):
        FAMILY.lora_targets("attn", parts.denoiser.config)


def test_sizes(parts):
    assert (FAMILY.latent_stride(parts), FAMILY.pixel_multiple(parts)) == (8, 16)
    vae = {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}
    for guided, tokens in ((True, 512), (False, 256)):
        real = FAMILY.facts({"transformer": {"guidance_embeds": guided}, "vae": vae})
        assert real == {"latent_stride": 8, "pixel_multiple": 16, "default_size": 1024, "text_tokens": tokens, "guidance_embeds": guided}
