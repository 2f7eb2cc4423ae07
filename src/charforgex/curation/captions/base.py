"""What a captioner is, and which there are.

A backend is a module of this folder with `build(settings) -> Captioner`. Building is cheap: it checks what can be checked and finds the
captioner's name; the model is loaded when the first picture comes, so that captions from the cache need none.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from charforgex.curation.captions.settings import CaptionSettings

Framing = Literal["portrait", "upper", "full"]
VERSION = 1  # of the way from an answer to a caption; part of every name
ENDS = 2**16  # bytes at either end of a weight file that tell one training from another


@dataclass(frozen=True)
class Context:
    """What is known of a picture besides its pixels. `turns` are questions and answers that came before, oldest first."""

    name: str
    captions: tuple[str, ...] = ()
    framing: Framing | None = None
    trigger: str | None = None
    class_word: str | None = None
    turns: tuple[tuple[str, str], ...] = ()


class Said(str):
    """A caption with what its captioner knows `about` it besides, as JSON can say it: how sure it is, what contradicts it."""

    about: Mapping[str, Any]

    def __new__(cls, text: str, about: Mapping[str, Any]) -> Said:
        said = super().__new__(cls, text)
        said.about = about
        return said


class Captioner(Protocol):
    """Pictures to captions. The same picture and context give the same caption, whatever else is in the batch.

    `name` says backend, model and a hash of all that shapes the answer; `reads` the fields of the context that do. Both with the picture's
    content are what a caption is cached by.
    """

    name: str
    reads: frozenset[str]

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        """One text a picture, or a `Said`; each of its lines is a caption (as in a `.txt` beside a picture), an empty text is none
        (a backend that knows why has logged it).

        Raises ModelError or ConfigError for what holds for every picture; anything else is taken for this batch's own trouble.
        """


def get_captioner(settings: CaptionSettings) -> Captioner:
    """What `settings` asks for, its model not loaded yet; for several backends, their ensemble. Raises ConfigError or ModelError."""
    if len(settings.backends) == 1:
        return _build(settings.of(settings.backends[0]))
    members = [_build(settings.of(backend)) for backend in settings.backends]
    return importlib.import_module(f"{__package__}.ensemble").build(settings, members)


def _build(settings: CaptionSettings) -> Captioner:
    return importlib.import_module(f"{__package__}.{settings.backends[0]}").build(settings)


def captioner_name(backend: str, model: str, shapes: Any) -> str:
    """`backend:model:hash`. `shapes` is all that changes the answers, as JSON can say it."""
    digest = hashlib.sha256(json.dumps([VERSION, shapes], sort_keys=True).encode()).hexdigest()
    return f"{backend}:{model}:{digest[:16]}"


def model_digest(source: str) -> str:
    """What tells models apart, in milliseconds: a hub's name; or of local files the names, sizes and both ends."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(ENDS))
            handle.seek(max(size - ENDS, 0))
            digest.update(handle.read(ENDS))
    return digest.hexdigest()


def one_line(text: str) -> str:
    """A model's answer as one caption: a line without doubled blanks that every encoding of Unicode can write."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
