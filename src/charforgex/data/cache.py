"""A content-addressed cache of encoded pictures, texts and masks.

An entry's name is the SHA-256 of everything its content depends on, so an entry is never stale, only unused. Nothing is ever
evicted: delete the folder to free the space; it is filled again. Entries are safetensors files with a digest of their tensors;
one that does not match is treated as absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from charforgex.errors import DataError

VERSION = 1  # raise it whenever the same key would give other numbers
MEMORY_LIMIT = 512 * 2**20  # bytes of entries that a process keeps after reading them once

Entry = dict[str, Tensor]


def key_of(kind: str, **parts: object) -> str:
    """The name of an entry: `kind/` and 64 digits. Parts are strings, numbers, bools, None and lists of these."""
    text = json.dumps({"kind": kind, "version": VERSION, **parts}, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"{kind}/{hashlib.sha256(text.encode()).hexdigest()}"


def _digest(entry: Entry) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(entry.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


class Cache:
    """Entries under a folder. A process keeps what it has read up to MEMORY_LIMIT; workers start with their own, empty memory."""

    def __init__(self, root: str | Path, memory_limit: int = MEMORY_LIMIT):
        self.root = Path(root).expanduser()
        self.memory_limit = memory_limit
        self._memory: dict[str, Entry] = {}
        self._memory_used = 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_memory": {}, "_memory_used": 0}

    def path(self, key: str) -> Path:
        kind, digest = key.split("/")
        return self.root / kind / digest[:2] / f"{digest}.safetensors"

    def find(self, key: str) -> Entry | None:
        """The entry, or None if it is absent or damaged."""
        if key in self._memory:
            return self._memory[key]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                whole = _digest(entry) == (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        if not whole:
            return None
        if self._memory_used + _size(entry) <= self.memory_limit:
            self._memory[key] = entry
            self._memory_used += _size(entry)
        return entry

    def read(self, key: str) -> Entry:
        """An entry that `prepare` has put there. Raises DataError if it has gone since."""
        entry = self.find(key)
        if entry is None:
            raise DataError(f"{self.path(key)} of the data cache is gone or damaged; start again, and it is made anew.")
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Store tensors atomically. Raises DataError if they are not finite."""
        from safetensors.torch import save

        from charforgex.runs import write_atomic

        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        if not all(tensor.isfinite().all() for tensor in entry.values()):
            raise DataError("An encoder gave numbers that are not finite; load it in float32 (float16 overflows in SDXL's own VAE).")
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(entry, {"digest": _digest(entry)}))

    def check_space(self, needed: int) -> None:
        """Raises DataError if the disk has no room for `needed` bytes and a tenth more."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed * 1.1 > free:
            raise DataError(
                f"The data cache needs {needed / 2**20:.0f} MiB in {self.root}, but {free / 2**20:.0f} MiB are free there; "
                "make room, or set data.cache to another disk."
            )
