"""`charforgex merge`: several LoRAs of any format to one, without a base model. `merge(cfg)` is the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import ConfigError, LoraError

if TYPE_CHECKING:
    from charforgex.merging.settings import Method, Selection, Size
    from charforgex.toolbox.common import Opened, Outputs

SELECTION = ("weights", "blocks", "block_weights", "gradient")
SIZE = ("rank", "energy", "error")
OUTPUTS = ("out", "format", "dtype", "overwrite", "dry_run")
AROUND = 1.02  # a file's size over its factors': names and the header


def merge(cfg: Any) -> dict[str, Any]:
    """Merges the files that merge.yaml's settings name, and returns what was made: `out`, `layers`, `ranks`, `bytes`, `error` (what was cut
    to reach the rank, as a share of the whole), `weights` of the files, `blocks`, each with its weights, ranks and error. Raises a
    CharForgeError before anything is read if the settings contradict each other.
    """
    from rich.console import Console

    from charforgex.merging import report
    from charforgex.merging.settings import Selection, Size, bind_method
    from charforgex.toolbox.common import Inputs, Outputs, opened_loras

    inputs = bind(Inputs, {name: cfg[name] for name in ("lora", "base")}, "")
    outputs = bind(Outputs, {name: cfg[name] for name in OUTPUTS}, "")
    selection = bind(Selection, {name: cfg[name] for name in SELECTION}, "")
    size, method = bind(Size, {name: cfg[name] for name in SIZE}, ""), bind_method(cfg.method)
    size.check(method)
    weights = selection.file_weights(method, len(inputs.paths))
    selection.of_file(len(inputs.paths))
    shaping = {
        "method": asdict(method.options),
        "weights": weights,
        **asdict(size),
        **{k: v for k, v in asdict(selection).items() if k != "weights"},
    }
    outputs = named(outputs, inputs.paths, method, shaping)
    outputs.check_out(inputs.paths)
    with opened_loras(inputs) as opened:
        result = _merged(opened, outputs, selection, size, method, weights, shaping)
    report.show(Console(), result, [path.stem for path in inputs.paths])
    return result


def named(outputs: Outputs, paths: list[Path], method: Method, shaping: Mapping[str, Any]) -> Outputs:
    """With a file in `out`: a name made from the settings where none is given, or a folder, and added to the given one in a sweep, whose
    jobs would replace each other's files."""
    from dataclasses import replace

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from charforgex.merging.settings import FOLDER, own_name

    told = {**shaping, "base": None, "format": outputs.format, "dtype": outputs.dtype}
    own = own_name(paths, method, told)
    if outputs.out is None or (outputs.out.suffix == "" and not outputs.out.is_file()):
        return replace(outputs, out=(outputs.out or FOLDER) / f"{own}.safetensors")
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return replace(outputs, out=outputs.out.with_name(f"{outputs.out.stem}_{own.rpartition('_')[2]}{outputs.out.suffix}"))
    return outputs


def _merged(
    opened: Opened, outputs: Outputs, selection: Selection, size: Size, method: Method, weights: list[float], shaping: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    from charforgex.merging import blocks, report
    from charforgex.merging.merger import Merger
    from charforgex.toolbox.common import counted, dtype_of, lineage, save

    base = opened.base
    outputs.check_format(opened)
    check_plain(opened)
    every = list({**base.shapes, **dict.fromkeys(opened.names)})
    chosen = selection.of_file(len(opened.files))
    factors = [
        blocks.factors(file.names, every, *told, base.family, base.spelling.denoiser_name, path.name)
        for file, path, told in zip(opened.files, opened.paths, chosen, strict=True)
    ]
    merger = Merger(method, size, lambda index, name: opened.files[index].layer(name), weights, factors, names=opened.names)
    told = {name: [w if name in own else None for w, own in zip(merger.of(name), factors, strict=True)] for name in opened.names}
    if not any(any(row) for row in told.values()):
        raise ConfigError("blocks, block_weights and gradient leave nothing: every weight is 0.")
    words = [word for wanted, table, _ in chosen for word in (*(wanted or ()), *table)]
    left = set(told)

    def make(name: str) -> Any:
        layer = merger.layer(name)
        left.discard(name)
        if not left and not merger.rows:
            raise LoraError("The files cancel each other: nothing is left to be written.")
        return layer

    made = {"out": None, "format": outputs.format or opened.format, "base": base.name}
    with counted(make, told, f"merging by {method.name}") as get:
        if outputs.dry_run:
            for name in told:
                get(name)
        else:
            made = save(opened, outputs, get, list(told), lineage(opened, f"merge {method.name}", shaping))
    rows = merger.rows
    numbers = sum(row.numbers for row in rows.values())
    dry = {"bytes": round(AROUND * numbers * dtype_of(opened, outputs.dtype).itemsize)}
    return {
        "layers": len(rows), **dry, "bytes_before": sum(path.stat().st_size for path in opened.paths), **made,
        "ranks": sorted({row.rank for row in rows.values()}), "method": method.name, "dry_run": outputs.dry_run, "weights": weights,
        "error": report.overall_error(rows.values()), "blocks": report.by_block(told, rows, list(blocks.depths(every))),
        "presets": blocks.sources(words, base.family),
    }  # fmt: skip


def check_plain(opened: Opened) -> None:
    """Raises LoraError for files with layers that are no plain LoRA."""
    words = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
    for path, file in zip(opened.paths, opened.files, strict=True):
        kinds = sorted({words[kind] for kind in file.kinds().values() if kind != "lora"})
        if kinds:
            raise LoraError(
                f"{path} has layers of {' and '.join(kinds)}, which are no products of two factors and cannot be merged; convert it "
                f"to LoRA first: charforgex lora convert {path} out={path.stem}_lora.safetensors kind=lora"
            )


if __name__ == "__main__":
    from charforgex.cli import run

    run("merge")
