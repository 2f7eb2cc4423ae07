"""`charforgex lora prune`: without some layers, without directions that are weak beside the file's strongest, or without small entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError
from charforgex.toolbox.common import Opened, Shrinks, as_lora, begun, lineage, progress

if TYPE_CHECKING:
    from charforgex.lora.lowrank import Product
    from charforgex.toolbox.shrinking import Row, Weight

Share = Annotated[float, Range(above=0, below=1)]
WAYS = ("drop", "share", "directions", "magnitude")


@dataclass(frozen=True, kw_only=True)
class Settings(Shrinks):
    """One of four. `drop`: layers by pattern (lora/targets.py). `share`: layers whose norm is below this share of the whole file's.
    `directions`: singular values below this share of the file's largest. `magnitude`: this share of each layer's entries, the smallest
    of the dense product; what is left is stored in as many directions as the layer had, or in `rank`.
    """

    drop: str | list[str] | None = None
    share: Share | None = None
    directions: Share | None = None
    magnitude: Share | None = None
    rank: Annotated[int, Range(at_least=1)] | None = None

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are two ways of pruning; take one after the other" if given else "nothing says what goes"
            raise ConfigError(f"{said}; say one of drop=[...], share=0.01, directions=0.01 and magnitude=0.5.")
        if self.drop is not None and not all([self.drop, *self.drop]):
            raise ConfigError(f"drop={self.drop} names no layer; say drop=[attn2, ff.net.2].")
        if self.rank is not None and self.magnitude is None:
            raise ConfigError("rank has no effect without magnitude; charforgex lora resize is for ranks.")

    @property
    def way(self) -> str:
        return next(name for name in WAYS if getattr(self, name) is not None)

    def told(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*WAYS, "rank") if getattr(self, name) is not None}


def prune(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the pruned LoRA, and tells what is left, and errors without the file's rounding. Raises a CharForgeError.

    Of magnitudes, `refactored_error` is between the product without its small entries and what is stored of it.
    """
    settings = bind(Settings, cfg, "")
    with begun(settings) as opened:
        from charforgex.toolbox import shrinking

        told = {}
        if settings.way in ("drop", "share"):
            get, rows = without_layers(opened, settings)
        else:
            shrinking.check_plain(opened, f"prune {settings.way}=...")
            get, rows, told = changed_layers(opened, settings)
        write = shrinking.layers(opened, get, lineage(opened, "prune", settings.told()))
        told |= shrinking.shrunk(opened, settings, write, rows, settings.functional)
        if "refactored" in told:
            told["refactored_error"] = shrinking.total_error(told.pop("refactored"))
    shrinking.show("prune " + ", ".join(f"{name}={value}" for name, value in settings.told().items()), told, rows)
    return told


def without_layers(opened: Opened, settings: Settings):
    """Layers that stay are what they were, whatever their kind. Raises LoraError for DoRA if norms decide."""
    from charforgex.lora.targets import chosen
    from charforgex.toolbox.shrinking import Row, norm

    file = opened.files[0]
    norms, ranks = {}, {}
    for name in progress(opened.names, "norms"):
        if (layer := file.layer(name)) is not None:
            if layer.kind == "dora" and settings.share is not None:
                path = opened.paths[0]
                raise LoraError(f"{path}: {name} is DoRA, and its norm depends on the base's weights. {as_lora(path)}")
            norms[name], ranks[name] = norm(layer), layer.rank
    if settings.drop is not None:
        gone = set(chosen("drop", [settings.drop] if isinstance(settings.drop, str) else settings.drop, list(norms)))
    else:
        whole = math.hypot(*norms.values())
        gone = {name for name, value in norms.items() if value < settings.share * whole}
    if len(gone) == len(norms):
        raise LoraError(f"{settings.way}={getattr(settings, settings.way)} drops all {len(norms)} layers; nothing would be left.")
    rows = {
        name: Row(ranks[name], 0 if name in gone else ranks[name], value, value if name in gone else 0.0) for name, value in norms.items()
    }
    return lambda name: None if name in gone else file.layer(name), rows


def changed_layers(opened: Opened, settings: Settings):
    from charforgex.toolbox.resizing import cutting, singular_values, unchanged
    from charforgex.toolbox.shrinking import Row, Shrinking, distance

    format = settings.format or opened.format
    if settings.directions is not None:
        values = singular_values(Shrinking(opened, format, unchanged))
        least = settings.directions * max(mine[0] for mine in values.values())
        kept = {names: sum(value >= least for value in mine) for names, mine in values.items()}
        weights = Shrinking(opened, format, cutting(lambda weight, _: kept[weight.names]))
        return weights.get, weights.rows, {}
    refactored: dict[str, Row] = {}

    def change(weight: Weight) -> tuple[Product, float, float]:
        left, changed = without_small(weight.change, settings.magnitude, settings.rank or weight.change.rank)
        lost = float((left.double() - changed.dense().double()).norm())
        refactored[weight.label] = Row(weight.change.rank, changed.rank, float(left.double().norm()), lost)
        return changed, weight.change.norm(), distance(weight.change, changed)

    weights = Shrinking(opened, format, change)
    return weights.get, weights.rows, {"refactored": refactored}


def without_small(found: Product, share: float, rank: int):
    """The dense product with that share of its entries, the smallest, set to zero; and the best product of that rank for it."""
    from charforgex.lora.lowrank import dense_spectrum

    dense = found.dense()
    count = int(share * dense.numel())
    if count:
        least = dense.abs().flatten().kthvalue(count).values
        dense = dense.where(dense.abs() > least, 0.0)
    return dense, dense_spectrum(dense).truncated(rank)
