"""The pre-training stage `captioner`: the embedded CLIP's eye learns to tell what it sees, from pictures cropped and spoilt at random."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from charforgex.charworld import captioner, world
from charforgex.charworld.assets import load_captioner, load_clip
from charforgex.data.rendered import RenderedBank
from charforgex.draws import torch_generator
from charforgex.training.stages import UNSAID, AttributeHeads, Pretraining, attribute_losses, labels_of, pixels_of


class CaptionNetworks(nn.Module):
    """The captioner, and heads that read attributes off its eye's mean state, which teach the eye and are not kept."""

    def __init__(self, start: Path | None):
        super().__init__()
        self.tokens = captioner.tokenizer()
        if start is None:
            seen = load_clip()[0].vision_model
            self.model = captioner.network(self.tokens, seen.config)
            self.model.encoder.load_state_dict(seen.state_dict())
        else:
            self.model = load_captioner(start)[0]
        self.model.requires_grad_(True)
        self.heads = AttributeHeads(self.model.config.encoder.hidden_size)

    def save(self, out: Path, write: Callable[[nn.Module, Path], None]) -> None:
        write(self.model, out / "captioner")
        self.tokens.save_pretrained(out / "captioner")


def spoilt(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """Half of the pictures (H, W, 3) uint8 as they come back from a JPEG file, one in four from a smaller size."""
    image, size = Image.fromarray(picture), picture.shape[1::-1]
    if rng.random() < 0.25:
        small = rng.randint(size[0] // 2, size[0] - 1)
        image = image.resize((small, small), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(30, 95))
        image = Image.open(file)
    return np.asarray(image)


def cropped(pixels_BPHW: Tensor, rng: random.Random) -> Tensor:
    """Each moved by up to 8 % of its width and zoomed by up to 10 %: less than what tells a close-up from a portrait."""
    affine = torch.zeros(len(pixels_BPHW), 2, 3)
    for row in affine:
        zoom = rng.uniform(0.9, 1.1)
        row[:] = torch.tensor([[zoom, 0, rng.uniform(-0.16, 0.16)], [0, zoom, rng.uniform(-0.16, 0.16)]])
    grid = F.affine_grid(affine, list(pixels_BPHW.shape), align_corners=False)
    return F.grid_sample(pixels_BPHW, grid, padding_mode="border", align_corners=False)


SWAPS = tuple(order for order in itertools.permutations(range(3)) if order != (0, 1, 2))
COLOURED = ("hair_colour", "skin", "eye_colour", "hat_colour", "garment_colour", "scene_colour")
COLOURS = tuple(dict.fromkeys((*(value for name in COLOURED for value in world.ATTRIBUTES[name]), *world.GLASSES_COLOURS)))


class CaptionModule(Pretraining):
    """Cross-entropy on the words of the whole caption, in its fixed order: what is unsaid is not there.

    One word in four that was said before is hidden (Bowman et al. 2016), and some pictures have their colour channels swapped and their
    colours unsaid: "green pigtails" is to be read off a picture even if green hair never was in pigtails.
    """

    hidden = 0.25
    recoloured = 0.4  # of the pictures, so that no shape is known by the colours that it comes in

    def __init__(self, start: Path | None, **settings):
        super().__init__(CaptionNetworks(start), **settings)
        ids = self.network.tokens([" ".join(COLOURS)], add_special_tokens=False, return_tensors="pt").input_ids
        self.colours = ids.flatten()

    def batch(self, bank: RenderedBank, indices: Sequence[int], rng: random.Random):
        scenes = [bank.scene(i) for i in indices]
        channels = [rng.choice(SWAPS) if rng.random() < self.recoloured else (0, 1, 2) for _ in indices]
        swapped = torch.tensor([order != (0, 1, 2) for order in channels])
        pixels = np.stack([spoilt(bank.pixels[i][..., order], rng) for i, order in zip(indices, channels, strict=True)])
        pixels = cropped(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, rng)
        gain = torch.tensor([[rng.uniform(0.93, 1.07) for _ in range(3)] for _ in indices])[:, :, None, None]
        pixels = pixels * gain + 0.03 * torch.randn(pixels.shape, generator=torch_generator(rng.random()))
        tokens = self.network.tokens([world.caption(*scene)[0] for scene in scenes], padding="longest", return_tensors="pt")
        words = tokens.input_ids.masked_fill(tokens.attention_mask == 0, UNSAID)
        named = swapped[:, None] & torch.isin(words, self.colours)
        labels = labels_of([world.visible_attributes(*scene) for scene in scenes])
        for name in COLOURED:
            labels[name] = labels[name].masked_fill(swapped, UNSAID)
        return pixels, words, named, labels

    def losses(self, micro, key: tuple) -> Tensor:
        """(B,): the mean over a caption's words, times 5 because most words are certain, and the heads' own."""
        pixels, words, named, shown = micro
        before = words.masked_fill(words == UNSAID, self.network.tokens.pad_token_id)
        hide = torch.rand(words.shape, generator=torch_generator(*key, "words")) < self.hidden
        before = before.masked_fill(hide | named, self.network.tokens.unk_token_id).roll(1, dims=1)
        before[:, 0] = self.network.model.config.decoder_start_token_id
        out = self.network.model(pixel_values=pixels, decoder_input_ids=before)
        words = words.masked_fill(named, UNSAID)
        loss = F.cross_entropy(out.logits.transpose(1, 2), words, reduction="none").sum(1) / (words != UNSAID).sum(1)
        return 5 * loss + attribute_losses(self.network.heads(out.encoder_last_hidden_state.mean(1)), shown)

    @torch.no_grad()
    def measure(self, bank: RenderedBank, count: int = 256) -> dict[str, float]:
        """Of `count` pictures as they are, how many captions say each attribute right, the mean over attributes, and whole captions."""
        parts = pixels_of(bank, range(count)).split(64)
        said = [text for part in parts for text in captioner.describe(self.network.model, self.network.tokens, part)]
        scenes = [bank.scene(i) for i in range(count)]
        shares = captioner.agreement(said, [world.visible_attributes(*scene) for scene in scenes])
        whole = sum(text == world.caption(*scene)[0] for text, scene in zip(said, scenes, strict=True)) / count
        measures = {"attributes": sum(shares.values()) / len(shares), "whole_captions": whole}
        return measures | {f"attributes/{name}": share for name, share in shares.items()}
