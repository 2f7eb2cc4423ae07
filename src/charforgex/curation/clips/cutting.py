"""Cuts out what was decided: reads each video once more and writes its clips as FFV1 in .mkv, every pixel as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from charforgex.binding import bind
from charforgex.curation import ingest
from charforgex.curation.clips.settings import WindowSettings
from charforgex.curation.clips.windows import whole
from charforgex.curation.cutting import are_there, plain_name
from charforgex.curation.executors import Job
from charforgex.curation.shards import digest
from charforgex.errors import DataError
from charforgex.filming import Output, writing
from charforgex.runs import sha256_file, write_json
from charforgex.videos import upright

FOLDER = "clip_cuts"
VERSION = 1
CHANGED = "it has changed in the meantime; run the same command again"
CLOCK = 1000  # ticks a second, all that Matroska has


def file_name(video: str, start: float, content: str) -> str:
    """Where a clip goes, in its video's subfolder: readable, unique, and the same in every run."""
    folders, _, last = video.rpartition("/")
    stem = plain_name(last)[-40:] or "video"
    parts = [plain_name(part) or "folder" for part in folders.split("/") if part]
    return "/".join([*parts, f"{stem}_{start:010.3f}_{content[:10]}.mkv"])


def cut(job: Job) -> dict[str, Any]:
    """Writes the clips of `job` (root, cache, out, settings, unit, wanted: file -> indices, box, size).

    Returns rows by file, of size and hash, and under "error" what kept some from being written. What is there already as it was written is
    not written again.
    """
    root, out, unit = Path(job["root"]), Path(job["out"]), ingest.Unit.from_json(job["unit"])
    told = bind(WindowSettings, job["settings"], "curation.windows")
    memo = Path(job["cache"]) / FOLDER / f"{digest([VERSION, job['out'], unit.path])}.json"
    before = json.loads(memo.read_text(encoding="utf-8")) if memo.exists() else {}
    wanted = {file: digest([VERSION, unit.stamps, job["settings"], what]) for file, what in job["wanted"].items()}
    done = {file: row for file, row in before.items() if row["wanted"] == wanted.get(file) and are_there([row], out)}
    error, left = CHANGED, {file: what for file, what in job["wanted"].items() if file not in done}
    if not left:
        return {"rows": done}
    try:
        path = ingest.locate(root, unit.path)
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != unit.stamps[0]:
            left = {}
        for file, pixels in clips(path, told, left):
            write(out / file, pixels, told.rate)
            size = {"width": pixels[0].width, "height": pixels[0].height}
            done[file] = {"wanted": wanted[file], "file": file, "sha256": sha256_file(out / file), "mask": None, **size}
    except (DataError, OSError) as found:
        error = f"it could be measured, but not read again: {found}"
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_json(memo, done)
    return {"rows": done} | ({"error": error} if len(done) < len(wanted) else {})


def clips(path: Path, settings: WindowSettings, wanted: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Image.Image]]]:
    """(file, its frames) in time, one in memory. Windows of a video have no frame in common."""
    waiting = sorted(wanted, key=lambda file: wanted[file]["indices"])
    pictures: list[Image.Image] = []
    for index, (_, frame, aspect, _) in enumerate(whole(path, settings, [])):
        if not waiting:
            return
        what = wanted[waiting[0]]
        if index == what["indices"][len(pictures)]:
            pictures.append(shown(upright(frame, aspect), what["box"], what["size"]))
        if len(pictures) == len(what["indices"]):
            yield waiting.pop(0), pictures
            pictures = []


def shown(picture: Image.Image, box: Sequence[int], size: Sequence[int]) -> Image.Image:
    """The pixels, resampled only if they are scaled."""
    part = picture.crop(box)
    return part if part.size == tuple(size) else part.resize(size, Image.Resampling.LANCZOS)


def write(path: Path, pictures: Sequence[Image.Image], rate: Fraction) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(Output(path, rate, CLOCK, "ffv1")) as out:
        for number, picture in enumerate(pictures):
            out.write(np.asarray(picture), number / rate, 1 / rate)
