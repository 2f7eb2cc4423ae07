"""`charforgex lora ablate`: which of its parts make the character. Each is left out in turn, and what is then drawn is measured.

Layer importance by ablation: what a part does when all others are there. Parts that stand in for each other all look unimportant; to drop
several, look at a file without all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.config import Range, bind, compose
from charforgex.errors import ConfigError, LoraError
from charforgex.overrides import as_overrides
from charforgex.runs import write_json
from charforgex.toolbox.common import Inputs, Opened, Outputs, check_place, lineage, opened_loras, save, say, writing
from charforgex.toolbox.places import in_order, place_of

NUMBERS, EVALUATION = "importance.json", "evaluation"


@dataclass(frozen=True, kw_only=True)
class AblateSettings:
    """conf/lora_ablate.yaml."""

    lora: str
    out: Path | None = None
    by: Literal["block", "component", "kind"] = "block"
    base: str | None = None
    references: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["identity", "attributes", "leakage"])
    packs: list[str] = field(default_factory=lambda: ["character", "leakage"])
    count: Annotated[int, Range(at_least=1)] = 2
    cache_dir: Path = Path("runs/cache")
    overwrite: bool = False
    dry_run: bool = False


def ablate(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns importance.json's content: {"parts": {part: {"layers", metric: {"lost", "low", "high", "verdict"}}}, "page": ...}.

    `lost` is the whole LoRA's number less that of the LoRA without the part, on the same prompts and seeds. Raises a CharForgeError.
    """
    from rich.console import Console

    from charforgex.evaluation.run import run

    settings, console = bind(AblateSettings, cfg, ""), Console()
    source = Path(settings.lora).expanduser()
    out = settings.out or source.with_suffix(".ablation")
    if not settings.overwrite and (out / NUMBERS).exists():
        raise ConfigError(f"out={out} holds an earlier ablation; choose another folder, or say overwrite=true.")
    check_place(out)
    with opened_loras(Inputs(lora=settings.lora)) as opened:
        parts = parts_of(opened.names, settings.by)
        if len(parts) < 2:
            raise LoraError(f"{source} has layers in one {settings.by} alone, {next(iter(parts))}; say by=kind, or by=block.")
        asked = evaluation(settings, source, out, {part: out / f"without-{part}.safetensors" for part in parts})
        config = compose("evaluate", asked)  # before a file is written: a metric or pack that is none
        if settings.dry_run:
            say(console, *(f"{part}: {len(names)} layers" for part, names in parts.items()), "Nothing is drawn: dry_run=true.")
            return {"parts": {part: {"layers": len(names)} for part, names in parts.items()}, "page": None}
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        for part, names in parts.items():
            write_without(opened, names, part, out / f"without-{part}.safetensors")
    told = importance(run(config), source.stem, parts)
    write_json(out / NUMBERS, told)
    show(told, console)
    return told


def parts_of(names: list[str], by: str) -> dict[str, list[str]]:
    """What is left out in turn: a part's name and its layers, in the order in which the networks run them."""
    found: dict[str, list[str]] = {}
    for name in names:
        place = place_of(name)
        part = {"component": place.component, "kind": place.kind, "block": f"{place.component}.{place.block}"}[by]
        found.setdefault(part, []).append(name)
    order = in_order(found) if by == "block" else sorted(found)
    return {part: found[part] for part in order}


def write_without(opened: Opened, gone: list[str], part: str, out: Path) -> None:
    file, without = opened.files[0], set(gone)
    names = [name for name in opened.names if name not in without]
    metadata = lineage(opened, "ablate", {"without": part})
    save(opened, Outputs(out=out, overwrite=True), file.layer, names, metadata)


def evaluation(settings: AblateSettings, source: Path, out: Path, files: Mapping[str, Path]) -> list[str]:
    """The overrides of evaluate.yaml: the whole LoRA and each that lacks a part are the contestants."""
    return as_overrides(
        {
            "lora": [str(source), *map(str, files.values())], "base": settings.base, "references": settings.references,
            "metric": settings.metrics, "pack": settings.packs, "count": settings.count, "cache_dir": str(settings.cache_dir),
            "out": str(out / EVALUATION), "overwrite": True,
        }
    )  # fmt: skip


def importance(result: Mapping[str, Any], whole: str, parts: Mapping[str, list[str]]) -> dict[str, Any]:
    """From an evaluation's paired comparisons of the whole with each that lacks a part."""
    rows = {(row["metric"], row["a"], row["b"]): row for row in (result["comparison"] or {"rows": []})["rows"]}
    found: dict[str, dict[str, Any]] = {}
    for part, names in parts.items():
        found[part] = {"layers": len(names)}
        for metric, told in result["metrics"].items():
            other = f"without-{part}"
            row, sign = rows.get((metric, whole, other)), 1.0
            if row is None:
                row, sign = rows.get((metric, other, whole)), -1.0
            if row is not None and (apart := row.get("difference")):
                low, high = sorted(sign * apart[end] for end in ("low", "high"))
                found[part][metric] = {"lost": sign * apart["estimate"], "low": low, "high": high, "verdict": row["verdict"]}
            else:
                values = [told["values"][name].get("estimate") for name in (whole, other)]
                if None not in values:  # a number of whole sets, of which there is no pair
                    found[part][metric] = {"lost": values[0] - values[1], "low": None, "high": None, "verdict": None}
    values = {metric: told["values"][whole].get("estimate") for metric, told in result["metrics"].items()}
    return {"parts": found, "whole": values, "page": result["page"]}


def show(told: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table

    metrics = list(told["whole"])
    table = Table(title="What is lost without it, and the 95 % interval", title_justify="left")
    table.add_column("part", overflow="fold")
    for name in ("layers", *metrics):
        table.add_column(name, justify="right")
    first = metrics[0]
    for part, row in sorted(told["parts"].items(), key=lambda item: -item[1].get(first, {"lost": 0})["lost"]):
        cells = [_cell(row.get(metric)) for metric in metrics]
        table.add_row(part, str(row["layers"]), *cells)
    console.print(table)
    say(console, f"Of the whole: {', '.join(f'{name} {value:.3f}' for name, value in told['whole'].items() if value is not None)}.")
    say(console, f"Pictures and all numbers: {told['page']}")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})"
    return f"{row['lost']:+.3f}{interval}"
