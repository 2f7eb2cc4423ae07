"""A character's pictures as training batches: read, checked, encoded once, and drawn by step number.

    data = CharacterData("pictures/", cache="cache/", resolution=1024, trigger="zkx", batch_size=2, seed=7)
    data.prepare(family, load_parts, weights={"vae": "...", "text": "..."}, pixel_multiple=32, latent_stride=8)
    for batch in data.train_dataloader(first_step=0, steps=1000): ...

The constructor only reads and checks, and is done before any model is loaded. Batch number k depends on the settings, the seed
and k alone: not on the number of workers, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from charforgex.binding import Range
from charforgex.curation.manifest import MIN_TRAIN, Problem, Record, decode_picture, open_manifest, read_bytes, read_picture, some
from charforgex.data import captions
from charforgex.data.buckets import FILTER, Cut
from charforgex.data.cache import Cache, Entry, key_of
from charforgex.data.dataset import Drawn, Item, Order, arrange, group
from charforgex.data.regularisation import Mixture, Regularisation
from charforgex.draws import python_rng, seed_of
from charforgex.errors import ConfigError, DataError
from charforgex.types import Batch, Components, Crop, Prior, Text

if TYPE_CHECKING:
    from PIL import Image

    from charforgex.families.base import Family

LoadParts = Callable[[Sequence[str]], Components]
FEW = 10  # below that an identity is learnt badly; 20 to 30 are good


def to_pixels(image: Image.Image) -> Tensor:
    """RGB to float32 (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


class CharacterData:
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
        self.resolutions = sorted({resolution} if isinstance(resolution, int) else set(resolution))
        if not self.resolutions:
            raise ConfigError("data.resolution=[] names no resolution; give at least one.")
        self.manifest = open_manifest(source, val_count)
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
        self._prepared = False

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
        made["latent"] = self._prepare_latents(family, load_parts, progress)
        made["text"] = self._prepare_texts(family, load_parts, prompts, progress)
        return made

    def _cuts(self) -> list[tuple[Record, Cut]]:
        cuts = [(item.record, item.cut) for item in [*self.items, *self.val_items]]
        return cuts + [(item.record, item.cut.mirrored()) for item in self.items] if self.flip else cuts

    def _latent_key(self, record: Record, cut: Cut) -> str:
        geometry = {"resized": cut.resized, "crop": [cut.top, cut.left, *cut.size], "flip": cut.flip, "filter": FILTER}
        colours = list(self.background)
        return key_of("latent", picture=record.sha256, background=colours, weights=self._weights["vae"], **geometry, **self._base)

    def _text_key(self, text: str) -> str:
        return key_of("text", text=text, weights=self._weights["text"], **self._base)

    def _mask_key(self, record: Record, cut: Cut) -> str:
        geometry = {"resized": cut.resized, "crop": [cut.top, cut.left, *cut.size], "flip": cut.flip}
        return key_of("mask", mask=record.mask_sha256, stride=self._stride, **geometry)

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

    def _prepare_latents(self, family: Family, load_parts: LoadParts, progress: bool) -> int:
        wanted = {self._latent_key(record, cut): (record, cut) for record, cut in self._cuts()}
        missing: dict[Record, list[tuple[str, Cut]]] = {}
        for key, (record, cut) in wanted.items():
            grid = tuple(side // self._stride for side in cut.size)
            entry = self.cache.find(key)
            if entry is None or not _is_posterior(entry, grid):
                missing.setdefault(record, []).append((key, cut))
        if not missing:
            return 0
        parts = load_parts(["vae"])

        def encode(record: Record, cuts: list[tuple[str, Cut]]) -> list[tuple[str, Entry]]:
            image = self._picture(record.path, record.sha256, record, self.background)
            entries = []
            for key, cut in cuts:
                mean, std = family.encode_pixels(parts, to_pixels(cut.picture(image)))
                assert tuple(mean.shape[-2:]) == tuple(side // self._stride for side in cut.size)
                entries.append((key, {"mean": mean[0].float(), "std": std[0].float()}))
            return entries

        jobs = [lambda record=record, cuts=cuts: encode(record, cuts) for record, cuts in missing.items()]
        return self._fill(jobs, "Encoding pictures", progress)

    def _prepare_texts(self, family: Family, load_parts: LoadParts, prompts: Sequence[str], progress: bool) -> int:
        texts = ["", *prompts, *(record.captions[0] for record in self.val)]
        texts += [text for found in self.texts.values() for text in found]
        if self.class_word is not None:
            texts += [self._class_text(text) for record in self.train for text in self.texts[record.sha256]]
        wanted = {self._text_key(text): text for text in texts}
        missing = {}
        for key, text in wanted.items():
            entry = self.cache.find(key)
            if entry is None or "tokens" not in entry:
                missing[key] = text
        if not missing:
            return 0
        parts = load_parts(["text"])

        def encode(key: str, text: str) -> list[tuple[str, Entry]]:
            encoded = family.encode_text(parts, [text])
            entry = {"tokens": encoded.tokens_BLD[0]}
            if encoded.pooled_BD is not None:
                entry["pooled"] = encoded.pooled_BD[0]
            return [(key, entry)]

        jobs = [lambda key=key, text=text: encode(key, text) for key, text in missing.items()]
        return self._fill(jobs, "Encoding captions", progress)

    def _prepare_masks(self) -> int:
        if self.subject_weight == 1:
            return 0
        missing: dict[Record, list[Cut]] = {}
        for record, cut in self._cuts():
            if record.mask and self.cache.find(self._mask_key(record, cut)) is None:
                missing.setdefault(record, []).append(cut)
        for record, cuts in missing.items():
            image = self._picture(record.mask, record.mask_sha256, record, (0, 0, 0))
            for cut in cuts:
                grid = torch.from_numpy(np.array(cut.mask(image, self._stride)))[None] / 255
                self.cache.write(self._mask_key(record, cut), {"mask": grid})
        return sum(map(len, missing.values()))

    def _fill(self, jobs: list[Callable[[], list[tuple[str, Entry]]]], title: str, progress: bool) -> int:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        written = 0
        for number, job in enumerate(track(jobs, title, console=console, disable=not (progress and console.is_terminal))):
            entries = job()
            if number == 0:
                self.cache.check_space(len(jobs) * sum(tensor.nbytes for _, entry in entries for tensor in entry.values()))
            for key, entry in entries:
                self.cache.write(key, entry)
            written += len(entries)
        return written

    # ---- batches ----

    def _row(self, drawn: Drawn) -> dict:
        """One place of a batch, as `_collate` takes it."""
        item, cut = drawn.item, drawn.cut
        row = {"entry": self.cache.read(self._latent_key(item.record, cut)), "cut": cut, "key": item.record.sha256, "caption": drawn.text}
        if self.subject_weight != 1:
            grid = (1, *(side // self._stride for side in cut.size))
            mask = self.cache.read(self._mask_key(item.record, cut))["mask"] if item.record.mask else torch.zeros(grid)
            row["mask"] = 1 + (self.subject_weight - 1) * mask
        if item.regular:
            row["weight"] = self.regularisation.weight
        return row

    def _collate(self, rows: list[dict], class_captions: Sequence[str] | None = None) -> Batch:
        """A batch of rows that are all the character's or all regular; with captions of its class, for prior preservation."""
        cuts = [row["cut"] for row in rows]
        sizes = [torch.tensor([pair for pair in pairs], dtype=torch.float32) for pairs in (
            [cut.original for cut in cuts], [cut.top_left for cut in cuts], [cut.size for cut in cuts])]  # fmt: skip
        said = tuple(row["caption"] for row in rows)
        return Batch(
            mean_BChw=torch.stack([row["entry"]["mean"] for row in rows]),
            std_BChw=torch.stack([row["entry"]["std"] for row in rows]),
            text=self.encoded(said),
            crop=Crop(*sizes),
            mask_B1hw=torch.stack([row["mask"] for row in rows]) if "mask" in rows[0] else None,
            keys=tuple(row["key"] for row in rows),
            captions=said,
            weight_B=torch.tensor([row["weight"] for row in rows]) if "weight" in rows[0] else None,
            prior=None if class_captions is None else self._prior(tuple(class_captions)),
        )

    def _prior(self, texts: tuple[str, ...]) -> Prior:
        encoded = self.encoded(texts)
        return Prior(encoded, encoded, texts)

    def _class_text(self, text: str) -> str:
        return captions.without_trigger(text, self.trigger, self.class_word)

    def _draw(self, number: int) -> list[Drawn]:
        """What batch `number` holds."""
        assert self._prepared, "prepare() comes first"
        drawn = []
        for place, index in enumerate(self._order.batch(number)):
            item = self.items[index]
            rng = python_rng(self.seed, "sample", number, place)
            mirrored, dropped = rng.random() < 0.5, rng.random() < self.caption_dropout
            caption = rng.choice(self.texts[item.record.sha256])
            drawn.append(Drawn(item, item.cut.mirrored() if self.flip and mirrored else item.cut, caption, dropped))
        return drawn

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step on one of `world` processes: a function of settings, seed, step and rank. Raises DataError if the
        cache has lost what it needs."""
        drawn = self._draw(step * world + rank)
        held = self.class_word is not None and not drawn[0].item.regular
        return self._collate([self._row(one) for one in drawn], [self._class_text(one.caption) for one in drawn] if held else None)

    def text(self, text: str) -> Text:
        """An encoded caption or prompt, batch size 1. Only what `prepare` was given or met can be had."""
        entry = self.cache.read(self._text_key(text))
        return Text(entry["tokens"][None], entry["pooled"][None] if "pooled" in entry else None)

    def encoded(self, texts: Sequence[str]) -> Text:
        """`text` of several, as one."""
        return Text.stack([self.text(text) for text in texts])

    def train_dataloader(self, first_step: int, steps: int, rank: int = 0, world: int = 1) -> DataLoader:
        """`steps` batches from `first_step` on, in order. The same with any number of workers."""
        return DataLoader(
            _Steps(self, first_step, steps, rank, world), batch_size=None, num_workers=self.num_workers,
            collate_fn=_as_it_is, worker_init_fn=_leave_signals_to_the_trainer,
        )  # fmt: skip

    def validation(self) -> list[Batch]:
        """The held-out pictures in a fixed order, first captions, no dropout, no mirroring. Batches of one bucket."""
        assert self._prepared, "prepare() comes first"
        buckets: dict[tuple[int, int], list[Item]] = {}
        for item in self.val_items:
            buckets.setdefault(item.cut.size, []).append(item)
        batches = []
        for _, items in sorted(buckets.items()):
            rows = [self._row(Drawn(item, item.cut, item.record.captions[0], dropped=False)) for item in items]
            batches += [self._collate(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]
        return batches

    # ---- what reports and evaluation ask for ----

    def paths(self, split: str) -> list[Path]:
        """The picture files of "train" or "val"."""
        return [self.manifest.file(record.path) for record in self.manifest.of(split)]

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

    def tag_frequency(self) -> dict[str, int]:
        return captions.tag_frequency(self.train, self.tag_separator)

    def final_prompts(self, count: int) -> list[str]:
        """The captions of the first `count` training samples, as they go to the encoder; "" where one is dropped."""
        return [drawn.text for number in range(count) for drawn in self._draw(number)][:count]

    def epoch_steps(self, world: int = 1) -> int:
        """Steps in which every picture of the character is seen once, rounded up."""
        assert self._prepared, "prepare() comes first"
        share = 1 - self.regularisation.share if self.regular else 1
        return math.ceil(self._own.cycle_length / (self.batch_size * world * share))


def _is_posterior(entry: Entry, grid: tuple[int, int]) -> bool:
    return {"mean", "std"} == set(entry) and all(tensor.ndim == 3 and tuple(tensor.shape[1:]) == grid for tensor in entry.values())


class _Steps(Dataset):
    """The batches of a stretch of steps, by their place in it."""

    def __init__(self, data: CharacterData, first: int, steps: int, rank: int, world: int):
        self.data, self.first, self.steps, self.rank, self.world = data, first, steps, rank, world

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, place: int) -> Batch:
        if not 0 <= place < self.steps:
            raise IndexError(place)
        return self.data.batch(self.first + place, self.rank, self.world)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach workers too; they must go on so that the trainer can save at the next step boundary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
