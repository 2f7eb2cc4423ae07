"""The seam between base models and everything else. A family is one file; nothing outside names its diffusers classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from charforgex.families.process import Process
from charforgex.types import Components, Crop, Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ALL = ("denoiser", "vae", "text")


class Family(ABC):
    """What differs between base models, and nothing that does not. Families hold no state: parts are passed in."""

    name: str
    denoiser_name: str
    is_video: bool = False

    @abstractmethod
    def load(self, source: str, only: Sequence[str] = ALL, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Components:
        """Load from a diffusers folder, a hub id, or one `.safetensors` checkpoint; `charworld` is the embedded base.

        The scheduler always comes along. Networks are in eval mode and need no gradients.
        Raises ModelError if the source is missing, unreadable, of another family, or incomplete.
        """

    @abstractmethod
    def tiny(self, seed: int = 0) -> Components:
        """The same classes with a few thousand random weights, for tests."""

    @abstractmethod
    def process(self, parts: Components) -> Process:
        """The noise process of this checkpoint, from its scheduler's config."""

    @abstractmethod
    def latent_stride(self, parts: Components) -> int:
        """Pixels per latent along one side: 8 for the real models."""

    @abstractmethod
    def pixel_multiple(self, parts: Components) -> int:
        """Picture sides must be multiples of this."""

    @abstractmethod
    def default_size(self, parts: Components) -> int:
        """The side in pixels at which the base was trained."""

    @abstractmethod
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        """Captions to states, exactly as this family's pipeline makes them. "" gives the unconditional text of guidance."""

    @abstractmethod
    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        """For each text encoder: the caption as it is seen after truncation, and how many tokens were cut off."""

    @abstractmethod
    def encode_pixels(self, parts: Components, pixels_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, both (B, C, h, w) float32, shifted and scaled."""

    @abstractmethod
    def decode_latents(self, parts: Components, latents_BChw: Tensor) -> Tensor:
        """Scaled latents to pixels (B, 3, H, W), float32, clamped to [-1, 1]."""

    @abstractmethod
    def denoise(self, denoiser: nn.Module, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        """The network's prediction on the latent grid, the shape of `noisy`. `t_B` is float32 in [0, 1]."""

    @abstractmethod
    def lora_targets(self, preset: str) -> list[str]:
        """Which of the denoiser's modules a preset adapts, as peft `target_modules` suffixes. Raises ConfigError."""

    @abstractmethod
    def pipeline(self, parts: Components) -> DiffusionPipeline:
        """The family's text-to-image pipeline around these very parts, without a safety checker or watermark.

        Text encoders that are not loaded are left out; such a pipeline wants encoded prompts.
        """
