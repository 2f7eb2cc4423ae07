"""A character's pictures as training batches: read, checked, encoded once, and drawn by step number.

    data = CharacterData("pictures/", cache="cache/", resolution=1024, trigger="zkx", batch_size=2, seed=7)
    data.prepare(family, load_parts, weights={"vae": "...", "text": "..."}, pixel_multiple=32, latent_stride=8)
    for batch in data.train_dataloader(range(1000)): ...

The constructor only reads and checks, and is done before any model is loaded. Batch number k depends on the settings, the seed
and k alone: not on the number of workers, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from charforgex.binding import Range
from charforgex.curation.manifest import MIN_TRAIN, Problem, Record, decode_picture, open_manifest, read_bytes, read_picture, some
from charforgex.data import captions
from charforgex.data.buckets import FILTER, Cut, sides
from charforgex.data.cache import Cache, Entry, key_of
from charforgex.data.dataset import Drawn, Item, Order, arrange, group
from charforgex.data.prepared import LoadParts, PreparedData, geometry
from charforgex.data.regularisation import Mixture, Regularisation
from charforgex.draws import seed_of
from charforgex.errors import ConfigError, DataError
from charforgex.types import Batch, Components, Prior

if TYPE_CHECKING:
    from PIL import Image

    from charforgex.families.base import Family

FEW = 10  # below that an identity is learnt badly; 20 to 30 are good


def to_pixels(image: Image.Image) -> Tensor:
    """RGB to float32 (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


class CharacterData(PreparedData):
    """One character's dataset. Attributes for reports: `problems` (files not used, and why), `notes` (what else to know)."""

    def __init__(
        self,
        source: Path,
        cache: Path,
        resolution: int | list[int],
        trigger: str | None = None,
        add_trigger: bool = False,
        default_caption: str | None = None,
        batch_size: Annotated[int, Range(at_least=1)] = 1,
        num_workers: Annotated[int, Range(at_least=0)] = 0,
        caption_dropout: Annotated[float, Range(at_least=0, at_most=1)] = 0.05,
        shuffle_tags: bool = False,
        keep_tokens: Annotated[int, Range(at_least=0)] = 0,
        caption_variants: Annotated[int, Range(at_least=1)] | None = None,
        tag_separator: str = ",",
        flip: bool = False,
        subject_weight: Annotated[float, Range(above=0)] = 1.0,
        upscale: bool = False,
        repeats: dict[str, int] | None = None,
        val_count: Annotated[int, Range(at_least=0)] | None = None,
        background: tuple[int, int, int] = (255, 255, 255),
        class_word: str | None = None,
        regularisation: Regularisation | None = None,
        seed: int = 0,
    ):
        """`source` is a folder of pictures with .txt captions or a .jsonl manifest; `cache` a folder that any dataset may share.

        `resolution`: sides of the squares whose area pictures get; with several, every picture comes at each it is large enough for.
        `caption_variants`: orders of tags cached per caption, 4 if not given; only with `shuffle_tags`, as is `keep_tokens`, the number
        of first tags that stay in place. `subject_weight`: the loss weight of a mask's white, against 1 elsewhere.
        `upscale`: also enlarge pictures more than 1.25 times. `repeats`: per top-level subfolder, how often its pictures come in an epoch.
        With `class_word`, batches of the character bring its captions with this word in the trigger's place, for prior preservation.
        Raises ConfigError for settings that mean nothing here, DataError for pictures or captions that cannot be used.
        """
        if not shuffle_tags and (keep_tokens or caption_variants):
            name = "keep_tokens" if keep_tokens else "caption_variants"
            raise ConfigError(f"data.{name} has no effect without data.shuffle_tags=true.")
        if not tag_separator.strip():
            raise ConfigError(f"data.tag_separator={tag_separator!r} must hold a character that is not blank, such as a comma.")
        if not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise ConfigError(f"data.background={background} must be red, green and blue in 0..255.")
        self.resolutions = sides(resolution)
        self.manifest = open_manifest(source, val_count)
        if any("fps" in record.facts for record in self.manifest.records):
            raise DataError(
                f"{source} is a manifest of clips, and this training takes pictures; experiment=animatediff_motion takes clips."
            )
        self.problems: tuple[Problem, ...] = self.manifest.problems
        self.notes: list[str] = []
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.caption_dropout, self.flip, self.upscale = caption_dropout, flip, upscale
        self.subject_weight, self.background, self.trigger = subject_weight, tuple(background), trigger
        self.tag_separator, self.repeats, self.class_word = tag_separator, dict(repeats or {}), class_word
        self.regularisation = regularisation or Regularisation()
        self.cache = Cache(cache)

        records = captions.with_trigger(self._enough(self.manifest.records), trigger, add_trigger, tag_separator, default_caption)
        records.sort(key=lambda record: record.sha256)  # so that files may be renamed without changing any batch
        self.train = tuple(record for record in records if record.split == "train")
        self.val = tuple(record for record in records if record.split == "val")
        self._check_masks()
        self._check_repeats()
        self._regular_manifest, self.regular = None, ()
        if self.regularisation.source is not None:
            self._regular_manifest, regular = self.regularisation.read(trigger, {record.sha256 for record in records})
            self.regular, self.problems = tuple(regular), (*self.problems, *self._regular_manifest.problems)
        self._of_regular = {record.sha256 for record in self.regular}
        count = (caption_variants or 4) if shuffle_tags else 1
        self.texts = {
            record.sha256: list(
                dict.fromkeys(
                    text
                    for caption in record.captions
                    for text in captions.variants(caption, count, tag_separator, keep_tokens, seed)
                )
            )
            for record in (*self.train, *self.regular)
        }  # fmt: skip

    # ---- checks before anything is loaded ----

    def _enough(self, records: Sequence[Record]) -> Sequence[Record]:
        train = sum(record.split == "train" for record in records)
        if train < MIN_TRAIN:
            skipped = f" Not usable are {some([f'{p.path} ({p.reason})' for p in self.problems])}." if self.problems else ""
            raise DataError(
                f"{self.manifest.root} has {train or 'no'} usable picture{'s' * (train != 1)} to train on; "
                f"at least {MIN_TRAIN} are needed, and 20 to 30 are good.{skipped}"
            )
        if train < FEW:
            self.notes.append(f"only {train} pictures to train on; 20 to 30 are good")
        return records

    def _check_masks(self) -> None:
        masked = sum(record.mask is not None for record in self.train)
        if self.subject_weight != 1 and not masked:
            raise ConfigError(f"data.subject_weight={self.subject_weight} has no effect: no picture has a mask (name.mask.png beside it).")
        if self.subject_weight == 1 and masked:
            self.notes.append(f"{masked} masks have no effect at data.subject_weight=1")

    def _check_repeats(self) -> None:
        folders = {record.path.split("/")[0] for record in self.train if "/" in record.path}
        for name, count in self.repeats.items():
            if name not in folders:
                known = ", ".join(sorted(folders)) or "none"
                raise ConfigError(f"data.repeats.{name} names no subfolder with pictures to train on; there are: {known}.")
            if count < 1:
                raise ConfigError(f"data.repeats.{name}={count} must be at least 1.")

    # ---- encoding ----

    def prepare(
        self,
        family: Family,
        load_parts: LoadParts,
        *,
        weights: Mapping[str, str],
        pixel_multiple: int,
        latent_stride: int,
        prompts: Sequence[str] = (),
        dtype: str = "float32",
        progress: bool = True,
    ) -> dict[str, int]:
        """Choose sizes, and encode what the cache lacks. Returns how many "latent", "text" and "mask" entries were made.

        `load_parts(["vae"])` and `load_parts(["text"])` are called only if something of theirs is missing, and what they return is let
        go of again. `weights` holds a hash for "vae" and one for "text": over the weights, configs and tokenizers that decide what
        these give; `dtype` is what they compute in. `prompts` are encoded too, for `text`. Entries are encoded one by one, so that
        their bits never depend on what else was missing: an interrupted preparation ends with the same cache.
        """
        items, notes = arrange(self.train, self.resolutions, pixel_multiple, self.upscale, self.repeats)
        held_out, more_notes = arrange(self.val, self.resolutions, pixel_multiple, self.upscale, {})
        regular, regular_notes = arrange(self.regular, self.resolutions, pixel_multiple, self.upscale, {})
        self.notes = list(dict.fromkeys([*self.notes, *notes, *more_notes, *regular_notes]))
        for whose, wanted, found, why in (("", self.train, items, notes), ("regularisation ", self.regular, regular, regular_notes)):
            if wanted and not found:
                raise DataError(
                    f"Every {whose}picture is too small for data.resolution={self.resolutions}: {some(why, 2)}. "
                    "Lower data.resolution, or set data.upscale=true."
                )
        self.items = [*items, *(replace(item, regular=True) for item in regular)]
        # Once per held-out picture, at the largest size it allows: resolutions ascend.
        self.val_items = list({item.record.sha256: item for item in held_out}.values())
        self._base = {"family": family.name, "dtype": dtype}
        self._weights, self._stride = dict(weights), latent_stride
        self._order = self._own = Order(group(items), self.batch_size, self.seed)
        if regular:
            other = Order(group(regular, first=len(items)), self.batch_size, seed_of(self.seed, "regularisation"))
            self._order = Mixture(self._own, other, self.regularisation.share)

        self._prepared = True
        made = {"mask": self._prepare_masks()}
        made["latent"] = self._prepare_latents(family, load_parts, "Encoding pictures", progress)
        made["text"] = self._prepare_texts(family, load_parts, [*prompts, *self._captions()], progress)
        return made

    def _captions(self) -> list[str]:
        """All that training may say."""
        texts = ["", *(record.captions[0] for record in self.val), *(text for found in self.texts.values() for text in found)]
        if self.class_word is not None:
            texts += [self._class_text(text) for record in self.train for text in self.texts[record.sha256]]
        return texts

    def _latent_key(self, item: Item, cut: Cut) -> str:
        picture = {"picture": item.record.sha256, "background": list(self.background), "filter": FILTER}
        return key_of("latent", weights=self._weights["vae"], **picture, **geometry(cut), **self._base)

    def _grid(self, item: Item, cut: Cut) -> tuple[int, ...]:
        return tuple(side // self._stride for side in cut.size)

    def _mask_key(self, record: Record, cut: Cut) -> str:
        return key_of("mask", mask=record.mask_sha256, stride=self._stride, **geometry(cut))

    def _file(self, relative: str, sha256: str) -> bytes:
        """A file's content, which must be what the manifest says: an entry filed under another picture's hash would be stale for ever."""
        manifest = self._regular_manifest if sha256 in self._of_regular else self.manifest
        try:
            data = read_bytes(manifest.file(relative))
        except DataError as error:
            raise DataError(f"{relative} cannot be used: {error}.") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{relative} was changed after it was read; start again.")
        return data

    def _picture(self, path: str, sha256: str, record: Record, background: tuple[int, int, int]) -> Image.Image:
        """A record's picture or mask. Raises DataError if it is not what the manifest says."""
        data = self._file(path, sha256)
        try:
            image = decode_picture(data, background)
        except DataError as error:
            raise DataError(f"{path} cannot be used: {error}.") from error
        if image.size != (record.width, record.height):
            size = f"{image.width} x {image.height}"
            raise DataError(f"{path} is {size} pixels, but the manifest says {record.width} x {record.height}; make the manifest anew.")
        return image

    def _encode(self, family: Family, parts: Components, wanted: list[tuple[str, Item, Cut]]) -> Iterator[tuple[str, Entry]]:
        record = wanted[0][1].record
        image = self._picture(record.path, record.sha256, record, self.background)
        for key, item, cut in wanted:
            mean, std = family.encode_pixels(parts, to_pixels(cut.picture(image)))
            assert tuple(mean.shape[-2:]) == self._grid(item, cut)
            yield key, {"mean": mean[0].float(), "std": std[0].float()}

    def _prepare_masks(self) -> int:
        if self.subject_weight == 1:
            return 0
        missing: dict[Record, list[Cut]] = {}
        for item, cut in self._cuts():
            if item.record.mask and self.cache.find(self._mask_key(item.record, cut)) is None:
                missing.setdefault(item.record, []).append(cut)
        for record, cuts in missing.items():
            image = self._picture(record.mask, record.mask_sha256, record, (0, 0, 0))
            for cut in cuts:
                grid = torch.from_numpy(np.array(cut.mask(image, self._stride)))[None] / 255
                self.cache.write(self._mask_key(record, cut), {"mask": grid})
        return sum(map(len, missing.values()))

    # ---- batches ----

    def _row(self, drawn: Drawn) -> dict:
        item, cut = drawn.item, drawn.cut
        row = super()._row(drawn)
        if self.subject_weight != 1:
            mask = self.cache.read(self._mask_key(item.record, cut))["mask"] if item.record.mask else torch.zeros(1, *self._grid(item, cut))
            row["mask"] = 1 + (self.subject_weight - 1) * mask
        if item.regular:
            row["weight"] = self.regularisation.weight
        return row

    def batch(self, number: int) -> Batch:
        batch = super().batch(number)
        if self.class_word is None or batch.weight_B is not None:  # what has a weight is not the character's
            return batch
        return replace(batch, prior=self._prior(tuple(self._class_text(one.caption) for one in self._draw(number))))

    def _prior(self, texts: tuple[str, ...]) -> Prior:
        encoded = self.encoded(texts)
        return Prior(encoded, encoded, texts)

    def _class_text(self, text: str) -> str:
        return captions.without_trigger(text, self.trigger, self.class_word)

    # ---- what reports and evaluation ask for ----

    def references(self) -> list[Image.Image]:
        """The held-out pictures, whole and upright, for identity scores."""
        return [read_picture(path, self.background) for path in self.paths("val")]

    @property
    def dataset_hash(self) -> str:
        """SHA-256 over pictures, captions, masks and split, regularisation included."""
        own = self.manifest.content_hash()
        if self._regular_manifest is None:
            return own
        return hashlib.sha256(f"{own}/{self._regular_manifest.content_hash()}".encode()).hexdigest()

    def epoch_batches(self) -> int:
        """In so many every picture of the character is seen once, rounded up."""
        assert self._prepared, "prepare() comes first"
        share = 1 - self.regularisation.share if self.regular else 1
        return math.ceil(self._own.cycle_length / (self.batch_size * share))
