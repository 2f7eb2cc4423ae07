"""What the tools share that make a LoRA file smaller: one weight of the file at a time, what each of them lost, and the table.

Queries, keys and values are one weight in some formats. Where they share `down` they are changed together, and share it again afterwards:
changed one by one they would need three times the directions in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from charforgex.errors import LoraError
from charforgex.lora.lowrank import Product, layer_of, product, stacked
from charforgex.lora.lycoris import kind_of
from charforgex.lora.state import Layer, LoraLayer, some
from charforgex.lora.writing import check_format, check_places
from charforgex.toolbox.common import Opened, Outputs, as_lora, counted, progress, save, say, written

SHOWN = 5  # of the layers that lost most


@dataclass(frozen=True)
class Weight:
    """One weight of the file: our names of its layers, and its change."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # rows of each layer
    change: Product

    @property
    def label(self) -> str:
        return self.names[0] + "".join(f" + {name.rpartition('.')[2]}" for name in self.names[1:])

    def layers(self, changed: Product) -> dict[str, LoraLayer]:
        """By our names, with alpha = rank."""
        ups = changed.up.split(self.sizes)
        shapes = [(size, *changed.shape[1:]) for size in self.sizes]
        return {name: layer_of(Product(up, changed.down, shape)) for name, up, shape in zip(self.names, ups, shapes, strict=True)}


@dataclass(frozen=True)
class Row:
    """What became of one weight. `rank` 0: it is not changed any more. Norms are Frobenius'."""

    rank_before: int
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


def total_error(rows: Mapping[str, Row]) -> float:
    """Over all layers: the norm of what was lost as a share of the whole."""
    whole = math.hypot(*(row.norm for row in rows.values()))
    return math.hypot(*(row.lost for row in rows.values())) / whole if whole else 0.0


def norm(layer: Layer) -> float:
    """Frobenius, of what a layer adds; of DoRA, of the product that is added before its norm."""
    if isinstance(layer, LoraLayer):
        return product(replace(layer, magnitude=None)).norm()
    return float(layer.delta().double().norm())


def distance(one: Product, other: Product) -> float:
    """The Frobenius norm of the difference."""
    return stacked([one, other], [1.0, -1.0]).norm()


def check_plain(opened: Opened, tool: str) -> None:
    """Raises LoraError unless every layer of the file is a product of two factors."""
    file, path = opened.files[0], opened.paths[0]
    other = [module for module, sides in file.sides.items() if kind_of(sides) != "lora"]
    if other:
        raise LoraError(f"{path}: {len(other)} layers are DoRA, LoHa or LoKr, which {tool} cannot change: {some(other)}. {as_lora(path)}")


class Shrinking:
    """The layers of one file, each weight changed by `change`: it gives the new product, or None to leave it out, the norm of the old one,
    and what of that was lost. `values` by our names: layers with different ones are not changed together. `rows` has what became of each
    weight that was asked for.
    """

    def __init__(
        self, opened: Opened, format: str, change: Callable[[Weight], tuple[Product | None, float, float]],
        values: Mapping[str, float] | None = None,
    ):  # fmt: skip
        self.file, self.change, self.values = opened.files[0], change, values or {}
        check_format(format, opened.base.names)
        check_places(self.file.names, format, opened.base.names)
        have = set(self.file.names)
        table = opened.base.names.table(format)
        self.modules = {name: [n for n, _ in parts if n in have] for parts in table.values() for name, _ in parts if name in have}
        self.rows: dict[str, Row] = {}
        self._last: tuple[list[str], dict[str, Layer]] = [], {}

    def weights(self) -> Iterator[Weight]:
        """One after the other, in the file's order. Layers that turn out to be unchanged are left out."""
        for names in progress({tuple(names): None for names in self.modules.values()}, "weights"):
            yield from self._weights(names)

    def get(self, name: str) -> Layer | None:
        """What `write_layers` asks for."""
        names = self.modules[name]
        if self._last[0] != names:
            layers: dict[str, Layer] = {}
            for weight in self._weights(names):
                changed, norm, lost = self.change(weight)
                rank = 0 if changed is None else changed.rank
                self.rows[weight.label] = Row(weight.change.rank, rank, norm, lost)
                layers |= {} if changed is None else weight.layers(changed)
            self._last = names, layers
        return self._last[1].get(name)

    def _weights(self, names: Sequence[str]) -> Iterator[Weight]:
        layers = {name: layer for name in names if (layer := self.file.layer(name)) is not None}
        first = next(iter(layers.values()), None)
        same = len({self.values.get(name) for name in layers}) == 1
        if len(layers) > 1 and same and all(torch.equal(layer.down, first.down) for layer in layers.values()):
            products = [product(layer) for layer in layers.values()]
            ups = torch.cat([found.up for found in products])
            joined = Product(ups, products[0].down, (len(ups), *products[0].shape[1:]))
            yield Weight(tuple(layers), tuple(len(found.up) for found in products), joined)
        else:
            for name, layer in layers.items():
                found = product(layer)
                yield Weight((name,), (len(found.up),), found)


Write = Callable[[Outputs], dict[str, Any]]  # writes the file, and tells what `save` does


def layers(opened: Opened, get: Callable[[str], Layer | None], metadata: Mapping[str, str]) -> Write:
    """Writes the layers that `get` makes."""

    def write(place: Outputs) -> dict[str, Any]:
        with counted(get, opened.names) as counting:
            return save(opened, place, counting, opened.names, metadata)

    return write


def shrunk(opened: Opened, outputs: Outputs, write: Write, rows: Mapping[str, Row], functional: bool) -> dict[str, Any]:
    """Writes the file and tells what became of it. `rows` are full once it is written. A dry run writes where it is soon forgotten."""
    with outputs.place() as place:
        told = write(place)
        worst = max(rows, key=lambda label: rows[label].error)
        told |= {
            "ranks_before": sorted({row.rank_before for row in rows.values()}), "layers_before": len(opened.names),
            "error": total_error(rows), "worst_layer": worst, "worst_error": rows[worst].error,
            "dropped": [label for label, row in rows.items() if not row.rank], "dry_run": outputs.dry_run,
        }  # fmt: skip
        if functional:
            from charforgex.evaluation.functional import difference

            told["functional"] = difference(opened.base, opened.paths[0], place.out)
    told["out"] = None if outputs.dry_run else told["out"]
    return told


def show(title: str, told: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """The table at the end: the file before and after, and the layers that lost most."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("", overflow="fold"), "before", "after", title=title)
    table.add_row("layers", str(told["layers_before"]), str(told["layers"]))
    table.add_row("ranks", span(told["ranks_before"]), span(told["ranks"]))
    table.add_row("bytes", f"{told['bytes_before']:,}", f"{told['bytes']:,} ({told['bytes'] / told['bytes_before']:.0%})")
    table.add_row("relative error, all layers", "", f"{told['error']:.3g}")
    if "refactored_error" in told:
        table.add_row("of it, by storing few directions", "", f"{told['refactored_error']:.3g}")
    for label in sorted(rows, key=lambda label: -rows[label].error)[:SHOWN]:
        row = rows[label]
        table.add_row(label, f"rank {row.rank_before}", f"rank {row.rank}, error {row.error:.3g}" if row.rank else "left out")
    for name, value in told.get("functional", {}).items():
        table.add_row(name.replace("_", " "), "", f"{value:.3g}")
    console = Console()
    console.print(table)
    say(console, written(told))


def span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
