"""`charforgex lora resize`: fewer directions for each layer, chosen by rank, energy, ratio or error: the best there are of that rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from charforgex.binding import annotation, fit
from charforgex.config import Range, bind
from charforgex.errors import ConfigError
from charforgex.lora.targets import check_patterns
from charforgex.toolbox.common import Opened, Shrinks, begun, lineage

if TYPE_CHECKING:
    from charforgex.lora.lowrank import Product, Spectrum
    from charforgex.toolbox.shrinking import Shrinking, Weight

Positive = Annotated[int, Range(at_least=1)]
Budget = Annotated[float, Range(at_least=0, below=1)]
CRITERIA = ("energy", "ratio", "error", "total_error")


@dataclass(frozen=True, kw_only=True)
class Settings(Shrinks):
    """One criterion; `rank` alone, or as the most that another may keep. `layers`: the criterion's value by pattern (lora/targets.py).

    `energy`, `ratio` and `error` are of each layer, as lowrank's keep_energy, keep_ratio and keep_error have them; `total_error` is of
    the whole file: its smallest singular values go first, whichever layer they are of.
    """

    rank: Positive | None = None
    energy: Annotated[float, Range(above=0, at_most=1)] | None = None
    ratio: Annotated[float, Range(at_least=1)] | None = None
    error: Budget | None = None
    total_error: Budget | None = None
    layers: dict[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in CRITERIA if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both say how much to keep; keep one of them, with rank as the most it may keep.")
        if not given and self.rank is None:
            raise ConfigError("nothing says how much to keep; say rank=8, energy=0.99, ratio=20, error=0.05 or total_error=0.05.")
        if self.layers is not None and self.criterion == "total_error":
            raise ConfigError("layers has no effect with total_error, one budget for the whole file; say error=... instead.")
        for pattern, value in (self.layers or {}).items():
            fit(value, annotation(Settings, self.criterion), f"layers.{pattern}")
        check_patterns("layers", self.layers or {})

    @property
    def criterion(self) -> str:
        return next((name for name in CRITERIA if getattr(self, name) is not None), "rank")

    def told(self) -> dict[str, Any]:
        """What lineage and tables say of the choice."""
        return {name: getattr(self, name) for name in ("rank", *CRITERIA, "layers") if getattr(self, name) is not None}


def resize(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the LoRA with fewer directions, and tells ranks, bytes, and errors without the file's rounding. Raises a CharForgeError."""
    settings = bind(Settings, cfg, "")
    with begun(settings) as opened:
        from charforgex.toolbox import shrinking

        shrinking.check_plain(opened, "resize")
        weights = shrunk_weights(opened, settings)
        write = shrinking.layers(opened, weights.get, lineage(opened, "resize", settings.told()))
        told = shrinking.shrunk(opened, settings, write, weights.rows, settings.functional)
    shrinking.show("resize " + ", ".join(f"{name}={value}" for name, value in settings.told().items()), told, weights.rows)
    return told


def shrunk_weights(opened: Opened, settings: Settings) -> Shrinking:
    """The file's layers, each cut when it is asked for. A budget for the whole file reads all of them once more, first."""
    from charforgex.lora import lowrank, targets
    from charforgex.toolbox.shrinking import Shrinking

    format, names, criterion = settings.format or opened.format, opened.names, settings.criterion
    most = lowrank.keep_rank(settings.rank) if settings.rank is not None else lambda found: found.numerical_rank()
    if criterion == "total_error":
        plan = budget(Shrinking(opened, format, unchanged), settings.total_error)

        def keep(weight: Weight, found: Spectrum) -> int:
            return min(plan[weight.names], most(found))

        return Shrinking(opened, format, cutting(keep))
    values = targets.each("layers", settings.layers, getattr(settings, criterion), names)
    make = {"rank": lambda value: lowrank.keep_rank(int(value)), "energy": lowrank.keep_energy, "ratio": lowrank.keep_ratio}
    make["error"] = lowrank.keep_error

    def keep(weight: Weight, found: Spectrum) -> int:
        chosen = make[criterion](values[weight.names[0]])(found)
        return chosen if criterion == "rank" else max(1, min(chosen, most(found)))

    return Shrinking(opened, format, cutting(keep), values)


def cutting(keep):
    """A change for `Shrinking`: the directions whose number `keep` says; of a layer that has none left, nothing."""
    from charforgex.lora.lowrank import spectrum

    def change(weight: Weight) -> tuple[Product | None, float, float]:
        found = spectrum(weight.change)
        rank, values = keep(weight, found), found.values.double()
        return (found.truncated(rank) if rank else None), float(values.norm()), float(values[rank:].norm())

    return change


def unchanged(weight: Weight) -> tuple[Product, float, float]:
    """What a pass over the weights changes that only looks at them."""
    return weight.change, weight.change.norm(), 0.0


def singular_values(weights: Shrinking) -> dict[tuple[str, ...], Sequence[float]]:
    """Of each weight of the file, descending."""
    from charforgex.lora.lowrank import spectrum

    return {weight.names: spectrum(weight.change).values.tolist() for weight in weights.weights()}


def budget(weights: Shrinking, most: float) -> dict[tuple[str, ...], int]:
    """How many directions each weight keeps if the smallest ones of the file go, until `most` of its norm is spent.

    The error of all layers together is at most that, and no choice of as many directions has a smaller one.
    """
    values = singular_values(weights)
    smallest = sorted((value * value, -place, names) for names, mine in values.items() for place, value in enumerate(mine))
    left = most**2 * sum(square for square, *_ in smallest)
    kept = {names: len(mine) for names, mine in values.items()}
    for square, _, names in smallest:
        left -= square
        if left < 0:
            break
        kept[names] -= 1
    return kept
