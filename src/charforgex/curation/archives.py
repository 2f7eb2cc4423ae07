"""Pictures inside zip and tar archives, one at a time, and never written to disk.

An archive is read twice: for the names, captions and masks, then for the pictures. What is in memory is the names, the sidecars (up to
`SIDECAR_BYTES`) and one picture. Nothing in an archive is believed: sizes are counted while unpacking, headers are bounded, and a member
that leads outside, is a link or unpacks to hundreds of times its size is refused.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

from charforgex.binding import Range
from charforgex.curation.folders import (
    MAX_CAPTION_BYTES,
    Sorted,
    caption_lines,
    caption_verdict,
    is_mask,
    is_sidecar,
    leads_out,
    mask_verdict,
    printable,
    refusal_by_name,
    sort_names,
)
from charforgex.curation.items import Item, Verdict
from charforgex.curation.pictures import Unusable, verdict_of

SUFFIXES = (".zip", ".cbz", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
SIDECAR_BYTES = 2**28  # captions and masks of one archive
HEADER_BYTES = 2**20  # a long name or a pax header
DIRECTORY_BYTES = 256  # of a zip's directory, for each member that is allowed
RATIO_FROM = 2**23  # what unpacks to less is never a bomb
XZ_MEMORY = 2**28  # `xz -9` needs 65 MiB
BLOCK = 512
CHUNK = 2**16


@dataclass(frozen=True)
class ArchiveSettings:
    max_members: Annotated[int, Range(at_least=1)] = 100_000
    max_total_gib: Annotated[float, Range(above=0)] = 64.0
    max_ratio: Annotated[float, Range(above=1)] = 300.0


@dataclass(frozen=True)
class Member:
    """A file in an archive. `name` is relative, without `.` and doubled slashes, unless `refusal` says that it cannot be read.

    `read` gives the content, `size` bytes, until the next member is asked for.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    refusal: Verdict | None = None


class Ended(Unusable):
    """The archive cannot be read on from here."""


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def items(path: Path, name: str, settings: ArchiveSettings, max_bytes: int, max_pixels: int) -> Iterator[Item]:
    """An item for each member but folders and hidden files, then one for the archive. Never raises for what is in the archive."""
    beside = Beside(path, settings)
    labels: set[str] = set()
    pictures, verdict = 0, None
    try:
        for member in members(path, settings):
            label = f"{name}!/{printable(member.name)}"
            first, again = label not in labels, 2
            while label in labels:  # an archive may hold several of one name
                label, again = f"{name}!/{printable(member.name)}#{again}", again + 1
            labels.add(label)
            if first and member.name in beside.contents:
                continue  # told with its picture
            refusal = member.refusal or beside.refusal(member.name)
            data = None
            try:
                data = None if refusal else _read(member, max_bytes)
            except Ended as error:
                yield Item(label, verdict=verdict_of(error))
                raise
            except Unusable as error:
                refusal = verdict_of(error)
            verdicts = beside.verdicts(member.name, data, max_pixels)
            if data is None:
                yield Item(label, verdict=refusal)
            else:
                pictures += 1
                yield Item(label, data, captions=beside.captions(member.name), mask=beside.mask(member.name, verdicts))
            for sidecar in beside.take(member.name):
                yield Item(f"{name}!/{printable(sidecar)}", verdict=verdicts[sidecar])
    except Ended as error:
        verdict = Verdict(error.kind, f"{error}; " + (f"{pictures} pictures before that are used" if pictures else "it gives no picture"))
    for sidecar, owner in beside.left():
        unreached = Verdict("sidecar", f"it belongs to {printable(owner)}, which was not reached")
        yield Item(f"{name}!/{printable(sidecar)}", verdict=unreached)
    yield Item(name, verdict=verdict or Verdict("container", f"{pictures} pictures in {len(labels)} members"))


def _read(member: Member, max_bytes: int) -> bytes:
    if member.size > max_bytes:
        raise Unusable("too_large", f"it has {member.size / 2**20:.0f} MiB, more than the {max_bytes / 2**20:g} MiB that are read")
    if not member.size:
        raise Unusable("corrupt", "the file is empty")
    return member.read()


def _content(member: Member, room: int) -> bytes | Verdict:
    """A sidecar's content, or why it is not read. Raises Ended."""
    try:
        return _read(member, room if is_mask(member.name) else min(room, MAX_CAPTION_BYTES)) if member.size else b""
    except Ended:
        raise
    except Unusable as error:
        return verdict_of(error)


class Beside:
    """The names in an archive, and the contents of the captions and masks that belong to a picture."""

    def __init__(self, path: Path, settings: ArchiveSettings):
        names: dict[str, None] = {}
        self.contents: dict[str, bytes | Verdict] = {}
        room = SIDECAR_BYTES
        try:
            for member in members(path, settings):
                if member.refusal or member.name in names:
                    continue
                names[member.name] = None
                if is_sidecar(member.name):
                    content = _content(member, room)
                    self.contents[member.name] = content
                    room -= len(content) if isinstance(content, bytes) else 0
        except Ended:
            pass  # the second reading ends at the same place, and tells
        self.found: Sorted = sort_names(names)
        self.pictures = set(self.found.pictures)
        owners = self.found.owners()
        self.lonely = self.contents.keys() - owners.keys()
        self.contents = {name: content for name, content in self.contents.items() if name in owners}
        self.owned: dict[str, list[str]] = {}
        for sidecar in self.contents:
            self.owned.setdefault(owners[sidecar], []).append(sidecar)

    def refusal(self, name: str) -> Verdict | None:
        """Why a member of this name gives no picture."""
        if name in self.pictures:
            return None
        if name in self.contents:
            return Verdict("unsupported", "a file of this name came before it, and is the one that is used")
        if name in self.lonely:
            return Verdict("unsupported", "no picture has this name")
        if is_archive(name):
            return Verdict("unsupported", "an archive inside an archive is not opened; unpack it")
        return refusal_by_name(name)

    def captions(self, picture: str) -> tuple[str, ...]:
        """Those that can be read; the verdicts of the others tell what is wrong with them."""
        lines = []
        for name in self.found.captions(picture):
            content = self.contents.get(name)
            if isinstance(content, bytes) and caption_verdict(content, picture).kind == "sidecar":
                lines += caption_lines(content)
        return tuple(dict.fromkeys(lines))

    def mask(self, picture: str, verdicts: dict[str, Verdict]) -> bytes | None:
        name = self.found.mask(picture)
        return self.contents[name] if name in verdicts and verdicts[name].kind == "sidecar" else None

    def verdicts(self, picture: str, data: bytes | None, max_pixels: int) -> dict[str, Verdict]:
        """What becomes of the sidecars of a picture with this content, by name."""
        owner, told = printable(picture), {}
        mask = self.found.mask(picture)
        for name in (*self.found.captions(picture), *([mask] if mask else [])):
            content = self.contents.get(name)
            if isinstance(content, Verdict):
                told[name] = content
            elif content is not None:
                told[name] = mask_verdict(content, data, owner, max_pixels) if name == mask else caption_verdict(content, owner)
        return told

    def take(self, picture: str) -> list[str]:
        return self.owned.pop(picture, [])

    def left(self) -> Iterator[tuple[str, str]]:
        for owner, sidecars in self.owned.items():
            for sidecar in sidecars:
                yield sidecar, owner


# ---- zip and tar behind one interface ----


def members(path: Path, settings: ArchiveSettings) -> Iterator[Member]:
    """The files of an archive as they come. Raises Ended where it breaks off, is a bomb, or has more than is read."""
    kind = _zip_members if path.name.lower().endswith((".zip", ".cbz")) else _tar_members
    total, most = 0, settings.max_total_gib * 2**30
    try:
        with open(path, "rb") as file:
            for number, member in enumerate(kind(file, settings)):
                if number >= settings.max_members:
                    raise Ended("too_large", f"it has more than the {settings.max_members} members that are read")
                total += max(0, member.size)
                if total > most:
                    raise Ended("too_large", f"it unpacks to more than {settings.max_total_gib:g} GiB")
                if leads_out(member.name):
                    yield Member(member.name, 0, member.read, Verdict("unsafe", "its path leads out of the archive"))
                    continue
                name = PurePosixPath(member.name)
                if not any(part.startswith(".") for part in name.parts):
                    yield Member(str(name), member.size, member.read, member.refusal)
    except OSError as error:
        raise Ended("corrupt", f"it cannot be read: {error.strerror or error}") from error


class _Bounded:
    """A file that refuses to give more than `limit` bytes at once: zipfile reads a zip's whole directory in one go."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.limit = file, limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(self.limit + 1 if count < 0 else min(count, self.limit + 1))
        if len(data) > self.limit:
            raise Ended("too_large", f"its directory has more than {self.limit / 2**20:.0f} MiB")
        return data


def _zip_members(file: BinaryIO, settings: ArchiveSettings) -> Iterator[Member]:
    limit = max(2**20, settings.max_members * DIRECTORY_BYTES)
    try:
        archive = zipfile.ZipFile(_Bounded(file, limit))
    except Ended:
        raise
    except Exception as error:
        raise Ended("corrupt", f"its directory is damaged or missing ({error}); zip -FF may repair it") from error
    for info in archive.infolist():
        if not info.is_dir():
            name = info.orig_filename  # as it is written: zipfile cuts names at a NUL
            yield Member(name, info.file_size, functools.partial(_read_zipped, archive, info), _zip_refusal(info, settings))


def _zip_refusal(info: zipfile.ZipInfo, settings: ArchiveSettings) -> Verdict | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return Verdict("unsafe", "it is a link or a device, not a file")
    if info.file_size > RATIO_FROM and info.file_size > settings.max_ratio * max(1, info.compress_size):
        times = info.file_size / max(1, info.compress_size)
        return Verdict("unsafe", f"it unpacks to {times:.0f} times its size; up to {settings.max_ratio:g} is allowed")
    if info.flag_bits & 0x41:
        return Verdict("unsupported", "it is encrypted; unpack the archive with its password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Verdict("unsupported", f"its compression (method {info.compress_type}) is not read; pack it with deflate")
    return None


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            data = file.read(info.file_size + 1)
    except Exception as error:  # of many types: zlib's, zipfile's, struct's
        raise Unusable("corrupt", f"it is damaged in the archive: {type(error).__name__}: {error}") from error
    if len(data) != info.file_size:
        raise Unusable("corrupt", f"it breaks off in the archive: {len(data)} of {info.file_size} bytes")
    return data


class _Stream:
    """The unpacked bytes of a tar, front to back. Raises Ended where they break off or turn out to be a bomb."""

    def __init__(self, file: BinaryIO, settings: ArchiveSettings):
        self.file, self.settings, self.done = file, settings, 0
        self.size = file.seek(0, 2)
        file.seek(0)
        head = file.read(6)
        file.seek(0)
        self.packed = True
        if head.startswith(b"\x1f\x8b"):
            self.source: Any = gzip.GzipFile(fileobj=file)
        elif head.startswith(b"BZh"):
            self.source = bz2.BZ2File(file)
        elif head.startswith(b"\xfd7zXZ\0"):
            self.source = _Xz(file)
        else:
            self.source, self.packed = file, False

    def chunks(self, count: int) -> Iterator[bytes]:
        while count:
            try:
                chunk = self.source.read(min(count, CHUNK))
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise Ended("corrupt", f"it is damaged after {self.done} unpacked bytes: {error}") from error
            if not chunk:
                raise Ended("corrupt", f"it breaks off after {self.done} unpacked bytes")
            self.done += len(chunk)
            if self.packed and self.done > RATIO_FROM and self.done > self.settings.max_ratio * max(1, self.file.tell()):
                raise Ended("unsafe", f"it unpacks to more than {self.settings.max_ratio:g} times its size")
            if self.done > self.settings.max_total_gib * 2**30:
                raise Ended("too_large", f"it unpacks to more than {self.settings.max_total_gib:g} GiB")
            yield chunk
            count -= len(chunk)

    def read(self, count: int) -> bytes:
        return b"".join(self.chunks(count))

    def skip(self, count: int) -> None:
        if not self.packed:
            if self.file.tell() + count > self.size:
                raise Ended("corrupt", f"it breaks off after {self.size} bytes")
            self.done += count
            self.file.seek(count, 1)
        else:
            for _ in self.chunks(count):
                pass


class _Xz:
    """What lzma.LZMAFile does, with a bound on memory: a header may ask for 4 GiB."""

    def __init__(self, file: BinaryIO):
        self.file, self.decoder = file, lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(self, count: int) -> bytes:
        data = b""
        while not (out := self.decoder.decompress(data, count)):
            if self.decoder.eof:
                rest = (self.decoder.unused_data or self.file.read(CHUNK)).lstrip(b"\0")  # streams may follow, padded with zeros
                if not rest:
                    return b""
                self.decoder, data = lzma.LZMADecompressor(memlimit=XZ_MEMORY), rest
            elif not (data := self.file.read(CHUNK)):
                raise EOFError("the end of the stream is missing")
        return out


LINKS = {tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE}
FILES = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


def _tar_members(file: BinaryIO, settings: ArchiveSettings) -> Iterator[Member]:
    """Headers by POSIX.1-2001 (pax) and GNU tar.

    tarfile itself reads headers of any length into memory and takes damage after the first member for the archive's end.
    """
    stream = _Stream(file, settings)
    long_name, pax = "", {}
    while (block := stream.read(BLOCK)).strip(b"\0"):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(pax.get("size", info.size))
        except (tarfile.HeaderError, ValueError) as error:
            raise Ended("corrupt", f"the header at {stream.done - BLOCK} is damaged: {error}") from error
        if size < 0:
            raise Ended("corrupt", f"a member says that it has {size} bytes")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            if info.size > HEADER_BYTES:
                raise Ended("unsafe", f"a header has {info.size} bytes; up to {HEADER_BYTES} are read")
            content = stream.read(info.size)
            stream.skip(-info.size % BLOCK)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax = _pax(content)
            continue
        name = pax.get("path") or long_name or info.name
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
        long_name, pax = "", {}
        if info.type in LINKS:
            yield Member(name, 0, bytes, Verdict("unsafe", "it is a link or a device, not a file"))
            continue
        taken: list[int] = []
        if info.type != tarfile.DIRTYPE and not name.endswith("/"):
            odd = sparse or info.type not in FILES
            refusal = Verdict("unsupported", "it is a sparse or special file; pack the archive with tar --format=pax") if odd else None
            yield Member(name, size, functools.partial(_read_tarred, stream, size, taken), refusal)
        elif info.type == tarfile.DIRTYPE:
            size = 0
        stream.skip((0 if taken else size) + -size % BLOCK)


def _read_tarred(stream: _Stream, size: int, taken: list[int]) -> bytes:
    taken.append(size)
    return stream.read(size)


def _pax(content: bytes) -> dict[str, str]:
    """The records of a pax header, each `length key=value` and a line feed."""
    found, start = {}, 0
    while start < len(content) and content[start]:
        length, space, _ = content[start : start + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 2:
            raise Ended("corrupt", "a pax header is damaged")
        key, _, value = content[start + len(length) + 1 : start + int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start += int(length)
    return found
