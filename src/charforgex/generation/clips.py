"""Clips from prompts and seeds: one at a time and however long, through the family's network and diffusers' own schedulers.

A clip is a function of its prompts, its seed and the settings. Shapes as in `types.py`; K texts that a clip goes through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.errors import ConfigError, ModelError
from charforgex.families.process import STEPS
from charforgex.generation.sampling import check_size, evaluating, needs_negative
from charforgex.generation.schedulers import DEFAULT, build_scheduler
from charforgex.generation.windows import Windowing, in_windows, noise_order, windows
from charforgex.types import Components, Crop, Text

if TYPE_CHECKING:
    from charforgex.families.base import Family

OnShare = Callable[[float], None]  # the share of the work that was done since the last call


@dataclass(frozen=True)
class Beginning:
    """What a clip is made of instead of noise alone: scaled latents (C, T, h, w), and the share of the steps that change them.

    `holds_first` keeps the first frame as it is there.
    """

    latents_CThw: Tensor
    strength: float
    holds_first: bool = False


def travel(keys: Sequence[int], frames: int, loop: bool = False) -> Tensor:
    """How much of each text every frame has (T, K), float32, rows of sum 1. `keys` are the frames that are of one text alone, in order.

    Between two keys the share goes evenly from one text to the next. Before the first key and after the last one nothing changes, except
    that in a loop the last text goes back to the first over the end.
    """
    shares = torch.zeros(frames, len(keys))
    for frame in range(frames):
        after = next((number for number, key in enumerate(keys) if key > frame), len(keys))
        one, two = (after - 1) % len(keys), after % len(keys)
        if not loop and after in (0, len(keys)):
            shares[frame, 0 if after == 0 else -1] = 1
            continue
        length = (keys[two] - keys[one]) % frames or frames
        share = (frame - keys[one]) % frames / length
        shares[frame, one] += 1 - share
        shares[frame, two] += share
    return shares


def clip_noise(seed: int, shape_Chw: tuple[int, int, int], order: Sequence[int]) -> Tensor:
    """Noise of unit variance (C, T, h, w) in float32 on the CPU; each frame's depends on the seed and its number in `order` alone."""
    drawn = {number: torch.randn(shape_Chw, generator=torch_generator("noise", seed, "frame", number)) for number in set(order)}
    return torch.stack([drawn[number] for number in order], dim=1)


def first_step(steps: int, strength: float) -> int:
    """The step at which a clip of a beginning comes in, diffusers' own rule. Raises ConfigError if none would be left."""
    left = min(steps, int(steps * strength + 1e-6))
    if left < 1:
        raise ConfigError(f"strength={strength:g} changes nothing in {steps} steps; it must be {1 / steps:.2g} at least.")
    return steps - left


@torch.no_grad()
def sample_clip(
    family: Family, parts: Components, text: Text, seed: int, *, frames: int, size: tuple[int, int], steps: int, guidance: float,
    negative_text: Text | None = None, shares_TK: Tensor | None = None, windowing: Windowing | None = None,
    beginning: Beginning | None = None, scheduler: str = DEFAULT, batch_size: int = 8, on_share: OnShare | None = None,
) -> Tensor:  # fmt: skip
    """Scaled latents (C, T, h, w), float32 on the CPU, of one clip.

    `text` has one row, or K of which `shares_TK` says how much each frame has. `size` is (height, width) in pixels. Without `windowing` the
    network sees all frames at once; `batch_size` is how many frames it sees where there are several windows, but always a whole one. The
    networks stay where they are and as they are. Raises ConfigError for what cannot work and ModelError for a clip that is not finite.
    """
    guided = needs_negative(family, parts, guidance)
    assert negative_text is not None or not guided, "this guidance needs a negative text"
    check_size(size, family.pixel_multiple(parts))
    denoiser, stride = parts.denoiser, family.latent_stride(parts)
    device, dtype = denoiser.device, denoiser.dtype
    how = windowing or Windowing(frames, 0)
    cut = windows(frames, how)
    length = cut.frames_WL.shape[1]
    at_once = max(1, batch_size // length)
    calls = ceil(len(cut.frames_WL) / at_once)
    sampler = build_scheduler(parts["scheduler"], scheduler, steps)
    sampler.set_timesteps(steps, device=device)
    first = 0 if beginning is None else first_step(steps, beginning.strength)
    times = sampler.timesteps[first:]
    shape = (denoiser.config.in_channels, size[0] // stride, size[1] // stride)
    noise = clip_noise(seed, shape, noise_order(frames, how, seed))[None].to(device)
    texts = _Texts(text, negative_text if guided else None, shares_TK).to(device, dtype)

    def predict(noisy_NCLhw: Tensor, frames_NL: Tensor, time: Tensor) -> Tensor:
        many = torch.cat([noisy_NCLhw] * 2) if guided else noisy_NCLhw
        t_B = (time.float() / (STEPS - 1)).expand(len(many)).to(device)
        crop = Crop.whole(len(many), *size).to(device)
        found = family.denoise(denoiser, many.to(dtype), t_B, texts.of(frames_NL), crop).float()
        if on_share is not None:
            on_share(1 / (len(times) * calls))
        if not guided:
            return found
        without, with_text = found.chunk(2)
        return without + guidance * (with_text - without)

    if beginning is None:
        latents, start = noise * sampler.init_noise_sigma, None
    else:
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(first)
        start = beginning.latents_CThw[None].to(device, torch.float32)
        latents = sampler.add_noise(start, noise, times[:1])
    draws = {"generator": torch_generator("sampling", seed)}  # ancestral samplers draw at every step
    draws = {name: value for name, value in draws.items() if name in inspect.signature(sampler.step).parameters}
    with evaluating(parts.networks().values()):
        for number, time in enumerate(times):
            noisy = sampler.scale_model_input(latents, time)
            prediction = in_windows(lambda some, which, time=time: predict(some, which, time), noisy, cut, at_once)
            latents = sampler.step(prediction, time, latents, return_dict=False, **draws)[0]
            if beginning is not None and beginning.holds_first:
                last = number + 1 == len(times)
                held = start if last else sampler.add_noise(start, noise, times[number + 1 : number + 2])
                latents[:, :, :1] = held[:, :, :1]
    if not latents.isfinite().all():
        raise ModelError(f"The clip of seed {seed} is not finite in {dtype}; try dtype=float32, or a smaller LoRA scale.")
    return latents[0].cpu()


@dataclass(frozen=True)
class _Texts:
    """What the network reads at each frame."""

    text: Text
    negative: Text | None
    shares_TK: Tensor | None

    def to(self, device, dtype) -> _Texts:
        negative = None if self.negative is None else self.negative.to(device, dtype)
        return _Texts(self.text.to(device, dtype), negative, None if self.shares_TK is None else self.shares_TK.to(device, dtype))

    def of(self, frames_NL: Tensor) -> Text:
        """One row a frame: first those of the negative text for all of them, where there is one."""
        count = frames_NL.numel()
        if self.shares_TK is None:
            rows = self.text[[0] * count]
        else:
            shares, pooled = self.shares_TK[frames_NL.flatten()], self.text.pooled_BD
            rows = Text(torch.einsum("fk,kld->fld", shares, self.text.tokens_BLD), None if pooled is None else shares @ pooled)
        return rows if self.negative is None else Text.stack([self.negative[[0] * count], rows])


# ---- frames in and out ----


@torch.no_grad()
def encode_frames(family: Family, parts: Components, frames: Iterable[np.ndarray], at_once: int = 8) -> Tensor:
    """Latents (C, T, h, w), the posterior's mean, of uint8 frames (H, W, 3); so many pictures are held at once."""
    frames, found = iter(frames), []
    while some := list(islice(frames, at_once)):
        pixels = torch.from_numpy(np.stack(some)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        found.append(family.encode_pixels(parts, pixels)[0][0].cpu())
    return torch.cat(found, dim=1)


@torch.no_grad()
def decode_frames(family: Family, parts: Components, latents_CThw: Tensor, at_once: int = 8) -> Iterator[np.ndarray]:
    """uint8 frames (H, W, 3) in order; so many pictures are held at once."""
    for some in latents_CThw.split(at_once, dim=1):
        pixels = family.decode_latents(parts, some[None])[0].cpu()
        yield from ((pixels / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
