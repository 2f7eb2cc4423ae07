"""From the clips that were cut to a dataset: captions, sides of the split, the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from charforgex.curation.captions.base import Captioner, Context
from charforgex.curation.captions.cache import Job
from charforgex.curation.clips.deciding import Clip, together
from charforgex.curation.clips.settings import ClipSettings
from charforgex.curation.manifest import BY_HAND, Manifest, Record
from charforgex.curation.pipeline import Bar, Captions, ask, edited, publish, rounded
from charforgex.curation.split import Part, Split, SplitSettings, group, split
from charforgex.videos import frames

MANIFEST = "clips.jsonl"


def caption(
    folder: Path, cache_dir: Path, beside: Mapping[str, tuple[str, ...]], cuts: Sequence[Mapping[str, Any]],
    captioner: Captioner | None, settings: ClipSettings, bar: Bar,
) -> Captions:  # fmt: skip
    """Captions `beside` a video are those of all its clips, unless `recaption`; else a captioner sees the middle frame of each.

    A caption that somebody changed by hand beside a clip of an earlier run stays as it was changed.
    """

    rules = settings.rules
    captions = Captions(edited(folder, MANIFEST))
    jobs, of_key = [], {}
    for row in cuts:
        file, clip = row["file"], row["clip"]
        there = beside.get(clip.video, ())
        if file in captions.by_hand:
            captions.add(file, captions.by_hand[file])
        elif there and not settings.recaption:
            captions.add(file, there, rules if settings.rewrite else None)
        elif captioner is not None:
            framing = settings.crop.framing if clip.row["face"] else "full"
            context = Context(file, there, framing, rules.trigger, rules.class_word)
            jobs.append(Job(row["sha256"], lambda path=folder / file: middle(path, settings.windows.frames), context))
            of_key[row["sha256"]] = file
    if captioner is not None and jobs:
        ask(captioner, jobs, of_key, captions, cache_dir, settings.captions, rules, bar)
    return captions


def middle(path: Path, num_frames: int) -> Image.Image:
    return Image.fromarray(next(islice(frames(path), num_frames // 2, None)).pixels)


def assemble(
    folder: Path, clips: Sequence[Clip], groups: Sequence[Sequence[int]], cuts: Sequence[Mapping[str, Any]], captions: Captions,
    settings: ClipSettings, notes: list[str],
) -> Manifest:  # fmt: skip
    """The manifest, written: every clip with its captions, its side of the split, and what is known of it."""

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
    manifest = Manifest(folder, tuple(records))
    if records:
        publish(manifest, MANIFEST)
    return manifest


def held_out(
    clips: Sequence[Clip], groups: Sequence[Sequence[int]], cuts: Sequence[Mapping[str, Any]], settings: SplitSettings, notes: list[str]
) -> tuple[dict[str, int], list[str]]:
    """The group of each cut by its file, none of which is torn apart, and its side.

    A group is a video, or a shot where no whole video can be held out, with what has a copy in it.
    """

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
