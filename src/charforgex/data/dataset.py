"""Which pictures, at which sizes, in which order: everything of training data that is a function of numbers alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from charforgex.curation.manifest import Record
from charforgex.data.buckets import MAX_ENLARGEMENT, Bucket, Cut, find_bucket, make_buckets, make_cut
from charforgex.draws import python_rng


@dataclass(frozen=True)
class Item:
    """One picture or clip at one size. `repeats` says how often it comes in an epoch; `regular` that it is not the character's."""

    record: Record
    cut: Cut
    repeats: int = 1
    regular: bool = False
    frames: tuple[int, ...] = ()  # of a clip: which frames of its video, counted from 0

    @property
    def key(self) -> str:
        """What it is: its file's content hash, and the first frame of a clip."""
        return f"{self.record.sha256}@{self.frames[0]}" if self.frames else self.record.sha256


class Drawn(NamedTuple):
    """One place of a batch: what is shown, and what is said of it. A dropped caption goes to the encoder as ""."""

    item: Item
    cut: Cut
    caption: str
    dropped: bool

    @property
    def text(self) -> str:
        return "" if self.dropped else self.caption


def group(items: Sequence[Item], first: int = 0) -> dict[Bucket, list[int]]:
    """Numbers of the items by bucket, counted from `first`, each as often as it comes in an epoch."""
    buckets: dict[Bucket, list[int]] = {}
    for number, item in enumerate(items, first):
        buckets.setdefault(item.cut.size, []).extend([number] * item.repeats)
    return buckets


def arrange(
    records: Sequence[Record], resolutions: Sequence[int], multiple: int, upscale: bool, repeats: Mapping[str, int]
) -> tuple[list[Item], list[str]]:
    """Every record at every resolution that it is large enough for, and notes on what is left out or cut hard.

    `repeats` maps top-level subfolders to how often their pictures come in an epoch.
    """
    items, notes = [], []
    for record in records:
        often = repeats.get(record.path.split("/")[0], 1) if "/" in record.path else 1
        too_small = []
        for resolution in resolutions:
            bucket = find_bucket(record.height, record.width, make_buckets(resolution, multiple))
            cut = make_cut(record.height, record.width, bucket)
            if cut.scale > MAX_ENLARGEMENT and not upscale:
                too_small.append(f"{cut.scale:.2g} times for {resolution}")
                continue
            items.append(Item(record, cut, often))
            if cut.lost > 0.4:
                size = f"{record.width} x {record.height}"
                notes.append(f"{record.path} ({size}) loses {cut.lost:.0%} of its area to the bucket {bucket[1]} x {bucket[0]}")
        if too_small:
            left_out = "left out" if len(too_small) == len(resolutions) else "not used at every resolution"
            size = f"{record.width} x {record.height}"
            notes.append(f"{record.path} ({size}) is {left_out}: it would be enlarged {', '.join(too_small)}; data.upscale=true allows it")
    return items, notes


class Order:
    """The items of batch number k, for every k, without any state.

    A batch holds items of one bucket. Each bucket is an endless chain of permutations of its items, cut into batches. A cycle of as
    many batches as there are items holds each bucket once per item of it, evenly spread; so a cycle is `batch_size` epochs, after
    which every item has been seen exactly `batch_size` times, and a bucket's items never differ by more than one within an epoch.
    """

    def __init__(self, buckets: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int):
        self.buckets = {bucket: tuple(items) for bucket, items in sorted(buckets.items())}
        self.batch_size, self.seed = batch_size, seed
        self.cycle_length = sum(map(len, self.buckets.values()))
        self._cycle = lru_cache(4)(self._cycle_of)
        self._permutation = lru_cache(1024)(self._permutation_of)

    def __reduce__(self):
        return Order, (self.buckets, self.batch_size, self.seed)

    def _cycle_of(self, cycle: int) -> list[tuple[Bucket, int]]:
        """The cycle's batches: their bucket, and how many batches of it came before in this cycle."""
        rng = python_rng(self.seed, "cycle", cycle)
        places = [((k + rng.random()) / len(items), bucket, k) for bucket, items in self.buckets.items() for k in range(len(items))]
        return [(bucket, k) for _, bucket, k in sorted(places)]

    def _permutation_of(self, bucket: Bucket, epoch: int) -> list[int]:
        items = list(self.buckets[bucket])
        rng: random.Random = python_rng(self.seed, "epoch", *bucket, epoch)
        rng.shuffle(items)
        return items

    def batch(self, number: int) -> list[int]:
        cycle, place = divmod(number, self.cycle_length)
        bucket, before = self._cycle(cycle)[place]
        count = len(self.buckets[bucket])
        first = (cycle * count + before) * self.batch_size
        return [self._permutation(bucket, p // count)[p % count] for p in range(first, first + self.batch_size)]
