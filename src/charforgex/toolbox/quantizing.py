"""`charforgex lora quantize`: factors in 8 or 4 bits (lora/quantized.py). Names, kinds and alphas stay; such a file is read as any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from charforgex.config import bind
from charforgex.errors import ConfigError
from charforgex.toolbox.common import Opened, Outputs, Shrinks, begun, dtype_of, lineage, progress, writing

if TYPE_CHECKING:
    from torch import Tensor

    from charforgex.lora.formats import LoraFile
    from charforgex.lora.state import Layer
    from charforgex.toolbox.shrinking import Row

WHOLE = 64  # values; a factor of fewer stays as it is


@dataclass(frozen=True, kw_only=True)
class Settings(Shrinks):
    kind: Literal["fp8", "int8", "nf4"] = "fp8"

    def __post_init__(self):
        super().__post_init__()
        for name in ("format", "dtype"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect: what is quantised keeps its names and is read in its dtype; convert it first.")


def quantize(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the LoRA with quantised factors, and tells bytes and errors of what is read back. Raises a CharForgeError."""
    settings = bind(Settings, cfg, "")
    with begun(settings) as opened:
        from charforgex.lora.metadata import hashes
        from charforgex.lora.quantized import mark
        from charforgex.lora.writing import write_tensors
        from charforgex.toolbox import shrinking

        file, keys = opened.files[0], quantised_keys(opened.files[0])
        metadata = lineage(opened, "quantize", {"kind": settings.kind})
        metadata |= {key: value for key, value in file.metadata.items() if key == "lora_adapter_metadata"}
        metadata |= mark(settings.kind, str(dtype_of(opened, None)).removeprefix("torch."), {key: file.shapes[key] for key in keys})

        def write(place: Outputs) -> dict[str, Any]:
            with writing(place.out):
                write_tensors(tensors(opened.paths[0], keys, settings.kind), place.out, metadata)
            ranks = sorted({row.rank for row in rows.values()})
            return {
                "out": str(place.out), "format": opened.format, "base": opened.base.name, "layers": len(rows), "ranks": ranks,
                "bytes": place.out.stat().st_size, "bytes_before": opened.paths[0].stat().st_size, **hashes(place.out),
            }  # fmt: skip

        rows = errors(opened, keys, settings.kind)
        told = shrinking.shrunk(opened, settings, write, rows, settings.functional)
    shrinking.show(f"quantize {settings.kind}", told, rows)
    return told | {"kind": settings.kind}


def quantised_keys(file: LoraFile) -> list[str]:
    """Of the factors; alphas and magnitudes are few and stay."""
    stay = {"alpha", "magnitude", "dora_scale"}
    factors = [key for sides in file.sides.values() for side, key in sides.items() if side not in stay]
    return [key for key in factors if len(file.shapes[key]) > 1 and math.prod(file.shapes[key]) >= WHOLE]


def tensors(path: Path, keys: list[str], kind: str) -> Iterator[tuple[str, Tensor]]:
    """Those of the file, one at a time, with codes and scales in the place of `keys`."""
    from charforgex.lora import quantized
    from charforgex.lora.formats import opened

    chosen = set(keys)
    with opened(path) as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if key not in chosen:
                yield key, tensor
                continue
            codes, scale = quantized.quantize(tensor, kind)
            yield key, codes
            yield key + quantized.SCALE, scale


def errors(opened_files: Opened, keys: list[str], kind: str) -> dict[str, Row]:
    """Of each layer: its change as it is, and as it will be read. Of DoRA, of the product that is added before the norm."""
    from charforgex.lora import formats, quantized
    from charforgex.lora.formats import LoraFile
    from charforgex.toolbox.shrinking import Row

    before, dtype, chosen = opened_files.files[0], dtype_of(opened_files, None), set(keys)
    with formats.opened(opened_files.paths[0]) as file:

        def read(key: str) -> Tensor:
            tensor = file.get_tensor(key)
            if key not in chosen:
                return tensor
            return quantized.dequantize(quantized.quantize(tensor, kind), kind, tuple(tensor.shape)).to(dtype)

        after = LoraFile(before.shapes, before.metadata, opened_files.base.names, read)
        rows = {}
        for name in progress(opened_files.names, "quantising"):
            one, other = before.layer(name), after.layer(name)
            if one is not None:
                rows[name] = Row(one.rank, one.rank, *_norms(one, other))
    return rows


def _norms(one: Layer, other: Layer | None) -> tuple[float, float]:
    """Of a layer's change, and of its difference to another's; None is one that has become zero."""
    from dataclasses import replace

    from charforgex.lora.lowrank import product
    from charforgex.lora.state import LoraLayer
    from charforgex.toolbox.shrinking import distance, norm

    whole = norm(one)
    if other is None:
        return whole, whole
    if isinstance(one, LoraLayer):
        return whole, distance(*(product(replace(layer, magnitude=None)) for layer in (one, other)))
    return whole, float((one.delta().double() - other.delta().double()).norm())
