"""Does the picture show what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from charforgex.charworld.world import read_prompt
from charforgex.errors import ModelError
from charforgex.evaluation.identity import to_pixels


class Follower(Protocol):
    """Scores pictures against prompts, and gives the features in which their variety is measured."""

    name: str

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number a picture, larger is better."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) of what a picture shows, whoever it is."""


class ClipFollower:
    """CLIP score (Hessel et al. 2021): cosine of picture and prompt, by any CLIP of transformers."""

    def __init__(self, source: str):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.name = source
        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"evaluation.clip={source} cannot be loaded: {error}") from error

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        return self._see(pixels)

    def _see(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.visual_projection(self.model.vision_model(pixels).pooler_output), dim=-1)

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        text = F.normalize(self.model.text_projection(self.model.text_model(ids).pooler_output), dim=-1)
        return (self.features(pictures) * text).sum(-1).tolist()


class CharworldFollower(ClipFollower):
    """Charworld's own: the share of what the prompt asks for (expression, clothes, scene, framing) that the judge reads
    off the picture. Readable, and in [0, 1]; features are the embedded CLIP's."""

    def __init__(self):
        from charforgex.charworld.assets import load_clip, load_judge

        self.name, self.judge = "charworld", load_judge()
        self.model, self.tokenizer = load_clip()

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._see(to_pixels(pictures, 64))

    def clip_score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return super().score(pictures, prompts)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The share of asked attributes that are shown; a prompt that asks for none scores 1."""
        shown = self.judge.read(to_pixels(pictures, 64))
        scores = []
        for reading, prompt in zip(shown, prompts, strict=True):
            asked = read_prompt(prompt)
            right = [reading[name] == value for name, value in asked.items()]
            scores.append(sum(right) / len(right) if right else 1.0)
        return scores


def get_follower(source: str) -> Follower:
    return CharworldFollower() if source == "charworld" else ClipFollower(source)
