"""What `charforgex votes` prints. Names come from strangers: no markup, and nothing that a terminal obeys (see ballots.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(found: Mapping[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    plan, look = found["plan"], found["looks"][-1]
    console.print(
        _table(found["question"], ["contestant", "votes", "share", "strength"], [
            [row["contestant"], f"{row['votes']:,}", _percent(row["share"]), _within(row["strength"], row["low"], row["high"], "{:+.2f}")]
            for row in found["ranking"]
        ]),
        _table("Two and two", ["pair", "prompts", "first : equal : second", "first's share", "verdict"], [
            [
                f"{row['a']} or {row['b']}", str(row["prompts"]), f"{row['a_votes']} : {row['tied']} : {row['b_votes']}",
                _within(*row["share"].values(), "{:.0%}") if row["share"] else "", row["verdict"],
            ]
            for row in found["pairs"]
        ]),
        _table("Raters", ["rater", "votes", "ties", "seconds each", "left", "the same again"], [
            [
                row["name"], str(row["votes"]), str(row["tied"]), f"{row['seconds']:.1f}", f"{row['left']['count']} of {row['left']['of']}",
                f"{row['again']['same']} of {row['again']['of']}" if row["again"] else "",
            ]
            for row in found["raters"]
        ]),
    )  # fmt: skip
    agreement = found["agreement"]
    if agreement["same"] is None:
        told = "Agreement: no two raters voted on the same pair."
    else:
        told = f"Agreement: two raters say the same of {agreement['same']:.0%} of {agreement['pairs']} pairs"
        alpha = _within(agreement["alpha"], agreement["low"], agreement["high"], "{:.2f}")
        told += f"; Krippendorff's alpha {alpha} (1 is full, 0 is chance)." if alpha else ", and of all pairs alike."
    stop = f"{look['votes']:,} of {plan['votes']:,} planned votes are in. "
    stop += "Stop: every pair is decided, or too close to call." if found["stop"] else "Go on."
    for line in (told, *found["notes"], stop, f"Result: {path}"):
        console.print(Text(line), soft_wrap=True)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for i, head in enumerate(heads):
        table.add_column(head, overflow="fold", justify="left" if i == 0 or head == "verdict" else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _within(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return ""
    known = low is not None and high is not None and low == low  # NaN is not itself
    return form.format(value) + (f" ({form.format(low)} to {form.format(high)})" if known else "")
