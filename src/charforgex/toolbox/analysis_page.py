"""What `analyze` found, to look at: a picture, a page that needs neither network nor scripts, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.runs import replace_atomic, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

TEMPLATE = Path(__file__).with_name("analysis.html")
TOP = 25  # layers in the page's list
ROW, COLUMN = 0.17, 0.42  # inches of the heat map for a block, and for a kind of layer


def draw(analysis: Mapping[str, Any], path: Path) -> None:
    """For each file: the energy by block and kind of layer, and the singular values of all layers; for each pair: cosines by block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files, pairs = analysis["files"], analysis["pairs"]
    heights = [1.4 + ROW * max(8, len(file["heat"])) for file in files] + [1.3 + ROW * max(4, len(pair["blocks"])) for pair in pairs]
    kinds = max(len(file["kind"]) for file in files)
    figure = Figure(figsize=(7.5 + COLUMN * kinds, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[2 + COLUMN * kinds, 4])
    for row, file in enumerate(files):
        _heat_map(figure, figure.add_subplot(grid[row, 0]), file)
        _spectra(figure.add_subplot(grid[row, 1]), file)
    for row, pair in enumerate(pairs, len(files)):
        _cosines(figure.add_subplot(grid[row, :]), pair)
    with replace_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _heat_map(figure, axes, file: Mapping[str, Any]) -> None:
    """Colours are roots of shares: norms, in which little things still show."""
    blocks, kinds = list(file["heat"]), list(file["kind"])
    shares = [[file["heat"][block].get(kind, float("nan")) ** 0.5 for kind in kinds] for block in blocks]
    image = axes.imshow(shares, aspect="auto", cmap="magma_r", vmin=0, interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.set_facecolor("#f1efec")
    axes.set_title(f"{file['name']}: where it changes the base", fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.01)
    bar.set_label("share of the whole norm", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _spectra(axes, file: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    spectra = [row["values"] for row in file["layers"].values() if row["values"]]
    for values in spectra:
        axes.plot(
            range(1, len(values) + 1), [value / values[0] for value in values], color="#b8502f", alpha=max(0.04, 1 / len(spectra) ** 0.7)
        )
    longest = max(map(len, spectra), default=0)
    middle = [sorted((values[i] if i < len(values) else 0.0) / values[0] for values in spectra)[len(spectra) // 2] for i in range(longest)]
    axes.plot(range(1, longest + 1), middle, color="#211f1c", linewidth=1.6, label="median of the layers")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("direction", fontsize=9)
    axes.set_title("Singular values of each layer, over its largest", fontsize=10)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)


def _cosines(axes, pair: Mapping[str, Any]) -> None:
    blocks = list(pair["blocks"])
    cosines = [pair["blocks"][block]["cosine"] for block in blocks]
    axes.barh(range(len(blocks)), cosines, color=["#b3261e" if value < 0 else "#1f4e9c" for value in cosines])
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.invert_yaxis()
    largest = max(0.1, *map(abs, cosines), abs(pair["cosine"])) if cosines else 1.0
    axes.set_xlim(-1.05 * largest, 1.05 * largest)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.grid(alpha=0.25, axis="x")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"{pair['first']} and {pair['second']}: cosine of their changes by block; of all {pair['cosine']:.3f}", fontsize=10)


def write_page(analysis: Mapping[str, Any], picture: Path, path: Path) -> None:
    """Names in it come from files of strangers; the template escapes all of them."""
    from charforgex.pages import as_png, render

    write_atomic(path, render(
        TEMPLATE, title=" and ".join(file["name"] for file in analysis["files"]), analysis=analysis, top=TOP, share=_share,
        largest=lambda file: sorted(file["layers"].items(), key=lambda item: -item[1]["norm"])[:TOP],
        picture=as_png(picture.read_bytes()),
    ))  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def summary(analysis: Mapping[str, Any], page: Path, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"LoRAs for {analysis['base']}")
    shares = ["of the base"] if analysis["weights"] else []
    for head in ("file", "component", "layers", "norm", *shares, "effective, stable rank", "most energy in"):
        table.add_column(head, justify="left" if head in ("file", "component", "most energy in") else "right", overflow="fold")
    for file in analysis["files"]:
        for component, row in file["component"].items():
            own = {name: found for name, found in file["block"].items() if name.startswith(f"{component}.")}
            most = max(own, key=lambda name: own[name]["energy"])
            share = [_share(row["share"])] if analysis["weights"] else []
            ranks = f"{row['effective_rank']:.1f}, {row['stable_rank']:.1f}"
            table.add_row(
                escape(file["name"]), component, str(row["layers"]), f"{row['norm']:.3g}", *share, ranks,
                f"{most.removeprefix(component + '.')}, {100 * own[most]['energy']:.0f} %",
            )  # fmt: skip
    console.print(table)
    if analysis["pairs"]:
        table = Table(title="How they go together")
        for head in ("first", "second", "cosine", "of second in first", "of first in second", "by chance"):
            table.add_column(head, justify="left" if head in ("first", "second") else "right", overflow="fold")
        for pair in analysis["pairs"]:
            inside = [_share(pair[key]["both"]) if key in pair else "" for key in ("second_in_first", "first_in_second")]
            chance = _share(pair["second_in_first"]["chance"]) if "second_in_first" in pair else ""
            table.add_row(escape(pair["first"]), escape(pair["second"]), f"{pair['cosine']:.3f}", *inside, chance)
        console.print(table)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
