"""The expensive half of curation: each picture is decoded, measured and embedded once, in shards that any process can do.

A shard's folder is named by what went in: the files' content, their names, the settings and `VERSION`. It appears whole or not at all, so a
run that is killed loses the shards in work and no others, and its successor comes to the same findings.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from charforgex.binding import bind
from charforgex.curation import fingerprints, ingest, people, quality
from charforgex.curation.executors import Executor, Job, Jobs
from charforgex.curation.items import Finding, Item
from charforgex.curation.pictures import decode_picture, verdict_of
from charforgex.curation.settings import ScanSettings
from charforgex.errors import DataError
from charforgex.quiet import quiet
from charforgex.runs import fsync_folder, write_json

if TYPE_CHECKING:
    from charforgex.curation.faces import Detector
    from charforgex.embedders import Clip, Embedder

VERSION = 5
PREVIEW = 160  # pixels of the longer side of what the report shows
TOGETHER = 32  # pictures embedded at a time
FOLDER = "shards"
CONTAINERS = ("archive", "video")
REMEMBERED, MAPPED = 4096, 64  # findings and arrays that memory holds at a time
UNFINISHED = ".work_"  # what the names of shards in work begin with
DEAD = 24 * 3600  # seconds without a write after which the process that worked on a shard is taken for killed


# ---- one shard, in a worker ----


@dataclass
class Tools:
    """What a worker loads once."""

    detector: Detector
    embedder: Embedder
    clip: Clip | None
    assessor: quality.Assessor | None


@cache
def tools(settings: str) -> Tools:
    from charforgex.curation.faces import get_detector
    from charforgex.embedders import get_clip, get_embedder

    told = bind(ScanSettings, json.loads(settings), "curation")
    one_thread()
    with quiet("transformers"):
        return Tools(
            get_detector(told.faces),
            get_embedder(told.embedder, faces=True),
            get_clip(told.clip) if told.clip else None,
            quality.get_assessor(told.assessor) if told.assessor else None,
        )


def one_thread() -> None:
    """What OMP_NUM_THREADS=1 says, for OpenCV, which does not read it, and for a torch that was imported before."""
    import cv2
    import torch

    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)


def scan(job: Job) -> str:
    """Does the shard of `job` (root, cache, settings, units) unless it is there. Returns the name of its folder."""
    root, store = Path(job["root"]), Path(job["cache"]) / FOLDER
    units = [ingest.Unit.from_json(unit) for unit in job["units"]]
    settings = json.dumps(job["settings"], sort_keys=True)
    outside = digest([VERSION, settings, str(root.resolve()), [[u.path, u.stamps] for u in units]])

    def name() -> str:
        return digest([VERSION, settings, [[u.path, ingest.content_hashes(root, u)] for u in units]])

    return kept(store, outside, name, lambda folder: write_shard(folder, root, units, settings))


def kept(store: Path, outside: str, content: Callable[[], str], write: Callable[[Path], None]) -> str:
    """Has a folder of findings written into `store` unless it is there, whole or not at all. Returns its name, the digest `content()`.

    `outside` is a digest of what can be told without reading the files: while that stays, they are not read again.
    """
    memo = store / "known" / f"{outside}.json"
    if memo.exists() and (store / (name := json.loads(memo.read_text())["shard"])).is_dir():
        return name
    name = content()
    if not (store / name).is_dir():
        store.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=store, prefix=UNFINISHED))
        try:
            write(temporary)
            fsync_folder(temporary)
            os.rename(temporary, store / name)
        except OSError:
            if not (store / name).is_dir():  # else another worker was first, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    memo.parent.mkdir(exist_ok=True)
    write_json(memo, {"shard": name})
    return name


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:40]


class Column:
    """Rows of numbers of one shape, appended to a file as they come: a shard of a long video holds none of them in memory."""

    def __init__(self, folder: Path, name: str, kind: type):
        self.file, self.kind, self.shape = (folder / f"{name}.bin").open("wb"), kind, [0]

    def add(self, row: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(row, self.kind))
        self.shape = [self.shape[0] + 1, *np.shape(row)]

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


FILES = {"findings": "findings.jsonl", "previews": "previews.jpg"}  # each with a column of where its pieces end
# `heads` is the number of faces up to and with each finding. So any is found without reading the others, in a shard of 100,000 too.
COLUMNS: dict[str, type] = {
    "findings": np.int64, "heads": np.int64, "faces": np.float32, "pictures": np.float32, "thumbnails": np.uint8, "previews": np.int64,
}  # fmt: skip


def write_shard(folder: Path, root: Path, units: Sequence[ingest.Unit], settings: str) -> None:
    """findings.jsonl, previews.jpg, the columns beside them and their shapes."""
    told = bind(ScanSettings, json.loads(settings), "curation")
    columns = {name: Column(folder, name, kind) for name, kind in COLUMNS.items()}
    rows = heads = 0
    with open(folder / FILES["findings"], "wb") as file, open(folder / FILES["previews"], "wb") as shown:
        pending: list[tuple[Finding, Image.Image | None]] = []

        def flush() -> None:
            nonlocal heads
            decoded = [(finding, picture) for finding, picture in pending if picture is not None]
            if decoded:
                for name, vectors in zip(("faces", "pictures"), embed(decoded, tools(settings)), strict=True):
                    for vector in vectors:
                        columns[name].add(vector)
            assessor = tools(settings).assessor if decoded else None
            opinions = iter(assessor([picture for _, picture in decoded]) if assessor else ())
            for finding, picture in pending:
                if assessor and picture is not None:
                    finding = replace(finding, scores={**finding.scores, **next(opinions)})
                file.write(json.dumps(finding.to_json(), ensure_ascii=False).encode() + b"\n")
                columns["findings"].add(np.array(file.tell()))
                heads += len(finding.faces)
                columns["heads"].add(np.array(heads))
            pending.clear()

        for unit in units:
            for item in ingest.items(root, unit, told.ingest):
                finding, picture, thumbnail = examine(item, told, settings)
                if picture is not None:
                    finding, rows = replace(finding, row=rows), rows + 1
                    columns["thumbnails"].add(thumbnail)
                    picture = bounded(picture)
                    shown.write(preview(picture))
                    columns["previews"].add(np.array(shown.tell()))
                pending.append((finding, picture))
                if len(pending) >= TOGETHER:
                    flush()
        flush()
        for written in (file, shown):
            written.flush()
            os.fsync(written.fileno())
    for column in columns.values():
        column.close()
    write_json(folder / "shapes.json", {name: column.shape for name, column in columns.items()})


def examine(item: Item, told: ScanSettings, settings: str) -> tuple[Finding, Image.Image | None, np.ndarray | None]:
    """What is known of an item, but for the embeddings; its picture, upright sRGB, and thumbnail, unless it cannot be decoded."""
    if item.verdict is not None:
        return Finding(item.name, verdict=item.verdict, captions=item.captions), None, None
    content = item.data if item.data is not None else item.picture.tobytes()
    known = Finding(item.name, sha256=hashlib.sha256(content).hexdigest(), captions=item.captions)
    try:
        picture = item.picture or decode_picture(item.data, told.ingest.background, told.ingest.max_pixels)
    except DataError as error:
        return replace(known, verdict=verdict_of(error)), None, None
    pixels = np.asarray(picture)
    thumbnail = fingerprints.thumbnail(pixels)
    return replace(
        known, width=picture.width, height=picture.height, scores=quality.measure(pixels, item.data),
        fingerprint=fingerprints.fingerprint(thumbnail).hex, faces=tuple(tools(settings).detector.detect(pixels)),
    ), picture, thumbnail  # fmt: skip


def bounded(picture: Image.Image, side: int = 1024) -> Image.Image:
    """At most `side` pixels a side: embedders look at a few hundred, and a batch of whole photographs would take gigabytes."""
    scale = side / max(picture.size)
    return picture if scale >= 1 else picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.LANCZOS)


def preview(picture: Image.Image) -> bytes:
    """A small JPEG."""
    file = io.BytesIO()
    small = picture.copy()
    small.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def embed(decoded: Sequence[tuple[Finding, Image.Image]], loaded: Tools) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Vectors of all faces in order, and of the pictures (of width 0 without a CLIP)."""

    heads = []
    for finding, picture in decoded:
        scale = picture.width / finding.width
        heads += [people.view(picture, face.scaled(scale), loaded.embedder) for face in finding.faces]
    vectors = [row for start in range(0, len(heads), TOGETHER) for row in loaded.embedder(heads[start : start + TOGETHER]).numpy()]
    pictures = loaded.clip.see([picture for _, picture in decoded]).numpy() if loaded.clip else np.zeros((len(decoded), 0), np.float32)
    return vectors, list(pictures)


# ---- all shards, in the run ----


def plan(units: Sequence[ingest.Unit], pictures: int) -> list[list[ingest.Unit]]:
    """Neighbours together, at most `pictures` a shard, in the order of the units; then archives and videos, each a shard of its own.

    Where a shard begins is a matter of the paths' hashes: at each in the lowest 1 / (4 `pictures`) of the space, and while a part is too
    large, at the smallest in its middle half. So a file that comes or goes nearly always changes the one shard that it is in, never those
    behind the next low hash; counting would shift all that follow, and all would be decoded again.
    """
    alone = [[unit] for unit in units if unit.kind in CONTAINERS]
    loose = [unit for unit in units if unit.kind not in CONTAINERS]
    hashes = np.array([int(hashlib.sha256(unit.path.encode()).hexdigest()[:16], 16) for unit in loose], np.uint64)
    edges = sorted({0, *np.flatnonzero(hashes < 2**64 // (4 * pictures)).tolist(), len(loose)})
    parts, shards = list(pairwise(edges))[::-1], []
    while parts:
        start, end = parts.pop()
        if end - start <= pictures:
            shards.append(loose[start:end])
            continue
        margin = max(1, (end - start) // 4)
        place = start + margin + int(hashes[start + margin : end - margin + 1].argmin())
        parts += [(place, end), (start, place)]  # the left one is next
    return shards + alone


def scan_all(
    root: Path, cache_dir: Path, units: Sequence[ingest.Unit], settings: Mapping[str, Any], pictures: int, executor: Executor
) -> Iterator[tuple[int, str, int]]:
    """(number, folder, files) of each shard as it is done."""
    shards = plan(units, pictures)
    sweep(cache_dir / FOLDER)
    common = {"root": str(root.resolve()), "cache": str(cache_dir.resolve()), "settings": dict(settings)}
    jobs = Jobs(len(shards), lambda number: {**common, "units": [unit.to_json() for unit in shards[number]]})
    for number, name in executor.map("charforgex.curation.shards:scan", jobs):
        yield number, name, len(shards[number])


def sweep(store: Path) -> None:
    """Removes what killed processes left unfinished. Others may be at work there now, so what was written to lately stays."""
    for folder in store.glob(f"{UNFINISHED}*"):
        try:
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except FileNotFoundError:  # its process has just ended well
            continue
        if time.time() - latest > DEAD:
            shutil.rmtree(folder, ignore_errors=True)


class Findings(Sequence[Finding]):
    """The findings of all shards in order, read when asked for: memory holds the last ones looked at, however many there are."""

    def __init__(self, cache_dir: Path, shards: Sequence[str]):
        self.folders = [Path(cache_dir) / FOLDER / name for name in shards]
        self._shapes = [json.loads((folder / "shapes.json").read_text(encoding="utf-8")) for folder in self.folders]
        self.counts = [0, *accumulate(shapes["findings"][0] for shapes in self._shapes)]
        self._array = lru_cache(MAPPED)(self._open)
        self._finding = lru_cache(REMEMBERED)(self._read)

    def __len__(self) -> int:
        return self.counts[-1]

    def place(self, index: int) -> tuple[int, int]:
        """The number of the shard that finding `index` is in, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.counts, index) - 1
        return number, index - self.counts[number]

    def __getitem__(self, index: int) -> Finding:
        return self._finding(index)

    def _read(self, index: int) -> Finding:
        number, place = self.place(index)
        return Finding.from_json(json.loads(self._piece(number, "findings", place)))

    def _piece(self, number: int, column: str, place: int) -> bytes:
        """What lies between two of the ends in a column, in the file that they are of."""
        ends = self._array(number, column)
        return self._array(number, FILES[column])[_before(ends, place) : ends[place]].tobytes()

    def only(self, indices: Sequence[int]) -> Sequence[Finding]:
        """Some of them, read when asked for, too."""
        return Chosen(self, indices)

    def _open(self, number: int, name: str) -> np.ndarray:
        """A column, or the bytes of another file of a shard: read by the system where they are looked at."""
        if name not in COLUMNS:
            return np.asarray(np.memmap(self.folders[number] / name, np.uint8, "r"))
        shape = tuple(self._shapes[number][name])
        if not math.prod(shape):
            return np.zeros(shape, COLUMNS[name])  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.folders[number] / f"{name}.bin", COLUMNS[name], "r", shape=shape))

    def face_vectors(self, index: int) -> np.ndarray:
        """(F, D) of the faces of finding `index`, in their order."""
        number, place = self.place(index)
        heads = self._array(number, "heads")
        return self._array(number, "faces")[_before(heads, place) : heads[place]]

    def vector(self, index: int) -> np.ndarray | None:
        """(D,) of the whole picture, None where it was not decoded or no CLIP looked."""
        return self._row(index, "pictures")

    def thumbnail(self, index: int) -> np.ndarray | None:
        """uint8 (96, 96, 3), whatever the picture's aspect: `fingerprints.thumbnail`; None where it was not decoded."""
        return self._row(index, "thumbnails")

    def preview(self, index: int) -> bytes | None:
        """A small JPEG for the report, None where the picture was not decoded."""
        number, _ = self.place(index)
        row = self[index].row
        return None if row is None else self._piece(number, "previews", row)

    def _row(self, index: int, name: str) -> np.ndarray | None:
        number, _ = self.place(index)
        row = self[index].row
        if row is None:
            return None
        found = self._array(number, name)[row]
        return found if found.size else None


def _before(ends: np.ndarray, place: int) -> int:
    """Where the piece at `place` begins."""
    return int(ends[place - 1]) if place else 0


class Chosen(Sequence[Finding]):
    def __init__(self, findings: Findings, indices: Sequence[int]):
        self.findings, self.indices = findings, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Finding:
        return self.findings[self.indices[place]]
