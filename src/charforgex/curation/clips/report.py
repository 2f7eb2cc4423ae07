"""What curation made of the videos: report.html for people, report.json for programs, a screenful for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.curation.clips.deciding import CLASSES, Clip, counts
from charforgex.curation.clips.scanning import Findings
from charforgex.curation.items import Verdict
from charforgex.curation.manifest import Manifest
from charforgex.pages import as_jpeg, render
from charforgex.runs import write_atomic, write_json

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1
JSON, HTML = "report.json", "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = 60  # strips of each class on the page; about 12 kB each


def write(
    out: Path, title: str, files: Mapping[str, Verdict], clips: Sequence[Clip], findings: Mapping[str, Findings], manifest: Manifest,
    notes: Sequence[str], windows: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Writes both files. `files` are all that lay there, `windows` what a clip is. Returns the report without its rows."""
    records = {record.facts["from"]: record for record in manifest.records}
    rows = [row(clip, records) for clip in clips]
    told = {
        "version": VERSION,
        "title": title,
        "windows": dict(windows),
        "classes": counts([*files.values(), *(clip.verdict for clip in clips)]),
        "split": dict(Counter(record.split for record in manifest.records)),
        "notes": list(notes),
    }
    others = [{"name": name, "kind": verdict.kind, "reason": verdict.reason} for name, verdict in files.items()]
    write_json(out / JSON, told | {"files": others, "clips": rows})
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CLASSES}
    for clip, one in zip(clips, rows, strict=True):
        if len(shown[one["kind"]]) < SHOWN:
            strip = None if clip.number is None else as_jpeg(findings[clip.video].strip(clip.number))
            shown[one["kind"]].append(one | {"strip": strip})
    values = {
        "report": told, "title": title, "shown": {kind: found for kind, found in shown.items() if found},
        "count": Counter(one["kind"] for one in rows), "meaning": CLASSES, "files": [one for one in others if one["kind"] != "sidecar"],
    }  # fmt: skip
    write_atomic(out / HTML, render(TEMPLATE, **values))
    return told


def row(clip: Clip, records: Mapping[str, Any]) -> dict[str, Any]:
    """One clip in report.json."""
    record = records.get(clip.name)
    return {
        "name": clip.name,
        "video": clip.video,
        "kind": clip.verdict.kind if clip.verdict else "kept",
        "reason": clip.verdict.reason if clip.verdict else "",
        "scores": clip.row.get("scores", {}),
        "box": clip.row.get("box"),
        "face": clip.row.get("face"),
        "file": record.path if record else None,
        "size": [record.width, record.height] if record else None,
        "captions": list(record.captions) if record else [],
        "split": record.split if record else None,
    }


def summary(console: Console, told: Mapping[str, Any], page: Path) -> None:
    """One screen: how many clips, what was set aside, where the page is."""
    from rich.table import Table
    from rich.text import Text

    classes = told["classes"]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_column(style="dim")
    for kind, count in classes.items():
        if kind not in ("sidecar", "container"):
            table.add_row(f"{count:,}", Text(kind.replace("_", " "), style="green" if kind == "kept" else ""), CLASSES[kind])
    sides = ", ".join(f"{count} {side}" for side, count in told["split"].items())
    kept = (f"{classes.get('kept', 0):,} clips", "bold green")
    console.print(Text.assemble(kept, " of {frames} frames at {fps:g} a second".format(**told["windows"]), f" ({sides})" if sides else ""))
    console.print(table)
    for note in told["notes"]:
        console.print(Text.assemble(("! ", "yellow"), note))
    console.print(Text.assemble("Look at ", (str(page), "bold")))
