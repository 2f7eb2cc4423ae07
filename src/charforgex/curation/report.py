"""What curation did and what the dataset is like: report.html for people, report.json for programs, a screenful for the terminal.

    report = header(...)                                                   # counts, analysis, recommendations
    write(folder, report, (row(...) for each file), thumbnail)             # one pass over the files, in memory only what the page shows

report.json is the header and, as its last key, `pictures`: a row for each file, one per line. `VERSION` rises when a key changes its
meaning or goes; new keys may come at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from charforgex.curation.items import CLASSES, Finding, Verdict
from charforgex.curation.manifest import BY_HAND, Manifest
from charforgex.errors import DataError
from charforgex.runs import plain, replace_atomic, write_atomic

VERSION = 1
JSON, HTML = "report.json", "report.html"
CLUSTERS, MEMBERS = 24, 6  # groups of look-alikes on the page, and pictures of each
KEPT_OF_FEW = 3  # kept pictures are what people look at: so many times a class's number
# Each step of the funnel and the classes that are set aside at it.
FUNNEL = {
    "files": ("sidecar", "container"),
    "are pictures": ("corrupt", "unsupported", "too_large", "unsafe"),
    "are good enough": ("too_small", "blurred", "exposure", "noisy", "compressed", "marked"),
    "are no copies": ("duplicate",),
    "show one person": ("no_face", "several_people"),
    "show the character": ("wrong_person",),
}
assert {kind for kinds in FUNNEL.values() for kind in kinds} | {"kept"} == set(CLASSES)


def row(finding: Finding, verdict: Verdict | None, cuts: Sequence[Mapping[str, Any]] = (), group: int | None = None) -> dict[str, Any]:
    """One file in the report. Without a verdict it is kept, and `cuts` are what became of it, each with `file`, `framing`, `box` (left,
    top, right, bottom in the file's pixels), `captions`, `split`, `facts` and what is known `about` its captions; `group` is common to
    files that show the same picture."""
    return {
        "name": finding.name,
        "kind": verdict.kind if verdict else "kept",
        "reason": verdict.reason if verdict else "",
        "sha256": finding.sha256,
        "width": finding.width,
        "height": finding.height,
        "scores": dict(finding.scores),
        "faces": [asdict(face) for face in finding.faces],
        "group": group,
        "cuts": [dict(cut) for cut in cuts],
    }


def header(
    title: str, classes: Mapping[str, int], analysis: Mapping[str, Any], advice: Sequence[Mapping[str, Any]], split: Mapping[str, int],
    notes: Sequence[str] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """All of the report but the files. `classes` counts files, `split` pictures trained and held out; `more` is kept as it is."""
    return {
        "version": VERSION,
        "title": title,
        "classes": {kind: classes[kind] for kind in CLASSES if classes.get(kind)},
        "funnel": funnel(classes),
        "split": dict(split),
        "recommendations": [dict(piece) for piece in advice],
        "notes": list(notes),
        "analysis": dict(analysis),
    } | more


def funnel(classes: Mapping[str, int]) -> list[dict[str, Any]]:
    """From the files to the kept: what is left after each step."""
    left = sum(classes.values())
    steps = []
    for name, kinds in FUNNEL.items():
        left -= sum(classes.get(kind, 0) for kind in kinds)
        steps.append({"step": name, "count": left})
    return steps


def write(
    folder: str | Path, report: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], thumbnail: Callable[[str], Image.Image | None],
    gallery: int = 40,
) -> tuple[Path, Path]:  # fmt: skip
    """Writes report.json and report.html, each whole or not at all; returns their paths.

    `rows` is gone through once and never held. The page shows the first `gallery` files of each class (of the kept three times as many)
    and says how many more there are. `thumbnail` gives a picture of a file by name, upright and whole, of any size and aspect, or None.
    """
    from charforgex.curation.page import write_page

    folder = Path(folder)
    shown: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in CLASSES}
    clusters: dict[int, list[Mapping[str, Any]]] = {}
    with replace_atomic(folder / JSON) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(_dumps(report, indent=1)[:-2] + ',\n "pictures": [')  # the brace comes after the pictures
        for number, one in enumerate(rows):
            file.write(("," if number else "") + "\n" + _dumps(one))
            if len(shown[one["kind"]]) < gallery * (KEPT_OF_FEW if one["kind"] == "kept" else 1):
                shown[one["kind"]].append(one)
            group = one.get("group")
            if group is not None and (group in clusters or len(clusters) < CLUSTERS):
                clusters.setdefault(group, []).append(one)
                # the one that is kept comes first and stays
                clusters[group] = sorted(clusters[group], key=lambda member: member["kind"] == "duplicate")[:MEMBERS]
        file.write("\n]}\n")
    with replace_atomic(folder / HTML) as temporary, temporary.open("w", encoding="utf-8") as file:
        write_page(file, report, shown, [members for members in clusters.values() if len(members) > 1], thumbnail)
    return folder / HTML, folder / JSON


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


# ---- for the terminal ----


def summary(console: Console, report: Mapping[str, Any], page: Path | None = None) -> None:
    """One screen: from files to pictures, what was set aside, the weightiest recommendations, where the page is."""
    from rich.table import Table
    from rich.text import Text

    classes, steps = report["classes"], report["funnel"]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_column(style="dim")
    for kind, count in classes.items():
        if kind not in ("sidecar", "container"):
            table.add_row(f"{count:,}", Text(kind.replace("_", " "), style="green" if kind == "kept" else ""), CLASSES[kind])
    sides = ", ".join(f"{count} {side}" for side, count in report["split"].items() if count)
    kept = (f"{steps[-1]['count']:,}", "bold green")
    console.print(Text.assemble(kept, f" of {steps[0]['count']:,} files are kept", f" ({sides})" if sides else ""))
    console.print(table)
    for note in report["notes"]:
        console.print(Text.assemble(("! ", "yellow"), note))
    for piece in report["recommendations"][:5]:
        console.print(Text.assemble(("→ ", "yellow"), piece["text"]))
    if len(report["recommendations"]) > 5:
        console.print(Text(f"  and {len(report['recommendations']) - 5} more", style="dim"))
    if page is not None:
        console.print(Text.assemble("Look at ", (str(page), "bold")))


# ---- for those who look at it again: a gallery, an editor of captions ----


def read(folder: str | Path) -> dict[str, Any]:
    """report.json, whole. Raises DataError if there is none that can be read."""
    path = Path(folder) / JSON
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Curate again, which takes what is known from the cache.") from error
    if not isinstance(report, dict) or report.get("version") != VERSION:
        raise DataError(f"{path} is not a report of version {VERSION}. Curate again, which takes what is known from the cache.")
    return report


def select(
    rows: Iterable[Mapping[str, Any]], kind: str | None = None, split: str | None = None, text: str = "", **facts: str
) -> Iterator[Mapping[str, Any]]:
    """Rows of one class, of one side of the split, with `text` in name, reason or a caption, and with a cut of which these facts hold."""
    needle = text.lower()
    for one in rows:
        words = " ".join([one["name"], one["reason"], *(line for cut in one["cuts"] for line in cut["captions"])]).lower()
        cuts = [cut for cut in one["cuts"] if split is None or cut["split"] == split]
        cuts = [cut for cut in cuts if all(cut["facts"].get(question) == answer for question, answer in facts.items())]
        if (kind is None or one["kind"] == kind) and needle in words and (cuts or not (split or facts)):
            yield one


def set_captions(manifest: str | Path, path: str, captions: Sequence[str]) -> Manifest:
    """Gives the picture at `path` these captions, in the manifest and in the `.txt` beside it; a run of curation leaves them so.

    Raises DataError for a path that is not in the manifest.
    """
    found = Manifest.read(manifest)
    record = next((one for one in found.records if one.path == path), None)
    if record is None:
        raise DataError(f"{manifest} has no picture {path}.")
    said = tuple(dict.fromkeys(line for line in (" ".join(caption.split()) for caption in captions) if line))
    written = replace(record, captions=said, facts={**record.facts, BY_HAND: True})
    changed = replace(found, records=tuple(written if one is record else one for one in found.records))
    changed.write(manifest)
    write_atomic(found.file(path).with_suffix(".txt"), "".join(f"{line}\n" for line in said))
    return changed
