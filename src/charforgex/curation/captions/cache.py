"""Captions of many pictures: in batches, each asked for once, nothing lost to a kill but the batch in work.

One append-only file of JSON lines per captioner holds what it said; a line that a crash tore is as if never written. Several processes may
append to one file: each batch is one write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from charforgex.curation.captions.base import Captioner, Context, Said
from charforgex.errors import ConfigError, DataError, ModelError

WINDOW = 1024  # answers that wait for a batch to fill up, at most: results come in the order of the pictures
GIVE_UP = 8  # failures in a row after which it is not the pictures


class Job(NamedTuple):
    """A picture to caption. `key` is the SHA-256 of its content, `open` decodes it, and is called only if its caption is not known yet."""

    key: str
    open: Callable[[], Image.Image]
    context: Context


def caption_all(
    captioner: Captioner,
    jobs: Iterable[Job],
    cache: Path,
    batch_size: int,
    report: Callable[[str, str], None],
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[str, str]]:
    """Yields (key, text) in the order of the jobs, out of the cache or new. A picture that cannot be captioned is left out, and
    `report(name, reason)` told. `progress` hears how many more are through. Raises ModelError when it is not the picture's fault."""
    store = Store(cache, captioner.name)
    runner = _Runner(captioner, batch_size, report)
    waiting: list[tuple[Job, str]] = []
    missing: dict[str, Job] = {}

    def flush() -> Iterator[tuple[str, str]]:
        store.add(runner.caption(missing))
        yield from ((job.key, store[key]) for job, key in waiting if key in store)
        progress(len(waiting))
        waiting.clear()
        missing.clear()

    for job in jobs:
        key = _cache_key(captioner, job)
        waiting.append((job, key))
        if key not in store:
            missing.setdefault(key, job)
        if len(missing) == batch_size or len(waiting) == WINDOW:
            yield from flush()
    yield from flush()


def _cache_key(captioner: Captioner, job: Job) -> str:
    read = {field: getattr(job.context, field) for field in sorted(captioner.reads)}
    return hashlib.sha256(json.dumps([job.key, read]).encode()).hexdigest()


class Store:
    """What one captioner has said, by key. In memory are only the places of the lines."""

    def __init__(self, folder: Path, name: str):
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]
        self.path = Path(folder) / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.jsonl"
        self.places: dict[str, int] = {}
        if self.path.exists():
            with self.path.open("rb") as file:
                self._index(file, 0)

    def _index(self, file: Iterable[bytes], place: int) -> None:
        for line in file:
            if row := _parse(line):
                self.places.setdefault(row["key"], place)
            place += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __getitem__(self, key: str) -> str:
        with self.path.open("rb") as file:
            file.seek(self.places[key])
            row = _parse(file.readline())
        return Said(row["text"], row["about"]) if "about" in row else row["text"]

    def add(self, texts: dict[str, str]) -> None:
        """Appends a batch; when this returns it is on disk."""
        if not texts:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
            torn = size and file.read(1) != b"\n"
            data = b"".join(json.dumps({"key": key} | _row(text)).encode() + b"\n" for key, text in texts.items())
            data = (b"\n" if torn else b"") + data
            if file.write(data) != len(data):
                raise OSError(f"{self.path} could not be written in full; is the disk full?")
            os.fsync(file.fileno())
            self._index(data.splitlines(keepends=True), file.tell() - len(data))


def _row(text: str) -> dict[str, Any]:
    return {"text": text} | ({"about": text.about} if isinstance(text, Said) else {})


def _parse(line: bytes) -> dict | None:
    """A whole line of ours, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("key", "text"))
    return row if whole else None


class _Runner:
    """Batches that shrink: when one fails its halves are tried, down to single pictures, so that a bad one costs only itself."""

    def __init__(self, captioner: Captioner, batch_size: int, report: Callable[[str, str], None]):
        self.captioner, self.size, self.report = captioner, batch_size, report
        self.failures = 0  # in a row

    def caption(self, jobs: dict[str, Job]) -> dict[str, str]:
        """Texts by cache key, of the pictures for which there is one."""
        texts, keys, start = {}, list(jobs), 0
        while start < len(keys):
            part = keys[start : start + self.size]  # the size may have shrunk meanwhile
            texts |= self._part(part, [jobs[key] for key in part])
            start += len(part)
        return texts

    def _part(self, keys: Sequence[str], jobs: Sequence[Job]) -> dict[str, str]:
        opened = [(key, job, picture) for key, job in zip(keys, jobs, strict=True) if (picture := self._open(job))]
        return self._try(opened) if opened else {}

    def _open(self, job: Job) -> Image.Image | None:
        try:
            return job.open()
        except (DataError, OSError) as error:
            self.report(job.context.name, f"the picture cannot be opened: {error}")
            return None

    def _try(self, opened: list[tuple[str, Job, Image.Image]]) -> dict[str, str]:
        try:
            texts = self.captioner.caption([picture for _, _, picture in opened], [job.context for _, job, _ in opened])
        except (ConfigError, ModelError):
            raise
        except Exception as error:  # whatever a model says of a picture it cannot take; it is reported below
            reason, memory = f"{type(error).__name__}: {error}", _is_memory(error)
        else:
            assert len(texts) == len(opened), f"{self.captioner.name} gave {len(texts)} captions for {len(opened)} pictures"
            self.failures = 0
            for (_, job, _), text in zip(opened, texts, strict=True):
                if not text:
                    self.report(job.context.name, f"no caption by {self.captioner.name}: it had nothing to say")
            return {key: text for (key, _, _), text in zip(opened, texts, strict=True) if text}

        # Here the exception, and with it the tensors that its traceback holds, is gone.
        _free_memory()
        if len(opened) == 1:
            return self._failed(opened[0][1], reason)
        half = len(opened) // 2
        if memory:
            self.size = min(self.size, half)
        return self._try(opened[:half]) | self._try(opened[half:])

    def _failed(self, job: Job, reason: str) -> dict[str, str]:
        self.report(job.context.name, f"no caption by {self.captioner.name}: {reason}")
        self.failures += 1
        if self.failures == GIVE_UP:
            raise ModelError(f"{self.captioner.name} failed on {GIVE_UP} pictures in a row; the last one: {reason}")
        return {}


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower()


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
