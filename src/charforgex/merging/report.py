"""What a merge shows when it is done: a table by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from charforgex.merging.blocks import block_of

if TYPE_CHECKING:
    from rich.console import Console

    from charforgex.merging.merger import Row


def overall_error(rows: Iterable[Row]) -> float:
    """What was cut, as a share of the whole result, in the Frobenius norm over all layers."""
    rows = list(rows)
    return math.sqrt(sum(row.lost**2 for row in rows) / total) if (total := sum(row.norm**2 for row in rows)) else 0.0


def by_block(weights: Mapping[str, Sequence[float | None]], rows: Mapping[str, Row], order: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each block, in the order of depth: its layers, each file's weights, ranks, and what was cut.

    `weights` has all layers, and None where a file has not.
    """
    found: dict[str, list[str]] = {block: [] for block in order}
    for name in weights:
        found[block_of(name)].append(name)
    told = []
    for block, names in ((block, names) for block, names in found.items() if names):
        made = [rows[name] for name in names if name in rows]
        files = range(len(weights[names[0]]))
        told.append({
            "block": block,
            "layers": len(made),
            "weights": [_ends(weights[name][index] for name in names if weights[name][index] is not None) for index in files],
            "ranks_before": [_ends(row.ranks[index] for row in made if row.ranks[index] is not None) for index in files],
            "ranks": _ends(row.rank for row in made),
            "norm": math.sqrt(sum(row.norm**2 for row in made)),
            "error": overall_error(made),
        })  # fmt: skip
    return told


def _ends(values: Iterable[float]) -> list[float]:
    """The smallest and the largest, one number where they are the same, none of none."""
    values = list(values)
    return sorted({min(values), max(values)}) if values else []


def _said(ends: Sequence[float]) -> str:
    return (
        "-".join(f"{value:.3g}" for value in ends) if all(value >= 0 for value in ends) else " to ".join(f"{value:.3g}" for value in ends)
    )


def show(console: Console, result: Mapping[str, Any], files: Sequence[str], share: Callable[[float], str] = "{:.2%}".format) -> None:
    """The table, in which a file's column has its weights, and a line for the file."""
    from rich import box
    from rich.table import Table

    components = {row["block"].partition(".")[0] for row in result["blocks"]}
    within = f", {components.pop()}" if len(components) == 1 else ""
    table = Table(
        title=f"{result['method']} of {', '.join(files)}{within}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("block", overflow="fold")
    for heading in ("layers", *files, "ranks", "norm", "cut"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["blocks"]:
        ranks = f"{' + '.join(_said(ends) or 'none' for ends in row['ranks_before'])} -> {_said(row['ranks'])}" if row["layers"] else ""
        cells = [str(row["layers"]), *(_said(ends) for ends in row["weights"]), ranks, f"{row['norm']:.3g}"]
        table.add_row(row["block"].partition(".")[2] if within else row["block"], *cells, share(row["error"]) if row["error"] else "0")
    console.print(table)
    for word, source in result["presets"].items():
        console.print(f"{word}: {source}.", soft_wrap=True)
    where = result["out"] if not result["dry_run"] else "nothing is written (dry_run=true)"
    size = f"{result['bytes_before'] / 2**20:.1f} -> {result['bytes'] / 2**20:.1f} MiB"
    console.print(f"{where}: {result['layers']} layers, {size}, {share(result['error'])} cut", soft_wrap=True)
