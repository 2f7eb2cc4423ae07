"""The embedded motion base: SDXL's base made smaller and given motion modules, then trained on clips and pictures together."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from charforgex.charworld import models
from charforgex.charworld.assets import ROOT, load_clip
from charforgex.charworld.clips import FRAMES
from charforgex.data.rendered import RenderedBank, RenderedClips
from charforgex.families.base import Family
from charforgex.training.live import LiveText
from charforgex.training.module import DenoiserModule
from charforgex.training.stages import pixels_of
from charforgex.types import Batch, Components, Crop, Text


@dataclass(frozen=True)
class Films:
    """Clips, and pictures besides: they are cheaper to draw, and show more characters. `share` of the batches are clips."""

    pictures: RenderedBank
    clips: RenderedClips
    share: float

    def __len__(self) -> int:
        return min(len(self.pictures), len(self.clips) * FRAMES)

    @property
    def name(self) -> str:
        return f"{self.pictures.name}+{self.clips.name}"


class FilmModule(DenoiserModule):
    """The whole of AnimateDiff's network and its text encoder, on latents of clips and of pictures, which are clips of one frame."""

    dropout = 0.1  # of captions

    def __init__(self, family: Family, parts: Components, latents: Mapping[str, np.ndarray], **settings):
        networks = {name: parts[name] for name in (family.denoiser_name, "text_encoder")}
        trainable = {
            f"{name}.{path}": p for name, network in networks.items() for path, p in network.requires_grad_(True).named_parameters()
        }
        live = LiveText(family, parts)
        super().__init__(family, parts.denoiser, family.process(parts), trainable=trainable, live=live, **settings)
        self.base, self.latents = parts, latents

    def batch(self, bank: Films, indices: Sequence[int], rng: random.Random) -> Batch:
        """As many pictures as `indices`, or clips with as many frames in all."""
        if rng.random() < bank.share:
            kind, rows = "clips", [index // FRAMES for index in indices[: max(1, len(indices) // FRAMES)]]
            said = [bank.clips.caption(row, rng) for row in rows]
        else:
            kind, rows = "pictures", list(indices)
            said = [bank.pictures.caption(row, rng)[0] for row in rows]
        captions = tuple("" if rng.random() < self.dropout else caption for caption in said)
        posterior = torch.from_numpy(np.stack([self.latents[kind][row] for row in rows])).float()
        side = bank.pictures.pixels.shape[1]
        unread = Text(torch.zeros(len(rows), 0, 0))  # the text encoder learns, so that captions are encoded in the step
        return Batch(posterior[:, 0], posterior[:, 1], unread, Crop.whole(len(rows), side, side), captions=captions)


def frames_of(bank: RenderedBank, rows: Sequence[int]) -> Tensor:
    """(B, 3, 1, H, W) in [-1, 1]: pictures as clips of one frame."""
    return pixels_of(bank, rows).unsqueeze(2)


def clips_of(bank: RenderedClips, rows: Sequence[int]) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([bank.pixels[row] for row in rows])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def write_start(folder: Path) -> None:
    """What the motion base begins with: SDXL's VAE, its second text encoder's first layers, and its network without what does not fit."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    for name, copied in (("vae", "vae"), ("tokenizer_2", "tokenizer")):
        shutil.copytree(ROOT / "sdxl" / name, folder / copied, dirs_exist_ok=True)
    clip, tokens = load_clip()
    encoder = models.motion_text_encoder(tokens)
    known = clip.text_model.state_dict()
    encoder.load_state_dict({name.removeprefix("text_model."): known[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    encoder.save_pretrained(folder / "text_encoder")
    network = models.motion_unet()
    from diffusers import UNet2DConditionModel

    pictures = UNet2DConditionModel.from_pretrained(ROOT / "sdxl/unet", torch_dtype=torch.float32, use_safetensors=True)
    fill_from(network, pictures)
    network.save_pretrained(folder / "unet")


@torch.no_grad()
def fill_from(network: nn.Module, pictures: nn.Module) -> None:
    """Gives a motion network the weights of a picture network as wide or wider: of each layer the first channels.

    Of cross-attention, SDXL's second text encoder's part, which comes last. What joins a block's channels with those skipped past it,
    and a gated layer's two halves, are cut part by part.
    """
    known, wide, narrow = pictures.state_dict(), pictures.config.block_out_channels, network.config.block_out_channels
    for name, parameter in network.named_parameters():
        if "motion_modules" in name:
            continue
        weight = known[name]
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            weight = weight[:, -parameter.shape[1] :]
        before, after = (_inputs(name, channels) for channels in (wide, narrow))
        axis = 1 if weight.ndim > 1 else 0
        if before:
            weight = torch.cat(
                [part[_first(part, axis, count)] for part, count in zip(weight.split(before, axis), after, strict=True)], axis
            )
        if ".ff.net.0.proj." in name:
            weight = torch.cat([half[: len(parameter) // 2] for half in weight.chunk(2)])
        parameter.copy_(weight[tuple(slice(size) for size in parameter.shape)])


def _first(part: Tensor, axis: int, count: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(count),)


def _inputs(name: str, channels: Sequence[int]) -> list[int]:
    """The parts of what a resnet on the way up reads: the block's own channels and the skipped ones. Else nothing."""
    if not name.startswith("up_blocks.") or not any(end in name for end in (".norm1.", ".conv1.weight", ".conv_shortcut.weight")):
        return []
    _, block, kind, layer, *_ = name.split(".")
    if kind != "resnets":
        return []
    up, block, layer = list(reversed(channels)), int(block), int(layer)
    own = up[block] if layer else up[max(0, block - 1)]
    return [own, up[min(block + 1, len(up) - 1)] if layer else up[block]]
