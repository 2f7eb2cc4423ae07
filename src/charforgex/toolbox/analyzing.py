"""`charforgex lora analyze`: what adapters change, where and by how much, and how far several of them get in each other's way.

Everything is measured on the changes of weights, never on the factors, which are not unique. One layer of each file is in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import ConfigError, LoraError
from charforgex.runs import write_json
from charforgex.toolbox.common import Inputs, check_place, opened_loras, writing
from charforgex.toolbox.places import in_order, place_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from charforgex.lora.lowrank import Spectrum
    from charforgex.toolbox.common import Opened

DIGITS = 6  # of a number in analysis.json: more would be rounding
REPORT, PICTURES, NUMBERS = "report.html", "analysis.png", "analysis.json"
GROUPS = ("component", "block", "kind")


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings:
    """conf/lora_analyze.yaml."""

    lora: str | list[str]
    base: str | None = None
    out: Path | None = None


def analyze(cfg: DictConfig) -> dict[str, Any]:
    """Writes report.html, analysis.png and analysis.json into `out`, and returns the last one's content. Raises a CharForgeError."""
    from rich.console import Console

    from charforgex.toolbox.analysis_page import draw, summary, write_page

    settings = bind(AnalyzeSettings, cfg, "")
    inputs, source = inputs_of(settings.lora, settings.base)
    out = settings.out or inputs.paths[0].with_suffix(".analysis")
    check_folder(out)
    with opened_loras(inputs) as opened:
        analysis = measure(opened, source)
    with writing(out):
        write_json(out / NUMBERS, analysis)
        draw(analysis, out / PICTURES)
        write_page(analysis, out / PICTURES, out / REPORT)
    summary(analysis, out / REPORT, Console())
    return analysis


def inputs_of(lora: str | list[str], base: str | None) -> tuple[Inputs, str | None]:
    """The files, and where the base's weights are: `base` is either a listed base's name or the address of one."""
    from charforgex.families import bases

    return (Inputs(lora=lora, base=base), None) if base in bases.names() else (Inputs(lora=lora), base)


def check_folder(out: Path) -> None:
    """Raises ConfigError for a folder with anything but an earlier report, and for one that cannot be made."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / NUMBERS).is_file()):
        raise ConfigError(f"out={out} holds other files; name another folder.")
    check_place(out)


def measure(opened: Opened, source: str | None = None) -> dict[str, Any]:
    """All numbers. With `source`, the base's weights, also what share of them the changes are. Raises LoraError, ModelError."""
    import torch

    from charforgex.toolbox.checkpoints import reader
    from charforgex.toolbox.common import progress
    from charforgex.toolbox.spectra import norm, spectrum_of

    names = opened.names
    files: list[dict[str, dict]] = [{} for _ in opened.files]
    pairs: dict[tuple[int, int], dict[str, dict]] = {pair: {} for pair in combinations(range(len(files)), 2)}
    read = reader(opened.base, "base", source, names) if source else None
    weights = {}
    for name in progress(names, "layers"):
        weight = read(name) if read else None
        if weight is not None:
            weights[name] = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        found: dict[int, Spectrum] = {}
        for index, file in enumerate(opened.files):
            layer = file.layer(name)
            if layer is None:
                continue
            if not layer.is_finite:
                raise LoraError(f"{opened.paths[index]}: the layer {name} holds values that are not finite.")
            try:
                found[index] = spectrum_of(layer, opened.base.shapes.get(name), weight)
            except LoraError as error:
                raise LoraError(f"{opened.paths[index]}: {name}: {error}") from error
            files[index][name] = _layer(layer, found[index], weights.get(name))
        for pair, rows in pairs.items():
            if all(index in found and norm(found[index].values) for index in pair):
                rows[name] = _pair(*(found[index] for index in pair))
    told = [_file(path, rows, weights) for path, rows in zip(opened.paths, files, strict=True)]
    for row, name in zip(told, distinct(opened.paths), strict=True):
        row["name"] = name
    both = [_compared(told[one], told[other], rows) for (one, other), rows in pairs.items()]
    return _rounded({"base": opened.base.name, "weights": source, "files": told, "pairs": both})


def distinct(paths: list[Path]) -> list[str]:
    """A name for each file: its own, with its folder's where several share it, as those of training runs do."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    folders = [f"{path.absolute().parent.name}/{path.stem}" for path in paths]
    return folders if len(set(folders)) == len(folders) else [str(path) for path in paths]


# ---- one file ----


def _layer(layer, found: Spectrum, weight_norm: float | None) -> dict[str, Any]:
    from charforgex.toolbox.spectra import effective_rank, norm, stable_rank

    size = norm(found.values)
    told = {
        "kind": layer.kind, "rank": layer.rank, "numerical_rank": len(found.values), "effective_rank": effective_rank(found.values),
        "stable_rank": stable_rank(found.values), "norm": size, "values": found.values.tolist(),
    }  # fmt: skip
    return told | ({} if weight_norm is None else {"share": size / weight_norm if weight_norm else None})


def _file(path: Path, layers: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, Any]:
    total = sum(row["norm"] ** 2 for row in layers.values())
    groups = {group: _grouped(group, layers, weights, total) for group in GROUPS}
    heat: dict[str, dict[str, float]] = defaultdict(dict)
    for name, row in layers.items():
        place = place_of(name)
        block = f"{place.component}.{place.block}"
        heat[block][place.kind] = heat[block].get(place.kind, 0.0) + (row["norm"] ** 2 / total if total else 0.0)
    return {
        "path": str(path),
        "norm": total**0.5,
        **groups,
        "heat": {block: heat[block] for block in in_order(heat)},
        "layers": dict(layers),
    }


def _grouped(group: str, layers: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], total: float) -> dict[str, Any]:
    """By component, block or kind: layers, their share of all energy, mean ranks, and the norm's share of the base's."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        place = place_of(name)
        key = {"component": place.component, "block": f"{place.component}.{place.block}", "kind": place.kind}[group]
        members[key].append(name)
    told = {}
    for key, names in ((key, members[key]) for key in (in_order(members) if group == "block" else members)):
        energy = sum(layers[name]["norm"] ** 2 for name in names)
        told[key] = {
            "layers": len(names), "norm": energy**0.5, "energy": energy / total if total else 0.0,
            "effective_rank": _mean(layers[name]["effective_rank"] for name in names),
            "stable_rank": _mean(layers[name]["stable_rank"] for name in names),
        }  # fmt: skip
        if weights:
            whole = sum(weights[name] ** 2 for name in names)
            told[key]["share"] = (energy / whole) ** 0.5 if whole else None
    return told


# ---- two files ----


def _pair(one: Spectrum, other: Spectrum) -> dict[str, Any]:
    from charforgex.toolbox.spectra import inner, norm, overlap, principal_angles

    columns, rows = principal_angles(one.left, other.left), principal_angles(one.right.T, other.right.T)
    return {
        "inner": inner(one, other), "norms": [norm(one.values), norm(other.values)],
        "column_angles": columns.tolist(), "row_angles": rows.tolist(),
        "second_in_first": overlap(one, other), "first_in_second": overlap(other, one),
    }  # fmt: skip


def _compared(one: Mapping[str, Any], other: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The cosine of the whole changes, a layer that one file lacks being zero there, and the overlap of the layers that both have."""
    blocks: dict[str, dict[str, Mapping]] = defaultdict(dict)
    for name, row in layers.items():
        place = place_of(name)
        blocks[f"{place.component}.{place.block}"][name] = row
    norms = one["norm"] * other["norm"]
    dots = sum(row["inner"] for row in layers.values())
    return {
        "first": one["name"], "second": other["name"], "common_layers": len(layers), "cosine": dots / norms if norms else 0.0,
        **_overlaps(layers.values()),
        "blocks": {
            block: {"cosine": _cosine(one["block"][block]["norm"] * other["block"][block]["norm"], rows), **_overlaps(rows.values())}
            for block, rows in ((block, blocks[block]) for block in in_order(blocks))
        },
        "layers": {name: row | {"cosine": row["inner"] / (row["norms"][0] * row["norms"][1])} for name, row in layers.items()},
    }  # fmt: skip


def _cosine(norms: float, rows: Mapping[str, Mapping[str, Any]]) -> float:
    return sum(row["inner"] for row in rows.values()) / norms


def _overlaps(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over layers, each weighed by the energy whose share is told."""
    rows, told = list(rows), {}
    for key, whose in (("second_in_first", 1), ("first_in_second", 0)):
        energy = sum(row["norms"][whose] ** 2 for row in rows)
        if energy:
            names = rows[0][key]
            told[key] = {name: sum(row["norms"][whose] ** 2 * row[key][name] for row in rows) / energy for name in names}
    return told


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
