"""The last words of an evaluation: a table with intervals, the recommendation, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from charforgex.evaluation import reading

FEW = 4  # contestants that stand side by side; more stand one below the other


def show(console: Console, result: Mapping[str, Any]) -> None:
    """Numbers with their 95 % intervals, between floor and ceiling."""
    names = [one["name"] for one in result["contestants"]]
    console.print(_by_metric(result, names) if len(names) <= FEW else _by_contestant(result, names))
    for why, whose in reasons(result).items():
        _say(console, f"[yellow]{escape('; '.join(whose))}: {escape(why)}[/yellow]")
    if result["recommended"]:
        told = result["recommended"]
        _say(console, f"[bold]{escape(told['contestant'])}[/bold] {escape(told['why'])}.")
    seconds = result["seconds"]
    speed = f", {seconds['drawn'] / seconds['draw']:.2f} a second" if seconds["drawn"] else ""
    _say(console, f"{seconds['drawn']} pictures drawn in {seconds['draw']:.1f} s{speed}; measured in {seconds['measure']:.1f} s")
    _say(console, f"report    {escape(result['page'])}")


def reasons(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Why numbers are lacking -> whose they would be: metrics, with the contestants where it is not all of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric in result["metrics"].values():
        for contestant, value in metric["values"].items():
            if "why" in value:
                found.setdefault(value["why"], {}).setdefault(reading.heading(metric["card"]), []).append(contestant)
    everyone = len(result["contestants"])
    return {
        why: [metric if len(who) == everyone else f"{metric} of {', '.join(who)}" for metric, who in whose.items()]
        for why, whose in found.items()
    }


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _by_metric(result: Mapping[str, Any], names: list[str]) -> Table:
    table = Table("", "floor", *map(escape, names), "ceiling", "better")
    for metric in result["metrics"].values():
        cells = [_cell(metric["values"][name]) for name in names]
        ends = [reading.rounded(metric[end], None) for end in ("floor", "ceiling")]
        table.add_row(escape(reading.heading(metric["card"])), ends[0], *cells, ends[1], metric["card"]["better"])
    return table


def _by_contestant(result: Mapping[str, Any], names: list[str]) -> Table:
    """Estimates alone where the intervals would not fit a line; the page has them all."""
    table = Table("", *(escape(reading.heading(metric["card"])) for metric in result["metrics"].values()))
    for end in ("floor", "ceiling"):
        table.add_row(f"[dim]{end}[/dim]", *(f"[dim]{reading.rounded(metric[end], None)}[/dim]" for metric in result["metrics"].values()))
    for name in names:
        table.add_row(escape(name), *(_cell(metric["values"][name]) for metric in result["metrics"].values()))
    return table


def _cell(value: Mapping[str, Any]) -> str:
    return "–" if "why" in value else reading.with_interval(value).replace(" (", "\n(")
