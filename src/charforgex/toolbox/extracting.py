"""`charforgex lora extract`: what a fine-tuned checkpoint has learnt, as a LoRA: the best of its rank for the difference of every weight.

Both checkpoints may lie in any layout, each in its own. One module of each is in memory at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.toolbox.common import Dtype, Outputs, counted, progress, say, writing, written

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from charforgex.families.originals import Original
    from charforgex.lora.lowrank import Product, Spectrum
    from charforgex.lora.state import LoraLayer
    from charforgex.toolbox.checkpoints import Part, Weights

RANK = 32  # where nothing says how much to keep
PROBE = 64  # directions that are looked for first where energy or error say how many there must be
CHEAPER = 16  # a side of so many times the wanted directions is where the leading ones are found much faster than all of them
SHOWN = 5  # of layers and tensors in the table
OLD_ATTENTION = re.compile(r"\.(query|key|value|proj_attn)\.")  # of VAEs that old diffusers saved: no way leads from them to single files


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Outputs):
    """conf/lora_extract.yaml. Raises ConfigError for values that contradict each other."""

    base: str
    tuned: str
    rank: Annotated[int, Range(at_least=1)] | None = None
    energy: Annotated[float, Range(above=0, at_most=1)] | None = None
    error: Annotated[float, Range(at_least=0, below=1)] | None = None
    format: str = "kohya"
    dtype: Dtype = "float16"

    def __post_init__(self):
        if self.energy is not None and self.error is not None:
            raise ConfigError("energy and error both say how much to keep; keep one of them, with rank as the most it may keep.")
        if self.base == self.tuned:
            raise ConfigError(f"base and tuned are both {self.base}; tuned is the checkpoint that was made from the base.")

    @property
    def budget(self) -> float | None:
        """The error that is allowed for a layer, None if the rank alone counts."""
        return self.error if self.energy is None else math.sqrt(1 - self.energy)

    @property
    def most(self) -> int | None:
        """Directions of a layer at most."""
        return RANK if self.rank is None and self.budget is None else self.rank


@dataclass(frozen=True)
class Row:
    """What became of one layer. Norms are Frobenius'; `lost` is with the file's rounding. `exact`: from all of its directions."""

    rank: int
    norm: float
    lost: float
    exact: bool

    @property
    def error(self) -> float:
        return self.lost / self.norm


def extract(cfg: DictConfig) -> dict[str, Any]:
    """Writes the LoRA and tells ranks, errors, and what a LoRA cannot hold of the difference. Raises a CharForgeError."""
    settings = bind(ExtractSettings, cfg, "")
    if not settings.dry_run:
        settings.check_out([])

    from charforgex.families.sources import EMBEDDED
    from charforgex.lora.writing import check_format
    from charforgex.toolbox import checkpoints

    if settings.tuned == EMBEDDED:
        base = checkpoints.find(settings.base)
        tuned = checkpoints.find(settings.tuned, like=base.base)
    else:
        tuned = checkpoints.find(settings.tuned)
        base = checkpoints.find(settings.base, like=tuned.base)
    if not settings.dry_run:
        settings.check_out([path for weights in (base, tuned) for path in (weights.path, *(part.path for part in weights.parts))])
    check_format(settings.format, base.base.names)
    extraction = Extraction(base, tuned, settings)
    names = _with_places(extraction, common_modules(base, tuned))
    told = {"out": None, "format": settings.format, "base": base.base.name}
    if settings.dry_run:
        for name in progress(names, "extract"):
            extraction.get(name)
        extraction.check()
    else:
        told |= _write(extraction, names, settings)
    told |= extraction.told() | {"beside": beside(base, tuned)}
    _show(told, extraction.rows)
    return told


def common_modules(base: Weights, tuned: Weights) -> list[str]:
    """The modules that both hold. Raises ModelError unless they are checkpoints of one base."""
    from charforgex.lora.state import some

    if base.base.family != tuned.base.family:
        raise ModelError(f"{base.path} is of {base.base.family} and {tuned.path} of {tuned.base.family}; they have no difference.")
    names = [name for name in base.modules if name in tuned.modules]
    others = [name for name in names if base.shape(name) != tuned.shape(name)]
    if others or not names:
        what = f"have weights of different sizes: {some(others)}" if others else "share no module that a LoRA can change"
        raise ModelError(f"{base.path} ({base.base.name}) and {tuned.path} ({tuned.base.name}) {what}.")
    return names


def _with_places(extraction: Extraction, names: list[str]) -> list[str]:
    """Without modules that have no place in the format and do not differ. Raises LoraError for one that does."""
    from charforgex.lora.writing import check_places

    format, spelled = extraction.settings.format, extraction.base.base.names
    places = spelled.places(format)
    kept = [name for name in progress(names, "compare") if name in places or extraction.difference(name) is not None]
    check_places(kept, format, spelled)
    return kept


class Extraction:
    """The layers, each made when it is asked for; `rows` has what became of those that differ."""

    def __init__(self, base: Weights, tuned: Weights, settings: ExtractSettings):
        self.base, self.tuned, self.settings = base, tuned, settings
        self.rows: dict[str, Row] = {}

    def difference(self, name: str) -> Tensor | None:
        return difference(self.base.modules[name], self.tuned.modules[name])

    def get(self, name: str) -> LoraLayer | None:
        """None for a module that does not differ. Raises ModelError for values that are not finite."""
        import torch

        from charforgex.lora.lowrank import layer_of

        change = self.difference(name)
        if change is None:
            return None
        norm = float(change.norm())
        if not norm:  # too little for squares in float32
            return None
        if not math.isfinite(norm):
            raise ModelError(f"{name} of {self.tuned.path} and {self.base.path} differ by values that are not finite.")
        kept, exact = decomposed(change, self.settings.most, self.settings.budget, name)
        layer = layer_of(kept)
        dtype = getattr(torch, self.settings.dtype)
        lost = float((change - layer.map(lambda x: x.to(dtype).float()).delta().view_as(change)).norm())
        self.rows[name] = Row(layer.rank, norm, lost, exact)
        return layer

    def check(self) -> None:
        """Raises LoraError if nothing differs. Once all layers were asked for."""
        if not self.rows:
            raise LoraError(f"{self.tuned.path} and {self.base.path} hold the same weights in every module that a LoRA can change.")

    def told(self) -> dict[str, Any]:
        rows, whole = self.rows.values(), math.hypot(*(row.norm for row in self.rows.values()))
        worst = max(self.rows, key=lambda name: self.rows[name].error)
        return {
            "layers": len(rows),
            "ranks": sorted({row.rank for row in rows}),
            "error": math.hypot(*(row.lost for row in rows)) / whole,
            "worst_layer": worst,
            "worst_error": self.rows[worst].error,
            "exact": sum(row.exact for row in rows),
            "dry_run": self.settings.dry_run,
        }


def decomposed(change: Tensor, most: int | None, budget: float | None, key: str) -> tuple[Product, bool]:
    """The best product for a dense change: of `most` directions, or as few as lack at most the share `budget` of it, or both.

    Whether all directions were looked at comes with it. The leading ones are, many times as fast, where they are few for the weight's
    size; if they do not settle or do not meet the budget, all are. `key` is of the random start.
    """
    from charforgex.draws import torch_generator
    from charforgex.lora.lowrank import SPARE, dense_spectrum, keep_error, keep_rank, leading_spectrum

    def cut(found: Spectrum) -> Product:
        rank = keep_rank(most)(found) if budget is None else keep_error(budget)(found)
        return found.truncated(rank if most is None else min(rank, most))

    wanted = most or PROBE
    if CHEAPER * (wanted + SPARE) <= min(change.shape[0], change[0].numel()):
        found = leading_spectrum(change, wanted, torch_generator("extract", key))
        kept = None if found is None else cut(found)
        if kept is not None and (budget is None or kept.rank == most or (change - kept.dense()).norm() <= budget * change.norm()):
            return kept, False
    return cut(dense_spectrum(change)), True


def difference(base: tuple[Part, Original], tuned: tuple[Part, Original]) -> Tensor | None:
    """tuned - base in float32. None if they are equal, or are so in the coarser of their dtypes: then one was rounded to the other."""
    one, other = base[0].read(base[1]), tuned[0].read(tuned[1])
    pairs = [(one.to(other.dtype), other), (other.to(one.dtype), one)] if one.dtype != other.dtype else []
    if any((rounded.float() == as_it_is.float()).all() for rounded, as_it_is in pairs):
        return None
    change = other.float() - one.float()
    return change if change.any() else None


# ---- what a LoRA cannot hold ----


def beside(base: Weights, tuned: Weights) -> dict[str, Any]:
    """What differs besides the weights of linear and convolutional modules: norms, biases, embeddings, the VAE, parts that one lacks.

    `change` is the norm of the differences as a share of the base's values.
    """
    pairs, only_base, only_tuned = _pairs(base, tuned)
    differing, squares, whole = [], 0.0, 0.0
    for name in progress(pairs, "the other tensors"):
        one, other = pairs[name]
        if one[0].header.dtypes[one[1].key] == other[0].header.dtypes[other[1].key] and one[0].raw(one[1]) == other[0].raw(other[1]):
            continue
        change = difference(one, other)
        if change is not None:
            differing.append(name)
            squares += float(change.norm()) ** 2
            whole += float(one[0].read(one[1]).float().norm()) ** 2
    return {
        "differing": differing,
        "change": math.sqrt(squares / whole) if whole else 0.0,
        "only_in_base": sorted({*only_base, *(base.modules.keys() - tuned.modules.keys())}),
        "only_in_tuned": sorted({*only_tuned, *(tuned.modules.keys() - base.modules.keys())}),
    }


def _pairs(base: Weights, tuned: Weights) -> tuple[dict[str, tuple], list[str], list[str]]:
    """The other tensors of both, by name, and the names that only one of them has."""
    mine, theirs = base.rest, tuned.rest
    if base.in_our_names != tuned.in_our_names:
        ours, file = (base, tuned) if base.in_our_names else (tuned, base)
        translated = _by_names_of(ours, file)
        mine, theirs = (mine, translated) if base.in_our_names else (translated, theirs)
    pairs = {name: (mine[name], theirs[name]) for name in mine if name in theirs}
    return pairs, [name for name in mine if name not in pairs], [name for name in theirs if name not in pairs]


def _by_names_of(ours: Weights, file: Weights) -> dict[str, tuple[Part, Original]]:
    """The other tensors of a single file by the names that they have in folders, where `ours` has them, else by their own."""
    from charforgex.families.parts import read_config
    from charforgex.lora.inject import TEXT_PREFIX
    from charforgex.toolbox.checkpoints import closest

    (part,) = file.parts
    found, known = {}, set()
    for component, alternatives in ours.sets.items():
        shapes = dict(_translatable(shape for held in alternatives[0] for shape in held.header.shapes.items()))
        config = read_config(ours.path, component) if ours.is_folder else ours.base.config
        places = closest(ours.base, component, shapes, part.header, config)
        for key, place in places.items():
            name = f"{component}.{key.removeprefix(TEXT_PREFIX)}"
            known.add(place.key)
            if name in ours.rest:
                found[name] = part, place
    return found | {name: at for name, at in file.rest.items() if at[1].key not in known}


def _translatable(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    from charforgex.families.single_file import IGNORED_ENDS

    return ((key, shape) for key, shape in shapes if not key.endswith(IGNORED_ENDS) and not OLD_ATTENTION.search(key))


# ---- the file ----


def _write(extraction: Extraction, names: list[str], settings: ExtractSettings) -> dict[str, Any]:
    import torch

    from charforgex.lora.metadata import hashes
    from charforgex.lora.writing import write_layers

    base, out = extraction.base, settings.out
    metadata = _metadata(extraction, settings)
    try:
        with writing(out), counted(extraction.get, names, "extract") as get:
            write_layers(get, names, out, settings.format, base.base.names, getattr(torch, settings.dtype), metadata)
    except LoraError:
        extraction.check()  # says it of checkpoints
        raise
    return {"out": str(out), "bytes": out.stat().st_size, **hashes(out)}


def _metadata(extraction: Extraction, settings: ExtractSettings) -> dict[str, str]:
    base, tuned = extraction.base, extraction.tuned
    chosen = {name: value for name in ("rank", "energy", "error") if (value := getattr(settings, name)) is not None}
    lineage = {
        "method": "extract", "settings": chosen or {"rank": RANK}, "version": version("charforgex"),
        "parents": [{"name": weights.path.name, "sha256": weights.sha256()} for weights in (base, tuned)],
    }  # fmt: skip
    return {
        **base.base.spelling.lora_labels,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": settings.out.stem,
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": base.path.name,
        "charforgex.family": base.base.family,
        "charforgex.base": base.base.name,
        "charforgex.lineage": json.dumps(lineage, sort_keys=True, ensure_ascii=False),
    }


def _show(told: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from charforgex.lora.state import some

    table = Table(title="extract", show_header=False)
    table.add_column(overflow="fold")
    table.add_column()
    table.add_row("layers", f"{told['layers']}, {told['exact']} of them from all their directions")
    table.add_row("ranks", ", ".join(map(str, told["ranks"][:SHOWN])) + (" ..." if len(told["ranks"]) > SHOWN else ""))
    table.add_row("relative error, all layers", f"{told['error']:.3g}")
    for name in sorted(rows, key=lambda name: -rows[name].error)[:SHOWN]:
        table.add_row(name, f"rank {rows[name].rank}, error {rows[name].error:.3g}")
    console = Console(stderr=True)
    console.print(table)
    found = told["beside"]
    lines = []
    if found["differing"]:
        lines.append(
            f"{len(found['differing'])} tensors differ, by {found['change']:.2%}, that no LoRA can hold: {some(found['differing'])}."
        )
    lines += [f"Only {side} has {some(names)}." for side in ("base", "tuned") if (names := found[f"only_in_{side}"])]
    say(console, *lines, written(told))
