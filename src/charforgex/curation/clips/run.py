"""`charforgex curate clips`: videos to clips of one length, a manifest that training reads, and a report to look at.

As with pictures, files are only read, what takes long is kept under the cache folder by content, and a second run does what is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex import runs
from charforgex.config import bind
from charforgex.curation.run import RunSettings, Source, bind_rules, check_apart, check_out
from charforgex.errors import DataError
from charforgex.videos import check_pyav

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from PIL import Image
    from rich.console import Console

    from charforgex.curation.captions.base import Captioner
    from charforgex.curation.clips.deciding import Clip
    from charforgex.curation.clips.scanning import Findings
    from charforgex.curation.clips.settings import ClipSettings
    from charforgex.curation.executors import Executor
    from charforgex.curation.ingest import Unit
    from charforgex.curation.items import Verdict
    from charforgex.curation.manifest import Manifest
    from charforgex.curation.pipeline import Bar, Captions
    from charforgex.curation.split import Split, SplitSettings

CLIPS = "clips"  # the dataset's own folder: clips, captions and the manifest
MANIFEST = "clips.jsonl"
NO_VIDEO = {
    "picture": "a picture; charforgex curate makes a dataset of pictures",
    "archive": "videos in archives are not read; unpack it",
    "sidecar": "no video has this name",
}


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


@dataclass
class Videos:
    """What lies under the root: videos by name, the captions beside them, and what becomes of all other files."""

    units: dict[str, Unit]
    captions: dict[str, tuple[str, ...]]
    others: dict[str, Verdict]


def make_clips(
    source: Source, settings: ClipSettings, out: Path, cache_dir: Path, console: Console, only_report: bool = False
) -> dict[str, Any]:
    """Writes clips/ (with captions and clips.jsonl), report.html, report.json and result.json into `out`, or the report alone.

    Raises DataError if no clip is kept.
    """
    from charforgex.curation import ingest, pipeline
    from charforgex.curation.clips import deciding, report
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
            captions = caption(out, cache_dir, videos, cuts, captioner, settings, bar)
            manifest = assemble(out, clips, groups, cuts, captions, settings, notes)
        files = videos.others | {video: deciding.verdict_of_video(found, of_video[video]) for video, found in findings.items()}
        told = report.write(out, root.name, files, clips, findings, manifest, notes, asdict(settings.windows))
    report.summary(console, told, out / report.HTML)
    kept = sum(clip.verdict is None for clip in clips)
    if not kept:
        raise DataError(deciding.nothing_kept(source.root, clips, list(files.values()), out))
    result = {
        "manifest": None if only_report else str(manifest.root / MANIFEST),
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


# ---- find ----


def find(root: Path, leave_out: Sequence[Path]) -> Videos:
    from charforgex.curation import ingest
    from charforgex.curation.folders import is_mask, is_sidecar, refusal_by_name, stem, suffix_of
    from charforgex.curation.items import Verdict

    units = ingest.units(root, ingest.IngestSettings(), leave_out)
    found = Videos({unit.path: unit for unit in units if unit.kind == "video" and unit.verdict is None}, {}, {})
    of_stem: dict[str, list[str]] = {}
    for path in found.units:
        of_stem.setdefault(stem(path, suffix_of(path)), []).append(path)
    for unit in units:
        owners = of_stem.get(stem(unit.path, suffix_of(unit.path)), ())
        if unit.path in found.units:
            continue
        if is_sidecar(unit.path) and not is_mask(unit.path) and owners:
            found.others[unit.path] = take_caption(root, unit.path, owners, found.captions)
        else:
            reason = NO_VIDEO.get(unit.kind) or refusal_by_name(unit.path).reason
            known = unit.verdict if unit.kind != "sidecar" else None  # which was looked for among pictures
            found.others[unit.path] = known or Verdict("unsupported", reason)
    return found


def take_caption(root: Path, name: str, owners: Sequence[str], captions: dict[str, tuple[str, ...]]) -> Verdict:
    """The lines of a file beside videos, added to their captions."""
    from charforgex.curation import ingest
    from charforgex.curation.folders import MAX_CAPTION_BYTES, caption_lines, caption_verdict
    from charforgex.curation.pictures import read_bytes, verdict_of

    try:
        data = read_bytes(ingest.locate(root, name), MAX_CAPTION_BYTES, may_be_empty=True)
    except DataError as error:
        return verdict_of(error)
    verdict = caption_verdict(data, owners[0])
    if verdict.kind == "sidecar":
        for owner in owners:
            captions[owner] = tuple(dict.fromkeys([*captions.get(owner, ()), *caption_lines(data)]))
    return verdict


# ---- measure and cut ----


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
    return [rows[file] | {"clip": clip} for file, clip in files.items() if file in rows]


# ---- caption ----


def caption(
    out: Path, cache_dir: Path, videos: Videos, cuts: Sequence[Mapping[str, Any]], captioner: Captioner | None,
    settings: ClipSettings, bar: Bar,
) -> Captions:  # fmt: skip
    """Captions beside a video are those of all its clips, unless `recaption`; else a captioner sees the middle frame of each.

    A caption that somebody changed by hand beside a clip of an earlier run stays as it was changed.
    """
    from charforgex.curation import pipeline
    from charforgex.curation.captions.base import Context
    from charforgex.curation.captions.cache import Job

    rules = settings.rules
    captions = pipeline.Captions(pipeline.edited(out / CLIPS, MANIFEST))
    jobs, of_key = [], {}
    for row in cuts:
        file, clip = row["file"], row["clip"]
        there = videos.captions.get(clip.video, ())
        if file in captions.by_hand:
            captions.add(file, captions.by_hand[file])
        elif there and not settings.recaption:
            captions.add(file, there, rules if settings.rewrite else None)
        elif captioner is not None:
            framing = settings.crop.framing if clip.row["face"] else "full"
            context = Context(file, there, framing, rules.trigger, rules.class_word)
            jobs.append(Job(row["sha256"], lambda path=out / CLIPS / file: middle(path, settings.windows.frames), context))
            of_key[row["sha256"]] = file
    if captioner is not None and jobs:
        pipeline.ask(captioner, jobs, of_key, captions, cache_dir, settings.captions, rules, bar)
    return captions


def middle(path: Path, num_frames: int) -> Image.Image:
    from itertools import islice

    from PIL import Image

    from charforgex.videos import frames

    return Image.fromarray(next(islice(frames(path), num_frames // 2, None)).pixels)


# ---- assemble ----


def assemble(
    out: Path, clips: Sequence[Clip], groups: Sequence[Sequence[int]], cuts: Sequence[Mapping[str, Any]], captions: Captions,
    settings: ClipSettings, notes: list[str],
) -> Manifest:  # fmt: skip
    """The manifest, written: every clip with its captions, its side of the split, and what is known of it."""
    from charforgex.curation.manifest import BY_HAND, Manifest, Record
    from charforgex.curation.pipeline import publish, rounded

    numbers, sides = held_out(clips, groups, cuts, settings.split, notes)
    records = []
    for row, side in zip(cuts, sides, strict=True):
        clip, file = row["clip"], row["file"]
        known = {
            "from": clip.name, "frames": settings.windows.frames, "fps": settings.windows.fps, "shot": clip.row["shot"],
            "box": clip.row["box"], "face": clip.row["face"], "group": numbers[file], "scores": rounded(clip.row["scores"]),
        }  # fmt: skip
        if file in captions.by_hand:
            known[BY_HAND] = True
        if file in captions.about:
            known["caption"] = captions.about[file]
        records.append(
            Record(file, row["sha256"], row["width"], row["height"], captions=captions.texts.get(file, ()), split=side, facts=known)
        )
    manifest = Manifest(out / CLIPS, tuple(records))
    if records:
        publish(manifest, MANIFEST)
    return manifest


def held_out(
    clips: Sequence[Clip], groups: Sequence[Sequence[int]], cuts: Sequence[Mapping[str, Any]], settings: SplitSettings, notes: list[str]
) -> tuple[dict[str, int], list[str]]:
    """The group of each cut by its file, none of which is torn apart, and its side.

    A group is a video, or a shot where no whole video can be held out, with what has a copy in it.
    """
    from charforgex.curation.clips.deciding import together
    from charforgex.curation.split import Part, group, split

    def by(whole: bool) -> tuple[dict[str, int], Split]:
        numbers = group([clip.name for clip in clips], together(clips, groups, whole), 0.0)
        of_clip = dict(zip(map(id, clips), numbers, strict=True))
        parts = [Part(row["sha256"], of_clip[id(row["clip"])]) for row in cuts]
        return {row["file"]: part.group for row, part in zip(cuts, parts, strict=True)}, split(parts, settings)

    numbers, found = by(whole=True)
    if settings.val and "val" not in found.sides:
        numbers, found = by(whole=False)
        if "val" in found.sides:
            notes.append("Whole videos have too many clips to be held out, so shots are: validation shows much that training has seen.")
    notes += [note.replace("pictures", "clips") for note in found.notes]
    return numbers, found.sides
