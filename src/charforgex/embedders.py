"""Pictures and texts as unit vectors: who is it (`get_embedder`), what does it show (`get_clip`). By default the embedded models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from charforgex.errors import ConfigError, ModelError


class Embedder(Protocol):
    name: str
    aligned: bool  # wants faces of 112 x 112 turned and scaled so that eyes, nose and mouth are where ArcFace has them

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), float32, whose cosine says how much two pictures show the same character."""


def to_pixels(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """(N, 3, size, size) in [-1, 1]; pictures are resized whole, by Lanczos where the size differs."""
    resized = [p if p.size == (size, size) else p.resize((size, size), Image.Resampling.LANCZOS) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in resized])).permute(0, 3, 1, 2).float() / 127.5 - 1


class CharworldEmbedder:
    """The embedded judge's identity vectors: trained against look-alikes that the same words describe."""

    name, aligned = "charworld", False

    def __init__(self):
        from charforgex.charworld.assets import load_judge

        self.judge = load_judge()

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.judge.embed(to_pixels(pictures, 64))


class TransformersEmbedder:
    """Any image model of transformers by path or hub id, such as facebook/dinov2-base: its pooled output, normalised."""

    aligned = False

    def __init__(self, source: str):
        from transformers import AutoImageProcessor, AutoModel

        self.name = source
        try:
            self.processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
            self.model = AutoModel.from_pretrained(source, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"The embedder {source} cannot be loaded: {error}") from error

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        model = getattr(self.model, "vision_model", self.model)  # of CLIP-like models only the tower that sees
        return F.normalize(model(**inputs).pooler_output.float(), dim=-1)


class ArcFaceEmbedder:
    """A face recogniser as an .onnx file, trained as ArcFace was (Deng et al. 2019): RGB in [-1, 1] at 112 x 112 to one vector.

    For files without the scaling of pixels inside, such as InsightFace's w600k_r50.onnx.
    """

    aligned = True

    def __init__(self, source: str):
        from charforgex.onnx_nets import OnnxNet

        self.name, self.net = source, OnnxNet(source, (1, 3, 112, 112), "The embedder")
        self([Image.new("RGB", (112, 112))])

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        found = [self.net.run(pixels[None].numpy()) for pixels in to_pixels(pictures, 112)]
        if any(len(outputs) != 1 or outputs[0].size < 16 for outputs in found):
            shapes = [tuple(output.shape) for output in found[0]]
            raise ModelError(f"The embedder {self.name} gives {shapes}; a face recogniser gives one vector.")
        return F.normalize(torch.from_numpy(np.stack([outputs[0].reshape(-1) for outputs in found])), dim=-1)


def get_embedder(source: str, faces: bool = False) -> Embedder:
    """`charworld`, an image model of transformers, or, where the caller brings `faces`, an ArcFace by a path that ends in .onnx.

    Raises ConfigError and ModelError.
    """
    if not source:
        raise ConfigError('The embedder "" names nothing; give charworld, or an image model of transformers by path or hub id.')
    if source == "charworld":
        return CharworldEmbedder()
    if not source.endswith(".onnx"):
        return TransformersEmbedder(source)
    if not faces:
        raise ConfigError(f"The embedder {source} is for aligned faces, and here whole pictures are compared; give charworld or a folder.")
    return ArcFaceEmbedder(source)


class Clip:
    """A CLIP (Radford et al. 2021) of transformers by path or hub id, or the embedded one: `charworld`."""

    def __init__(self, source: str):
        self.name, self.processor = source, None
        if source == "charworld":
            from charforgex.charworld.assets import load_clip

            self.model, self.tokenizer = load_clip()
            return
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"The CLIP {source} cannot be loaded: {error}") from error

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax over them."""
        return self.model.logit_scale.exp().item()

    @property
    def length(self) -> int:
        """Tokens of a text at most, its beginning and end included; longer ones are cut."""
        return self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), float32."""
        if self.processor is None:
            pixels = to_pixels(pictures, self.model.config.vision_config.image_size)
        else:
            pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        return F.normalize(self.model.visual_projection(self.model.vision_model(pixels).pooler_output).float(), dim=-1)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D), float32."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return F.normalize(self.model.text_projection(self.model.text_model(tokens.input_ids).pooler_output).float(), dim=-1)


def get_clip(source: str) -> Clip:
    if not source:
        raise ConfigError('The CLIP "" names nothing; give charworld, or a CLIP of transformers by path or hub id.')
    return Clip(source)
