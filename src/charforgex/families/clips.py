"""What families of clips share: a UNet of pictures with AnimateDiff's motion modules, which attend over a clip's frames. Guo et al. 2023.

A clip is (B, P, T, H, W), its latents are (B, C, T, h, w); a picture is a clip of one frame. Motion modules were trained with a noise
schedule of their own, which is not that of the picture base: with the base's, clips flicker and wash out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from charforgex.errors import ConfigError
from charforgex.families import motion_base
from charforgex.families.base import Family
from charforgex.families.folders import Folder
from charforgex.families.parts import adaptable, unet_facts
from charforgex.families.process import Ddpm
from charforgex.families.single_file import Checkpoint
from charforgex.families.sources import Source
from charforgex.types import Components, Crop, Text

CHUNK = 16  # frames that the VAE sees at once, so that its memory does not grow with the clip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
TARGETS = {  # preset -> where, and the ends of the modules there
    "attention": {"attentions": ATTENTION, "motion_modules": ATTENTION},
    "spatial": {"attentions": ATTENTION},
    "temporal": {"motion_modules": ATTENTION},
    "attention_mlp": {"attentions": MLP, "motion_modules": MLP},
}
TARGETS["all"] = {**TARGETS["attention_mlp"], "resnets": RESNETS}


class Clips(Family):
    """To be joined with what knows the picture base: its text, its names in files, and what its network is told besides."""

    halves: ClassVar[tuple[type, type]]  # what reads the picture base, and what reads motion modules, where they come apart
    is_video = True
    temporal = ".motion_modules."
    lone = ("MotionAdapter",)
    reads_text = ("attn2.to_k", "attn2.to_v")

    def opened(self, found: Source) -> Folder | Checkpoint:
        return motion_base.opened(self, found)

    def joined(self, givers: Mapping[str, Folder | Checkpoint], source: str) -> dict[str, Any]:
        return motion_base.joined(self, givers, source)

    def facts(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """As of a picture's base, and how many frames its motion modules know."""
        return unet_facts(configs) | {"max_frames": configs["unet"]["motion_max_seq_length"]}

    def process(self, parts: Components) -> Ddpm:
        return Ddpm.from_config(parts["scheduler"].config)

    @torch.no_grad()
    def encode_pixels(self, parts: Components, pixels_BPTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each frame's posterior, both (B, C, T, h, w)."""
        vae, count = parts["vae"], len(pixels_BPTHW)
        posteriors = [vae.encode(some.to(vae.device, vae.dtype)).latent_dist for some in _frames(pixels_BPTHW).split(CHUNK)]
        scale = vae.config.scaling_factor
        mean = torch.cat([posterior.mean.float() for posterior in posteriors]) * scale
        std = torch.cat([posterior.std.float() for posterior in posteriors]) * scale
        return _clips(mean, count), _clips(std, count)

    @torch.no_grad()
    def decode_latents(self, parts: Components, latents_BCThw: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W)."""
        vae = parts["vae"]
        latents = _frames(latents_BCThw) / vae.config.scaling_factor
        pixels = [vae.decode(some.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1) for some in latents.split(CHUNK)]
        return _clips(torch.cat(pixels), len(latents_BCThw))

    def denoise(self, denoiser, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        """One time a clip, one text a clip or a frame. Raises ConfigError for more frames than the motion modules know."""
        frames, known = noisy.shape[2], denoiser.config.motion_max_seq_length
        if frames > known:
            raise ConfigError(f"A clip of {frames} frames: these motion modules know {known} at once; take that many or fewer.")
        index = t_B.float() * 999
        index = torch.where((index - index.round()).abs() < 1e-3, index.round(), index)  # some samplers go between those of training
        tokens = text.tokens_BLD.to(noisy.dtype)
        if len(text) == len(noisy):
            tokens = tokens.repeat_interleave(frames, dim=0)
        conditions = self.conditions(text, crop, noisy)
        return denoiser(noisy, index, encoder_hidden_states=tokens, added_cond_kwargs=conditions, return_dict=False)[0]

    def conditions(self, text: Text, crop: Crop, noisy: Tensor) -> dict[str, Tensor] | None:
        """What the network is told of each clip besides, under diffusers' names."""
        return None

    def blocks(self, denoiser) -> list[torch.nn.Module]:
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]

    def lora_targets(self, preset: str, denoiser_config: Mapping[str, Any]) -> list[str]:
        """Whole paths: the modules of a base and those of its motion have the same ends."""
        if preset not in TARGETS:
            raise ConfigError(f"lora.targets={preset} is unknown for {self.name}; choose one of {', '.join(TARGETS)}.")
        wanted = [(f".{place}.", tuple(f".{end}" for end in ends)) for place, ends in TARGETS[preset].items()]
        return [path for path in adaptable(self, denoiser_config) if any(place in path and path.endswith(ends) for place, ends in wanted)]

    def save_motion(self, denoiser, folder: Path) -> Path:
        return motion_base.save(denoiser, folder)

    def pipeline_settings(self, parts: Components) -> dict[str, Any]:
        return {"motion_adapter": None}  # the network has its motion modules


def _frames(clips_BCTHW: Tensor) -> Tensor:
    """(B * T, C, H, W): the frames as pictures."""
    return clips_BCTHW.transpose(1, 2).flatten(0, 1)


def _clips(frames: Tensor, count: int) -> Tensor:
    """The inverse of `_frames`, for so many clips."""
    return frames.unflatten(0, (count, -1)).transpose(1, 2)
