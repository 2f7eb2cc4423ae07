"""`charforgex lora decompose`: an adapter as directions, each layer's singular vectors in order of strength, and the chosen ones alone.

A layer's change is the sum of its directions, each a change of rank 1, no two of which overlap: what is exported is exactly those that
are chosen, and the chosen ones and the others add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import ConfigError, LoraError
from charforgex.runs import write_json
from charforgex.toolbox.common import Inputs, Opened, Outputs, as_lora, counted, lineage, opened_loras, progress, save, say, written

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from charforgex.lora.lowrank import Spectrum
    from charforgex.lora.state import LoraLayer

SHOWN = 20  # directions in the table


@dataclass(frozen=True, kw_only=True)
class DecomposeSettings(Inputs, Outputs):
    """conf/lora_decompose.yaml. Raises ConfigError for values that need each other."""

    keep: int | list[int] | str | None = None
    layers: list[str] | None = None

    def __post_init__(self):
        self.the_path()
        chooser(self.keep)
        if self.out is None:
            self.check_unused()
            if self.keep is not None:
                raise ConfigError(f"keep={self.keep} chooses what is written, and out is not set; say out=<file.safetensors>.")
        elif self.keep is None:
            raise ConfigError(f"out={self.out} needs to know which directions of each layer it shall hold; say keep=[0,1] or keep=0-3.")


def decompose(cfg: DictConfig) -> dict[str, Any]:
    """Tells the directions, and writes the chosen ones if `out` is set. Returns what `<out>.json` says. Raises a CharForgeError."""
    from rich.console import Console

    settings = bind(DecomposeSettings, cfg, "")
    wanted = chooser(settings.keep)
    if settings.out is not None:
        settings.check_out(settings.paths)
    with opened_loras(settings) as opened:
        settings.check_format(opened)
        names = layers_of(opened, settings.layers)
        spectra = {}
        for name in progress(names, "layers"):
            found = spectrum(opened, name)
            spectra[name] = [] if found is None else found.values.tolist()
        told = directions(spectra, wanted)
        result = {"lora": str(opened.paths[0]), "base": opened.base.name, **told}
        if settings.out is not None:
            if not told["kept"]:
                raise ConfigError(f"keep={settings.keep} chooses none of the directions of any layer; they have up to {told['most']}.")
            if not settings.dry_run:
                chosen = [name for name in names if wanted(len(spectra[name]))]
                meta = lineage(opened, "decompose", {"keep": settings.keep, "layers": settings.layers})

                def get(name: str) -> LoraLayer:
                    return picked(spectrum(opened, name), wanted(len(spectra[name])))

                with counted(get, chosen) as counting:
                    result |= save(opened, settings, counting, chosen, meta)
                write_json(f"{settings.out}.json", result)
    show(result, settings, Console())
    return result


Wanted = Callable[[int], list[int]]


def chooser(keep: int | Sequence[int] | str | None) -> Wanted:
    """Of a number of directions the indices of those that are wanted: 2, [0, 2], "2-5" (both ends count), "4-". Raises ConfigError."""
    if keep is None:
        return lambda count: list(range(count))
    if isinstance(keep, str):
        first, dash, last = (part.strip() for part in keep.partition("-"))
        if not (dash and first.isdecimal() and (last.isdecimal() or not last)):
            raise ConfigError(f"keep={keep} is no range; write keep=0-3, keep=4- for all from the fifth on, or a list: keep=[0,1].")
        if last and int(last) < int(first):
            raise ConfigError(f"keep={keep} ends before it begins.")
        return lambda count: list(range(int(first), min(count, int(last) + 1) if last else count))
    keep = [keep] if isinstance(keep, int) else keep
    if not keep or min(keep) < 0 or len(set(keep)) != len(keep):
        raise ConfigError(f"keep={list(keep)}: each direction is counted from 0, the strongest, and named once.")
    return lambda count: [index for index in sorted(keep) if index < count]


def layers_of(opened: Opened, patterns: Sequence[str] | None) -> list[str]:
    """The layers that any of the patterns fits, all without. Raises LoraError for a pattern that fits none."""
    from charforgex.lora.targets import chosen

    return opened.names if patterns is None else chosen("layers", patterns, opened.names)


def spectrum(opened: Opened, name: str) -> Spectrum | None:
    """Of a layer of the first file, None where it has none. Raises LoraError for DoRA, and for values that are not finite."""
    from charforgex.toolbox.spectra import spectrum_of

    layer = opened.files[0].layer(name)
    if layer is None:
        return None
    if not layer.is_finite:
        raise LoraError(f"{opened.paths[0]}: the layer {name} holds values that are not finite.")
    if layer.kind == "dora":
        raise LoraError(f"{opened.paths[0]}: {name} is DoRA, whose directions depend on the base's weights. {as_lora(opened.paths[0])}")
    return spectrum_of(layer, opened.base.shapes.get(name))


def picked(found: Spectrum, indices: Sequence[int]) -> LoraLayer:
    """Some of the directions as a layer, the strength of each shared evenly by both of its factors."""
    from charforgex.lora.lowrank import Product, layer_of

    root = found.values[list(indices)].sqrt()
    return layer_of(Product(found.left[:, list(indices)] * root, root[:, None] * found.right[list(indices)], found.shape))


def directions(spectra: Mapping[str, Sequence[float]], wanted: Wanted) -> dict[str, Any]:
    """All directions of all layers, the strongest first, with their shares in the energy of these layers, and what is kept of it."""
    total = sum(value**2 for values in spectra.values() for value in values)
    rows = [
        {"layer": name, "index": index, "value": value, "share": value**2 / total, "kept": index in kept}
        for name, values in spectra.items()
        for kept in [set(wanted(len(values)))]
        for index, value in enumerate(values)
    ]
    rows.sort(key=lambda row: -row["value"])
    return {
        "directions": rows, "kept": sum(row["kept"] for row in rows), "most": max(map(len, spectra.values()), default=0),
        "energy": sum(row["share"] for row in rows if row["kept"]),
    }  # fmt: skip


def show(result: Mapping[str, Any], settings: DecomposeSettings, console: Console) -> None:
    from rich.table import Table

    rows, chosen = result["directions"], settings.keep is not None
    table = Table(title=f"The strongest of {len(rows)} directions, for {result['base']}")
    for head in ("layer", "index", "value", "energy", *(["kept"] if chosen else [])):
        table.add_column(head, justify="left" if head in ("layer", "kept") else "right", overflow="fold")
    for row in rows[:SHOWN]:
        kept = [("yes" if row["kept"] else "")] if chosen else []
        table.add_row(row["layer"], str(row["index"]), f"{row['value']:.4g}", f"{100 * row['share']:.2g} %", *kept)
    console.print(table)
    if chosen:
        say(console, f"{result['kept']} of {len(rows)} directions kept, {100 * result['energy']:.1f} % of the energy.", written(result))
