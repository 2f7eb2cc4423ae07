"""Tags instead of sentences: WD14-style networks (SmilingWolf) by the user's ONNX file, or an image classifier of transformers."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, model_digest
from charforgex.curation.captions.loading import check_source, load_model
from charforgex.curation.captions.settings import CaptionSettings, default
from charforgex.errors import ConfigError, ModelError
from charforgex.onnx_nets import OnnxNet

SIZE = 448  # of the pictures that these networks were trained on
GENERAL, CHARACTER = 0, 4  # categories of selected_tags.csv; 9 are ratings, which are no words of a caption


class Network(Protocol):
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Probabilities (N, tags)."""


class Tagger:
    """What is surer than its threshold, the surest first, with commas. Ratings are left out; so are names where the threshold is 1."""

    reads = frozenset()

    def __init__(self, settings: CaptionSettings):
        self.settings, source = settings, settings.source_of("tagger")
        self.folder = Path(source).expanduser()
        self.onnx = self.folder / "model.onnx"
        if self.onnx.is_file():
            self.source = str(self.folder)
            self.tags, self.categories = read_tags(self.folder / "selected_tags.csv")
        elif self.folder.is_dir() and not (self.folder / "config.json").exists():
            raise ModelError(
                f"curation.captions.source={source} has neither model.onnx (beside selected_tags.csv) nor a classifier's config.json."
            )
        else:
            self.source = check_source(settings)
            if settings.character != default("character"):
                raise ConfigError(
                    f"curation.captions.character={settings.character:g}: {source} is a classifier without names; leave it out."
                )
        shapes = [model_digest(self.source), settings.general, settings.character]
        self.name = captioner_name("tagger", Path(self.source).name, shapes)

    @cached_property
    def network(self) -> Network:
        if self.onnx.is_file():
            return _Onnx(self.onnx)
        network = _Classifier(self.source, self.settings)
        self.tags, self.categories = network.tags, np.full(len(network.tags), GENERAL)
        return network

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        probabilities = self.network(pictures)
        if probabilities.shape != (len(pictures), len(self.tags)):
            raise ModelError(
                f"{self.source} gives {probabilities.shape[1]} numbers a picture for {len(self.tags)} tags; is the list another's?"
            )
        limits = np.where(
            self.categories == GENERAL, self.settings.general, np.where(self.categories == CHARACTER, self.settings.character, 1)
        )
        return [", ".join(self.tags[i] for i in np.argsort(-row, kind="stable") if row[i] > limits[i]) for row in probabilities]


def read_tags(path: Path) -> tuple[list[str], np.ndarray]:
    """Tags with spaces, and their categories, of a selected_tags.csv. Raises ModelError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ModelError(
            f"{path} is no list of tags with the columns name and category: {error!r}; it lies beside the model's file."
        ) from error
    return [spaced(name) for name, _ in rows], np.array([category for _, category in rows], dtype=int)


def spaced(tag: str) -> str:
    """`long_hair` is `long hair`; a face such as `^_^` or `o_o`, which has no word in it, stays."""
    return tag.replace("_", " ") if re.search(r"[^\W\d_]{2}", tag) else tag


class _Onnx:
    """A file that takes (1, 448, 448, 3), BGR, 0 to 255, the picture in the middle of a white square, and gives probabilities."""

    def __init__(self, path: Path):
        self.net = OnnxNet(path, (1, SIZE, SIZE, 3), "curation.captions.source")

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        pixels = [np.asarray(squared(picture, SIZE), dtype=np.float32)[None, :, :, ::-1] for picture in pictures]
        # One at a time: many of these files have a batch of 1 written into them.
        return np.concatenate([self.net.run(np.ascontiguousarray(one))[0] for one in pixels])


def squared(picture: Image.Image, size: int) -> Image.Image:
    """On a white square of its longer side, then resized."""
    picture = picture.convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


class _Classifier:
    """Probabilities of an image classifier: of each label by itself where the model says so, else of one among all."""

    def __init__(self, source: str, settings: CaptionSettings):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model = load_model(source, AutoModelForImageClassification, settings)
        try:
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"The image processor of curation.captions.source={source} cannot be loaded: {error}") from error
        labels = self.model.config.id2label
        self.tags = [spaced(labels[index]) for index in range(len(labels))]

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        import torch

        inputs = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            logits = self.model(**inputs).logits.float()
        several = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if several else logits.softmax(-1)).cpu().numpy()


def build(settings: CaptionSettings) -> Tagger:
    return Tagger(settings)
