"""Whose pictures are judged: references that no training saw, training pictures, other people, and what calls the character."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from charforgex.charworld.demo import DEMO, number_of, other_characters, references_of, trigger_of
from charforgex.curation.manifest import Manifest, open_manifest, some
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.settings import Settings
from charforgex.evaluation.trainings import Training, training_in

FEW = 4  # references, below which numbers depend on which ones they are


@dataclass(frozen=True)
class Character:
    """The sets of a `metric.Case` but for the base's pictures, and what is to be told of them."""

    source: str  # where the references come from, as `references=` takes it
    references: Gallery
    training: Gallery | None
    others: Gallery | None
    trigger: str | None
    notes: tuple[str, ...] = ()


def read_character(settings: Settings, trainings: Sequence[Training], cache: Path) -> Character:
    """What the settings name, else what the contestants' runs held out and trained on, of the first of them that is still there.

    Raises ConfigError if nothing says how the character looks, and DataError for what cannot be read.
    """
    notes: list[str] = []
    home = next(iter(trainings), None)
    source = settings.references or (str(home.folder) if home is not None else None)
    if source is None:
        raise ConfigError(
            "nothing says how the character looks; say references=<a folder or manifest of pictures that no training saw>. "
            f"{DEMO}0 is the embedded demo's character."
        )
    seen, others = None, settings.others
    if source.startswith(DEMO):
        held_out = demo_references(number_of(source, "references"), cache)
        trigger, others = trigger_of(number_of(source, "references")), others or source
    elif Path(source).is_dir() and (run := training_in(Path(source))) is not None:
        try:
            manifest = run.manifest()
        except DataError as error:
            raise DataError(f"what {source} was trained on is not to be had: {error} Say references=<folder or manifest>.") from error
        held_out, seen = _gallery("references", manifest, "val", cache), _gallery("training", manifest, "train", cache)
        trigger, others = run.trigger, others or run.others
    else:
        manifest = _open(source, "references", notes)
        split = _is_split(source, manifest)
        held_out = _gallery("references", manifest, "val" if split else None, cache)
        seen, trigger = _gallery("training", manifest, "train", cache) if split else None, home.trigger if home is not None else None
    if not len(held_out):
        raise DataError(f"{source} holds no picture of the character out; say references=<pictures that no training saw>.")
    if len(held_out) < FEW:
        notes.append(f"only {len(held_out)} references: numbers depend on which ones they are.")
    if settings.training is not None:
        manifest = _open(settings.training, "training", notes)
        seen = _gallery("training", manifest, "train" if _is_split(settings.training, manifest) else None, cache)
    others = None if others is None else _others(others, cache, notes)
    return Character(source, held_out, seen, others, settings.trigger or trigger, tuple(notes))


def _is_split(source: str, manifest: Manifest) -> bool:
    """Whether a manifest says itself what is held out; of a folder, everything is what it was named for."""
    return not Path(source).expanduser().is_dir() and any(record.split == "val" for record in manifest.records)


def _others(source: str, cache: Path, notes: list[str]) -> Gallery:
    if source.startswith(DEMO):
        pictures = other_characters(number_of(source, "others"))
        return Gallery("others", [Shot(picture, key=_key(picture)) for picture in pictures], cache)
    return _gallery("others", _open(source, "others", notes), None, cache, people=True)


def demo_references(number: int, cache: Path | None = None) -> Gallery:
    """The demo character's pictures that no training ever saw."""
    return Gallery("references", [Shot(picture, text, key=_key(picture)) for picture, text in references_of(number)], cache)


def _key(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size} {picture.mode}".encode() + picture.tobytes()).hexdigest()


def _open(source: str, setting: str, notes: list[str]) -> Manifest:
    try:
        manifest = open_manifest(source)
    except DataError as error:
        raise DataError(f"{setting}={source}: {error}") from error
    if not manifest.records:
        raise DataError(f"{setting}={source} has no picture that can be read.{_why(manifest)}")
    if manifest.problems:
        notes.append(f"{setting}: {len(manifest.problems)} files of {source} are not used.{_why(manifest)}")
    return manifest


def _why(manifest: Manifest) -> str:
    told = some([f"{problem.path} ({problem.reason})" for problem in manifest.problems], 3)
    return f" {told}." if told else ""


def _gallery(name: str, manifest: Manifest, split: str | None, cache: Path, people: bool = False) -> Gallery:
    """Pictures of one side of the split, or all. With `people`, a subfolder's are one person's."""
    records = manifest.records if split is None else manifest.of(split)
    shots = [
        Shot(
            manifest.file(record.path), next(iter(record.captions), ""), key=record.sha256,
            people=(record.path.partition("/")[0],) if people and "/" in record.path else (),
        )
        for record in records
    ]  # fmt: skip
    return Gallery(name, shots, cache)
