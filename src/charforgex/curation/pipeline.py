"""The stages of curation, each a function from what is known to what is known next. `run.py` calls them in order."""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console

from charforgex.curation import advice, analysis, crops, facts, report, shards
from charforgex.curation.cutting import file_name
from charforgex.curation.deciding import Decided, counts, vectors_of
from charforgex.curation.executors import Executor, Jobs
from charforgex.curation.exports import write_webdataset
from charforgex.curation.ingest import Unit
from charforgex.curation.items import Face, Finding, Verdict
from charforgex.curation.manifest import BY_HAND, Manifest, Record
from charforgex.curation.settings import CurationSettings
from charforgex.curation.shards import Findings
from charforgex.quiet import quiet
from charforgex.runs import plain, write_atomic

if TYPE_CHECKING:
    from rich.progress import Progress

    from charforgex.curation.captions.base import Captioner
    from charforgex.curation.captions.cache import Job
    from charforgex.curation.captions.rules import CaptionRules
    from charforgex.curation.captions.settings import CaptionSettings

PICTURES = "pictures"  # the dataset's own folder: pictures, captions and masks as every trainer reads them, and the manifest
MANIFEST = "manifest.jsonl"
NEXT = "next.jsonl"  # what the manifest is about to be, while the captions beside the pictures become so
EVERY = 30  # seconds between two lines of progress in a log
SAMPLE = 10_000  # pictures by which variety is measured, evenly out of all
TOGETHER = 1000  # pictures of which a CLIP is asked at once
NOTED = 20  # pictures with trouble that are named on the screen; the report has all


class Bar:
    """One line of progress at a time: what is done, how far, how long yet. In a log, which has no such line, a new one now and then."""

    def __init__(self, shown: Progress, console: Console):
        self.shown, self.console, self.task, self.told = shown, console, None, 0.0

    def start(self, what: str, total: int | None = None) -> None:
        if self.task is not None:
            self.shown.remove_task(self.task)
        self.task, self.told = self.shown.add_task(what, total=total), time.monotonic()
        if total and not self.console.is_terminal:
            self.console.print(f"{what}: {total:,}", highlight=False)

    def step(self, count: int = 1) -> None:
        self.shown.advance(self.task, count)
        if not self.console.is_terminal and time.monotonic() - self.told > EVERY:
            task, self.told = self.shown.tasks[0], time.monotonic()
            self.console.print(f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}", highlight=False)


@contextmanager
def progress(console: Console) -> Iterator[Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        yield Bar(shown, console)


# ---- measure ----


def scan(root: Path, cache_dir: Path, units: Sequence[Unit], settings: CurationSettings, executor: Executor, bar: Bar) -> Findings:
    """Every picture decoded, measured and embedded once; shards that are known are taken as they are."""
    bar.start("looking at pictures", len(units))
    names: dict[int, str] = {}
    options = plain(asdict(settings.scan()))
    for number, name, count in shards.scan_all(root, cache_dir, units, options, settings.shard, executor):
        names[number] = name
        bar.step(count)
    return Findings(cache_dir, [names[number] for number in sorted(names)])


# ---- cut ----


def cut(
    root: Path, cache_dir: Path, out: Path, units: Sequence[Unit], findings: Findings, decided: Decided, settings: CurationSettings,
    executor: Executor, bar: Bar,
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes the crops of what is kept, and says where they are (rows of `cutting.cut`, with the finding's `index`, in its order).

    A picture of which no crop can be made gets a verdict now.
    """
    planned = shards.plan(units, settings.shard)
    left: dict[int, list[int]] = {}
    for index in decided.open(range(len(findings))):
        left.setdefault(findings.place(index)[0], []).append(index)
    numbers = list(left)
    common = {
        "root": str(root), "cache": str(cache_dir), "out": str(out / PICTURES), "ingest": plain(asdict(settings.ingest)),
        "masks": settings.masks,
    }  # fmt: skip

    def job(place: int) -> dict[str, Any]:
        wanted = {findings[index].name: what for index in left[numbers[place]] if (what := cuts_of(index, findings, decided, settings))}
        return {**common, "units": [unit.to_json() for unit in planned[numbers[place]]], "wanted": wanted}

    bar.start("cutting pictures", sum(map(len, left.values())))
    rows = []
    for place, found in executor.map("charforgex.curation.cutting:cut", Jobs(len(numbers), job)):
        bar.step(len(left[numbers[place]]))
        index_of = {findings[index].name: index for index in left[numbers[place]]}
        for row in found:
            index = index_of[row["item"]]
            if "error" in row:
                decided.verdicts[index] = Verdict("corrupt", f"it could be measured, but not read again: {row['error']}")
            else:
                rows.append(row | {"index": index})
    order = {name: place for place, name in enumerate(settings.crops.framings)}
    return sorted(rows, key=lambda row: (row["index"], order[row["framing"]]))


def cuts_of(index: int, findings: Findings, decided: Decided, settings: CurationSettings) -> dict[str, Any] | None:
    """What `cutting.cut` is to make of a finding. None if no crop can be made of it, which its verdict tells now."""
    finding = findings[index]
    face = finding.faces[decided.faces[index]] if index in decided.faces else None
    others = [other for place, other in enumerate(finding.faces) if place != decided.faces.get(index)] if face else []
    subject = None if face else scaled(crops.salient_box(thumbnail := findings.thumbnail(index)), thumbnail.shape, finding)
    cuts = crops.plan(finding.width, finding.height, face, settings.crops, subject, others)
    if not cuts:
        decided.verdicts[index] = uncuttable(finding, face, others, settings)
        return None
    return {
        "sha256": finding.sha256,
        "face": asdict(face) if face else None,
        "subject": subject,
        "cuts": [asdict(cut) | {"file": file_name(finding, cut.framing)} for cut in cuts],
    }


def scaled(box: crops.Box, shape: Sequence[int], finding: Finding) -> crops.Box:
    """A box in an array of that shape (H, W, ...) in the picture's own pixels."""
    across, down = finding.width / shape[1], finding.height / shape[0]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def uncuttable(finding: Finding, face: Face | None, others: Sequence[Face], settings: CurationSettings) -> Verdict:
    if others:
        return Verdict("several_people", "the character cannot be cut out without the others")
    if face is None and "full" not in settings.crops.framings:
        framings = ", ".join(settings.crops.framings)
        return Verdict("no_face", f"no face was found in it, and curation.crops.framings has {framings}, which are cut around one")
    return Verdict(
        "too_small", f"no crop of {finding.width} x {finding.height} has {settings.crops.min_side} pixels a side with the whole head in it"
    )


def as_they_are(root: Path, findings: Findings, decided: Decided) -> tuple[list[dict[str, Any]], Manifest]:
    """The kept pictures whole, as `cut` and `assemble` would have them: for a report alone. Nothing is written."""
    rows, records = [], []
    for index in decided.open(range(len(findings))):
        found = findings[index]
        rows.append({"index": index, "file": found.name, "framing": "full", "box": [0, 0, found.width, found.height]})
        records.append(Record(found.name, found.sha256, found.width, found.height, found.captions))
    return rows, Manifest(root, tuple(records))


# ---- caption ----


@dataclass
class Captions:
    """By the file of a cut: what was written by hand, the captions of all, and what is known about them."""

    by_hand: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, file: str, lines: Sequence[str], rules: CaptionRules | None = None, about: Mapping[str, Any] | None = None) -> None:
        """Captions as the rules want them, or as they are, with notes on what a person should know, such as words that CLIP cuts off."""
        from charforgex.curation.captions.rules import apply, truncation

        told = [apply(line, rules) if rules else (line, truncation(line)) for line in lines if line.strip()]
        self.texts[file] = tuple(dict.fromkeys(text for text, _ in told if text))
        notes = dict.fromkeys(note for _, found in told for note in found)
        known = {**(about or {})} | ({"notes": list(notes)} if notes else {})
        if known:
            self.about[file] = known


def caption(
    out: Path, cache_dir: Path, findings: Findings, cuts: Sequence[Mapping[str, Any]], captioner: Captioner | None,
    settings: CurationSettings, bar: Bar,
) -> Captions:  # fmt: skip
    """Captions that were there are kept, unless `recaption`; the rules change them only if `rewrite`.

    A caption that somebody changed by hand beside a picture of an earlier run stays as it was changed.
    """
    from charforgex.curation.captions.base import Context
    from charforgex.curation.captions.cache import Job

    rules, pictures = settings.rules, out / PICTURES
    captions = Captions(edited(pictures))
    jobs, of_key = [], {}
    for row in cuts:
        finding, file = findings[row["index"]], row["file"]
        if file in captions.by_hand:
            captions.add(file, captions.by_hand[file])
        elif finding.captions and not settings.recaption:
            captions.add(file, finding.captions, rules if settings.rewrite else None)
        elif captioner is not None:
            context = Context(file, finding.captions, row["framing"], rules.trigger, rules.class_word)
            jobs.append(Job(row["sha256"], lambda path=pictures / file: Image.open(path).convert("RGB"), context))
            of_key[row["sha256"]] = file
    if captioner is not None and jobs:
        ask(captioner, jobs, of_key, captions, cache_dir, settings.captions, rules, bar)
    return captions


def ask(
    captioner: Captioner, jobs: Sequence[Job], of_key: Mapping[str, str], captions: Captions, cache_dir: Path, told: CaptionSettings,
    rules: CaptionRules, bar: Bar,
) -> None:  # fmt: skip
    """Adds what the captioner says of each job; `of_key` has their files."""
    from charforgex.curation.captions.cache import caption_all

    trouble: list[str] = []

    def note(name: str, why: str) -> None:
        trouble.append(f"{name}: {why}")

    bar.start(f"captions by {', '.join(told.backends)}", len(jobs))
    with quiet("transformers"):
        for key, text in caption_all(captioner, jobs, cache_dir / "captions", told.batch_size, note, bar.step):
            captions.add(of_key[key], text.splitlines(), rules, getattr(text, "about", {}))
    for line in trouble[:NOTED]:
        bar.console.print(f"[yellow]no caption for {line}", highlight=False)


def captioner_of(told: CaptionSettings) -> Captioner | None:
    """Who writes the captions, its model not loaded yet; None where nobody is asked. Raises ConfigError or ModelError."""
    from charforgex.curation.captions.base import get_captioner

    return None if told.backends == ("sidecar",) else get_captioner(told)  # which has no more than is known


def edited(folder: Path, manifest: str = MANIFEST) -> dict[str, tuple[str, ...]]:
    """Captions in the dataset of an earlier run that are not what it wrote, or were not in one before: somebody improved them."""
    written: dict[str, set[tuple[str, ...]]] = {}
    by_hand = set()
    for path in (folder / manifest, folder / NEXT):  # the latter of a run that was stopped while it wrote captions
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            record = json.loads(line)
            written.setdefault(record["path"], set()).add(tuple(record["captions"]))
            if record["facts"].get(BY_HAND):
                by_hand.add(record["path"])
    found = {}
    for name, captions in written.items():
        path = (folder / name).with_suffix(".txt")
        texts = tuple(text for text in path.read_text(encoding="utf-8").splitlines() if text.strip()) if path.is_file() else None
        if texts is not None and (texts not in captions or name in by_hand):
            found[name] = texts
    return found


# ---- assemble ----


def assemble(
    out: Path, findings: Findings, decided: Decided, cuts: Sequence[Mapping[str, Any]], captions: Captions,
    settings: CurationSettings, bar: Bar,
) -> Manifest:  # fmt: skip
    """The manifest, written: every cut with its captions, its side of the split, and what is known of it."""
    from charforgex.curation.split import Part, group, split

    bar.start("writing the manifest")
    unique = list({row["sha256"]: row for row in cuts}.values())
    names = [findings[row["index"]].name for row in unique]
    place = {}
    for position, row in enumerate(unique):
        place.setdefault(row["index"], []).append(position)
    clusters = [[p for index in members for p in place.get(index, [])] for members in decided.groups] + list(place.values())
    groups = group(names, [cluster for cluster in clusters if len(cluster) > 1], settings.split.scene_gap)
    sides = split([Part(row["sha256"], g, row["framing"]) for row, g in zip(unique, groups, strict=True)], settings.split)
    decided.notes += sides.notes
    records = []
    for row, name, number, side in zip(unique, names, groups, sides.sides, strict=True):
        finding = findings[row["index"]]
        known = {"from": name, "framing": row["framing"], "box": row["box"], "group": number, "scores": rounded(finding.scores)}
        if row["index"] in decided.faces:
            known["face"] = asdict(finding.faces[decided.faces[row["index"]]])
        if row["file"] in captions.by_hand:
            known[BY_HAND] = True
        if row["file"] in captions.about:
            known["caption"] = captions.about[row["file"]]
        about = {name: row[name] for name in ("sha256", "width", "height", "mask", "mask_sha256")}
        records.append(Record(row["file"], captions=captions.texts.get(row["file"], ()), split=side, facts=known, **about))
    pictures = out / PICTURES
    manifest = Manifest(pictures, tuple(records))
    if not records:
        return manifest
    publish(manifest, MANIFEST, also=["manifest.parquet"])
    if settings.manifest == "parquet":
        manifest.write(pictures / "manifest.parquet")
    if settings.webdataset:
        write_webdataset(manifest, out / "webdataset")
    return manifest


def publish(manifest: Manifest, name: str, also: Sequence[str] = ()) -> None:
    """Writes the manifest and the captions beside its files, and removes all else from its folder, which is ours, but for `also`."""
    manifest.write(manifest.root / NEXT)
    texts = {PurePosixPath(record.path).with_suffix(".txt").as_posix(): record.captions for record in manifest.records}
    for path, captions in texts.items():
        write_atomic(manifest.root / path, "".join(text + "\n" for text in captions))
    manifest.write(manifest.root / name)  # what a later run compares captions with, to see what somebody changed
    belongs = {name, *also, *texts} | {record.path for record in manifest.records} | {record.mask for record in manifest.records}
    for path in sorted(manifest.root.rglob("*")):  # of an earlier run over other files
        if path.is_file() and path.relative_to(manifest.root).as_posix() not in belongs:
            path.unlink()


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in scores.items()}


# ---- tell ----


def tell(
    out: Path, title: str, findings: Findings, decided: Decided, cuts: Sequence[Mapping[str, Any]], manifest: Manifest,
    settings: CurationSettings, bar: Bar,
) -> dict[str, Any]:  # fmt: skip
    """Writes report.html and report.json. Returns the report without its files."""
    bar.start("writing the report")
    records = {record.path: record for record in manifest.records}
    rows_of: dict[int, list[dict[str, Any]]] = {}
    known: list[dict[str, str]] = []
    shown = [row for row in cuts if row["file"] in records]
    guesses = guessed(findings, shown, settings)
    for position, row in enumerate(shown):
        finding, record = findings[row["index"]], records[row["file"]]
        found = facts.read(finding, " ".join(record.captions), row["box"], small_copy(findings, row))
        found = facts.complete(found, guesses[position], settings.analysis.margin) if guesses else found
        known.append(found)
        cut = {"file": row["file"], "framing": row["framing"], "box": row["box"], "facts": found, "captions": record.captions}
        rows_of.setdefault(row["index"], []).append(cut | {"about": record.facts.get("caption", {}), "split": record.split})
    kept, rest = Columns(), Columns()
    for index in range(len(findings)):
        if findings[index].scores:
            (rest if index in decided.verdicts else kept).add(findings[index].scores)
    seen = list(dict.fromkeys(row["index"] for row in shown))
    features = vectors_of(findings, seen[:: max(1, math.ceil(len(seen) / SAMPLE))])
    analysed = analysis.analyse(
        known, features, kept.arrays(), rest.arrays(), analysis.limits(settings.quality), settings.analysis,
        facts.answers(labels(settings)) if guesses else facts.ANSWERS,
    )  # fmt: skip
    decided.notes += noted(record.facts.get("caption", {}) for record in records.values())
    classes = counts(findings, decided)
    uncaptioned = sum(not record.captions for record in records.values())
    pieces = advice.recommend(analysed, classes, uncaptioned, settings.analysis)
    header = report.header(title, classes, analysed, pieces, Counter(record.split for record in records.values()), decided.notes)
    group_of = {index: number for number, members in enumerate(decided.groups) for index in members}
    index_of = {findings[index].name: index for index in range(len(findings))}

    def preview(name: str) -> Image.Image | None:
        data = findings.preview(index_of[name])
        return Image.open(io.BytesIO(data)) if data else None

    verdict = decided.verdicts.get
    rows = (report.row(finding, verdict(i), rows_of.get(i, ()), group_of.get(i)) for i, finding in enumerate(findings))
    report.write(out, header, rows, preview, settings.analysis.gallery)
    return header


def noted(about: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences on how many captions a person should look at."""
    known = list(about)
    contradicted, remarked = (sum(bool(one.get(what)) for one in known) for what in ("contradictions", "notes"))
    said = [(contradicted, "the captioners contradict one another"), (remarked, "the rules have a remark")]
    return [f"Of {count} caption{'s'[: count != 1]} {what}; they stand under the pictures in report.html." for count, what in said if count]


class Columns:
    """Scores by name, one list each."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, scores: Mapping[str, float]) -> None:
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(values) for name, values in self.values.items()}


def guessed(findings: Findings, shown: Sequence[Mapping[str, Any]], settings: CurationSettings) -> list[dict[str, facts.Guess]]:
    """What a CLIP of the user's takes each picture for; the embedded one knows drawings of charworld and none of these words."""
    if settings.clip in (None, "charworld"):
        return []
    from charforgex.embedders import get_clip

    clip = get_clip(settings.clip)
    read, guesses = facts.label_vectors(clip, labels(settings)), []
    for start in range(0, len(shown), TOGETHER):
        features = vectors_of(findings, [row["index"] for row in shown[start : start + TOGETHER]])
        guesses += facts.zero_shot(features, read, clip.scale)
    return guesses


def labels(settings: CurationSettings) -> facts.Labels:
    return {**facts.LABELS, **settings.analysis.labels}


def small_copy(findings: Findings, row: Mapping[str, Any]) -> np.ndarray | None:
    """The cut in the size of the report's pictures, uint8 (H, W, 3)."""
    data = findings.preview(row["index"])
    if data is None:
        return None
    picture = Image.open(io.BytesIO(data))
    scale = picture.width / findings[row["index"]].width
    left, top, right, bottom = (round(value * scale) for value in row["box"])
    return np.asarray(picture.convert("RGB").crop((left, top, max(left + 1, right), max(top + 1, bottom))))
