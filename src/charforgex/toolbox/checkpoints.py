"""Base checkpoints as files of weights by our names of the modules: which base it is, and where each weight lies. No network is built.

A checkpoint is a diffusers folder or a single file. Each weight of ours is one run of bytes in a file, also the rows of a weight that joins
several, so it is read and replaced for itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charforgex.errors import ModelError
from charforgex.families import bases, layouts, registry
from charforgex.families.base import Family
from charforgex.families.bases import Base
from charforgex.families.files import file_hash, stamp
from charforgex.families.folders import Folder
from charforgex.families.layouts import Header
from charforgex.families.originals import Original, Spelling, each
from charforgex.families.parts import read_config
from charforgex.families.single_file import IGNORED, IGNORED_ENDS, spell
from charforgex.families.sources import EMBEDDED, Source, component_weights, read_json, resolve
from charforgex.lora.inject import TEXT_PREFIX

DTYPES = {  # as safetensors call them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
AS_DIFFUSERS = Spelling(each(lambda key, config: Original(key)), ("",))  # a denoiser alone, as training scripts save it
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """One file. `modules`: our weights in it, "<component>.<path>" -> place; `rest`: its other tensors, by names that all checkpoints of
    its layout share."""

    header: Header
    modules: dict[str, Original]
    rest: dict[str, Original]

    @property
    def path(self) -> Path:
        return self.header.path

    def span(self, place: Original) -> tuple[int, int]:
        """The bytes of a weight of ours, from the start of the file."""
        start, end = self.header.offsets[place.key]
        if place.rows is None:
            return start, end
        height = self.header.shapes[place.key][0]
        rows, wide = place.span(height), (end - start) // height
        return start + rows.start * wide, start + rows.stop * wide

    def read(self, place: Original) -> Tensor:
        """Our tensor in the dtype that is stored. Raises ModelError for a dtype in which numbers are not stored plainly."""
        data, shape, dtype = self.raw(place), self.header.shapes[place.key], self.dtype(place)
        stored = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return place.read(stored.view(-1, *shape[1:]) if place.rows is not None else stored.view(shape))

    def raw(self, place: Original) -> bytearray:
        """The bytes of our tensor as they are stored."""
        start, end = self.span(place)
        data = bytearray(end - start)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise ModelError(f"{self.path} ends within {place.key}: it has become shorter.")
        return data

    def dtype(self, place: Original) -> torch.dtype:
        name = self.header.dtypes[place.key]
        if name not in DTYPES:
            raise ModelError(f"{self.path} holds {place.key} as {name}, which is quantised; take the file in bf16, fp16 or fp32.")
        return DTYPES[name]


@dataclass(frozen=True)
class Weights:
    """A checkpoint's files by component, None for a single file in the original spelling. A folder may hold a component several times,
    as fp32 and fp16: each is a list of its files, and the first of them is the one that is loaded."""

    path: Path
    base: Base
    sets: dict[str | None, list[list[Part]]]

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def in_our_names(self) -> bool:
        """Whether all tensors have the names that networks give them, as in folders; else `rest` has those of single files."""
        return None not in self.sets

    @cached_property
    def parts(self) -> list[Part]:
        """Of each component the files that are loaded."""
        return [part for alternatives in self.sets.values() for part in alternatives[0]]

    @cached_property
    def modules(self) -> dict[str, tuple[Part, Original]]:
        """Where each of our modules' weights is."""
        return {name: (part, place) for part in self.parts for name, place in part.modules.items()}

    @cached_property
    def rest(self) -> dict[str, tuple[Part, Original]]:
        """The other tensors that count."""
        found = {name: (part, place) for part in self.parts for name, place in part.rest.items()}
        return {n: at for n, at in found.items() if not at[1].key.startswith(IGNORED) and not at[1].key.endswith(IGNORED_ENDS)}

    @property
    def components(self) -> list[str]:
        """Those that hold modules of ours."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.modules))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our module's weight. A folder's encoders may be of other sizes than the listed base's, by whose denoiser it is known."""
        part, place = self.modules[name]
        return part.header.shapes[place.key] if self.in_our_names else self.base.shapes[name]

    def sha256(self) -> str:
        """Of the file, or of the files that are loaded of a folder, by their names in it."""
        hashes = {part.path: file_hash(stamp(part.path)) for part in self.parts}
        if not self.is_folder:
            return hashes[self.path]
        lines = sorted(f"{path.relative_to(self.path).as_posix()}\0{digest}\n" for path, digest in hashes.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def find(source: str, like: Base | None = None) -> Weights:
    """What a source is. `like`: the base that it should be, where several fit, and whose family `charworld` means.

    Raises ModelError for a source that is none, or whose denoiser is none that can be understood.
    """
    if like and like.family not in registry.FAMILIES:
        raise ModelError(f"Of {like.family} only LoRA files are understood, not checkpoints; those of {', '.join(registry.FAMILIES)} are.")
    if str(source) == EMBEDDED and like is None:
        raise ModelError(f"{EMBEDDED} is embedded for several families; give the folder of one.")
    family = like.spelling if like else None
    place = resolve(source, family.name if family else "", list(_networks(family)) if family else [])
    return _file(place.path, like) if place.is_single_file else _folder(place)


def reader(base: Base, setting: str, source: str, names: Iterable[str]) -> Callable[[str], Tensor]:
    """Reads these modules' weights, in float32, from the files of `source`, which `setting` names.

    Raises ModelError unless it holds all of them in the base's sizes, before one is read.
    """
    held = find(source, base)
    for name in names:
        if name not in held.modules:
            raise ModelError(f"{setting}={source} holds no {name}, which the LoRA changes; give a base that has it.")
        if (shape := base.shapes.get(name)) not in (None, held.shape(name)):
            raise ModelError(f"{setting}={source} is no {base.name}, for which the LoRA is: {name} is {held.shape(name)} and not {shape}.")

    def read(name: str) -> Tensor:
        part, place = held.modules[name]
        return part.read(place).float()

    return read


def _networks(family: Family) -> Iterator[str]:
    return (name for group in family.components.values() for name in group if not name.startswith("tokenizer"))


# ---- diffusers folders ----


def _folder(source: Source) -> Weights:
    pipeline = read_json(source.path / "model_index.json").get("_class_name")
    family = next((found for found in map(registry.get, registry.FAMILIES) if pipeline in found.pipelines), None)
    if family is None:
        raise ModelError(f"{source.path} holds a {pipeline}, which is of none of the families {', '.join(registry.FAMILIES)}.")
    folder = Folder(family, source)
    if family.denoiser_name not in folder.held:
        raise ModelError(f"{source.path} holds no {family.denoiser_name}.")
    headers = {name: _headers(source, name) for name in _networks(family) if name in folder.held}
    shapes = {
        key.removesuffix(".weight"): shape
        for header in headers[family.denoiser_name][0]
        for key, shape in header.shapes.items()
        if key.endswith(".weight") and len(shape) in (2, 4)
    }
    base = _base_of(family, shapes, source.path)
    sets = {name: [[_part(base, name, header) for header in files] for files in found] for name, found in headers.items()}
    return Weights(source.path, base, sets)


def _headers(source: Source, component: str) -> list[list[Header]]:
    """A component's weights in every variant that the folder holds, the one that is loaded first."""
    folder = source.path / component
    if not folder.is_dir():
        raise ModelError(f"{source.path} has no folder {component}, which its model_index.json names; the download or copy is incomplete.")
    weights, files = component_weights(folder, source.variants)
    found = [files[weights.is_sharded :]]
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    shards = [[folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))] for index in indices]
    sharded = {path for paths in shards for path in paths}
    for paths in [*shards, *([path] for path in sorted(folder.glob("*.safetensors")) if path not in sharded)]:
        if paths not in found:
            found.append(paths)
    return [[_header(path) for path in paths] for paths in found]


def _header(path: Path) -> Header:
    """Raises ModelError also for offsets that do not fit the shapes or each other, by which all is read and written."""
    header = layouts.read_header(path)
    with path.open("rb") as file:
        at = 8 + int.from_bytes(file.read(8), "little")
    for key, (start, end) in sorted(header.offsets.items(), key=lambda item: item[1]):
        dtype = DTYPES.get(header.dtypes[key])
        if start != at or end < start or (dtype and end - start != math.prod(header.shapes[key]) * dtype.itemsize):
            raise ModelError(f"{path} is damaged: {key} does not lie where its header says; download or copy it again.")
        at = end
    return header


def _base_of(family: Family, shapes: Shapes, path: Path) -> Base:
    """The listed base whose denoiser has these modules, or one of its own."""
    start = family.denoiser_name + "."
    named = {start + name: shape for name, shape in shapes.items()}
    for name in bases.names():
        base = bases.get(name)
        if base.family == family.name and named == {n: shape for n, shape in base.shapes.items() if n.startswith(start)}:
            return base
    return Base(path.name, family.name, read_config(path, family.denoiser_name), named)


def _part(base: Base, component: str, header: Header) -> Part:
    known, modules, rest = base.names.modules.get(component, {}), {}, {}
    for key in header.shapes:
        path, _, leaf = key.rpartition(".")
        ours = path if path in known else TEXT_PREFIX + path  # transformers 5 has dropped it from one of its classes
        if leaf == "weight" and ours in known:
            modules[f"{component}.{ours}"] = Original(key)
        else:
            rest[f"{component}.{key.removeprefix(TEXT_PREFIX)}"] = Original(key)
    return Part(header, modules, rest)


# ---- single files ----


def _file(path: Path, like: Base | None) -> Weights:
    if path.suffix == layouts.GGUF:
        raise ModelError(f"{path} is a GGUF, whose packed weights stay as they are; take the .safetensors that it was made from.")
    header = _header(path)
    layouts.refuse_others(header)
    families = [like.family] if like else list(registry.FAMILIES)
    listed = [bases.get(name) for name in bases.names() if bases.get(name).family in families]
    candidates = [like, *(base for base in listed if base is not like)] if like else listed
    found = {base.name: _places(base, header) for base in candidates}
    base = max(candidates, key=lambda one: len(found[one.name]))
    places = found[base.name]
    if not places:
        raise ModelError(f"{path} holds no base of {', '.join(families)} that is listed ({spell(list(header.shapes)) or 'no tensors'}).")
    start = base.spelling.denoiser_name + "."
    wanted = {name for name in base.shapes if name.startswith(start)}
    if wanted & places.keys() and wanted - places.keys():
        raise ModelError(f"{path} is most like {base.name}, and lacks weights of its size: {spell(sorted(wanted - places.keys()))}.")
    components = {name.partition(".")[0] for name in places}
    alone = components.pop() if len(components) == 1 else ""
    if alone and all(f"{alone}.{place.key}" == f"{name}.weight" for name, place in places.items()):
        return Weights(path, base, {alone: [[_part(base, alone, header)]]})
    modules = {place.key for place in places.values()}
    rest = {_plain_name(base, key, alone): Original(key) for key in header.shapes if key not in modules}
    return Weights(path, base, {None: [[Part(header, places, rest)]]})


def _places(base: Base, header: Header) -> dict[str, Original]:
    """Where the modules of the base are, of the components of which the file holds more than half."""
    found: dict[str, Original] = {}
    for component in base.names.modules:
        start = component + "."
        shapes = {f"{n.removeprefix(start)}.weight": shape for n, shape in base.shapes.items() if n.startswith(start)}
        places = closest(base, component, shapes, header, base.config)
        taken = {place.key for place in found.values()}  # by an encoder of the same size
        if 2 * len(places) > len(shapes) and not any(place.key in taken for place in places.values()):
            found |= {start + key.removesuffix(".weight"): place for key, place in places.items()}
    return found


def closest(base: Base, component: str, shapes: Shapes, header: Header, config: Mapping[str, Any]) -> dict[str, Original]:
    """Those of a component's tensors that a single file holds, in the spelling in which they are most. `config` is the component's."""
    family = base.spelling
    spellings = [*family.original.get(component, ()), *([AS_DIFFUSERS] if component == family.denoiser_name else [])]
    options = []
    for spelling in spellings:
        names = spelling.names(shapes, config)
        for prefix in spelling.prefixes:
            places = {key: place.behind(prefix) for key, place in names.items()}
            options.append({key: at for key, at in places.items() if header.shapes.get(at.key) == at.shape(shapes[key])})
    return max(options, key=len, default={})


def _plain_name(base: Base, key: str, alone: str) -> str:
    """A key without what its maker put in front: "vae:decoder.conv_in.bias". `alone` is the file's only component."""
    prefixes = {p: component for component, found in base.spelling.original.items() for spelling in found for p in spelling.prefixes if p}
    longest = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)
    return f"{alone}:{key}" if longest is None else f"{prefixes[longest]}:{key.removeprefix(longest)}"
