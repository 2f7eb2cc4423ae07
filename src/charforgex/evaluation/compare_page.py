"""What compare.json says, to look at: a page that needs nothing else, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.evaluation import charts, page, reading
from charforgex.pages import render
from charforgex.runs import plain, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from charforgex.evaluation.compare import Run

TEMPLATE = Path(__file__).with_name("compare.html")


def write_page(found: Mapping[str, Any], runs: Sequence[Run], out: Path) -> Path:
    found = plain(found)
    metrics = [_metric(name, metric, found) for name, metric in found["metrics"].items()]
    cards = {name: metric["card"] for name, metric in found["metrics"].items()}
    thumbnails = page.Thumbnails(out.parent)
    return write_atomic(out, render(
        TEMPLATE, **page.WORDS, title=page.together([run["name"] for run in found["runs"]]), found=found, metrics=metrics,
        legend={name: {"name": name, "card": card} for name, card in cards.items()}, sheets=_sheets(runs, thumbnails),
        comparison=page.paired(found["comparison"], cards, found["runs"][0]["name"]), curves=_curves(found, runs), thumbnails=thumbnails,
    ))  # fmt: skip


def _metric(name: str, metric: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Bars for each group of runs that can be compared, and why there are several."""
    groups = [
        page.bars(name, {"card": metric["card"], **group}, [{"name": run, "kind": ""} for run in group["runs"]])
        for group in metric["groups"]
    ]  # fmt: skip
    reasons = [f"{page.together(one['runs'])}: {one['why']}" for one in found["not_compared"] if one["metric"] == name]
    return {"name": name, "card": metric["card"], "groups": groups, "reasons": reasons}


def _curves(found: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The curves of runs that can be compared in one chart; a group of runs, of which none has one, has no chart."""
    charted = []
    for along, other in (("step", "scale"), ("scale", "step")):
        for name, metric in found["metrics"].items():
            for group in metric["groups"]:
                series = {}
                for run in (run for run in runs if run.name in group["runs"]):
                    known = reading.measured(run.result["metrics"][name])
                    lines = page.contestants_along(run.result["contestants"], along, other)
                    for label, line in lines.items():
                        points = page.points(line, known, along)
                        if len(points) > 1:
                            series[run.name if len(lines) == 1 else f"{run.name}, {label}"] = points
                if series:
                    title = reading.heading(metric["card"])
                    levels = {end: group[end] for end in ("floor", "ceiling")}
                    svg = charts.curves(series, levels, along, f"{title} by {along}")
                    charted.append({"along": along, "title": title, "svg": svg, "key": list(series)})
    return charted


def _sheets(runs: Sequence[Run], thumbnails: page.Thumbnails) -> dict[str, Any]:
    """What several runs were asked, side by side."""
    shots, asked = [], {}
    for run in runs:
        for shot in run.own:
            key = run.place(shot)
            asked.setdefault(key, set()).add(run.name)
            shots.append((key, {
                "contestant": run.name, "file": str((run.folder / shot["file"]).absolute()), "pack": shot["pack"], "prompt": key[0],
                "seed": key[1],
            }))  # fmt: skip
    drawn = [run for run in runs if any(run.name in names for names in asked.values())]
    shots = [shot for key, shot in shots if len(asked[key]) > 1]
    contestants = [{"name": run.name} for run in drawn]
    return page.sheets({"contestants": contestants}, shots, thumbnails)


def show(found: Mapping[str, Any], console: Console) -> None:
    """Values and intervals; what cannot be compared with the first run stands in brackets, and why below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("metric")
    for run in found["runs"]:
        kept = escape(run["contestant"]) if run["contestant"] != run["name"] else ""
        table.add_column(f"{escape(run['name'])}\n[dim]{kept}[/dim]", justify="right", overflow="fold")
    for metric in found["metrics"].values():
        cells = []
        for run in found["runs"]:
            number, group = next(((i, one) for i, one in enumerate(metric["groups"]) if run["name"] in one["runs"]), (0, None))
            told = "" if group is None else reading.with_interval(group["values"][run["name"]]).replace(" (", "\n(")
            cells.append(escape(f"[{told}]" if number else told))
        table.add_row(escape(metric["card"]["title"]), *cells)
    console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in found["not_compared"]:
        reasons.setdefault((page.together(one["runs"]), one["why"]), []).append(found["metrics"][one["metric"]]["card"]["title"])
    for (who, why), titles in reasons.items():
        console.print(f"[yellow]Not comparable[/yellow], {escape(who)}: {escape(why)} ({escape(', '.join(titles))})", soft_wrap=True)
    for row in (found["comparison"] or {"rows": []})["rows"]:
        if row["better"]:
            title = found["metrics"][row["metric"]]["card"]["title"]
            won = row if row["better"] == row["a"] else page.turned(row)
            told = (
                f"{title}: {won['a']} better than {won['b']} in {won['prompts_won']} of {won['prompts']} prompts (p = {won['p_holm']:.2g})"
            )
            console.print(escape(told), soft_wrap=True, highlight=False)
    changed = [one["name"] for one in found["settings"]]
    if changed:
        console.print(f"They differ in {escape(', '.join(changed))}.", soft_wrap=True, highlight=False)
    console.print(f"page      {escape(str(found['page']))}", soft_wrap=True, highlight=False)
