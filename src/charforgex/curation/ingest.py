"""What there is to look at: files of a folder as units of work, and the pictures that each of them gives.

Nothing is fetched, nothing is changed, nothing is unpacked to disk. Every file and member gets an item: a picture, or why it is none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.binding import Range
from charforgex.curation import archives, videos
from charforgex.curation.archives import ArchiveSettings
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
    resolve_inside,
    sort_names,
    suffix_of,
    walk,
)
from charforgex.curation.items import Item, Verdict
from charforgex.curation.pictures import MAX_BYTES, MAX_PIXELS, SUFFIXES, check_file, looks_like_picture, read_bytes, verdict_of
from charforgex.curation.videos import VideoSettings
from charforgex.errors import ConfigError, DataError

Kind = Literal["picture", "archive", "video", "sidecar", "other"]
Channel = Annotated[int, Range(at_least=0, at_most=255)]


@dataclass(frozen=True)
class IngestSettings:
    background: tuple[Channel, ...] = (255, 255, 255)
    max_pixels: Annotated[int, Range(at_least=1)] = MAX_PIXELS
    max_bytes: Annotated[int, Range(at_least=1)] = MAX_BYTES
    archives: ArchiveSettings = field(default_factory=ArchiveSettings)
    videos: VideoSettings = field(default_factory=VideoSettings)

    def __post_init__(self):
        if len(self.background) != 3:
            raise ConfigError(
                f"curation.ingest.background={list(self.background)} needs three numbers, red, green and blue, such as [255,255,255]."
            )


@dataclass(frozen=True, slots=True)
class Unit:
    """A file under the root. Paths are relative to it, with forward slashes; `path` is printable even where the file's name is not.

    `owner` is the picture that a sidecar belongs to. `stamps` has (size, mtime_ns) of each of `files`: all that the unit's items depend on.
    """

    path: str
    kind: Kind
    stamps: tuple[tuple[int, int], ...] = ()
    captions: tuple[str, ...] = ()
    mask: str | None = None
    owner: str | None = None
    verdict: Verdict | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path, *self.captions, *(other for other in (self.mask, self.owner) if other))

    @property
    def size(self) -> int:
        return self.stamps[0][0] if self.stamps else 0

    @property
    def mtime_ns(self) -> int:
        return self.stamps[0][1] if self.stamps else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(item: Mapping[str, Any]) -> Unit:
        return Unit(
            **{
                **item,
                "stamps": tuple((size, mtime_ns) for size, mtime_ns in item["stamps"]),
                "captions": tuple(item["captions"]),
                "verdict": Verdict(*item["verdict"]) if item["verdict"] else None,
            }
        )


# ---- which files there are ----


def units(root: str | Path, settings: IngestSettings, leave_out: Sequence[Path] = ()) -> list[Unit]:
    """Every file under `root`, or the one file that it is, in the order of their names; nothing is opened.

    Names that begin with a dot and the paths in `leave_out` are passed over. Links that lead out of the root get a verdict, and so do names
    that cannot be told apart. Raises ConfigError for an address, and for a root that is not there.
    """
    root = check_root(root)
    if root.is_file():
        return [_unit(root.parent, root.name, sort_names([root.name]), {})]
    out = frozenset(str(path.resolve()) for path in leave_out)
    files = list(walk(root, out))
    found = sort_names(name for name, why in files if why is None and not leads_out(name))
    owners = found.owners()
    containers = {name for name, why in files if why is None and (archives.is_archive(name) or videos.is_video(name))}
    made = []
    for name, why in files:
        verdict, shown = why or _refusal(root, name), printable(name)
        if clash := next((folder for folder in _folders(name) if folder.endswith("!") and folder[:-1] in containers), None):
            verdict = Verdict("unsupported", f"the folder {clash} is named like what is inside {clash[:-1]}; rename it")
            shown = shown.replace("!/", "\\x21/")  # so that no two things have one name
        made.append(Unit(shown, "other", _stamps(root, [name]), verdict=verdict) if verdict else _unit(root, name, found, owners))
    return made


def check_root(root: str | Path) -> Path:
    """The folder or file, absolute. Raises ConfigError."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(root)):  # two letters at least: C:/ is a drive
        raise ConfigError(f"data.root={root} is an address, and nothing is fetched from a network; download it and give the folder.")
    path = Path(root).expanduser().resolve()
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"data.root={root} does not exist; give a folder of pictures, an archive, a video or a picture.")
    return path


def _folders(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _refusal(root: Path, name: str) -> Verdict | None:
    """Why a file is not opened, by its name and where it leads."""
    if printable(name) != name:
        return Verdict("unsupported", "its name is not valid UTF-8; rename it")
    if leads_out(name):
        return Verdict("unsupported", "its name has a backslash or reads as a drive; rename it")
    if os.path.islink(f"{root}/{name}"):
        try:
            if not resolve_inside(root, name).exists():
                return Verdict("unsafe", "it is a link that leads nowhere; copy the file here")
        except DataError:
            return Verdict("unsafe", "it is a link that leads out of the folder, or in a circle; copy the file here")
    return None


def _unit(root: Path, name: str, found: Sorted, owners: Mapping[str, str]) -> Unit:
    owner = owners.get(name)
    if is_sidecar(name):
        verdict = None if owner else Verdict("unsupported", "no picture has this name")
        return Unit(name, "sidecar", _stamps(root, [name, *([owner] if owner else [])]), owner=owner, verdict=verdict)
    if suffix_of(name).lower() in SUFFIXES:
        captions, mask = tuple(found.captions(name)), found.mask(name)
        return Unit(name, "picture", _stamps(root, [name, *captions, *([mask] if mask else [])]), captions, mask)
    kind: Kind = "archive" if archives.is_archive(name) else "video" if videos.is_video(name) else "other"
    return Unit(name, kind, _stamps(root, [name]))


def _stamps(root: Path, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    stamps = []
    for name in names:
        try:
            status = os.stat(f"{root}/{name}")
        except OSError:  # gone or forbidden: reading it will tell
            stamps.append((0, 0))
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


# ---- what a file gives ----


def locate(root: Path, relative: str) -> Path:
    """The file of a unit. Raises DataError if it leads out of the root."""
    return resolve_inside(root.parent if root.is_file() else root, relative)


def content_hashes(root: Path, unit: Unit) -> list[str]:
    """SHA-256 of each file that the unit's items depend on, or what kept it from being read. What gives no picture is not opened."""
    if unit.verdict:
        return list(unit.verdict)
    if unit.kind == "other" and suffix_of(unit.path):
        return list(refusal_by_name(unit.path))
    found = []
    for name in unit.files:
        try:
            path = locate(root, name)
            check_file(path, may_be_empty=True)
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        except (DataError, OSError) as error:
            found.append(f"unreadable: {error}")
    return found


def items(root: str | Path, unit: Unit, settings: IngestSettings) -> Iterator[Item]:
    """The pictures of a unit one by one, and a verdict for all that is none. Never raises for what is in a file."""
    if unit.verdict:
        yield Item(unit.path, verdict=unit.verdict)
        return
    root = check_root(root)
    try:
        path = locate(root, unit.path)
        check_file(path, may_be_empty=unit.kind in ("sidecar", "other"))
        if unit.kind == "archive":
            yield from archives.items(path, unit.path, settings.archives, settings.max_bytes, settings.max_pixels)
        elif unit.kind == "video":
            yield from videos.items(path, unit.path, settings.videos, settings.max_pixels)
        elif unit.kind == "sidecar":
            yield Item(unit.path, verdict=_sidecar(root, path, unit, settings))
        elif unit.kind == "picture" or _is_unnamed_picture(path, unit.path):
            yield _picture(root, read_bytes(path, settings.max_bytes), unit, settings)
        else:
            yield Item(unit.path, verdict=refusal_by_name(unit.path))
    except DataError as error:
        yield Item(unit.path, verdict=verdict_of(error))
    except OSError as error:
        yield Item(unit.path, verdict=Verdict("corrupt", f"it cannot be read: {error.strerror or error}"))


def _is_unnamed_picture(path: Path, name: str) -> bool:
    """Whether a file without a suffix holds a picture: exports and caches name them by numbers alone. Raises OSError."""
    if suffix_of(name):
        return False
    with open(path, "rb") as file:
        return looks_like_picture(file.read(16))


def _picture(root: Path, data: bytes, unit: Unit, settings: IngestSettings) -> Item:
    lines, mask = [], None
    for name in unit.captions:
        content = _beside(root, name, MAX_CAPTION_BYTES)
        if isinstance(content, bytes) and caption_verdict(content, unit.path).kind == "sidecar":
            lines += caption_lines(content)
    if unit.mask:
        content = _beside(root, unit.mask, settings.max_bytes)
        if isinstance(content, bytes) and mask_verdict(content, data, unit.path, settings.max_pixels).kind == "sidecar":
            mask = content
    return Item(unit.path, data, captions=tuple(dict.fromkeys(lines)), mask=mask)


def _beside(root: Path, name: str, limit: int) -> bytes | Verdict:
    """A sidecar's content, or why it cannot be read: its own unit tells that."""
    try:
        return read_bytes(locate(root, name), limit, may_be_empty=True)
    except DataError as error:
        return verdict_of(error)


def _sidecar(root: Path, path: Path, unit: Unit, settings: IngestSettings) -> Verdict:
    assert unit.owner
    if is_mask(unit.path):
        picture = _beside(root, unit.owner, settings.max_bytes)
        mask = read_bytes(path, settings.max_bytes)
        return mask_verdict(mask, picture if isinstance(picture, bytes) else None, unit.owner, settings.max_pixels)
    return caption_verdict(read_bytes(path, MAX_CAPTION_BYTES, may_be_empty=True), unit.owner)
