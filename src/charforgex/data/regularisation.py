"""Pictures of the class without the character, mixed in so that the class stays what it was."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from charforgex.binding import Range
from charforgex.curation.manifest import Manifest, Record, open_manifest, some
from charforgex.data.captions import PLACEHOLDER, has_trigger
from charforgex.data.dataset import Order
from charforgex.errors import ConfigError, DataError


@dataclass(frozen=True)
class Regularisation:
    """A folder or manifest of such pictures, the weight of their losses, their share of all batches, and the caption of bare ones."""

    source: Path | None = None
    weight: Annotated[float, Range(above=0)] = 1.0
    share: Annotated[float, Range(above=0, at_most=0.9)] = 0.5
    default_caption: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if self.source is None and value != field.default:
                raise ConfigError(
                    f"data.regularisation.{field.name}={value} has no effect without data.regularisation.source, a folder of pictures."
                )

    def read(self, trigger: str | None, used: Collection[str]) -> tuple[Manifest, list[Record]]:
        """All pictures, whatever their split, with captions and without masks.

        Raises DataError for captions that name the character, missing captions, and pictures among `used` (hashes).
        """
        try:
            manifest = open_manifest(self.source)
        except DataError as error:
            raise DataError(f"data.regularisation.source={self.source}: {error}") from error
        if not manifest.records:
            raise DataError(f"data.regularisation.source={self.source} has no usable picture.")
        bare = [record.path for record in manifest.records if not record.captions]
        if bare and not self.default_caption:
            raise DataError(
                f"{len(bare)} of {len(manifest.records)} regularisation pictures have no caption: {some(bare)}. Write a .txt file of the "
                "same name beside each, or set data.regularisation.default_caption to one for all of them."
            )
        records = [
            replace(record, captions=record.captions or (self.default_caption,), split="train", mask=None, mask_sha256=None)
            for record in manifest.records
        ]
        naming = [record.path for record in records if any(_names(caption, trigger) for caption in record.captions)]
        if naming:
            raise DataError(
                f"The captions of {len(naming)} regularisation pictures hold the trigger: {some(naming)}. They would teach that other "
                "people are the character; take it out of them."
            )
        twice = [record.path for record in records if record.sha256 in used]
        if twice:
            raise DataError(
                f"{len(twice)} regularisation pictures are among the character's own: {some(twice)}. Take them out of one folder."
            )
        return manifest, sorted(records, key=lambda record: record.sha256)


def _names(caption: str, trigger: str | None) -> bool:
    return PLACEHOLDER in caption or (trigger is not None and has_trigger(caption, trigger))


class Mixture:
    """Two orders as one: of any number of batches from the first, a `share` is of `other`, evenly spread. Without any state."""

    def __init__(self, order: Order, other: Order, share: float):
        self.order, self.other, self.share = order, other, share

    def batch(self, number: int) -> list[int]:
        before = int(number * self.share)
        if int((number + 1) * self.share) > before:
            return self.other.batch(before)
        return self.order.batch(number - before)
