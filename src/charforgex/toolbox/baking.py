"""`charforgex lora bake`: LoRAs into a base, for good: W + weight * change for every layer.

The result is a file or folder like the base in every byte that is not a changed weight: layout, dtypes, shards, variants, configs.
One weight is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError
from charforgex.runs import TEMPORARY, fsync_folder, replace_atomic
from charforgex.toolbox.common import Inputs, Opened, check_place, lineage, progress, say, writing, written

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from charforgex.families.bases import Base
    from charforgex.lora.formats import LoraFile
    from charforgex.toolbox.checkpoints import Part, Weights

Strength = Annotated[float, Range(at_least=-10, at_most=10)]
# Whose files would still be the base's
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")
BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class BakeSettings:
    """conf/lora_bake.yaml. Raises ConfigError for values that contradict each other."""

    lora: str | list[str]
    base: str
    weights: Strength | list[Strength] | None = None
    components: list[str] | None = None
    out: Path | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self):
        if len(self.strengths) != len(self.paths):
            raise ConfigError(f"weights={self.weights} are {len(self.strengths)} and the LoRAs {len(self.paths)}; give one for each.")
        if self.components == []:
            raise ConfigError("components=[] bakes nothing; leave it out for all, or name some.")
        if self.out is None and not self.dry_run:
            raise ConfigError("out is not set; say out=<folder or file.safetensors>, or dry_run=true to write nothing.")

    @property
    def paths(self) -> list[Path]:
        return Inputs(lora=self.lora).paths

    @property
    def strengths(self) -> list[float]:
        if self.weights is None:
            return [1.0] * len(self.paths)
        return self.weights if isinstance(self.weights, list) else [self.weights]


def bake(cfg: DictConfig) -> dict[str, Any]:
    """Writes `out`, a base with the LoRAs in it, and returns what the table says. Raises a CharForgeError."""
    settings = bind(BakeSettings, cfg, "")
    from charforgex.toolbox import checkpoints

    weights = checkpoints.find(settings.base, like=_base_of(settings.paths[0]))
    with _opened(settings, weights.base) as files:
        names = _chosen(settings, weights, files)
        if settings.out is not None:
            check_out(settings.out, weights, settings.paths, settings.overwrite)
        baker = Baker(weights.base, files, settings.strengths, names)
        baker.check(weights)
        told = {"source": str(weights.path), "base": weights.base.name, "out": None, "left_out": []}
        if settings.dry_run:
            for part in weights.parts:
                for _ in baker.spans(part, record=True):
                    pass
        else:
            header, left_out = _lineage(settings, weights, files), []
            with writing(settings.out):
                if weights.is_folder:
                    left_out = _write_folder(weights, baker, settings.out, header)
                else:
                    with replace_atomic(settings.out) as temporary:
                        rewrite(weights.parts[0], baker, temporary, header)
            told |= {"out": str(settings.out), "left_out": left_out}
    told |= baker.told()
    _show(told)
    return told


def _base_of(path: Path) -> Base | None:
    """None for a LoRA of no listed base: a folder's own config says then what its layers are."""
    from charforgex.families import bases

    try:
        return bases.base_of_file(path)
    except LoraError:  # raised again by the reader, unless the base has another size
        return None


@contextmanager
def _opened(settings: BakeSettings, base: Base) -> Iterator[list[LoraFile]]:
    from charforgex.lora.formats import open_lora

    with ExitStack() as stack:
        yield [stack.enter_context(open_lora(path, base.names)) for path in settings.paths]


def _chosen(settings: BakeSettings, weights: Weights, files: Sequence[LoraFile]) -> list[set[str]]:
    """The layers of each LoRA that are baked. Raises ConfigError, LoraError."""
    from charforgex.lora.state import some

    known = {name.partition(".")[0] for file in files for name in file.names}
    if strange := sorted(set(settings.components or ()) - known):
        raise ConfigError(f"components={settings.components}: no LoRA changes {', '.join(strange)}, only {', '.join(sorted(known))}.")
    chosen = []
    for path, file in zip(settings.paths, files, strict=True):
        names = {name for name in file.names if settings.components is None or name.partition(".")[0] in settings.components}
        if lost := sorted(names - weights.modules.keys()):
            whole = {name.partition(".")[0] for name in names} - {name.partition(".")[0] for name in lost}
            way_out = f"; say components=[{','.join(sorted(whole))}] to bake the others" if whole else ""
            raise LoraError(
                f"{len(lost)} layers of {path} are of weights that base={settings.base} does not hold: {some(lost)}. "
                f"It holds {', '.join(weights.components)}{way_out}."
            )
        chosen.append(names)
    return chosen


class Baker:
    """Makes the new weights, and remembers by component what they change: `spans` is the only place where anything is computed."""

    def __init__(self, base: Base, files: Sequence[LoraFile], strengths: Sequence[float], chosen: Sequence[set[str]]):
        self.base, self.files, self.strengths, self.chosen = base, files, strengths, chosen
        self.names = set().union(*chosen)
        self.squares: dict[str, Counter[str]] = defaultdict(Counter)  # component -> sums of squares

    def check(self, weights: Weights) -> None:
        """Raises LoraError for a layer of another size or not finite, ModelError for weights that are missing or stored quantised."""
        from charforgex.errors import ModelError
        from charforgex.lora.state import some

        for name in sorted(self.names):
            for file, chosen, strength in zip(self.files, self.chosen, self.strengths, strict=True):
                layer = file.layer(name) if name in chosen else None
                if layer is not None and layer.kind == "dora" and strength < 0:
                    raise LoraError(
                        f"{name} is DoRA, whose change depends on the weight that it was baked into: weights={strength:g} cannot take it "
                        "out. Keep the base as it was."
                    )
                if layer is not None and not layer.fits(weights.shape(name)):
                    raise LoraError(
                        f"{name} changes a weight of {layer.weight_shape}, and that of {weights.path} is {weights.shape(name)}."
                    )
                if layer is not None and not layer.is_finite:
                    raise LoraError(f"{name} holds values that are not finite.")
        for component, alternatives in weights.sets.items():
            wanted = {name for name in self.names if component in (None, name.partition(".")[0])}
            for parts in alternatives:
                if lost := wanted - {name for part in parts for name in part.modules}:
                    raise ModelError(f"{parts[0].path} lacks weights that the LoRA changes: {some(sorted(lost))}; remove or complete it.")
                for part in parts:
                    for name in wanted & part.modules.keys():
                        part.dtype(part.modules[name])

    def spans(self, part: Part, record: bool) -> Iterator[tuple[int, int, Tensor]]:
        """Bytes of the file from where to where, and the weight that comes there as it is stored, in the file's order."""
        found = sorted((*part.span(place), name) for name, place in part.modules.items() if name in self.names)
        for start, end, name in progress(found, part.path.name):
            place = part.modules[name]
            yield start, end, place.written(self._changed(name, part.read(place), record))

    def _changed(self, name: str, weight: Tensor, record: bool) -> Tensor:
        """W + sum of weight * change, in the dtype of W. Raises LoraError for values that it cannot hold."""
        old = weight.float()
        change = None
        for file, strength, chosen in zip(self.files, self.strengths, self.chosen, strict=True):
            layer = file.layer(name) if name in chosen else None
            if layer is not None:
                one = layer.change(old).mul_(strength)
                change = one if change is None else change.add_(one)
        if change is None:
            return weight
        norms = {"weight": old.norm(), "change": change.norm()}
        exact = change.add_(old)
        new = exact.to(weight.dtype)
        back = new.float()
        if not back.isfinite().all():
            raise LoraError(f"{name} with the LoRA does not fit into {weight.dtype}; take a base in bfloat16 or float32.")
        norms["rounding"] = (back - exact).norm()
        if record:
            sums = self.squares[name.partition(".")[0]]
            sums["layers"] += 1
            for what, norm in norms.items():
                sums[what] += float(norm) ** 2
        return new

    def told(self) -> dict[str, Any]:
        """By component, as shares in the Frobenius norm: `change` of the weights, `rounding` of the change."""
        rows = {
            component: {
                "layers": sums["layers"],
                "change": math.sqrt(sums["change"] / sums["weight"]) if sums["weight"] else 0.0,
                "rounding": math.sqrt(sums["rounding"] / sums["change"]) if sums["change"] else 0.0,
            }
            for component, sums in self.squares.items()
        }
        return {"components": rows, "layers": sum(row["layers"] for row in rows.values())}


# ---- writing ----


def check_out(out: Path, weights: Weights, loras: Sequence[Path], overwrite: bool) -> None:
    """Raises ConfigError before anything is computed."""
    if weights.is_folder:
        if out.resolve() == weights.path.resolve() or weights.path.resolve() in out.resolve().parents:
            raise ConfigError(f"out={out} is the base itself or inside it, which stays as it is; name another folder.")
        if out.resolve() in weights.path.resolve().parents:
            raise ConfigError(f"out={out} holds the base; name another folder.")
        if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / "model_index.json").is_file()):
            raise ConfigError(f"out={out} holds something that is no diffusers folder; name another.")
    elif out.suffix != ".safetensors":
        raise ConfigError(f"out={out} must end in .safetensors, as the base does.")
    elif out.resolve() in {path.resolve() for path in (weights.path, *loras)}:
        raise ConfigError(f"out={out} is one of the inputs, which stay as they are; name another file.")
    elif out.is_dir():
        raise ConfigError(f"out={out} is a folder, and the base a file; name a file.")
    if out.exists() and not overwrite:
        raise ConfigError(f"out={out} exists; say overwrite=true to replace it, or name another.")
    home = check_place(out)
    needed = sum(source.stat().st_size for source, _ in _kept(weights)[0]) if weights.is_folder else weights.path.stat().st_size
    if (free := shutil.disk_usage(home).free) < needed:
        raise ConfigError(f"out={out} takes {needed / 2**30:.1f} GiB, and {home} has {free / 2**30:.1f} GiB free; choose another disk.")


def rewrite(part: Part, baker: Baker, target: Path, metadata: Mapping[str, str], record: bool = True) -> None:
    """The file with its new weights: all other bytes are copied, the header's metadata has what `metadata` adds."""
    with part.path.open("rb") as source, target.open("wb") as file:
        length = int.from_bytes(source.read(8), "little")
        table = json.loads(source.read(length))
        kept = {key: value for key, value in table.pop("__metadata__", {}).items() if "hash_sha256" not in key and "model_hash" not in key}
        # transformers refuses a file whose metadata, if there are any, do not name the format
        text = json.dumps(
            {"__metadata__": {"format": "pt", **kept, **metadata}, **table}, separators=(",", ":"), ensure_ascii=False
        ).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        at = 8 + length
        for start, end, weight in baker.spans(part, record):
            _copy(source, file, at, start)
            file.write(_bytes(weight))
            at = end
        _copy(source, file, at, part.path.stat().st_size)


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        block = source.read(min(BLOCK, end - start))
        target.write(block)
        start += len(block)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _kept(weights: Weights) -> tuple[list[tuple[Path, str]], list[str]]:
    """The files of a folder that its copy has, with their names there, and the names of those that would be the base's still."""
    index = json.loads((weights.path / "model_index.json").read_text("utf-8"))
    kept, left_out = [], []
    for path in sorted(path for path in weights.path.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY)):
        name = path.relative_to(weights.path).as_posix()
        folder = name.partition("/")[0] if "/" in name else None
        if folder is not None and folder not in index:
            continue  # what belongs to no component, such as .git
        stale = path.name.endswith(OTHER_WEIGHTS) or any(f"{end}.index" in path.name for end in OTHER_WEIGHTS)
        stale = stale or (folder is None and path.suffix == ".safetensors")
        if stale and (folder is None or folder in weights.components):
            left_out.append(name)
        else:
            kept.append((path, name))
    return kept, left_out


def _write_folder(weights: Weights, baker: Baker, out: Path, metadata: Mapping[str, str]) -> list[str]:
    """The whole folder under a temporary name first. Returns the names of the base's files that are left out."""
    kept, left_out = _kept(weights)
    parts = {part.path: part for alternatives in weights.sets.values() for files in alternatives for part in files}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{out.name}") for _ in range(2))
    try:
        for source, name in kept:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = parts.get(source)
            if part is not None and baker.names & part.modules.keys():
                rewrite(part, baker, target, metadata, record=part in weights.parts)
            else:
                shutil.copyfile(source, target)
            with target.open("r+b") as file:
                os.fsync(file.fileno())
        for folder in (temporary, *(path for path in temporary.iterdir() if path.is_dir())):
            fsync_folder(folder)
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    fsync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)
    return left_out


def _lineage(settings: BakeSettings, weights: Weights, files: list[LoraFile]) -> dict[str, str]:
    chosen = {"weights": settings.strengths, "components": settings.components}
    told = json.loads(lineage(Opened(weights.base, settings.paths, files), "bake", chosen)["charforgex.lineage"])
    told["parents"].insert(0, {"name": weights.path.name, "sha256": weights.sha256()})
    return {"charforgex.lineage": json.dumps(told, sort_keys=True, ensure_ascii=False)}


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "layers", "change of the weights", "lost to rounding")
    for component, row in told["components"].items():
        table.add_row(component, str(row["layers"]), f"{row['change']:.3%}", f"{row['rounding']:.3%} of the change")
    console = Console(stderr=True)
    console.print(table)
    if told["left_out"]:
        say(console, f"Left out, as they hold the base's weights: {', '.join(told['left_out'])}.")
    say(console, written(told))
