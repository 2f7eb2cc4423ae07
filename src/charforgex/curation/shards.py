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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from charforgex.binding import bind
from charforgex.curation import duplicates, ingest, people, quality
from charforgex.curation.executors import Executor, Job
from charforgex.curation.items import Finding, Item
from charforgex.curation.pictures import decode_picture, verdict_of
from charforgex.curation.settings import ScanSettings
from charforgex.errors import DataError
from charforgex.quiet import quiet
from charforgex.runs import fsync_folder, write_json

if TYPE_CHECKING:
    from charforgex.curation.faces import Detector
    from charforgex.embedders import Clip, Embedder

VERSION = 2
PREVIEW = 160  # pixels of the longer side of what the report shows
TOGETHER = 32  # pictures embedded at a time
FOLDER = "shards"


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
    import cv2
    import torch

    from charforgex.curation.faces import get_detector
    from charforgex.embedders import get_clip, get_embedder

    told = bind(ScanSettings, json.loads(settings), "curation")
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    with quiet("transformers"):
        return Tools(
            get_detector(told.faces),
            get_embedder(told.embedder, faces=True),
            get_clip(told.clip) if told.clip else None,
            quality.get_assessor(told.assessor) if told.assessor else None,
        )


def scan(job: Job) -> str:
    """Does the shard of `job` (root, cache, settings, units) unless it is there. Returns the name of its folder."""
    root, store = Path(job["root"]), Path(job["cache"]) / FOLDER
    units = [ingest.Unit.from_json(unit) for unit in job["units"]]
    settings = json.dumps(job["settings"], sort_keys=True)
    outside = digest([VERSION, settings, str(root.resolve()), [[u.path, u.stamps] for u in units]])
    memo = store / "known" / f"{outside}.json"
    if memo.exists() and (store / (name := json.loads(memo.read_text())["shard"])).is_dir():
        return name
    name = digest([VERSION, settings, [[u.path, ingest.content_hashes(root, u)] for u in units]])
    if not (store / name).is_dir():
        store.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=store, prefix=".work_"))
        try:
            write_shard(temporary, root, units, settings)
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


COLUMNS: dict[str, type] = {"faces": np.float32, "pictures": np.float32, "thumbnails": np.uint8, "previews": np.int64}


def write_shard(folder: Path, root: Path, units: Sequence[ingest.Unit], settings: str) -> None:
    """findings.jsonl, the columns beside it, their shapes, and the previews as one file that the column of that name has the ends of."""
    told = bind(ScanSettings, json.loads(settings), "curation")
    columns = {name: Column(folder, name, kind) for name, kind in COLUMNS.items()}
    rows = ended = 0
    with open(folder / "findings.jsonl", "w", encoding="utf-8") as file, open(folder / "previews.jpg", "wb") as shown:
        pending: list[tuple[Finding, Image.Image | None]] = []

        def flush() -> None:
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
                file.write(json.dumps(finding.to_json(), ensure_ascii=False) + "\n")
            pending.clear()

        for unit in units:
            for item in ingest.items(root, unit, told.ingest):
                finding, picture, thumbnail = examine(item, told, settings)
                if picture is not None:
                    finding, rows = replace(finding, row=rows), rows + 1
                    columns["thumbnails"].add(thumbnail)
                    picture = bounded(picture)
                    ended += shown.write(preview(picture))
                    columns["previews"].add(np.array(ended))
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
    known = Finding(
        item.name, sha256=hashlib.sha256(content).hexdigest(), captions=item.captions,
        mask_sha256=hashlib.sha256(item.mask).hexdigest() if item.mask else None,
    )  # fmt: skip
    try:
        picture = item.picture or decode_picture(item.data, told.ingest.background, told.ingest.max_pixels)
    except DataError as error:
        return replace(known, verdict=verdict_of(error)), None, None
    pixels = np.asarray(picture)
    thumbnail = duplicates.thumbnail(pixels)
    return replace(
        known, width=picture.width, height=picture.height, scores=quality.measure(pixels, item.data),
        fingerprint=duplicates.fingerprint(thumbnail).hex, faces=tuple(tools(settings).detector.detect(pixels)),
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
    """Neighbours together, `pictures` a shard; an archive or a video is a shard of its own."""
    shards: list[list[ingest.Unit]] = []
    room = 0
    for unit in units:
        alone = unit.kind in ("archive", "video")
        if alone or room == 0:
            shards.append([])
            room = 0 if alone else pictures
        shards[-1].append(unit)
        room = max(0, room - 1)
    return shards


def scan_all(
    root: Path, cache_dir: Path, units: Sequence[ingest.Unit], settings: Mapping[str, Any], pictures: int, executor: Executor
) -> Iterator[tuple[int, str, int]]:
    """(number, folder, files) of each shard as it is done."""
    shards = plan(units, pictures)
    common = {"root": str(root.resolve()), "cache": str(cache_dir.resolve()), "settings": dict(settings)}
    jobs = [common | {"units": [unit.to_json() for unit in shard]} for shard in shards]
    for number, name in executor.map("charforgex.curation.shards:scan", jobs):
        yield number, name, len(shards[number])


class Findings(Sequence[Finding]):
    """The findings of all shards in order, read when asked for: memory holds a few numbers for each, and the last shards looked at."""

    def __init__(self, cache_dir: Path, shards: Sequence[str]):
        self.folders = [Path(cache_dir) / FOLDER / name for name in shards]
        counts, rows = [0], [0]
        self._faces: list[np.ndarray] = []
        for number in range(len(self.folders)):
            findings = self._shard(number)
            counts.append(counts[-1] + len(findings))
            rows.append(rows[-1] + sum(f.row is not None for f in findings))
            self._faces.append(np.cumsum([0] + [len(f.faces) for f in findings], dtype=np.int64))
        self.counts = np.array(counts)

    @lru_cache(maxsize=8)  # noqa: B019  one object a run
    def _shard(self, number: int) -> list[Finding]:
        with open(self.folders[number] / "findings.jsonl", encoding="utf-8") as file:
            return [Finding.from_json(json.loads(line)) for line in file]

    def __len__(self) -> int:
        return int(self.counts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.counts, index, side="right")) - 1
        return number, index - int(self.counts[number])

    def __getitem__(self, index: int) -> Finding:
        number, place = self._place(index)
        return self._shard(number)[place]

    def only(self, indices: Sequence[int]) -> Sequence[Finding]:
        """Some of them, read when asked for, too."""
        return Chosen(self, indices)

    def _array(self, number: int, name: str) -> np.ndarray:
        folder = self.folders[number]
        shape = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))[name]
        if not math.prod(shape):
            return np.zeros(shape, COLUMNS[name])  # an empty file cannot be mapped
        return np.memmap(folder / f"{name}.bin", COLUMNS[name], "r", shape=tuple(shape))

    def face_vectors(self, index: int) -> np.ndarray:
        """(F, D) of the faces of finding `index`, in their order."""
        number, place = self._place(index)
        first, last = self._faces[number][place : place + 2]
        return np.asarray(self._array(number, "faces")[first:last])

    def vector(self, index: int) -> np.ndarray | None:
        """(D,) of the whole picture, None where it was not decoded or no CLIP looked."""
        return self._row(index, "pictures")

    def thumbnail(self, index: int) -> np.ndarray | None:
        """uint8 (96, 96, 3), whatever the picture's aspect: `duplicates.thumbnail`; None where it was not decoded."""
        return self._row(index, "thumbnails")

    def preview(self, index: int) -> bytes | None:
        """A small JPEG for the report, None where the picture was not decoded."""
        number, _ = self._place(index)
        row = self[index].row
        if row is None:
            return None
        ends = self._array(number, "previews")
        first = int(ends[row - 1]) if row else 0
        with open(self.folders[number] / "previews.jpg", "rb") as file:
            file.seek(first)
            return file.read(int(ends[row]) - first)

    def _row(self, index: int, name: str) -> np.ndarray | None:
        number, _ = self._place(index)
        row = self[index].row
        if row is None:
            return None
        found = np.asarray(self._array(number, name)[row])
        return found if found.size else None


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON has it."""
    return json.loads(json.dumps(asdict(settings), default=str))


class Chosen(Sequence[Finding]):
    def __init__(self, findings: Findings, indices: Sequence[int]):
        self.findings, self.indices = findings, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Finding:
        return self.findings[self.indices[place]]
