"""The manifest: what a dataset is, as one JSON line per picture. The contract between curation, training and evaluation.

A plain folder becomes a manifest too: pictures in it and in its subfolders; beside `name.png` may stand

- `name.txt` (or `name.caption`, or both): one caption per non-empty line, all of the same picture;
- `name.mask.png`: the picture's size, white where the subject is.

Names that begin with a dot are not looked at. Everything else that cannot be used stands in `Manifest.problems`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from charforgex.curation.folders import FOREIGN, MAX_CAPTION_BYTES, caption_lines, printable, resolve_inside, sort_names, suffix_of, walk
from charforgex.curation.pictures import MAX_PIXELS, decode_picture, measure_picture, read_bytes, read_picture
from charforgex.curation.split import MIN_TRAIN, Part, SplitSettings, split
from charforgex.curation.videos import is_video
from charforgex.errors import DataError

__all__ = ["Manifest", "Problem", "Record", "decode_picture", "from_folder", "open_manifest", "read_bytes", "read_picture", "videos_in"]

VERSION = 1
BY_HAND = "captions_by_hand"  # among a record's facts: a person wrote its captions, and no run may write others


class Problem(NamedTuple):
    """Why a file is not used. `path` is printable even where the file's name is not."""

    path: str
    reason: str


@dataclass(frozen=True)
class Record:
    """One picture. Paths are relative to the manifest, with forward slashes; sizes are pixels of the upright picture.

    `facts` is what curation knows of it (where it was cut from, scores, framing, its group of look-alikes); training does not depend on it.
    """

    path: str
    sha256: str
    width: int
    height: int
    captions: tuple[str, ...] = ()
    split: str = "train"
    mask: str | None = None
    mask_sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Manifest:
    """Records in a fixed order, the folder their paths start from, and what was left out when it was made from a folder."""

    root: Path
    records: tuple[Record, ...]
    problems: tuple[Problem, ...] = ()

    def file(self, relative: str) -> Path:
        """Where a record's path lies. Raises DataError if it leads out of the root, also through links."""
        return resolve_inside(self.root, relative)

    def of(self, split: str) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.split == split)

    def write(self, path: str | Path) -> None:
        """Write atomically, as JSON lines or a `.parquet` table. The file must lie in `root`, from where its paths count."""
        from charforgex.runs import write_atomic

        path = Path(path)
        if path.parent.resolve() != self.root.resolve():
            raise DataError(f"The manifest {path} must lie in {self.root}, because its paths are relative to itself.")
        rows = ({"version": VERSION, **asdict(record)} for record in self.records)
        if path.suffix == ".parquet":
            from charforgex.curation.exports import write_parquet

            write_parquet(path, rows)
        else:
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @staticmethod
    def read(path: str | Path) -> Manifest:
        """Read a manifest and check that every file is there with the content it had. Raises DataError."""
        path = Path(path)
        root = path.parent.resolve()
        records = []
        for number, item in _rows(path):
            try:
                records.append(_parse(item, root))
            except DataError as error:
                raise DataError(f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {number}: {error}") from error
        if not records:
            raise DataError(f"The manifest {path} has no records.")
        _refuse_twins(records, path)
        manifest = Manifest(root, tuple(records))
        _check_content(manifest, path)
        return manifest

    def content_hash(self) -> str:
        """SHA-256 over what training depends on: pictures, captions, masks and split; not the files' names."""
        content = sorted([r.sha256, r.captions, r.mask_sha256, r.split] for r in self.records)
        return hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


CHECKS = {
    "version": (lambda v: v == VERSION and type(v) is int, f"must be {VERSION}"),
    "path": (lambda v: isinstance(v, str), "must be a string"),
    "sha256": (_is_hash, "must be 64 lower-case hexadecimal digits"),
    "width": (lambda v: type(v) is int and v > 0, "must be a positive whole number"),
    "height": (lambda v: type(v) is int and v > 0, "must be a positive whole number"),
    "captions": (lambda v: isinstance(v, list) and all(isinstance(c, str) and c.strip() for c in v), "must be a list of texts"),
    "split": (lambda v: v in ("train", "val", "test"), 'must be "train", "val" or "test"'),
    "mask": (lambda v: v is None or isinstance(v, str), "must be a string or null"),
    "mask_sha256": (lambda v: v is None or _is_hash(v), "must be 64 lower-case hexadecimal digits or null"),
    "facts": (lambda v: isinstance(v, dict), "must be an object"),
}
OPTIONAL = {"captions": [], "split": "train", "mask": None, "mask_sha256": None, "facts": {}}
assert set(CHECKS) == {field.name for field in fields(Record)} | {"version"}


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, content) of each row of a manifest's file. Raises DataError."""
    if path.suffix == ".parquet":
        from charforgex.curation.exports import read_parquet

        yield from enumerate(read_parquet(path), start=1)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The manifest {path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: this is not JSON: {error}") from error


def _parse(item: Any, root: Path) -> Record:
    if not isinstance(item, dict):
        raise DataError("a record must be a JSON object")
    if unknown := sorted(set(item) - set(CHECKS)):
        raise DataError(f"unknown field {', '.join(unknown)}; the fields are {', '.join(CHECKS)}")
    item = OPTIONAL | item
    for name, (holds, rule) in CHECKS.items():
        if name not in item:
            raise DataError(f"the field {name} is missing")
        if not holds(item[name]):
            raise DataError(f"{name}={item[name]!r} {rule}")
    if (item["mask"] is None) != (item["mask_sha256"] is None):
        raise DataError("mask and mask_sha256 go together")
    for name in ("path", "mask"):
        if item[name] is not None:
            resolve_inside(root, item[name])
    del item["version"]
    return Record(**{**item, "captions": tuple(item["captions"])})


def _refuse_twins(records: Sequence[Record], path: Path) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.sha256 in seen:
            raise DataError(f"{path} has the same picture twice, {seen[record.sha256]} and {record.path}; keep one of the two lines.")
        seen[record.sha256] = record.path


def _check_content(manifest: Manifest, path: Path) -> None:
    wanted = [(r.path, r.sha256) for r in manifest.records] + [(r.mask, r.mask_sha256) for r in manifest.records if r.mask]

    def complaint(item: tuple[str, str]) -> str | None:
        try:
            data = read_bytes(manifest.file(item[0]))
        except DataError as error:
            return f"{item[0]} ({error})"
        return None if hashlib.sha256(data).hexdigest() == item[1] else f"{item[0]} (its content has changed)"

    with ThreadPoolExecutor() as pool:
        wrong = [found for found in pool.map(complaint, wanted) if found]
    if wrong:
        raise DataError(f"{path} does not fit its files: {some(wrong)}. Put the files back, or make the manifest anew.")


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def open_manifest(source: str | Path, val_count: int | None = None, min_side: int = 16, max_pixels: int = MAX_PIXELS) -> Manifest:
    """A folder of pictures, or a `.jsonl` or `.parquet` manifest (which brings its own split). Raises DataError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return from_folder(path, val_count, min_side, max_pixels)
    if not path.exists():
        raise DataError(f"There is no folder or manifest {path}; set data.source to a folder of pictures or a .jsonl manifest.")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is neither a folder of pictures nor a manifest (.jsonl, .parquet).")
    if val_count is not None:
        raise DataError(f"val_count={val_count} has no effect on {path}: a manifest says itself which pictures are held out.")
    return Manifest.read(path)


class Video(NamedTuple):
    """A video of a folder. `captions` are those beside it."""

    path: str
    captions: tuple[str, ...]


def videos_in(root: str | Path) -> tuple[list[Video], list[Problem]]:
    """The videos of a folder and its subfolders by their names, and what cannot be used. Raises DataError if `root` is no folder.

    Nothing of the videos is read. Pictures and other files are passed over, captions that belong to none of them are told.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    files = list(walk(root))
    found = sort_names(name for name, why in files if not why)
    problems = [Problem(printable(name), why.reason) for name, why in files if why]
    videos: list[Video] = []
    for name in filter(is_video, found.others):
        try:
            if printable(name) != name:
                raise DataError("its name is not valid UTF-8; rename it")
            videos.append(Video(name, _captions(root, found.captions(name))))
        except DataError as error:
            problems.append(Problem(printable(name), str(error)))
    owned = {text for name in [*found.others, *found.pictures] for text in found.captions(name)}
    lonely = [text for texts in found.texts.values() for text in texts if text not in owned]
    problems += [Problem(printable(name), "no video has this name") for name in lonely]
    return videos, problems


def _captions(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    lines = []
    for name in names:
        try:
            lines += caption_lines(read_bytes(resolve_inside(root, name), MAX_CAPTION_BYTES, may_be_empty=True))
        except DataError as error:
            raise DataError(f"its caption {printable(Path(name).name)}: {error}") from error
    return tuple(dict.fromkeys(lines))


def _read_record(root: Path, name: str, captions: Sequence[str], min_side: int, max_pixels: int) -> Record | Problem:
    if printable(name) != name:
        return Problem(printable(name), "its name is not valid UTF-8; rename it")
    try:
        data = read_bytes(resolve_inside(root, name))
        width, height = measure_picture(data, max_pixels)
        if min(width, height) < min_side:
            raise DataError(f"its size is {width} x {height}; sides below {min_side} pixels are too small")
        return Record(name, hashlib.sha256(data).hexdigest(), width, height, _captions(root, captions))
    except DataError as error:
        return Problem(name, str(error))


def _with_mask(root: Path, record: Record, mask: str, max_pixels: int) -> Record | Problem:
    try:
        data = read_bytes(resolve_inside(root, mask))
        size = measure_picture(data, max_pixels)
    except DataError as error:
        return Problem(printable(mask), f"{error}; {record.path} has no mask now")
    if size != (record.width, record.height):
        sizes = f"its size is {size[0]} x {size[1]}, the picture's is {record.width} x {record.height}"
        return Problem(mask, f"{sizes}; {record.path} has no mask now")
    return replace(record, mask=mask, mask_sha256=hashlib.sha256(data).hexdigest())


def split_records(records: Sequence[Record], val_count: int | None = None) -> list[Record]:
    """Hold out the `val_count` records (15 % if not given) whose ranks come first, so that the same pictures stay held out.

    At least two remain for training. Raises DataError if `val_count` leaves fewer.
    """
    if val_count is not None and not 0 <= val_count <= (most := max(0, len(records) - MIN_TRAIN)):
        raise DataError(f"val_count={val_count} of {len(records)} usable pictures: choose 0 to {most}, so that {MIN_TRAIN} can train.")
    settings = SplitSettings() if val_count is None else SplitSettings(val=val_count)
    sides = split([Part(record.sha256) for record in records], settings).sides
    return [replace(record, split=side) for record, side in zip(records, sides, strict=True)]


def from_folder(root: str | Path, val_count: int | None = None, min_side: int = 16, max_pixels: int = MAX_PIXELS) -> Manifest:
    """The manifest of a plain folder. Pictures that cannot be used are skipped and stand in `problems` with the reason.

    Raises DataError if `root` is no folder; a folder without a usable picture gives no records. A picture without caption has
    `captions == ()`; who trains decides what that means. Of equal files the first is kept.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    files = list(walk(root))
    problems = [Problem(printable(name), why.reason) for name, why in files if why]
    found = sort_names(name for name, why in files if not why)
    for name in found.others:
        if (suffix := suffix_of(name).lower()) in FOREIGN:
            problems.append(Problem(printable(name), f"{suffix} is not supported; save it as PNG, JPEG or WebP"))

    def read(name: str) -> Record | Problem:
        return _read_record(root, name, found.captions(name), min_side, max_pixels)

    # Decoders release the interpreter's lock; few threads, for their memory. What Pillow warns of, it then reads or refuses.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        results = list(pool.map(read, found.pictures))

    records: dict[str, Record] = {}
    for name, result in zip(found.pictures, results, strict=True):
        if isinstance(result, Record) and result.sha256 in records:
            result = Problem(result.path, f"it is the same file as {records[result.sha256].path}; its captions are not used")
        if isinstance(result, Record) and (mask := found.mask(name)):
            masked = _with_mask(root, result, mask, max_pixels)
            if isinstance(masked, Problem):
                problems.append(masked)
            else:
                result = masked
        if isinstance(result, Problem):
            problems.append(result)
        else:
            records[result.sha256] = result

    problems += [Problem(printable(name), "no picture has this name") for name in found.lonely()]
    return Manifest(root, tuple(split_records(list(records.values()), val_count)) if records else (), tuple(sorted(problems)))
