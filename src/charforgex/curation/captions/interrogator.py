"""What of a list of words fits a picture by CLIP: medium, artistic movement, light, composition, flavours.

After CLIP Interrogator (pharmapsychotic, 2022): a caption from elsewhere is lengthened by the phrase that brings the text's vector nearest
to the picture's, as long as one brings it nearer. The words, in labels.json, are our own and name no artist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, get_captioner, model_digest, one_line
from charforgex.curation.captions.loading import check_source
from charforgex.curation.captions.settings import CaptionSettings

if TYPE_CHECKING:
    from torch import Tensor

    from charforgex.embedders import Clip

ONE_EACH = ("medium", "movement", "lighting", "composition")  # at most one phrase of these tables, in this order
POOL = 32  # phrases that are tried: the nearest by themselves
CHUNK = 256  # texts read at once


class Interrogator:
    def __init__(self, settings: CaptionSettings):
        self.source = settings.source_of("interrogator")
        if self.source != "charworld":
            self.source = check_source(settings, {"clip"})
        self.flavours = settings.flavours
        self.begin = get_captioner(settings.of(settings.begin)) if settings.begin else None
        self.reads = self.begin.reads if self.begin else frozenset()
        words = hashlib.sha256(_labels_file().encode()).hexdigest()
        shapes = [model_digest(self.source), words, settings.flavours, self.begin.name if self.begin else None]
        self.name = captioner_name("interrogator", Path(self.source).name, shapes)

    @cached_property
    def words(self) -> Words:
        from charforgex.embedders import get_clip

        return Words(get_clip(self.source))

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        begun = self.begin.caption(pictures, contexts) if self.begin else [""] * len(pictures)
        texts = [one_line(text.partition("\n")[0]).rstrip(".") for text in begun]
        pictures_ND = self.words.clip.see(pictures)
        chain = Chain(self.words, pictures_ND, texts)
        for table in ONE_EACH:
            chain.extend(self.words.nearest(table, pictures_ND))
        pools = self.words.nearest("flavour", pictures_ND)
        for _ in range(self.flavours):
            chain.extend(pools)
        return chain.texts


class Words:
    """The tables as a CLIP reads them, read once."""

    def __init__(self, clip: Clip):
        self.clip, self.labels = clip, labels()
        self.vectors = {table: self.read(phrases) for table, phrases in self.labels.items()}

    def read(self, texts: Sequence[str]) -> Tensor:
        import torch

        return torch.cat([self.clip.read(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)])

    def nearest(self, table: str, pictures_ND: Tensor) -> list[list[str]]:
        """For each picture the phrases of a table that are nearest to it, nearest first."""
        near = (pictures_ND @ self.vectors[table].T).argsort(dim=1, descending=True, stable=True)
        return [[self.labels[table][index] for index in row] for row in near[:, :POOL].tolist()]

    def styles(self, pictures: Sequence[Image.Image], top: int = 3) -> list[dict[str, list[tuple[str, float]]]]:
        """For each picture and table the `top` likeliest phrases with their probability among all of the table."""
        pictures_ND, found = self.clip.see(pictures), [{} for _ in pictures]
        for table, vectors in self.vectors.items():
            shares, indices = (self.clip.scale * pictures_ND @ vectors.T).softmax(dim=1).topk(min(top, len(vectors)), dim=1)
            for styles, share, index in zip(found, shares.tolist(), indices.tolist(), strict=True):
                styles[table] = [(self.labels[table][i], p) for i, p in zip(index, share, strict=True)]
        return found


class Chain:
    """A text for each picture that grows by the phrase that helps most, while one helps. `scores` are the cosines; of no text it is -1."""

    def __init__(self, words: Words, pictures_ND: Tensor, texts: Sequence[str]):
        self.words, self.pictures_ND, self.texts = words, pictures_ND, list(texts)
        near = (pictures_ND * words.read([text or "-" for text in texts])).sum(dim=1).tolist()
        self.scores = [score if text else -1.0 for text, score in zip(texts, near, strict=True)]

    def extend(self, pools: Sequence[list[str]]) -> None:
        """Adds to each text the best phrase of its pool, which loses it; a pool without one that helps is emptied."""
        longer = [[f"{text}, {phrase}" if text else phrase for phrase in pool] for text, pool in zip(self.texts, pools, strict=True)]
        if not any(longer):
            return
        vectors = self.words.read([text for texts in longer for text in texts]).split([len(texts) for texts in longer])
        for index, (texts, pool, vectors_PD) in enumerate(zip(longer, pools, vectors, strict=True)):
            if not pool:
                continue
            score, best = (vectors_PD @ self.pictures_ND[index]).max(dim=0)
            # Past the length that CLIP reads a phrase changes nothing, and so does not help.
            if score.item() > self.scores[index] + 1e-6:
                self.texts[index], self.scores[index] = texts[best], score.item()
                del pool[best]
            else:
                pool.clear()


@cache
def _labels_file() -> str:
    return files(__package__).joinpath("labels.json").read_text(encoding="utf-8")


def labels() -> Mapping[str, list[str]]:
    return json.loads(_labels_file())


def build(settings: CaptionSettings) -> Interrogator:
    return Interrogator(settings)
