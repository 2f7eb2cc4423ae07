"""A folder of pictures, the tiny SDXL, and a count of what its encoders were asked."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from charforgex.data.datamodule import CharacterData
from charforgex.families.sdxl import Sdxl


def draw(path, seed: int, size=(96, 96)) -> None:
    """A picture of smooth colours, `size` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@dataclass
class Counting(Sdxl):
    """The tiny SDXL, which notes what it loads and encodes."""

    loaded: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    pictures: int = 0

    def load_parts(self, only):
        self.loaded += list(only)
        return BASE

    def encode_text(self, parts, captions):
        self.texts += list(captions)
        return super().encode_text(parts, captions)

    def encode_pixels(self, parts, pixels_BPHW):
        self.pictures += len(pixels_BPHW)
        return super().encode_pixels(parts, pixels_BPHW)


BASE = Sdxl().tiny()
GEOMETRY = {"pixel_multiple": Sdxl().pixel_multiple(BASE), "latent_stride": Sdxl().latent_stride(BASE)}
WEIGHTS = {"vae": "vae of the tests", "text": "text encoders of the tests"}


@pytest.fixture
def folder(tmp_path):
    """9 square and 5 wide pictures with a caption of tags."""
    for number in range(14):
        size = (96, 96) if number < 9 else (120, 72)
        draw(tmp_path / "in" / f"{number:02}.png", number, size)
        (tmp_path / "in" / f"{number:02}.txt").write_text(f"zkx, red hat, at the sea, number {number}")
    return tmp_path / "in"


@pytest.fixture
def prepared(folder, tmp_path):
    """Makes and prepares a CharacterData over the folder; returns it and its counting family."""

    def make(weights=WEIGHTS, prompts=(), dtype="float32", source=folder, **settings):
        data = CharacterData(source, tmp_path / "cache", **({"resolution": 64, "trigger": "zkx", "seed": 3} | settings))
        family = Counting()
        made = data.prepare(family, family.load_parts, weights=weights, prompts=prompts, dtype=dtype, progress=False, **GEOMETRY)
        assert made["latent"] == family.pictures and made["text"] == len(family.texts)
        return data, family

    return make


def flat(batch) -> list:
    """A batch as a list that == compares bit by bit."""
    tensors = [batch.mean_BChw, batch.std_BChw, batch.text.tokens_BLD, batch.text.pooled_BD, batch.mask_B1hw]
    tensors += [batch.crop.original_B2, batch.crop.top_left_B2, batch.crop.target_B2]
    return [None if tensor is None else tensor.tolist() for tensor in tensors] + [batch.keys]
