"""The expensive half: each video is decoded and its windows measured once, by any process; kept by content and settings.

The folder of a video's findings appears whole or not at all: `windows.json`, and beside it the windows' mosaics and strips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charforgex import videos
from charforgex.binding import bind
from charforgex.curation import ingest
from charforgex.curation.clips.dissolves import Dissolves
from charforgex.curation.clips.measures import Measured, measure
from charforgex.curation.clips.settings import ScanSettings
from charforgex.curation.clips.windows import Short, windows
from charforgex.curation.executors import Job
from charforgex.curation.shards import digest, kept, one_thread
from charforgex.errors import DataError
from charforgex.quiet import quiet
from charforgex.runs import write_json

if TYPE_CHECKING:
    from charforgex.curation.faces import Detector

VERSION = 2
FOLDER = "clips"


@cache
def detector_of(settings: str) -> Detector:
    from charforgex.curation.faces import get_detector

    one_thread()
    with quiet("transformers"):
        return get_detector(bind(ScanSettings, json.loads(settings), "curation").faces)


def scan(job: Job) -> str:
    """Does the video of `job` (root, cache, settings, unit) unless its findings are there. Returns the name of their folder."""
    root, unit = Path(job["root"]), ingest.Unit.from_json(job["unit"])
    settings = json.dumps(job["settings"], sort_keys=True)
    outside = digest([VERSION, settings, str(root), unit.path, unit.stamps])

    def name() -> str:
        return digest([VERSION, settings, ingest.content_hashes(root, unit)])

    return kept(Path(job["cache"]) / FOLDER, outside, name, lambda folder: write_findings(folder, root, unit, settings))


def write_findings(folder: Path, root: Path, unit: ingest.Unit, settings: str) -> None:
    told = bind(ScanSettings, json.loads(settings), "curation")
    problems: list[videos.Problem] = []
    dissolves = Dissolves()
    rows: list[dict[str, Any]] = []
    shorts: list[dict[str, Any]] = []
    mosaics: list[np.ndarray] = []
    try:
        path = ingest.locate(root, unit.path)
        for found in windows(path, told.windows, problems, dissolves):
            if isinstance(found, Short):
                shorts.append({"shot": found.shot, "start": float(found.start), "seconds": float(found.seconds)})
                continue
            measured: Measured = measure(found, told.crop, detector_of(settings))
            (folder / f"{len(rows):06d}.jpg").write_bytes(measured.strip)
            rows.append(measured.row)
            mosaics.append(measured.mosaic)
    except videos.Unreadable as error:
        problems.append(videos.Problem(error.kind, error.reason))
    except (DataError, OSError) as error:
        problems.append(videos.Problem("corrupt", f"it cannot be read: {error}"))
    np.save(folder / "mosaics.npy", np.stack(mosaics) if mosaics else np.zeros((0, 96, 96, 3), np.uint8))
    rest = {"windows": rows, "short": shorts, "dissolves": dissolves.found, "problems": [list(problem) for problem in problems]}
    write_json(folder / "windows.json", rest)


@dataclass(frozen=True)
class Findings:
    """What is known of one video. `windows` are the rows of `measures.measure`, in time, `dissolves` as in `dissolves.Dissolves`."""

    folder: Path
    windows: list[dict[str, Any]]
    short: list[dict[str, Any]]
    dissolves: list[tuple[float, float]]
    problems: list[videos.Problem]

    @staticmethod
    def read(folder: Path) -> Findings:
        told = json.loads((folder / "windows.json").read_text(encoding="utf-8"))
        problems = [videos.Problem(*problem) for problem in told["problems"]]
        return Findings(folder, told["windows"], told["short"], told["dissolves"], problems)

    def mosaics(self) -> np.ndarray:
        """uint8 (N, 96, 96, 3), mapped."""
        return np.load(self.folder / "mosaics.npy", mmap_mode="r", allow_pickle=False)

    def strip(self, number: int) -> bytes:
        return (self.folder / f"{number:06d}.jpg").read_bytes()
