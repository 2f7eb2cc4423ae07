"""AnimateDiff against diffusers' UNetMotionModel and AnimateDiffPipeline, on the tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charforgex.errors import ConfigError, LoraError
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.bases import get
from charforgex.families.clips import CHUNK, TARGETS
from charforgex.lora import formats, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter, unload_adapter
from charforgex.lora.state import Lora, LoraLayer
from charforgex.types import Components, Crop

FAMILY = AnimateDiff()
CAPTIONS = ["a photo of a man with short black hair", "a dog at the beach, " * 40]
CROP = Crop.whole(2, 48, 64)


@pytest.fixture(scope="module")
def parts() -> Components:
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def pipeline(parts):
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- the schedule ----


def test_the_schedule_is_the_linear_one(parts):
    """Signal to noise at six indices, in float64 from the definition of linear betas; those of the base's own would be others."""
    indices = [0, 147, 199, 499, 799, 999]
    process = FAMILY.process(parts)
    found = process.snr(torch.tensor(indices) / 999)
    power = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[indices]
    np.testing.assert_allclose(found, power / (1 - power), rtol=3e-4)
    np.testing.assert_allclose(found, [1175.47, 3.5621, 2.0802, 0.19305, 0.01431, 0.00158], rtol=3e-3)
    assert (process.snr(torch.tensor([119, 120]) / 999) > 5).tolist() == [True, False]


def test_noise_is_that_of_the_pipelines_scheduler(parts):
    clean, noise, index = draw(2, 4, 3, 6, 8), draw(2, 4, 3, 8, 6).transpose(3, 4), torch.tensor([120, 999])
    theirs = parts["scheduler"].add_noise(clean, noise, index)
    torch.testing.assert_close(FAMILY.process(parts).add_noise(clean, noise, index / 999), theirs, rtol=0, atol=1e-6)


# ---- parity ----


def test_encode_text_is_the_pipelines(parts, pipeline):
    text = FAMILY.encode_text(parts, [*CAPTIONS, ""])
    for i, caption in enumerate(CAPTIONS):
        tokens, unsaid = pipeline.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=True)
        torch.testing.assert_close(text.tokens_BLD[i : i + 1], tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.tokens_BLD[2:], unsaid, rtol=0, atol=1e-6)
    assert FAMILY.seen_text(parts, "a photo of a man") == [("a photo of a man", 0)]
    assert FAMILY.seen_text(parts, CAPTIONS[1])[0][1] > 0


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_denoise_is_the_network_called_directly(parts, frames):
    """Frame by frame the text is the clip's own, and the two clips do not see each other."""
    text, noisy, index = FAMILY.encode_text(parts, CAPTIONS), draw(2, 4, frames, 6, 8), torch.tensor([300, 812])
    ours = FAMILY.denoise(parts.denoiser, noisy, index / 999, text, CROP)
    assert ours.shape == noisy.shape
    for i in range(2):
        tokens = text.tokens_BLD[i].expand(frames, -1, -1)
        alone = parts.denoiser(noisy[i : i + 1], index[i], encoder_hidden_states=tokens).sample
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_frames_see_each_other_and_know_their_order(parts):
    text, noisy, t = FAMILY.encode_text(parts, CAPTIONS[:1]), draw(1, 4, 3, 6, 8), torch.tensor([0.5])
    base = FAMILY.denoise(parts.denoiser, noisy, t, text, CROP)
    other = noisy.clone()
    other[:, :, 2] += 1
    assert (FAMILY.denoise(parts.denoiser, other, t, text, CROP) - base)[:, :, 0].abs().max() > 1e-5
    backwards = FAMILY.denoise(parts.denoiser, noisy.flip(2), t, text, CROP).flip(2)
    assert (backwards - base).abs().max() > 1e-5


def test_denoise_and_to_clean_are_one_step_of_the_pipeline(parts):
    """With a single step at index 999 the pipeline returns its estimate of the clean latent."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(parts["scheduler"].config, timestep_spacing="trailing", set_alpha_to_one=True)
    stepping = FAMILY.pipeline(Components("tiny", "unet", parts.modules | {"scheduler": scheduler}, parts.config))
    stepping.set_progress_bar_config(disable=True)
    noise, text = draw(2, 4, 3, 6, 8), FAMILY.encode_text(parts, CAPTIONS)
    theirs = stepping(
        CAPTIONS, num_frames=3, height=48, width=64, num_inference_steps=1, guidance_scale=1.0, latents=noise.clone(), output_type="latent"
    ).frames
    with torch.no_grad():
        ours = FAMILY.process(parts).to_clean(noise, FAMILY.denoise(parts.denoiser, noise, torch.ones(2), text, CROP), torch.ones(2))
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frames_are_encoded_and_decoded_as_pictures_are(parts, pipeline):
    """Also past one chunk of them; the second clip's frames do not end up in the first."""
    clips = draw(2, 3, CHUNK - 2, 16, 24).clamp(-1, 1)
    mean, std = FAMILY.encode_pixels(parts, clips)
    latents = draw(2, 4, CHUNK - 2, 2, 3)
    pixels = FAMILY.decode_latents(parts, latents)
    assert mean.shape == (2, 4, CHUNK - 2, 2, 3) and pixels.shape == clips.shape
    for clip, frame in ((0, 0), (0, CHUNK - 3), (1, 5)):
        with torch.no_grad():
            posterior = parts["vae"].encode(clips[clip : clip + 1, :, frame]).latent_dist
        torch.testing.assert_close(mean[clip, :, frame], 0.18215 * posterior.mean[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(std[clip, :, frame], 0.18215 * posterior.std[0], rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs = pipeline.decode_latents(latents)
    torch.testing.assert_close(pixels, theirs.clamp(-1, 1), rtol=0, atol=2e-5)


def test_pipeline_lives_without_encoders_and_vae(parts):
    text, nothing = FAMILY.encode_text(parts, ["a cat"]), FAMILY.encode_text(parts, [""])
    light = Components("tiny", "unet", {name: parts[name] for name in ("unet", "scheduler")}, parts.config)
    clips = []
    for some in (light, parts):
        pipeline = FAMILY.pipeline(some)
        pipeline.set_progress_bar_config(disable=True)
        clips.append(
            pipeline(
                prompt_embeds=text.tokens_BLD, negative_prompt_embeds=nothing.tokens_BLD, num_frames=3, height=48, width=64,
                num_inference_steps=2, latents=draw(1, 4, 3, 6, 8), output_type="latent",
            ).frames
        )  # fmt: skip
    assert clips[0].shape == (1, 4, 3, 6, 8)
    assert torch.equal(*clips)


def test_too_many_frames_are_refused(parts):
    text, crop = FAMILY.encode_text(parts, ["a cat"]), Crop.whole(1, 16, 16)
    with pytest.raises(ConfigError, match=r"9 frames.* know 8 at once"):
        FAMILY.denoise(parts.denoiser, draw(1, 4, 9, 2, 2), torch.ones(1), text, crop)


# ---- LoRAs ----


def adapted(preset: str):
    """A network with an adapter of a preset that changes something."""
    network = FAMILY.tiny().denoiser
    paths = inject(network, FAMILY.lora_targets(preset, network.config), rank=2, alpha=2)
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(network).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)
    return network, paths


@pytest.mark.parametrize("preset", TARGETS)
def test_every_layer_of_a_preset_learns(parts, preset):
    network, paths = adapted(preset)
    text, t = FAMILY.encode_text(parts, CAPTIONS), torch.tensor([0.3, 0.8])
    FAMILY.denoise(network, draw(2, 4, 3, 6, 8), t, text, CROP).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(network).values())
    kinds = {kind for path in paths for kind in ("motion_modules", "attentions", "resnets") if f".{kind}." in path}
    assert kinds == set(TARGETS[preset])


def test_motion_loras_on_proj_in_and_proj_out_act_as_weights_do(parts):
    """diffusers names the argument of their calls, which peft's own layers do not take."""
    text, clip, t = FAMILY.encode_text(parts, CAPTIONS), draw(2, 4, 3, 6, 8), torch.tensor([0.3, 0.8])
    paths = [path for path in FAMILY.lora_targets("attention_mlp", parts.denoiser.config) if path.endswith(("s.0.proj_in", "s.0.proj_out"))]
    paths = [path for path in paths if "motion_modules" in path]
    assert len(paths) == 10

    def predicted(some):
        with torch.no_grad():
            return FAMILY.denoise(some.denoiser, clip, t, text, CROP)

    def lora(seed):
        sizes = {path: parts.denoiser.get_submodule(path).weight.shape for path in paths}
        return Lora({f"unet.{path}": LoraLayer(draw(2, size[1]) * seed, draw(size[0], 2) * 0.1, 2.0) for path, size in sizes.items()})

    changed = FAMILY.tiny()
    before = predicted(changed)
    load_adapter(changed, lora(1), "first")
    load_adapter(changed, lora(2), "second", 0.5)
    merged = FAMILY.tiny()
    for path in paths:
        layer = lora(1).layers[f"unet.{path}"].delta() + 0.5 * lora(2).layers[f"unet.{path}"].delta()
        merged.denoiser.get_submodule(path).weight.data += layer
    assert (predicted(merged) - before).abs().max() > 0.01
    torch.testing.assert_close(predicted(changed), predicted(merged), rtol=1e-4, atol=1e-5)
    unload_adapter(changed, "first")
    unload_adapter(changed, "second")
    assert torch.equal(predicted(changed), before)


def test_the_published_base_has_the_same_presets():
    """Of SD1.5: 16 blocks with two attentions of four layers; 20 motion modules with as many, 21 with the one in the middle."""
    for name, motion in (("animatediff_v3", 20), ("animatediff_v2", 21)):
        config = get(name).config
        assert len(FAMILY.lora_targets("spatial", config)) == 16 * 8
        assert len(FAMILY.lora_targets("temporal", config)) == motion * 8
        assert len(FAMILY.lora_targets("attention", config)) == 16 * 8 + motion * 8
        both = [path for path in FAMILY.lora_targets("attention_mlp", config) if path.endswith((".proj_in", ".proj_out"))]
        assert len(both) == 2 * (16 + motion)
    with pytest.raises(ConfigError, match=r"lora\.targets=motion.*temporal"):
        FAMILY.lora_targets("motion", config)


def test_each_path_goes_to_files_that_can_hold_it(tmp_path):
    """A temporal LoRA is AnimateDiff's own motion LoRA; a spatial one is any LoRA of Stable Diffusion 1.5."""
    for preset, format, refused in (("temporal", "animatediff", "kohya"), ("spatial", "kohya", "animatediff")):
        network, paths = adapted(preset)
        lora = read_adapter(network, "unet")
        path = writing.save_verified(lora, tmp_path / f"{preset}.safetensors", format, FAMILY, network)
        again = formats.read(path, FAMILY, network.config)
        assert set(again.layers) == {f"unet.{path}" for path in paths}
        for name, layer in lora.layers.items():  # files hold half precision
            torch.testing.assert_close(again.layers[name].delta(), layer.delta(), rtol=1e-2, atol=1e-3)
        with pytest.raises(LoraError, match="no place in the format"):
            writing.to_tensors(lora, refused, FAMILY, network.config, torch.float32)


def test_sizes(parts):
    assert (FAMILY.latent_stride(parts), FAMILY.pixel_multiple(parts), FAMILY.default_size(parts)) == (8, 16, 64)
    vae = {"block_out_channels": [128, 256, 512, 512]}
    real = FAMILY.facts({"unet": get("animatediff_v3").config, "vae": vae})
    assert real == {"latent_stride": 8, "pixel_multiple": 64, "default_size": 512, "max_frames": 32}
