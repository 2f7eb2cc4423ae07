"""The embedded captioner: what a drawn character looks like, in charworld's words, from pixels alone. For anything else it has no words."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, model_digest
from charforgex.curation.captions.settings import CaptionSettings

TOGETHER = 32  # pictures at a time, whatever the batch: more is no faster on a CPU


class CharworldCaptioner:
    """`charworld.captioner` on pictures of any size: the square of the largest side at the top of tall ones, in the middle of wide ones."""

    reads: frozenset[str] = frozenset()

    def __init__(self):
        from charforgex.charworld.assets import ROOT

        self.name = captioner_name("charworld", "embedded", model_digest(str(ROOT / "captioner")))
        self.loaded = None

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        from charforgex.charworld.assets import load_captioner
        from charforgex.charworld.captioner import describe
        from charforgex.embedders import to_pixels

        if self.loaded is None:
            self.loaded = load_captioner()
        model, tokens = self.loaded
        pixels = to_pixels([square(picture) for picture in pictures], model.config.encoder.image_size)
        return [text for part in pixels.split(TOGETHER) for text in describe(model, tokens, part)]


def square(picture: Image.Image) -> Image.Image:
    """What a portrait of a tall or wide picture would be."""
    width, height = picture.size
    side = min(width, height)
    left = (width - side) // 2
    return picture if width == height else picture.crop((left, 0, left + side, side))


def build(settings: CaptionSettings) -> CharworldCaptioner:
    return CharworldCaptioner()
