"""What lies in a folder, by its names alone: which files are pictures, and which captions and masks belong to them.

One set of rules for folders and archives. Names are relative, with forward slashes. Beside `name.png` may stand `name.txt` and
`name.caption` (a caption per line that is not empty) and `name.mask.png` (the picture's size, white where the subject is).
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from charforgex.curation.items import Verdict
from charforgex.curation.pictures import SUFFIXES, measure_picture, verdict_of
from charforgex.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
MASK_SUFFIX = ".mask.png"
FOREIGN = frozenset({".jxl", ".psd", ".svg", ".jp2", ".tga", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr"})
PACKED = frozenset({".7z", ".rar", ".cbr", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".cab", ".iso", ".dmg"})
MAX_CAPTION_BYTES = 2**20


def printable(path: str | Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def leads_out(relative: str) -> bool:
    """Whether a path may name something outside of the folder it is meant to be relative to, on any system."""
    if not relative or relative[0] == "/" or "\0" in relative or "\\" in relative or ".." in relative.split("/"):
        return True
    return relative[1:2] == ":" and relative[0].isascii() and relative[0].isalpha()  # a drive


def resolve_inside(root: Path, relative: str) -> Path:
    """The file `relative` names under `root`. Raises DataError if it is absolute, climbs with `..`, or a link leads outside."""
    if leads_out(relative):
        raise DataError(f"the path {relative!r} must be relative, with forward slashes, and stay inside the manifest's folder")
    root = root.resolve()
    try:
        target = (root / relative).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise DataError(f"the path {relative!r} cannot be followed: {error}") from error
    if not target.is_relative_to(root):
        raise DataError(f"the path {relative!r} is a link that leads out of the manifest's folder, to {target}")
    return target


def walk(root: Path, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Verdict | None]]:
    """(relative name, why it is not looked at or None) of the files under `root`, in the order of their names, folder by folder.

    Linked folders are not followed, names that begin with a dot are passed over, and so are the absolute paths in `leave_out`.
    """
    try:
        waiting = [("", _listing(str(root)))]
    except OSError as error:
        raise DataError(f"The folder {root} cannot be read: {error.strerror}.") from error
    while waiting:
        prefix, listing = waiting[-1]
        entry = next(listing, None)
        if entry is None:
            waiting.pop()
            continue
        if entry.name.startswith(".") or entry.path in leave_out:
            continue
        relative = prefix + entry.name
        if not os.path.isdir(entry.path):  # unlike the entry's own is_dir, says no to a loop of links
            yield relative, None
        elif entry.is_symlink():
            yield relative, Verdict("unsafe", "a linked folder is not followed; copy it here")
        else:
            if suffix_of(entry.name).lower() in SUFFIXES:
                yield relative, Verdict("unsupported", "it is a folder, not a picture; pictures inside are used")
            try:
                waiting.append((f"{relative}/", _listing(entry.path)))
            except OSError as error:
                yield relative, Verdict("unsupported", f"the folder cannot be read: {error.strerror}")


def _listing(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def stem(name: str, suffix: str) -> str:
    """What ties a caption or mask to its picture. Composed and decomposed accents count as equal: macOS mixes them."""
    folder, slash, last = name[: len(name) - len(suffix)].rpartition("/")
    return folder + slash + unicodedata.normalize("NFC", last)


def is_mask(name: str) -> bool:
    return name.lower().endswith(MASK_SUFFIX)


def is_sidecar(name: str) -> bool:
    return is_mask(name) or suffix_of(name).lower() in CAPTION_SUFFIXES


def suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1]


@dataclass(frozen=True)
class Sorted:
    """Names by what they are: pictures with what lies beside them, and the rest. All in the order in which they came."""

    pictures: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)  # by stem
    masks: dict[str, str] = field(default_factory=dict)  # by stem
    others: list[str] = field(default_factory=list)

    def captions(self, picture: str) -> list[str]:
        return self.texts.get(stem(picture, suffix_of(picture)), [])

    def mask(self, picture: str) -> str | None:
        return self.masks.get(stem(picture, suffix_of(picture)))

    def owners(self) -> dict[str, str]:
        """The picture of each caption and mask that has one; the first of several."""
        found: dict[str, str] = {}
        for picture in self.pictures:
            mask = self.mask(picture)
            for sidecar in (*self.captions(picture), *([mask] if mask else [])):
                found.setdefault(sidecar, picture)
        return found

    def lonely(self) -> list[str]:
        owned = self.owners()
        sidecars = [name for names in self.texts.values() for name in names] + list(self.masks.values())
        return [name for name in sidecars if name not in owned]


def sort_names(names: Iterable[str]) -> Sorted:
    found = Sorted()
    for name in names:
        suffix = suffix_of(name)
        if is_mask(name):
            found.masks[stem(name, MASK_SUFFIX)] = name
        elif suffix.lower() in SUFFIXES:
            found.pictures.append(name)
        elif suffix.lower() in CAPTION_SUFFIXES:
            found.texts.setdefault(stem(name, suffix), []).append(name)
        else:
            found.others.append(name)
    for texts in found.texts.values():
        texts.sort(key=lambda name: CAPTION_SUFFIXES.index(suffix_of(name).lower()))
    return found


def caption_lines(data: bytes) -> list[str]:
    """The captions in a file: its lines that are not empty. Raises DataError with the reason alone."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    lines = [" ".join(line.split()) for line in text.replace("\0", " ").splitlines()]
    return [line for line in lines if line]


def caption_verdict(data: bytes, owner: str) -> Verdict:
    try:
        caption_lines(data)
    except DataError as error:
        return Verdict("corrupt", f"{error}; {owner} does not have it as its caption")
    return Verdict("sidecar", f"the caption of {owner}")


def mask_verdict(mask: bytes, picture: bytes | None, owner: str, max_pixels: int) -> Verdict:
    """Of the class `sidecar` if the mask can be used: it is a picture of the same size as the one it belongs to."""
    try:
        size = measure_picture(mask, max_pixels)
    except DataError as error:
        return Verdict(verdict_of(error).kind, f"{error}; {owner} has no mask now")
    try:
        wanted = size if picture is None else measure_picture(picture, max_pixels)
    except DataError:  # the picture's own verdict says why
        wanted = size
    if size != wanted:
        sizes = f"its size is {size[0]} x {size[1]}, the picture's is {wanted[0]} x {wanted[1]}"
        return Verdict("corrupt", f"{sizes}; {owner} has no mask now")
    return Verdict("sidecar", f"the mask of {owner}")


def refusal_by_name(name: str) -> Verdict:
    """Why a file that is no picture, sidecar, archive or video is not looked into."""
    suffix = suffix_of(name).lower()
    if suffix in PACKED:
        return Verdict("unsupported", f"archives of the kind {suffix} are not opened; unpack it, or pack it as zip")
    if suffix in FOREIGN:
        return Verdict("unsupported", f"{suffix} is not supported; save it as PNG, JPEG or WebP")
    return Verdict("unsupported", "it is not a picture, an archive or a video")
