"""What training data of pictures and of clips have in common: encoded once into a cache, drawn by step number."""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from charforgex.curation.manifest import Manifest, Problem, Record
from charforgex.data import captions
from charforgex.data.buckets import Cut
from charforgex.data.cache import Cache, Entry, key_of
from charforgex.data.dataset import Drawn, Item, Order
from charforgex.draws import python_rng
from charforgex.types import Batch, Components, Crop, Text

if TYPE_CHECKING:
    from charforgex.families.base import Family

LoadParts = Callable[[Sequence[str]], Components]


class PreparedData(ABC):
    """A dataset whose batch number k is a function of its settings, its seed and k alone: not of the number of workers, nor of where a run
    was interrupted. `problems` says which files are not used, and why; `notes` what else to know."""

    # of the constructor
    manifest: Manifest
    problems: tuple[Problem, ...]
    notes: list[str]
    train: tuple[Record, ...]
    val: tuple[Record, ...]
    texts: dict[str, list[str]]  # by a record's content: the captions drawn from
    cache: Cache
    batch_size: int
    num_workers: int
    seed: int
    caption_dropout: float
    flip: bool
    tag_separator: str
    # of `prepare`
    items: list[Item]
    val_items: list[Item]
    _order: Order
    _base: dict[str, str]  # what all keys of entries depend on: the family, and what it computes in
    _weights: dict[str, str]
    _stride: int
    _prepared = False

    # ---- encoding ----

    @abstractmethod
    def _latent_key(self, item: Item, cut: Cut) -> str:
        """The name of an encoded picture or clip in the cache."""

    @abstractmethod
    def _grid(self, item: Item, cut: Cut) -> tuple[int, ...]:
        """The sides of its latents behind the channels."""

    @abstractmethod
    def _encode(self, family: Family, parts: Components, wanted: list[tuple[str, Item, Cut]]) -> Iterator[tuple[str, Entry]]:
        """The entries of one record, each with its name. Raises DataError if its file is not what the manifest says."""

    def _cuts(self) -> list[tuple[Item, Cut]]:
        cuts = [(item, item.cut) for item in [*self.items, *self.val_items]]
        return cuts + [(item, item.cut.mirrored()) for item in self.items] if self.flip else cuts

    def _text_key(self, text: str) -> str:
        return key_of("text", text=text, weights=self._weights["text"], **self._base)

    def _prepare_latents(self, family: Family, load_parts: LoadParts, title: str, progress: bool) -> int:
        wanted = {self._latent_key(item, cut): (item, cut) for item, cut in self._cuts()}
        missing: dict[Record, list[tuple[str, Item, Cut]]] = {}
        for key, (item, cut) in wanted.items():
            entry = self.cache.find(key)
            if entry is None or not _is_posterior(entry, self._grid(item, cut)):
                missing.setdefault(item.record, []).append((key, item, cut))
        if not missing:
            return 0
        parts = load_parts(["vae"])
        entries = (entry for some in missing.values() for entry in self._encode(family, parts, some))
        return self._fill(entries, sum(map(len, missing.values())), title, progress)

    def _prepare_texts(self, family: Family, load_parts: LoadParts, texts: Iterable[str], progress: bool) -> int:
        missing = {}
        for key, text in {self._text_key(text): text for text in texts}.items():
            entry = self.cache.find(key)
            if entry is None or "tokens" not in entry:
                missing[key] = text
        if not missing:
            return 0
        parts = load_parts(["text"])

        def encode(text: str) -> Entry:
            encoded = family.encode_text(parts, [text])
            pooled = {} if encoded.pooled_BD is None else {"pooled": encoded.pooled_BD[0]}
            return {"tokens": encoded.tokens_BLD[0], **pooled}

        return self._fill(((key, encode(text)) for key, text in missing.items()), len(missing), "Encoding captions", progress)

    def _fill(self, entries: Iterator[tuple[str, Entry]], count: int, title: str, progress: bool) -> int:
        """Write entries as they are made. Raises DataError if the disk has no room for so many like the first."""
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        shown = track(entries, title, total=count, console=console, disable=not (progress and console.is_terminal))
        for number, (key, entry) in enumerate(shown):
            if number == 0:
                self.cache.check_space(count * sum(tensor.nbytes for tensor in entry.values()))
            self.cache.write(key, entry)
        return count

    # ---- batches ----

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

    def _row(self, drawn: Drawn) -> dict:
        """One place of a batch, as `_collate` takes it; with a "mask" and a "weight" where it has them."""
        entry = self.cache.read(self._latent_key(drawn.item, drawn.cut))
        return {"entry": entry, "cut": drawn.cut, "key": drawn.item.key, "caption": drawn.text}

    def _collate(self, rows: list[dict]) -> Batch:
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
        )

    def batch(self, number: int) -> Batch:
        """A function of settings, seed and number. Raises DataError if the cache has lost what it needs."""
        return self._collate([self._row(one) for one in self._draw(number)])

    def text(self, text: str) -> Text:
        """An encoded caption or prompt, batch size 1. Only what `prepare` was given or met can be had."""
        entry = self.cache.read(self._text_key(text))
        return Text(entry["tokens"][None], entry["pooled"][None] if "pooled" in entry else None)

    def encoded(self, texts: Sequence[str]) -> Text:
        """`text` of several, as one."""
        return Text.stack([self.text(text) for text in texts])

    def train_dataloader(self, numbers: Sequence[int]) -> DataLoader:
        """The batches of these numbers, in order. The same with any number of workers."""
        return DataLoader(
            _Numbered(self, numbers), batch_size=None, num_workers=self.num_workers,
            collate_fn=_as_it_is, worker_init_fn=_leave_signals_to_the_trainer,
        )  # fmt: skip

    def validation(self) -> list[Batch]:
        """What is held out, in a fixed order: first captions, no dropout, no mirroring. Batches of one bucket."""
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
        """The files of "train" or "val"."""
        return [self.manifest.file(record.path) for record in self.manifest.of(split)]

    @property
    def dataset_hash(self) -> str:
        """SHA-256 over files, captions, masks and split."""
        return self.manifest.content_hash()

    def tag_frequency(self) -> dict[str, int]:
        return captions.tag_frequency(self.train, self.tag_separator)

    def final_prompts(self, count: int) -> list[str]:
        """The captions of the first `count` training samples, as they go to the encoder; "" where one is dropped."""
        return [drawn.text for number in range(count) for drawn in self._draw(number)][:count]

    def epoch_batches(self) -> int:
        """In so many every item is seen once, rounded up."""
        assert self._prepared, "prepare() comes first"
        return math.ceil(self._order.cycle_length / self.batch_size)


def geometry(cut: Cut) -> Mapping[str, object]:
    """What a cut says in keys of entries."""
    return {"resized": cut.resized, "crop": [cut.top, cut.left, *cut.size], "flip": cut.flip}


def _is_posterior(entry: Entry, grid: tuple[int, ...]) -> bool:
    return {"mean", "std"} == set(entry) and all(
        tensor.ndim == len(grid) + 1 and tuple(tensor.shape[1:]) == grid for tensor in entry.values()
    )


class _Numbered(Dataset):
    """Batches by their place among the numbers that are asked for."""

    def __init__(self, data: PreparedData, numbers: Sequence[int]):
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Batch:
        return self.data.batch(self.numbers[place])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach workers too; they must go on so that the trainer can save at the next step boundary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
