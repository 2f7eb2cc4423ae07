"""Clips are diffusers' own, bit for bit, where diffusers can make them; and what it cannot: windows, travelling prompts, loops."""

import numpy as np
import pytest
import torch

from charforgex.draws import torch_generator
from charforgex.errors import ConfigError, ModelError
from charforgex.families.animatediff import AnimateDiff
from charforgex.generation.clips import Beginning, clip_noise, decode_frames, encode_frames, first_step, sample_clip, travel
from charforgex.generation.schedulers import build_scheduler
from charforgex.generation.windows import Windowing
from charforgex.types import Text

FAMILY = AnimateDiff()
SIZE, LATENT = (32, 48), (4, 4, 6)
ASK = {"frames": 5, "size": SIZE, "steps": 4, "guidance": 5.0}


@pytest.fixture(scope="module")
def parts():
    return FAMILY.tiny()


@pytest.fixture(scope="module")
def texts(parts):
    return FAMILY.encode_text(parts, ["a dog", "a red cat"])


@pytest.fixture(scope="module")
def nothing(parts):
    return FAMILY.encode_text(parts, [""])


def clip(parts, texts, nothing, seed=3, **more):
    return sample_clip(FAMILY, parts, more.pop("text", texts[[0]]), seed, negative_text=nothing, **ASK | more)


@pytest.mark.parametrize("scheduler", ["checkpoint", "euler_a", "dpmpp_2m"])
def test_equal_to_diffusers(parts, texts, nothing, scheduler):
    """Linear betas are the checkpoint's own; Euler goes between the times of training."""
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = build_scheduler(parts["scheduler"], scheduler, 4)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    theirs = pipeline(
        num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=5.0, latents=clip_noise(3, LATENT, range(5))[None],
        output_type="latent", prompt_embeds=texts.tokens_BLD[:1], negative_prompt_embeds=nothing.tokens_BLD,
        generator=torch_generator("sampling", 3),
    ).frames[0]  # fmt: skip
    assert torch.equal(clip(parts, texts, nothing, scheduler=scheduler), theirs)


@pytest.mark.parametrize("scheduler", ["checkpoint", "euler"])
def test_video_to_video_equal_to_diffusers(parts, texts, nothing, scheduler):
    from diffusers import AnimateDiffVideoToVideoPipeline

    given = torch.randn(*LATENT[:1], 5, *LATENT[1:], generator=torch.Generator().manual_seed(8))
    own = FAMILY.pipeline(parts)
    pipeline = AnimateDiffVideoToVideoPipeline(**own.components)
    pipeline.vae_scale_factor = own.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    sampler = pipeline.scheduler = build_scheduler(parts["scheduler"], scheduler, 10)
    sampler.set_timesteps(10)
    sampler.set_begin_index(6) if hasattr(sampler, "set_begin_index") else None
    noisy = sampler.add_noise(given[None], clip_noise(3, LATENT, range(5))[None], sampler.timesteps[6:7])
    pipeline.scheduler = build_scheduler(parts["scheduler"], scheduler, 10)
    theirs = pipeline(
        height=32, width=48, num_inference_steps=10, strength=0.45, guidance_scale=5.0, latents=noisy, output_type="latent",
        prompt_embeds=texts.tokens_BLD[:1], negative_prompt_embeds=nothing.tokens_BLD,
    ).frames[0]  # fmt: skip
    assert torch.equal(clip(parts, texts, nothing, steps=10, beginning=Beginning(given, 0.45), scheduler=scheduler), theirs)


def test_windows_change_nothing_where_one_is_enough(parts, texts, nothing):
    plain = clip(parts, texts, nothing)
    assert torch.equal(clip(parts, texts, nothing, windowing=Windowing(8, 3)), plain)
    assert torch.equal(clip(parts, texts, nothing, windowing=Windowing(5, 0, blend="uniform")), plain)
    assert not torch.equal(clip(parts, texts, nothing, windowing=Windowing(8, 2, loop=True)), plain)


def test_long_clips_in_batches(parts, texts, nothing):
    long = {"frames": 19, "windowing": Windowing(8, 2), "steps": 2}
    shares = []
    one = clip(parts, texts, nothing, **long, on_share=shares.append)
    assert one.shape == (4, 19, 4, 6)
    assert len(shares) == 2 * 3 and sum(shares) == pytest.approx(1)
    torch.testing.assert_close(clip(parts, texts, nothing, **long, batch_size=16), one, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"19 frames.*know 8 at once"):
        clip(parts, texts, nothing, frames=19)


def test_noise_is_the_seeds_and_the_frames():
    noise = clip_noise(7, LATENT, [0, 1, 2, 1])
    assert torch.equal(noise[:, 1], noise[:, 3]) and not torch.equal(noise[:, 0], noise[:, 1])
    assert torch.equal(clip_noise(7, LATENT, [0, 1]), noise[:, :2])
    assert not torch.equal(clip_noise(8, LATENT, [0]), noise[:, :1])


def test_travel_between_texts():
    assert travel([0], 3).tolist() == [[1]] * 3
    quarters = [[1, 0], [1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1], [0, 1]]
    assert travel([1, 5], 7).tolist() == quarters
    assert travel([0, 2], 4, loop=True).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0.5, 0.5]]
    assert travel([1, 3], 8, loop=True)[:, 0].tolist() == pytest.approx([5 / 6, 1, 1 / 2, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6])
    assert travel([2], 4, loop=True).tolist() == [[1]] * 4


def test_a_clip_travels_to_another_text(parts, texts, nothing):
    """Both texts alike is no travel; and the network reads at each frame what that frame's share says."""
    plain, same = clip(parts, texts, nothing), texts[[0, 0]]
    torch.testing.assert_close(clip(parts, texts, nothing, text=same, shares_TK=travel([0, 4], 5)), plain, atol=1e-5, rtol=1e-5)
    read = []

    class Listening(AnimateDiff):
        def denoise(self, denoiser, noisy, t_B, text, crop):
            read.append(text.tokens_BLD)
            return super().denoise(denoiser, noisy, t_B, text, crop)

    moved = sample_clip(
        Listening(), parts, texts, 3, **ASK | {"frames": 10, "steps": 1}, negative_text=nothing, windowing=Windowing(8, 6), batch_size=16,
        shares_TK=travel([2, 6], 10),
    )  # fmt: skip
    one, two, without = texts.tokens_BLD[0], texts.tokens_BLD[1], nothing.tokens_BLD[0]
    assert len(read) == 1 and read[0].shape[0] == 2 * 2 * 8 and torch.equal(read[0][:16], without.expand(16, -1, -1))
    second = read[0][24:]  # frames 2 to 9
    for frame, share in enumerate([0, 0.25, 0.5, 0.75, 1, 1, 1, 1]):
        torch.testing.assert_close(second[frame], (1 - share) * one + share * two)
    assert moved.shape[1] == 10


def test_a_beginning_is_kept_as_its_strength_says(parts, texts, nothing):
    given = torch.randn(4, 5, *LATENT[1:], generator=torch.Generator().manual_seed(8))
    away = {
        strength: (clip(parts, texts, nothing, steps=5, beginning=Beginning(given, strength)) - given).abs().mean()
        for strength in (0.2, 0.6, 1.0)
    }
    assert away[0.2] < away[0.6] < away[1.0]
    for scheduler in ("checkpoint", "euler", "dpmpp_2m"):
        held = clip(parts, texts, nothing, steps=5, beginning=Beginning(given, 0.8, holds_first=True), scheduler=scheduler)
        torch.testing.assert_close(held[:, 0], given[:, 0])
        assert (held[:, 1] - given[:, 1]).abs().mean() > 0.05
    assert first_step(10, 0.7) == 3 and first_step(25, 0.6) == 10 and first_step(3, 1) == 0
    with pytest.raises(ConfigError, match=r"strength=0.04 changes nothing in 20 steps; it must be 0.05 at least"):
        first_step(20, 0.04)


def test_frames_in_and_out_in_pieces(parts):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    latents = encode_frames(FAMILY, parts, iter(frames), at_once=2)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(latents, FAMILY.encode_pixels(parts, pixels)[0][0], atol=1e-5, rtol=1e-5)
    shown = list(decode_frames(FAMILY, parts, latents, at_once=2))
    whole = FAMILY.decode_latents(parts, latents[None])[0].permute(1, 2, 3, 0)
    assert len(shown) == 5 and shown[0].dtype == np.uint8 and shown[0].shape == (32, 48, 3)
    assert np.abs(np.stack(shown) - (whole.numpy() / 2 + 0.5) * 255).max() <= 0.51


def test_a_clip_that_is_not_finite_is_an_error(parts, texts):
    broken = Text(texts.tokens_BLD[:1] * float("nan"))
    with pytest.raises(ModelError, match=r"seed 3 is not finite in torch.float32"):
        sample_clip(FAMILY, parts, broken, 3, **ASK | {"guidance": 1.0, "steps": 1})
