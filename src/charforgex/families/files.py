"""Hashes of files and of parts of them. A file whose size and time are unchanged is not read again within a process."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

Stamp = tuple[str, int, int]


def stamp(file: Path) -> Stamp:
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns


@cache
def file_hash(known: Stamp) -> str:
    with open(known[0], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def span_hash(known: Stamp, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with open(known[0], "rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(1 << 24, end - start))
            digest.update(block)
            start += len(block)
    return digest.hexdigest()
