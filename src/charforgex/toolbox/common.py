"""What all tools on LoRA files share: their settings, opening any file, where the result goes, and what it says of its parents."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from charforgex.errors import ConfigError, LoraError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from charforgex.families.bases import Base
    from charforgex.lora.formats import LoraFile
    from charforgex.lora.state import Layer

Dtype = Literal["float32", "float16", "bfloat16"]
T = TypeVar("T")
PATIENCE = 2.0  # seconds without a word


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`lora`: one file or several. `base`: which listed base they are for, where their keys do not tell."""

    lora: str | list[str]
    base: str | None = None

    @property
    def paths(self) -> list[Path]:
        paths = [self.lora] if isinstance(self.lora, str) else self.lora
        if not paths:
            raise ConfigError("lora=[] names no file; say lora=<file.safetensors>.")
        return [Path(path).expanduser() for path in paths]

    def the_path(self) -> Path:
        """Of a tool that takes one file. Raises ConfigError for several."""
        if len(self.paths) != 1:
            raise ConfigError(f"lora={[str(path) for path in self.paths]} are {len(self.paths)} files, and this tool takes one.")
        return self.paths[0]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """`out`: the file to be written. `format`, `dtype`: as the first input's where they are None. `dry_run`: tell, and write nothing."""

    out: Path | None = None
    format: str | None = None
    dtype: Dtype | None = None
    overwrite: bool = False
    dry_run: bool = False

    def check_out(self, inputs: Collection[Path]) -> Path:
        """The file to be written, before anything is computed. Raises ConfigError."""
        if self.out is None:
            raise ConfigError("out is not set; say out=<file.safetensors>.")
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"out={self.out} must end in .safetensors.")
        if self.out.resolve() in {path.resolve() for path in inputs}:
            raise ConfigError(f"out={self.out} is one of the inputs, which stay as they are; name another file.")
        if self.out.is_dir():
            raise ConfigError(f"out={self.out} is a folder; name a file.")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"out={self.out} exists; say overwrite=true to replace it, or name another file.")
        check_place(self.out)
        return self.out

    def check_unused(self) -> None:
        """Of a tool that writes a file if it is told to, and is not. Raises ConfigError for settings of the file."""
        if given := [name for name in ("format", "dtype") if getattr(self, name) is not None]:
            raise ConfigError(f"{' and '.join(given)} without a file would have no effect; say out=<file.safetensors>.")

    def check_format(self, opened: Opened) -> None:
        """Raises LoraError for a format that is none of the files' family."""
        from charforgex.lora.writing import check_format

        check_format(self.format or opened.format, opened.base.names)

    @contextmanager
    def place(self) -> Iterator[Outputs]:
        """Where a file is written that a dry run, too, must look at: its own is soon forgotten."""
        if not self.dry_run:
            yield self
            return
        with tempfile.TemporaryDirectory() as folder:
            yield replace(self, out=Path(folder) / "dry.safetensors")


@dataclass(frozen=True, kw_only=True)
class Shrinks(Inputs, Outputs):
    """Of the tools that make one file smaller. `functional`: also compare what the embedded base draws."""

    functional: bool = False

    def __post_init__(self):
        self.the_path()


def check_place(out: Path) -> Path:
    """The first folder above `out` that is there. Raises ConfigError if nothing can be written into it."""
    home = next(path for path in out.absolute().parents if path.exists())
    if not home.is_dir():
        raise ConfigError(f"out={out} lies below {home}, which is no folder; name another place.")
    if not os.access(home, os.W_OK):
        raise ConfigError(f"out={out} cannot be written: nobody but its owner may write into {home}; name another place.")
    return home


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises ConfigError where the system refuses, as a full disk does."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror or error}; make room, or name another place.") from error


@dataclass(frozen=True)
class Opened:
    """Files of one base, with what is known of each: `files[i]` lies at `paths[i]`. Layers are read when asked for."""

    base: Base
    paths: list[Path]
    files: list[LoraFile]

    @property
    def names(self) -> list[str]:
        """Our names of all layers that any file has, in the base's order."""
        have = set().union(*(file.names for file in self.files))
        return [name for component, paths in self.base.names.modules.items() for path in paths if (name := f"{component}.{path}") in have]

    @property
    def format(self) -> str:
        """The first file's, as `identify` says."""
        from charforgex.lora.identify import identify

        return identify(self.files[0].shapes)


@contextmanager
def opened_loras(inputs: Inputs) -> Iterator[Opened]:
    """The files, open. Raises LoraError if one cannot be understood, or if they are for different bases."""
    from charforgex.families import bases
    from charforgex.lora.formats import open_lora

    paths = inputs.paths
    found = [bases.base_of_file(path, inputs.base) for path in paths]
    families = {base.family for base in found}
    if len(families) > 1:
        said = ", ".join(f"{path.name} for {base.family}" for path, base in zip(paths, found, strict=True))
        raise LoraError(f"The LoRAs are for different families: {said}. A text encoder's layers alone fit several: then say base=<name>.")
    with ExitStack() as stack:
        base = max(found, key=lambda one: len(one.shapes))  # sizes of one family that share names: the one with all the layers
        files = [stack.enter_context(open_lora(path, base.names)) for path in paths]
        for path, one in zip(paths, found, strict=True):
            if one is not base and any(base.shapes.get(name) != shape for name, shape in one.shapes.items() if name in base.shapes):
                raise LoraError(f"{path} is for {one.name}, and the others for {base.name}, whose layers have other sizes.")
        yield Opened(base, paths, files)


@contextmanager
def begun(settings: Shrinks) -> Iterator[Opened]:
    """The one file, open, once it is sure that the result has a place and can be compared. Raises ConfigError, LoraError."""
    if not settings.dry_run:
        settings.check_out(settings.paths)
    with opened_loras(settings) as opened:
        if settings.functional:
            from charforgex.evaluation.functional import check_base

            check_base(opened.base)
        yield opened


def as_lora(path: Path) -> str:
    """The way out where a tool reads plain LoRA alone."""
    return f"Convert it to LoRA first: charforgex lora convert {path} out={path.stem}_lora.safetensors kind=lora"


def dtype_of(opened: Opened, wanted: Dtype | None) -> torch.dtype:
    """The wanted one, or that of the first file's first factor; float16 where that is one in which nothing is written, such as float8."""
    import torch

    if wanted is not None:
        return getattr(torch, wanted)
    file = opened.files[0]
    dtype = file.dtype(next(iter(file.sides.values())))
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float16


def save(
    opened: Opened, outputs: Outputs, get: Callable[[str], Layer | None], names: Sequence[str], metadata: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Writes the layers that `get` makes, one at a time, and returns what result.json and the tables say of the file."""
    from charforgex.lora.metadata import hashes
    from charforgex.lora.writing import write_layers

    out, format = outputs.check_out(opened.paths), outputs.format or opened.format
    with writing(out):
        layers = write_layers(get, names, out, format, opened.base.names, dtype_of(opened, outputs.dtype), metadata)
    ranks = sorted({layer.rank for layer in layers.values()})
    return {
        "out": str(out), "format": format, "base": opened.base.name, "layers": len(layers), "ranks": ranks,
        "bytes": out.stat().st_size, "bytes_before": sum(path.stat().st_size for path in opened.paths), **hashes(out),
    }  # fmt: skip


def lineage(opened: Opened, method: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The first file's metadata, without what is no longer true, and where the result comes from: `charforgex.lineage`, as JSON."""
    from charforgex.lora.metadata import hashes

    stale = ("sshs_", "modelspec.hash", "modelspec.merged_from", "charforgex.adapter_sha256", "ss_network_dim", "ss_network_alpha")
    kept = {key: value for key, value in opened.files[0].metadata.items() if not key.startswith(stale) and key != "lora_adapter_metadata"}
    parents = [
        {"name": path.name, "sha256": hashes(path)["sha256"], **_ancestors(file.metadata)}
        for path, file in zip(opened.paths, opened.files, strict=True)
    ]
    told = {"method": method, "settings": dict(settings), "parents": parents, "version": version("charforgex")}
    merged = {"modelspec.merged_from": ", ".join(path.stem for path in opened.paths)} if len(opened.paths) > 1 else {}
    return kept | merged | {"charforgex.lineage": json.dumps(told, sort_keys=True, ensure_ascii=False, default=str)}


def _ancestors(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a parent says of its own parents; nothing if that is no JSON of ours."""
    told = parsed(metadata, "charforgex.lineage")
    return {"lineage": told} if isinstance(told, dict) else {}


def parsed(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON in a header's value. None where there is none, or none that can be understood and written again."""
    try:
        found = json.loads(metadata.get(key, "null"))
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # halves of characters, and numbers that are none
        return found
    except (ValueError, RecursionError):
        return None


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """The items, and a bar on a terminal if they take more than a moment."""
    from rich.console import Console
    from rich.progress import Progress

    console, started, bar, task = Console(stderr=True), time.monotonic(), None, None
    try:
        for done, item in enumerate(items):
            if bar is None and console.is_terminal and time.monotonic() - started > PATIENCE:
                bar = Progress(console=console, transient=True)
                bar.start()
                task = bar.add_task(what, total=len(items))
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def counted(get: Callable[[str], T], names: Collection[str], what: str = "layers") -> Iterator[Callable[[str], T]]:
    """`get`, which is called once for each of the names, with `progress`."""
    with closing(progress(names, what)) as steps:

        def counting(name: str) -> T:
            next(steps, None)
            return get(name)

        yield counting


def say(console: Console, *lines: str) -> None:
    """Lines as they are: names in them may look like markup, and paths are not broken."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def written(told: Mapping[str, Any]) -> str:
    """The last line of what a tool says."""
    return f"Wrote {told['out']}." if told.get("out") else "Nothing is written: dry_run=true."
