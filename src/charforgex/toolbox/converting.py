"""`charforgex lora convert`: a LoRA file in another format or dtype, and DoRA, LoHa and LoKr as plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError
from charforgex.families import registry
from charforgex.toolbox.common import Inputs, Opened, Outputs, counted, lineage, opened_loras, save, say, written

if TYPE_CHECKING:
    from charforgex.lora.lowrank import Keep
    from charforgex.lora.state import LoraLayer
    from charforgex.toolbox.shrinking import Row

LYCORIS_KEYS = ("ss_network_module", "ss_network_args")  # what the header says of a kind that the file no longer has


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs, Outputs):
    part: Literal["spatial", "temporal"] | None = None
    kind: Literal["lora"] | None = None
    rank: Annotated[int, Range(at_least=1)] | None = None
    error: Annotated[float, Range(at_least=0, below=1)] | None = None
    base_weights: str | None = None

    def __post_init__(self):
        self.the_path()
        given = [name for name in ("rank", "error", "base_weights") if getattr(self, name) is not None]
        if given and self.kind is None:
            raise ConfigError(f"{' and '.join(given)} have an effect with kind=lora alone; add it, or say charforgex lora resize.")


def convert(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the file anew, one layer at a time, and tells what became of it. Raises a CharForgeError."""
    settings = bind(Settings, cfg, "")
    if not settings.dry_run:
        settings.check_out(settings.paths)
    with opened_loras(settings) as opened, settings.place() as place:
        _check(opened, settings)
        turned: dict[str, Row] = {}  # of the layers that were no plain LoRA
        get, names = opened.files[0].layer if settings.kind is None else _Plain(opened, settings, turned).layer, _names(opened, settings)
        with counted(get, names) as counting:
            told = save(opened, place, counting, names, _metadata(opened, settings))
        told |= {"out": None} if settings.dry_run else {}
        told |= {"format_before": opened.format, "kinds_before": sorted(set(opened.files[0].kinds().values())),
                 "converted": len(turned), **_error(turned), "dry_run": settings.dry_run}  # fmt: skip
    _show(settings, told, turned)
    return told


def _names(opened: Opened, settings: Settings) -> list[str]:
    """Of the layers, without those of the other part, or of a joined weight that are unchanged and have no place in the new format."""
    from charforgex.lora.identify import half_of

    places = opened.base.names.places(settings.format or opened.format)
    names = [name for name in opened.names if settings.part in (None, half_of(name))]
    return [name for name in names if name in places or opened.files[0].layer(name) is not None]


def _metadata(opened: Opened, settings: Settings) -> dict[str, str]:
    asked = ("format", "dtype", "part", "kind", "rank", "error")
    given = {name: getattr(settings, name) for name in asked if getattr(settings, name) is not None}
    found = lineage(opened, "convert", given)
    if settings.part is not None:  # the spatial part is a LoRA of the base without motion modules
        both = opened.base.spelling
        family = registry.spelling(both.pictures) if settings.part == "spatial" else both
        found = {key: value for key, value in found.items() if key not in both.lora_labels}
        found |= {**family.lora_labels, "charforgex.family": family.name}
    if settings.kind is not None:
        found = {key: value for key, value in found.items() if key not in LYCORIS_KEYS} | {"ss_network_module": "networks.lora"}
    return found


def _check(opened: Opened, settings: Settings) -> None:
    """Everything that can be known before a layer is read."""
    from charforgex.lora import lycoris
    from charforgex.lora.identify import half_of
    from charforgex.lora.state import some
    from charforgex.lora.writing import check_format

    format, kinds = settings.format or opened.format, opened.files[0].kinds()
    check_format(format, opened.base.names)
    _check_parts(opened, settings, format)
    kinds = {name: kind for name, kind in kinds.items() if settings.part in (None, half_of(name))}
    others = {name: kind for name, kind in kinds.items() if kind != "lora"}
    doras = [name for name, kind in others.items() if kind == "dora"]
    path = opened.paths[0]
    if settings.kind is None:
        try:
            lycoris.check_kinds(kinds.values(), format)
        except LoraError as error:
            raise LoraError(f"{path}: {error} Or say kind=lora.") from error
        return
    if not others:
        given = [f"{name}={value}" for name in ("rank", "error", "base_weights") if (value := getattr(settings, name)) is not None]
        if given:
            raise LoraError(f"{path} is plain LoRA already, so {' and '.join(given)} would have no effect; say charforgex lora resize.")
    if settings.base_weights is not None and not doras and others:
        raise LoraError(f"{path} holds no DoRA, so base_weights={settings.base_weights} has no effect.")
    if doras and settings.base_weights is None:
        raise LoraError(
            f"{path}: {len(doras)} layers are DoRA, which changes a weight in proportion to it: {some(doras)}. "
            "Say base_weights=<diffusers folder or .safetensors of the base that it was trained on>."
        )
    if doras and settings.rank is None and settings.error is None:
        raise LoraError(f"{path}: what DoRA changes has as many directions as the weight; say rank=64 or error=0.1.")


def _check_parts(opened: Opened, settings: Settings, format: str) -> None:
    """Raises LoraError for a part that is not there or is all there is, and where the format holds one part of two."""
    from charforgex.lora.identify import half_of

    path, parts = opened.paths[0], {half_of(name) for name in opened.names}
    if settings.part is None:
        if len(parts) > 1 and format in ("animatediff", "kohya", "comfyui"):
            part, other = ("temporal", "spatial") if format == "animatediff" else ("spatial", "temporal")
            raise LoraError(
                f"{path} has layers of motion modules and of the picture's base, and the format {format} holds the {part} ones alone; "
                f"say part={part}, and convert part={other} to a file of its own: format={'kohya' if other == 'spatial' else 'animatediff'}"
            )
    elif parts == {settings.part}:
        raise LoraError(f"{path} has {settings.part} layers alone, so part={settings.part} would have no effect; leave it out.")
    elif settings.part not in parts:
        raise LoraError(f"{path} has no {settings.part} layers, so nothing would be left; leave part={settings.part} out.")


class _Plain:
    """The file's layers, each as LoRA. `rows` has what became of those that were none, once they were asked for."""

    def __init__(self, opened: Opened, settings: Settings, rows: dict[str, Row]):
        from charforgex.lora import lowrank
        from charforgex.toolbox import checkpoints

        self.opened, self.rows = opened, rows
        limits: list[Keep] = [] if settings.rank is None else [lowrank.keep_rank(settings.rank)]
        limits += [] if settings.error is None else [lowrank.keep_error(settings.error)]
        self.keep: Keep | None = (lambda found: min(limit(found) for limit in limits)) if limits else None
        doras = [name for name, kind in opened.files[0].kinds().items() if kind == "dora"]
        self.weight = checkpoints.reader(opened.base, "base_weights", settings.base_weights, doras) if doras else None

    def layer(self, name: str) -> LoraLayer | None:
        from charforgex.lora.lowrank import layer_of
        from charforgex.toolbox.shrinking import Row
        from charforgex.toolbox.spectra import norm, spectrum_of

        layer = self.opened.files[0].layer(name)
        if layer is None or layer.kind == "lora":
            return layer
        shape = self.opened.base.shapes.get(name, layer.weight_shape)
        found = spectrum_of(layer, shape, self.weight(name) if layer.kind == "dora" else None)
        rank = max(1, len(found.values) if self.keep is None else self.keep(found))
        if self.keep is None and rank * (shape[0] + math.prod(shape[1:])) >= math.prod(shape):
            raise LoraError(
                f"{name} of {self.opened.paths[0]} has {rank} directions, so that as LoRA it would be larger than the weight "
                f"{shape} itself; say rank=64 or error=0.1 for the best of fewer."
            )
        whole = norm(found.values)
        self.rows[name] = Row(layer.rank, rank, whole, found.error(rank) * whole)
        return layer_of(found.truncated(rank))


def _error(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What the conversion lost of what it converted, and the layer that lost most."""
    from charforgex.toolbox.shrinking import total_error

    worst = max(rows, key=lambda name: rows[name].error, default=None)
    return {"error": total_error(rows), "worst_layer": worst, "worst_error": rows[worst].error if worst else 0.0}


def _show(settings: Settings, told: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from charforgex.toolbox.shrinking import span

    table = Table("", "before", "after", title=Text(f"convert {settings.the_path().name}"))
    table.add_row("format", told["format_before"], settings.format or told["format_before"])
    table.add_row("kinds", ", ".join(told["kinds_before"]), "lora" if settings.kind else ", ".join(told["kinds_before"]))
    table.add_row("layers", "", str(told["layers"]))
    table.add_row("ranks", "", span(told["ranks"]))
    table.add_row("bytes", f"{told['bytes_before']:,}", f"{told['bytes']:,}")
    if rows:
        table.add_row("relative error", "", f"{told['error']:.3g}; most {told['worst_error']:.3g}, {told['worst_layer']}")
    console = Console()
    console.print(table)
    say(console, written(told))
