"""sd3.py against diffusers' own StableDiffusion3Pipeline, on the tiny model."""

from __future__ import annotations

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.families.sd3 import TARGETS, Sd3
from charforgex.families.tiny import t5_tokenizer
from charforgex.lora.inject import inject
from charforgex.training.losses import computing_in
from charforgex.types import Components, Crop, Text

FAMILY = Sd3()
LONG = "a woman with red hair, " * 40
CAPTIONS = ["a photo of a man with short black hair", "xyzzy & \N{SNOWMAN}!", LONG, ""]
SIZE = dict(height=48, width=64)


@pytest.fixture(scope="module")
def parts() -> Components:
    return FAMILY.tiny()


@pytest.fixture
def pipeline(parts):
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without(parts: Components, *names: str) -> Components:
    return Components(parts.source, parts.denoiser_name, {n: m for n, m in parts.modules.items() if n not in names}, parts.config)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def encode(pipeline, prompt, tokens: int = 256):
    states, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return states, pooled


def test_encode_text_is_the_pipelines(parts):
    """77 CLIP tokens, two encoders side by side and zeros up to T5's width, and 256 of T5, padding attended to."""
    parts = without(parts)
    parts.modules["tokenizer_3"] = t5_tokenizer(512)
    pipeline = FAMILY.pipeline(parts)
    text = FAMILY.encode_text(parts, CAPTIONS)
    assert text.tokens_BLD.shape == (len(CAPTIONS), 77 + 256, 64)
    tokens, pooled = encode(pipeline, CAPTIONS)
    assert torch.equal(text.tokens_BLD, tokens)
    assert torch.equal(text.pooled_BD, pooled)
    for caption in CAPTIONS:
        alone, theirs = FAMILY.encode_text(parts, [caption]), encode(pipeline, caption)
        assert torch.equal(alone.tokens_BLD, theirs[0])
        assert torch.equal(alone.pooled_BD, theirs[1])


def test_the_empty_caption_is_the_pipelines_unconditional_text(parts, pipeline):
    _, tokens, _, pooled = pipeline.encode_prompt("a cat", None, None, device="cpu", max_sequence_length=24)
    text = FAMILY.encode_text(parts, [""])
    assert torch.equal(text.tokens_BLD, tokens)
    assert torch.equal(text.pooled_BD, pooled)


def test_without_t5_its_places_are_zeros_as_the_pipelines(parts):
    light = without(parts, "text_encoder_3", "tokenizer_3")
    text, theirs = FAMILY.encode_text(light, CAPTIONS[:2]), encode(FAMILY.pipeline(light), CAPTIONS[:2])
    assert torch.equal(text.tokens_BLD, theirs[0])
    assert torch.equal(text.pooled_BD, theirs[1])
    assert text.tokens_BLD.shape == (2, 77 + 256, 64)
    assert not text.tokens_BLD[:, 77:].any()
    assert len(FAMILY.seen_text(light, "a cat")) == 2


@pytest.mark.parametrize("absent", [("",), ("_2",), ("", "_2"), ("", "_3"), ("_2", "_3")], ids=str)
def test_absent_encoders_are_zeros_in_their_own_places(parts, absent):
    """The two CLIP encoders are 32 wide each, and so are their pooled vectors: what is there stays where it was."""
    whole = FAMILY.encode_text(parts, CAPTIONS[:2])
    light = without(parts, *(f"{kind}{suffix}" for suffix in absent for kind in ("text_encoder", "tokenizer")))
    text = FAMILY.encode_text(light, CAPTIONS[:2])
    assert text.pooled_BD.shape == (2, 64)
    assert text.tokens_BLD.shape == (2, 77 + (256 if "_3" in absent else 24), 64)
    for suffix, columns in (("", slice(0, 32)), ("_2", slice(32, 64))):
        for found, expected in ((text.tokens_BLD[:, :77], whole.tokens_BLD[:, :77]), (text.pooled_BD, whole.pooled_BD)):
            assert torch.equal(
                found[..., columns], torch.zeros_like(expected[..., columns]) if suffix in absent else expected[..., columns]
            )
    if "_3" not in absent:
        assert torch.equal(text.tokens_BLD[:, 77:], whole.tokens_BLD[:, 77:])
    t = torch.tensor([0.5, 0.5])
    assert FAMILY.denoise(parts.denoiser, draw(2, 4, 6, 8), t, text, Crop.whole(2, 48, 64)).isfinite().all()


def test_without_any_encoder_a_caption_means_nothing(parts):
    bare = without(parts, "text_encoder", "text_encoder_2", "text_encoder_3")
    with pytest.raises(ConfigError, match="none of its three text encoders"):
        FAMILY.encode_text(bare, ["a cat"])


def test_seen_text_tells_what_each_encoder_cut(parts):
    assert [cut for _, cut in FAMILY.seen_text(parts, "a photo of a man")] == [0, 0, 0]
    one, two, t5 = FAMILY.seen_text(parts, LONG)
    assert one[1] == two[1] == len(parts["tokenizer"](LONG).input_ids) - 77 > 0
    assert t5[1] == len(parts["tokenizer_3"](LONG).input_ids) - 24 > one[1]


@pytest.mark.parametrize("dual", [(), (0,)], ids=["SD3", "SD3.5 medium"])
def test_denoise_and_to_clean_are_a_step_of_the_pipeline(parts, dual):
    """The last of its Euler steps goes all the way to the clean latent. First from pure noise, then from the middle."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(3)
    transformer = SD3Transformer2DModel.from_config({**parts.denoiser.config, "dual_attention_layers": dual}).eval()
    parts = Components("tiny", "transformer", parts.modules | {"transformer": transformer}, parts.config)
    pipeline, process = FAMILY.pipeline(parts), FAMILY.process(parts)
    pipeline.set_progress_bar_config(disable=True)
    noise, text = draw(2, 4, 6, 8), FAMILY.encode_text(parts, CAPTIONS[:2])
    for sigmas in ([1.0], [1.0, 0.25]):  # before the shift by 3, which makes them 1 and 1 / 2
        inputs = []
        handle = transformer.register_forward_pre_hook(lambda _, args, kwargs, inputs=inputs: inputs.append(kwargs), with_kwargs=True)
        theirs = pipeline(
            CAPTIONS[:2], **SIZE, sigmas=sigmas, guidance_scale=1.0, latents=noise.clone(), max_sequence_length=24,
            output_type="latent",
        ).images  # fmt: skip
        told = inputs[-1]
        noisy, t = told["hidden_states"], pipeline.scheduler.sigmas[len(sigmas) - 1].repeat(2)
        assert t.tolist() == ([1.0, 1.0] if len(sigmas) == 1 else [0.5, 0.5])
        with torch.no_grad():
            ours = process.to_clean(noisy, FAMILY.denoise(transformer, noisy, t, text, Crop.whole(2, 48, 64)), t)
        handle.remove()
        assert (ours - noisy).std() > 0.1
        assert torch.equal(ours, theirs), sigmas
        told.pop("joint_attention_kwargs")
        assert told.keys() == inputs[-1].keys()
        for name, value in told.items():
            assert value is inputs[-1][name] is False or torch.equal(value, inputs[-1][name]), name


def test_times_reach_the_sinusoid_in_float32(parts):
    """In bfloat16, 700.1 and 700.3 would both be 700."""
    t, crop = torch.tensor([0.7001, 0.7003]), Crop.whole(2, 48, 64)
    text, noisy = FAMILY.encode_text(parts, CAPTIONS[:1])[[0, 0]], draw(1, 4, 6, 8).repeat(2, 1, 1, 1)
    seen = []
    handle = parts.denoiser.time_text_embed.time_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        with torch.no_grad():
            full = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
            parts.denoiser.bfloat16()
            with computing_in(torch.bfloat16, torch.device("cpu")):
                half = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
    finally:
        handle.remove()
        parts.denoiser.float()
    assert torch.equal(*seen)
    assert not torch.equal(seen[0][0], seen[0][1])
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
    from diffusers import StableDiffusion3Img2ImgPipeline

    pixels = draw(2, 3, 48, 64).clamp(-1, 1)
    mean, std = FAMILY.encode_pixels(parts, pixels)
    with torch.no_grad():
        posterior = parts["vae"].encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, 1.5305 * posterior.std)
    img2img = StableDiffusion3Img2ImgPipeline(**FAMILY.pipeline(parts).components)
    img2img.scheduler.set_timesteps(4)
    t = img2img.scheduler.timesteps[2:3]
    theirs = img2img.prepare_latents(pixels, t, 2, 1, torch.float32, "cpu", torch.Generator().manual_seed(3))
    fresh, noise = torch.randn(2, *mean.shape, generator=torch.Generator().manual_seed(3))
    ours = FAMILY.process(parts).add_noise(mean + std * fresh, noise, t.repeat(2) / 1000)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_decode_is_the_pipelines(parts, pipeline):
    calls = dict(prompt=CAPTIONS[:2], **SIZE, num_inference_steps=1, max_sequence_length=24)
    final = pipeline(**calls, latents=draw(2, 4, 6, 8), output_type="latent").images
    pixels = pipeline(**calls, latents=draw(2, 4, 6, 8), output_type="pt").images
    assert torch.equal(FAMILY.decode_latents(parts, final) / 2 + 0.5, pixels)


def test_lora_targets_exist(parts):
    modules = {path for path, module in parts.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {preset: set(inject(FAMILY.tiny().denoiser, FAMILY.lora_targets(preset, parts.denoiser.config), 1, 1.0)) for preset in TARGETS}
    left_out = {path for path in modules - found["all"] if path.startswith("transformer_blocks.")}
    assert left_out == {"transformer_blocks.1.attn.add_q_proj"}, "all is every linear layer of the blocks but the one that has no effect"
    assert {path for path in found["attention"] if "attn2" in path} == set()
    assert found["attention_dual"] - found["attention"] == {f"transformer_blocks.0.attn2.to_{name}" for name in ("q", "k", "v", "out.0")}
    assert {path.split(".")[2] for path in found["attention_mlp"] - found["attention"]} == {"ff", "ff_context"}
    with pytest.raises(ConfigError, match=r"lora\.targets=attn.*attention"):
        FAMILY.lora_targets("attn", parts.denoiser.config)


def test_without_a_second_attention(parts):
    """SD3 and SD3.5 large: older configs do not even name it."""
    for config in ({"num_layers": 2}, {"num_layers": 2, "dual_attention_layers": ()}):
        assert not any("attn2" in target for target in FAMILY.lora_targets("all", config))
        with pytest.raises(ConfigError, match=r"lora\.targets=attention_dual.*choose attention"):
            FAMILY.lora_targets("attention_dual", config)


def test_sizes(parts):
    assert (FAMILY.latent_stride(parts), FAMILY.pixel_multiple(parts), FAMILY.default_size(parts)) == (8, 16, 64)
    transformer = {"patch_size": 2, "sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    real = FAMILY.facts({"transformer": transformer, "vae": {"block_out_channels": [128, 256, 512, 512]}})
    assert real == {"latent_stride": 8, "pixel_multiple": 16, "default_size": 1024, "text_width": 4096, "pooled_width": 2048}
