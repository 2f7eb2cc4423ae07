"""One layer of the result from the layers of several files, by a method, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import torch

from charforgex.errors import LoraError
from charforgex.lora import lowrank
from charforgex.lora.lowrank import EXACT, Keep, Product
from charforgex.lora.state import Layer, LoraLayer
from charforgex.merging import methods
from charforgex.merging.settings import TRUNCATED, Method, Size

TOO_LARGE = 1e18  # norm of a change whose squares float32 could not hold


@dataclass(frozen=True)
class Row:
    """What became of one layer. `ranks` are the inputs', None without the layer; `norm` is of the whole result, `lost` of what was cut."""

    name: str
    weights: tuple[float, ...]
    ranks: tuple[int | None, ...]
    rank: int
    norm: float
    lost: float
    numbers: int  # in the factors

    @property
    def error(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


@dataclass
class Merger:
    """Makes layers when they are asked for, one at a time.

    `get(index, name)` reads one of a file; `weights` are the files', `factors` what each file's layers are multiplied by besides, 0 as if
    the file had no such layer; `names` are all layers, on which an angle between whole adapters is measured. `rows` fills with every
    layer that is made, and stays without those that come out zero.
    """

    method: Method
    size: Size
    get: Callable[[int, str], Layer | None]
    weights: Sequence[float]
    factors: Sequence[Mapping[str, float]]
    names: Sequence[str] = ()
    rows: dict[str, Row] = field(default_factory=dict)

    def of(self, name: str) -> tuple[float, ...]:
        """The weight of each file in this layer."""
        return tuple(weight * factors.get(name, 0.0) for weight, factors in zip(self.weights, self.factors, strict=True))

    def layer(self, name: str) -> LoraLayer | None:
        """None where nothing changes. Raises LoraError for what cannot be merged, with the layer's name."""
        try:
            return self._layer(name)
        except LoraError as error:
            raise LoraError(f"{name}: {error}") from error

    def _layer(self, name: str) -> LoraLayer | None:
        weights = self.of(name)
        layers = [self.get(index, name) if factors.get(name) else None for index, factors in enumerate(self.factors)]
        changes = [None if layer is None else lowrank.product(layer) for layer in layers]
        live = [index for index, change in enumerate(changes) if change is not None and weights[index] != 0]
        if not live:
            return None
        largest = max(abs(weights[index]) * changes[index].norm() for index in live)
        if not largest < TOO_LARGE:
            raise LoraError("Its values are too large to be computed with; this file, or its weight, is broken.")
        if not largest:
            return None
        ranks = tuple(None if change is None else change.rank for change in changes)
        wanted = self._rank(max(rank for rank in ranks if rank is not None))
        keep = self._keep(wanted)
        if self.method.kind.dense:
            found = lowrank.dense_spectrum(self._dense(name, [changes[i] for i in live], [weights[i] for i in live]), wanted)
        else:
            terms = [term for term in self._terms(changes, weights, live) if term.weight != 0]
            if keep is None and (whole := self._whole(terms, layers, changes)) is not None:
                return self._told(name, whole, weights, ranks, lowrank.product(whole).norm(), 0.0)
            found = lowrank.spectrum(lowrank.stacked([term.change for term in terms], [term.weight for term in terms]))
        live_values = int((found.values > EXACT * largest).sum())  # below it is the rounding of what cancels
        if not live_values:
            return None
        found = found._replace(left=found.left[:, :live_values], values=found.values[:live_values], right=found.right[:live_values])
        rank = live_values if keep is None else min(keep(found), live_values)
        norm = math.sqrt(float(found.values.double().square().sum()) + found.rest)
        return self._told(name, lowrank.layer_of(found.truncated(rank)), weights, ranks, norm, norm * found.error(rank))

    def _told(self, name: str, layer: LoraLayer, weights: tuple[float, ...], ranks: tuple, norm: float, lost: float) -> LoraLayer:
        numbers = layer.up.numel() + layer.down.numel()
        self.rows[name] = Row(name, weights, ranks, layer.rank, norm, lost, numbers)
        return layer

    def _rank(self, largest: int) -> int | None:
        """The rank to be kept, None where another measure decides. `largest` is the highest rank of the inputs."""
        if self.size.rank is not None:
            return self.size.rank
        return largest if self.method.name in TRUNCATED and not self.size.given else None

    def _keep(self, rank: int | None) -> Keep | None:
        """None keeps all."""
        if rank is not None:
            return lowrank.keep_rank(rank)
        if self.size.energy is not None:
            return lowrank.keep_energy(self.size.energy)
        return lowrank.keep_error(self.size.error) if self.size.error is not None else None

    def _terms(self, changes: Sequence[Product | None], weights: Sequence[float], live: Sequence[int]) -> list[methods.Term]:
        name, options = self.method.name, asdict(self.method.options)
        if name == "orthogonal":
            return methods.orthogonal(changes, weights, **options)
        there, known = [changes[index] for index in live], [weights[index] for index in live]
        if name == "subtract":
            return methods.subtract(there, known, first=live[0] == 0)
        if name != "slerp":
            return methods.linear(there, known)
        if options["angle"] == "layer":
            return methods.slerp(there, known)
        coefficients = [self.whole_coefficients[index] * weights[index] / self.weights[index] for index in live]
        return methods.linear(there, coefficients)

    @cached_property
    def whole_coefficients(self) -> list[float]:
        """Of SLERP between whole adapters, each as its factors make it: one file after another is a single long vector."""
        table = torch.zeros(len(self.weights), len(self.weights), dtype=torch.float64)
        for name in self.names:
            strengths = [factors.get(name, 0.0) for factors in self.factors]
            layers = [self.get(index, name) if strength else None for index, strength in enumerate(strengths)]
            live = [index for index, layer in enumerate(layers) if layer is not None]
            there = methods.gram([lowrank.product(layers[index]).scaled(strengths[index]) for index in live])
            for i, row in zip(live, there, strict=True):
                table[i, live] += row
        return methods.slerp_coefficients(table, self.weights)

    def _dense(self, name: str, changes: Sequence[Product], weights: Sequence[float]) -> torch.Tensor:
        """A method that looks at single values, on one layer's dense changes."""
        options = asdict(self.method.options)
        if self.method.kind.is_random:
            seed = options.pop("seed")
            options["keys"] = [(seed, "merge", name, methods.content(change)) for change in changes]
        dense = [change.up @ change.down for change in changes]
        return getattr(methods, self.method.name)(dense, weights, **options).view(changes[0].shape)

    def _whole(self, terms: Sequence[methods.Term], layers: Sequence[Layer | None], changes: Sequence[Product | None]) -> LoraLayer | None:
        """The result in the factors as they are, where nothing would be gained by others: one file's alone, or all of them stacked."""
        if self.method.name == "stack":
            return _balanced(terms)
        if len(terms) == 1 and terms[0].weight > 0:
            layer = next((layer for layer, change in zip(layers, changes, strict=True) if change is terms[0].change), None)
            return None if layer is None or layer.alpha <= 0 else replace(layer, alpha=layer.alpha * terms[0].weight)
        return None


def _balanced(terms: Sequence[methods.Term]) -> LoraLayer:
    """All factors beside each other, each pair's strength shared evenly, so that both halves have a place in float16."""
    pairs = []
    for change, weight in terms:
        up, down = change.up * weight, change.down
        sizes = float(up.norm()), float(down.norm())
        gain = math.sqrt(sizes[1] / sizes[0]) if all(sizes) else 1.0
        pairs.append(Product(up * gain, down / gain, change.shape))
    return lowrank.layer_of(lowrank.stacked(pairs))
