"""`charforgex curate clips`: videos to clips of one length, a manifest that training reads, and a report to look at.

As with pictures, files are only read, what takes long is kept under the cache folder by content, and a second run does what is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex import runs
from charforgex.config import bind
from charforgex.curation.run import RunSettings, Source, bind_rules, check_apart, check_out
from charforgex.errors import DataError
from charforgex.videos import check_pyav

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from charforgex.curation.clips.deciding import Clip
    from charforgex.curation.clips.finding import Videos
    from charforgex.curation.clips.scanning import Findings
    from charforgex.curation.clips.settings import ClipSettings
    from charforgex.curation.executors import Executor
    from charforgex.curation.pipeline import Bar

CLIPS = "clips"  # the dataset's own folder: clips, captions and the manifest


def curate_clips(cfg: DictConfig) -> dict[str, Any]:
    """Runs the curation that `cfg` describes, and returns the content of result.json. Raises a CharForgeError."""
    from rich.console import Console

    from charforgex.curation.clips.settings import ClipSettings
    from charforgex.curation.ingest import check_root

    settings = bind(ClipSettings, cfg.curation, "curation")
    told = bind(RunSettings, {name: cfg[name] for name in ("name", "cache_dir", "runs_dir", "out", "only_report")}, "")
    source = bind(Source, cfg.data, "data")
    check_pyav()
    root = check_root(source.root)
    settled = hashlib.sha256(f"{runs.config_hash(cfg)}\0{root}".encode()).hexdigest()
    out = (told.out or told.runs_dir / f"{told.name}-{settled[:8]}").resolve()
    check_out(out, root)
    out.mkdir(parents=True, exist_ok=True)
    runs.write_provenance(out, seed=0, root=str(root))
    runs.save_config(out, cfg)
    return make_clips(source, settings, out, told.cache_dir.resolve(), Console(), told.only_report)


def make_clips(
    source: Source, settings: ClipSettings, out: Path, cache_dir: Path, console: Console, only_report: bool = False
) -> dict[str, Any]:
    """Writes clips/ (with captions and clips.jsonl), report.html, report.json and result.json into `out`, or the report alone.

    Raises DataError if no clip is kept.
    """
    from charforgex.curation import ingest, pipeline
    from charforgex.curation.clips import assembling, deciding, report
    from charforgex.curation.clips.finding import find
    from charforgex.curation.executors import get_executor
    from charforgex.curation.manifest import Manifest

    started = time.perf_counter()
    root = ingest.check_root(source.root)
    check_apart(root, out)
    settings = replace(settings, rules=bind_rules(settings.rules, source))
    captioner = None if only_report else pipeline.captioner_of(settings.captions)
    videos = find(root, [out, cache_dir])
    if not videos.units:
        raise DataError(f"data.root={source.root} has no video among its {len(videos.others)} files; charforgex curate is for pictures.")
    folder = root if root.is_dir() else root.parent
    executor = get_executor(settings.where(cache_dir))
    with pipeline.progress(console) as bar:
        findings = scan(folder, cache_dir, videos, settings, executor, bar)
        of_video = {video: deciding.clips_of(video, found, settings) for video, found in findings.items()}
        clips = [clip for found in of_video.values() for clip in found]
        groups = deciding.decide(clips, findings, videos.captions, settings.limits)
        notes: list[str] = []
        manifest = Manifest(out / CLIPS, ())
        if not only_report:
            cuts = cut(folder, cache_dir, out, videos, clips, settings, executor, bar)
            captions = assembling.caption(out / CLIPS, cache_dir, videos.captions, cuts, captioner, settings, bar)
            manifest = assembling.assemble(out / CLIPS, clips, groups, cuts, captions, settings, notes)
        files = videos.others | {video: deciding.verdict_of_video(found, of_video[video]) for video, found in findings.items()}
        told = report.write(out, root.name, files, clips, findings, manifest, notes, asdict(settings.windows))
    report.summary(console, told, out / report.HTML)
    kept = sum(clip.verdict is None for clip in clips)
    if not kept:
        raise DataError(deciding.nothing_kept(source.root, clips, list(files.values()), out))
    result = {
        "manifest": None if only_report else str(manifest.root / assembling.MANIFEST),
        "report": str(out / report.HTML),
        "out": str(out),
        "videos": len(videos.units),
        "clips": kept,
        "classes": told["classes"],
        "split": told["split"],
        "content": manifest.content_hash(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    runs.write_result(out, result)
    return result


def scan(root: Path, cache_dir: Path, videos: Videos, settings: ClipSettings, executor: Executor, bar: Bar) -> dict[str, Findings]:
    """What is in each video, by name; those that are known are not decoded again."""
    from charforgex.curation import shards
    from charforgex.curation.clips.scanning import FOLDER, Findings
    from charforgex.curation.executors import Jobs

    units = list(videos.units.values())
    shards.sweep(cache_dir / FOLDER)
    common = {"root": str(root), "cache": str(cache_dir), "settings": runs.plain(asdict(settings.scan()))}
    jobs = Jobs(len(units), lambda number: {**common, "unit": units[number].to_json()})
    bar.start("looking at videos", len(units))
    names: dict[int, str] = {}
    for number, name in executor.map("charforgex.curation.clips.scanning:scan", jobs):
        names[number] = name
        bar.step()
    return {unit.path: Findings.read(cache_dir / FOLDER / names[number]) for number, unit in enumerate(units)}


def cut(
    root: Path, cache_dir: Path, out: Path, videos: Videos, clips: Sequence[Clip], settings: ClipSettings, executor: Executor, bar: Bar
) -> list[dict[str, Any]]:
    """Writes what is kept. Rows of `cutting.cut` with the `clip` of each, in the clips' order; what cannot be written gets a verdict."""
    from charforgex.curation.clips.cutting import file_name
    from charforgex.curation.executors import Jobs
    from charforgex.curation.items import Verdict

    files = {file_name(clip.video, clip.row["start"], clip.row["sha256"]): clip for clip in clips if clip.verdict is None}
    of_video: dict[str, dict[str, Any]] = {}
    for file, clip in files.items():
        of_video.setdefault(clip.video, {})[file] = {name: clip.row[name] for name in ("indices", "box", "size")}
    names = list(of_video)
    common = {"root": str(root), "cache": str(cache_dir), "out": str(out / CLIPS), "settings": runs.plain(asdict(settings.windows))}
    jobs = Jobs(len(names), lambda number: {**common, "unit": videos.units[names[number]].to_json(), "wanted": of_video[names[number]]})
    bar.start("cutting clips", len(files))
    rows: dict[str, dict[str, Any]] = {}
    for number, done in executor.map("charforgex.curation.clips.cutting:cut", jobs):
        bar.step(len(of_video[names[number]]))
        rows |= done["rows"]
        for file in of_video[names[number]].keys() - done["rows"].keys():
            files[file].verdict = Verdict("corrupt", done["error"])
    unique: dict[str, dict[str, Any]] = {}
    for file, clip in files.items():
        if file in rows and (known := unique.setdefault(rows[file]["sha256"], rows[file] | {"clip": clip}))["clip"] is not clip:
            clip.verdict = Verdict("duplicate", f"the same file as {known['clip'].name}")
    return list(unique.values())
