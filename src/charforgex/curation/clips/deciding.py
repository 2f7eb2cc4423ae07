"""What becomes of every video and every window, and why: exactly one class each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from charforgex.curation import duplicates, fingerprints, quality
from charforgex.curation.clips.scanning import Findings
from charforgex.curation.clips.settings import ClipSettings, LimitSettings
from charforgex.curation.duplicates import DuplicateSettings
from charforgex.curation.items import CLASSES as OF_FILES
from charforgex.curation.items import Face, Finding, Verdict
from charforgex.curation.quality import QualitySettings

CLASSES = {
    "kept": "in the dataset",
    "container": "a video, whose clips are told by themselves",
    "sidecar": "a caption, used with its video",
    "short": "no clip fits between two cuts",
    "jumping": "a cut that was not seen as one, or frames that are missing",
    "dissolving": "one shot goes over into another, or fades",
    "static": "nothing moves",
    "too_small": "too few pixels",
    "no_face": "no face was found",
    "exposure": "too dark or too bright",
    "blurred": "out of focus",
    "duplicate": "the same as another clip, or nearly",
    "surplus": "more than were asked of one video",
    **{kind: OF_FILES[kind] for kind in ("corrupt", "too_large", "unsafe")},
    "unsupported": "no video, or of a kind that is not read",
}


@dataclass
class Clip:
    """A window of a video, or a shot without one, and what became of it. `row` is that of `measures.measure`; a short shot has none."""

    name: str
    video: str
    verdict: Verdict | None = None
    row: dict[str, Any] = field(default_factory=dict)
    number: int | None = None  # of its strip and mosaic, in the video's findings


def clips_of(video: str, found: Findings, settings: ClipSettings) -> list[Clip]:
    """In time, each judged by itself."""
    seconds = float(settings.windows.seconds)
    clips = [
        Clip(_name(video, row["start"]), video, judge(row, settings, found.dissolves), row, number)
        for number, row in enumerate(found.windows)
    ]
    for short in found.short:
        said = f"the shot has {short['seconds']:.2f} seconds, and a clip takes {seconds:.2f}"
        clips.append(Clip(_name(video, short["start"]), video, Verdict("short", said)))
    return sorted(clips, key=lambda clip: clip.name)


def _name(video: str, start: float) -> str:
    return f"{video}!/{start:010.3f}s"


def judge(row: dict[str, Any], settings: ClipSettings, dissolves: Sequence[tuple[float, float]]) -> Verdict | None:
    """The first limit that a window falls short of; None: it is good. `dissolves` are those of its video, (start, end) in seconds."""
    limits = settings.limits
    if row["missing"]:
        count = settings.windows.frames
        said = f"{row['missing']} of its {count} frames are missing: nothing in the video is nearest to their times"
        return Verdict("jumping", f"{said}. curation.windows.fps={settings.windows.fps:g} may be more than it has")
    ends = row["start"] + float(settings.windows.seconds)
    over = next(((start, end) for start, end in dissolves if start < ends and end > row["start"]), None)
    if over is not None and not limits.dissolves:
        return Verdict("dissolving", "from {:.2f} to {:.2f} seconds its frames are one blended into another".format(*over))
    if row["face"] is None and settings.crop.without_face == "aside":
        return Verdict("no_face", "a face was found in {} of the {} frames looked at, and half are wanted".format(*row["seen"]))
    if row["size"] is None:
        return Verdict("too_small", "its frames have {} x {} pixels".format(*row["source"]))
    scores, side = row["scores"], min(row["size"])
    if limits.min_side is not None and side < limits.min_side:
        return Verdict("too_small", f"the crop's shorter side has {side} pixels; at least {limits.min_side} is wanted")
    if verdict := quality.judge({name: scores[name] for name in ("high", "low", "sharpness")}, *row["size"], as_of_pictures(limits)):
        return verdict
    if limits.min_motion is not None and scores["motion"] < limits.min_motion:
        said = f"brightness varies by {scores['motion']:.1f} of 255 where it varies most"
        return Verdict("static", f"{said}; at least {limits.min_motion:g} is wanted")
    if limits.max_jump is not None and scores["jump"] > limits.max_jump:
        said = f"the largest step between two frames is {scores['jump']:.1f} times its large ones"
        return Verdict("jumping", f"{said}; at most {limits.max_jump:g} is wanted")
    return None


def as_of_pictures(limits: LimitSettings) -> QualitySettings:
    """Of the limits that pictures have those that clips have, too."""
    none = {name: None for name in QualitySettings.__dataclass_fields__}
    return QualitySettings(**none | {name: getattr(limits, name) for name in ("min_high", "max_low", "min_sharpness")})


def decide(
    clips: Sequence[Clip], findings: Mapping[str, Findings], captions: Mapping[str, Sequence[str]], limits: LimitSettings
) -> list[list[int]]:
    """Verdicts for copies and for what is more than was asked for. Returns groups of clips, by index, that show the same.

    Of two copies the one with a face stays, then the one with more pixels, the one whose video has `captions`, and the sharper one.
    """
    groups: list[list[int]] = []
    left = [index for index, clip in enumerate(clips) if clip.verdict is None]
    told = DuplicateSettings(radius=None)  # equal ones alone
    if limits.difference is not None:
        told = DuplicateSettings(turned=False, cropped=False, difference=limits.difference)

    def mosaic(place: int) -> np.ndarray:
        clip = clips[left[place]]
        return np.asarray(findings[clip.video].mosaics()[clip.number])

    shown = [as_finding(clips[index], mosaic(place), captions.get(clips[index].video, ())) for place, index in enumerate(left)]
    for cluster in duplicates.clusters(shown, told, mosaic):
        groups.append([left[place] for place in cluster.members])
        for place, reason in cluster.others.items():
            clips[left[place]].verdict = Verdict("duplicate", reason)
    for video in findings if limits.max_clips is not None else ():
        kept = [clip for clip in clips if clip.video == video and clip.verdict is None]
        stay = {round(place) for place in np.linspace(0, len(kept) - 1, min(len(kept), limits.max_clips))}
        for place, clip in enumerate(kept):
            if place not in stay:
                clip.verdict = Verdict("surplus", f"{len(kept)} clips of this video are good, and {limits.max_clips} were asked for")
    return groups


def as_finding(clip: Clip, mosaic: np.ndarray, captions: Sequence[str]) -> Finding:
    """A clip as a picture of which copies are looked for: its mosaic."""
    return Finding(
        clip.name, clip.row["sha256"], *clip.row["size"], tuple(captions), {"sharpness": clip.row["scores"]["sharpness"]},
        fingerprints.fingerprint(mosaic).hex, (Face(tuple(clip.row["face"]), 1.0),) if clip.row["face"] else (),
    )  # fmt: skip


def together(clips: Sequence[Clip], groups: Sequence[Sequence[int]], whole: bool) -> list[list[int]]:
    """Clips, by index, that stay on one side of the split: those of a video (`whole`) or else of a shot; and what has a copy in another."""
    by: dict[object, list[int]] = {}
    for index, clip in enumerate(clips):
        if clip.row:
            by.setdefault(clip.video if whole else (clip.video, clip.row["shot"]), []).append(index)
    return [*by.values(), *map(list, groups)]


def counts(verdicts: Sequence[Verdict | None]) -> dict[str, int]:
    """Of each class, in the order of `CLASSES`."""
    found = Counter(verdict.kind if verdict else "kept" for verdict in verdicts)
    return {kind: found[kind] for kind in CLASSES if found[kind]}


def nothing_kept(root: str, clips: Sequence[Clip], files: Sequence[Verdict], out: Path) -> str:
    found = Counter(verdict.kind for verdict in [*(clip.verdict for clip in clips if clip.verdict), *files] if verdict.kind != "container")
    told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found.most_common())
    return f"data.root={root}: no clip is kept ({told}). {out / 'report.html'} says why for each; curation.limits has the limits."


def verdict_of_video(found: Findings, clips: Sequence[Clip]) -> Verdict:
    """What became of a video as a whole."""
    kept, shots = sum(clip.verdict is None for clip in clips), {clip.row.get("shot", clip.name) for clip in clips}
    used = f"clips kept: {kept} of {len(clips)}, shots: {len(shots)}"
    if found.problems:
        problem = found.problems[0]
        return Verdict(problem.kind, f"{problem.reason}; {used}" if clips else problem.reason)
    return Verdict("container", used) if clips else Verdict("corrupt", "no picture in it can be decoded")
