"""Who is evaluated: what `lora`, `scales`, `pictures` and `with_base` name, each with a name of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from charforgex.errors import ConfigError, LoraError
from charforgex.evaluation.settings import Settings
from charforgex.evaluation.trainings import Training, training_in, trainings_below

BASE = "base"


@dataclass(frozen=True)
class Contestant:
    """`loras` are files that act together at `scale`; none for the base model. `folder` holds the finished pictures of a "folder"."""

    name: str
    kind: Literal["lora", "checkpoint", "base", "folder"]
    loras: tuple[Path, ...] = ()
    scale: float = 1.0
    step: int | None = None
    training: Training | None = None
    folder: Path | None = None

    @property
    def slug(self) -> str:
        """The name as one of a folder."""
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", self.name).strip("-.") or "contestant"


def find(settings: Settings) -> tuple[list[Contestant], list[str]]:
    """All contestants in the order in which they were asked for, the base model first, and what is to be told of them.

    Headers alone are read, and checkpoints become LoRA files in the cache. Raises ConfigError and LoraError.
    """
    notes: list[str] = []
    named = [one for entry in settings.entries for one in _of(entry, settings.cache_dir, notes)]
    scales = list(dict.fromkeys(settings.scales))
    found = [replace(one, scale=scale) for one in _renamed(named) for scale in scales]
    if len(scales) > 1:
        found = [replace(one, name=f"{one.name} x{one.scale:g}") for one in found]
    if settings.draws and (settings.with_base or not named):
        found.insert(0, Contestant(BASE, "base"))
    for folder in settings.folders:
        if not folder.is_dir():
            raise ConfigError(f"pictures={folder} is not a folder.")
        found.append(Contestant(folder.resolve().name or str(folder), "folder", folder=folder))
    return _unique(found), notes


def _of(entry: str | Sequence[str], cache: Path, notes: list[str]) -> Iterator[Contestant]:
    """The contestants that one entry of `lora` stands for."""
    if not isinstance(entry, str):
        files = tuple(_file(Path(name).expanduser()) for name in entry)
        yield Contestant("+".join(file.stem for file in files), "lora", files, training=_home(files[0]))
        return
    path = Path(entry).expanduser()
    if not path.is_dir():
        file = _file(path)
        yield Contestant(file.stem, "lora", (file,), training=_home(file))
    elif training := training_in(path):
        yield from _of_training(training, cache, notes)
    else:
        trainings = trainings_below(path)
        if not trainings:
            why = " It is a sweep's own folder: name the folder of its runs, runs_dir." if (path / "multirun.yaml").is_file() else ""
            raise ConfigError(f"lora={path} is neither a run with a LoRA nor a folder of such runs.{why}")
        for training in trainings:
            yield Contestant(training.folder.name, "lora", (training.lora,), training=training)


def _of_training(training: Training, cache: Path, notes: list[str]) -> Iterator[Contestant]:
    files, problems = training.checkpoints(cache)
    notes += problems
    for step, file in files:
        best = ", best" if step == training.result.get("best_step") else ""
        yield Contestant(f"step {step}{best}", "checkpoint", (file,), step=step, training=training)
    if not files and training.lora is None:
        raise ConfigError(f"lora={training.folder} is a run without a whole checkpoint and without a LoRA; let it go on first.")
    if not files:
        yield Contestant(training.lora.stem, "lora", (training.lora,), training=training)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise LoraError(f"lora={path} is not there; name a .safetensors file, a run's folder, or a folder of runs.")
    return path


def _home(file: Path) -> Training | None:
    """The run in whose folder a LoRA lies."""
    return training_in(file.parent)


# ---- names ----


def _renamed(found: list[Contestant]) -> list[Contestant]:
    """Where names are equal, the folder that tells them apart joins them."""
    names = [one.name for one in found]
    return [replace(one, name=f"{_folder(one)} {one.name}") if names.count(one.name) > 1 else one for one in found]


def _folder(one: Contestant) -> str:
    return one.training.folder.resolve().name if one.training is not None else one.loras[0].resolve().parent.name


def _unique(found: Iterable[Contestant]) -> list[Contestant]:
    """With a number behind names that are still taken, also as names of folders."""
    taken: set[str] = set()
    out = []
    for one in found:
        name, number = one.name, 2
        while replace(one, name=name).slug.lower() in taken:
            name, number = f"{one.name}-{number}", number + 1
        out.append(replace(one, name=name))
        taken.add(out[-1].slug.lower())
    return out
