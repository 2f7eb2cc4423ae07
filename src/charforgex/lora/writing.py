"""Writing LoRA files: module by module, atomically, equal arguments giving equal bytes; and saving with proof that the file is right."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from charforgex.errors import LoraError
from charforgex.lora import lycoris
from charforgex.lora.formats import ADAPTER_METADATA, FORMATS, WRITTEN, read
from charforgex.lora.inject import TEXT_PREFIX, same_output
from charforgex.lora.joined import alike, join, swap_halves
from charforgex.lora.names import Names, Parts, Spelling
from charforgex.lora.state import Layer, Lora, LoraLayer, is_finite, some
from charforgex.runs import replace_atomic

Get = Callable[[str], Layer | None]  # our name -> the layer, None where a module is not adapted
DTYPES = {  # as safetensors call them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
SMALL = 4096  # bytes; alphas, magnitudes and scales are below it


def write(
    lora: Lora, path: str | Path, format: str, family: Spelling, denoiser_config: Mapping[str, Any],
    dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Writes `path` atomically; equal arguments give equal bytes. `metadata` None keeps the adapter's own.

    Raises LoraError for an adapter that is not finite or all zero, also if only `dtype` makes it so.
    """
    names = checked(lora, format, Names(family, denoiser_config))
    write_layers(lora.layers.get, lora.layers, path, format, names, dtype, lora.metadata if metadata is None else metadata)
    return Path(path)


def to_tensors(lora: Lora, format: str, family: Spelling, denoiser_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file by key. Alphas are float32, or float64 where that would round them, so that the strength stays."""
    names = checked(lora, format, Names(family, denoiser_config))
    stored = _stored(lora.layers.get, lora.layers, format, names, dtype)
    return {key: tensor for _, tensors in stored for key, tensor in tensors.items()}


def checked(lora: Lora, format: str, names: Names) -> Names:
    """Raises LoraError for an adapter that no file should hold, or that this format cannot."""
    check_format(format, names)
    lora.check()
    lycoris.check_mixed({name: layer.kind for name, layer in lora.layers.items()}, format)
    return names


def check_format(format: str, names: Names) -> None:
    """Raises LoraError for a format that is none of this family."""
    if format not in FORMATS and format not in ("ai-toolkit", *names.dialects):
        raise LoraError(f"{names.family} has no LoRA format {format}; choose {', '.join([*FORMATS, 'ai-toolkit', *names.dialects])}.")


def check_places(layers: Collection[str], format: str, names: Names) -> None:
    """Raises LoraError for layers of no module, and for those that this format cannot hold."""
    places = names.places(format)
    lost = [name for name in layers if name not in places]
    if not lost:
        return
    if set(lost) - names.places("diffusers"):
        raise LoraError(f"{len(lost)} of {len(layers)} layers are on no module of this {names.family} model: {some(lost)}.")
    able = [other for other in (*names.dialects, *FORMATS) if set(layers) <= names.places(other)]
    raise LoraError(f"{len(lost)} of {len(layers)} layers have no place in the format {format}, but in {' and '.join(able)}: {some(lost)}.")


@dataclass(frozen=True)
class Written:
    """What a file says about one layer."""

    rank: int
    alpha: float
    kind: str


def write_layers(
    get: Get, layers: Collection[str], path: str | Path, format: str, names: Names, dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Written]:  # fmt: skip
    """`write` for layers that are made when they are asked for: `get` is called once for each of `layers`, those of a joined weight
    together, and one joined weight is held at a time. Returns what was written of each layer that is not None.

    Raises LoraError for a layer that has no place in the format, for values that are not finite, and if nothing would change.
    """
    written: dict[str, Written] = {}
    moved = False
    with _body(path) as (body, told):
        for stored, tensors in _stored(get, layers, format, names, dtype):
            written |= {name: Written(layer.rank, layer.alpha, layer.kind) for name, layer in stored.items()}
            moved = moved or not all(layer.is_zero for layer in stored.values())
            for key, tensor in tensors.items():
                body.add(key, tensor)
        if not moved:
            zero = f"All {len(written)} layers are zero: {some(written)}" if written else "Of the layers none is left"
            raise LoraError(f"{zero}, so the adapter would change nothing.")
        lycoris.check_mixed({name: layer.kind for name, layer in written.items()}, format)
        told |= {key: value for key, value in (metadata or {}).items() if key != ADAPTER_METADATA}
        if WRITTEN[format].header:
            told[ADAPTER_METADATA] = json.dumps(_adapter_metadata(written), sort_keys=True)
    return written


def write_tensors(tensors: Iterable[tuple[str, Tensor]], path: str | Path, metadata: Mapping[str, str]) -> None:
    """`write_layers` for tensors as they are, by key: another file's, quantised."""
    with _body(path) as (body, told):
        told |= metadata
        for key, tensor in tensors:
            body.add(key, tensor)


@contextmanager
def _body(path: str | Path) -> Iterator[tuple[_Body, dict[str, str]]]:
    """What fills up with tensors and metadata, and becomes the file at `path` in the end."""
    with replace_atomic(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as bulk:
        body, told = _Body(bulk), {}
        yield body, told
        with temporary.open("wb") as file:
            body.write(file, told)


class _Body:
    """The data of a safetensors file on its way: what is large goes to disk at once, the rest is little.

    The order is the library's, so that a file which another tool saves again has the same hash: wider values first, then by name.
    """

    def __init__(self, bulk: BinaryIO):
        self.bulk = bulk
        self.small: dict[str, Tensor] = {}
        self.large: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}  # dtype, shape, place and bytes

    def add(self, key: str, tensor: Tensor) -> None:
        if tensor.nbytes <= SMALL:
            self.small[key] = tensor
            return
        data = _bytes(tensor)
        self.large[key] = tensor.dtype, tuple(tensor.shape), self.bulk.tell(), len(data)
        self.bulk.write(data)

    def write(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """Header and data. The library writes metadata in a random order; this header is sorted.

        Hashes of the data alone are added: modelspec's, and the one by which A1111 and Civitai know a LoRA.
        """
        found = [(tensor.dtype, key, tuple(tensor.shape), tensor.nbytes) for key, tensor in self.small.items()]
        found += [(dtype, key, shape, size) for key, (dtype, shape, _, size) in self.large.items()]
        found.sort(key=lambda one: (-one[0].itemsize, one[1]))
        entries, at = {}, 0
        for dtype, key, shape, size in found:
            entries[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        digest = hashlib.sha256()
        for _, key, *_ in found:
            digest.update(self._data(key))
        metadata = {**metadata, "format": "pt", "sshs_model_hash": digest.hexdigest()}
        if "modelspec.sai_model_spec" in metadata:
            metadata["modelspec.hash_sha256"] = f"0x{digest.hexdigest()}"
        wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
        assert not wrong, f"safetensors metadata must be strings: {wrong}"
        text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        file.write(len(text).to_bytes(8, "little") + text)
        for _, key, *_ in found:
            file.write(self._data(key))

    def _data(self, key: str) -> bytes | memoryview:
        if key in self.small:
            return _bytes(self.small[key])
        _, _, place, size = self.large[key]
        self.bulk.seek(place)
        return self.bulk.read(size)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


# ---- a layer as a format holds it ----


def _stored(
    get: Get, layers: Collection[str], format: str, names: Names, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Layer], dict[str, Tensor]]]:
    """For each name in the file: the layers as the format holds them, and their tensors.

    The change is the same. Where the format has no alpha, it is the rank; layers that are joined have one alpha and rank.
    """
    check_format(format, names)
    if not layers:
        raise LoraError("The adapter has no layers.")
    check_places(layers, format, names)
    table, wanted = names.table(format), set(layers)
    lycoris_names = {parts[0][0]: name for name, parts in table.items() if parts[0][1].rows is None and not parts[0][1].swapped}
    for module, parts in table.items():
        present = {name: layer for name, _ in parts if name in wanted and (layer := get(name)) is not None}
        if not present:
            continue
        for name, layer in present.items():
            if not layer.is_finite:
                raise LoraError(f"The layer {name} holds values that are not finite.")
        lycoris.check_kinds({layer.kind for layer in present.values()}, format)
        if WRITTEN[format].alpha is None and not WRITTEN[format].header:
            present = {name: replace(layer, up=layer.up * layer.scale, alpha=float(layer.rank)) for name, layer in present.items()}
        plain = {name: layer for name, layer in present.items() if layer.kind == "lora"}
        plain = dict(zip(plain, alike(list(plain.values())), strict=True)) if plain else {}
        present |= plain
        tensors = lycoris.tensors_of({n: layer for n, layer in present.items() if n not in plain}, format, lycoris_names, dtype)
        if plain:
            tensors |= _tensors(module, parts, plain, format, dtype)
        if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
            raise LoraError(f"The adapter does not fit into {dtype}; save it in float32 or bfloat16. Too large: {some(broken)}.")
        yield present, tensors


def _tensors(module: str, parts: Parts, plain: Mapping[str, LoraLayer], format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    ends, place = WRITTEN[format], parts[0][1]
    layers = [plain.get(name) for name, _ in parts]
    layer = layers[0] if place.rows is None else join(layers, [place.rows for _, place in parts])
    layer = swap_halves(layer) if place.swapped else layer
    tensors = {
        module + ends.down: layer.down.detach().to("cpu", dtype).contiguous(),
        module + ends.up: layer.up.detach().to("cpu", dtype).contiguous(),
    }
    if ends.alpha:
        alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        tensors[module + ends.alpha] = alpha if alpha.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float64)
    return tensors


def _adapter_metadata(written: Mapping[str, Written]) -> dict[str, Any]:
    """peft's settings by component, from which diffusers' `load_lora_weights` makes its layers."""
    settings, components = {}, {}
    for name, layer in written.items():
        component, _, path = name.partition(".")
        # without text_model. a target fits CLIPTextModel in transformers 4 and in 5
        components.setdefault(component, {})[path.removeprefix(TEXT_PREFIX)] = layer
    for component, layers in components.items():
        ranks, alphas = {path: layer.rank for path, layer in layers.items()}, {path: _tidy(layer.alpha) for path, layer in layers.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_whole(path): value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {_whole(path): value for path, value in alphas.items() if value != alpha},
            "target_modules": sorted(layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": any(layer.kind == "dora" for layer in layers.values()),
        }
        settings |= {f"{component}.{key}": value for key, value in config.items()}
    return settings


def _whole(path: str) -> str:
    """A pattern of peft's for this module alone: it matches ends of paths, and Flux has a proj_out inside its blocks and outside."""
    return path if "." in path else f"^{path}"


def _tidy(value: float) -> float:
    return int(value) if float(value).is_integer() else value


# ---- saving ----


def save_verified(
    lora: Lora, path: str | Path, format: str, family: Spelling, denoiser: nn.Module,
    dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None, encoders: Mapping[str, nn.Module] | None = None,
) -> Path:  # fmt: skip
    """Saves a trained adapter, or raises LoraError and leaves `path` as it was.

    `denoiser`, and text `encoders` by component, hold the adapter that was trained; `lora` is a copy of it, or its moving
    average. Before the file gets its name it is read back: every layer must be there with the values that `dtype` can hold, and,
    put into peft layers by the code that generation uses, must give the very outputs of the trained layers. Layers that the
    format holds in other factors, because it has no alpha for them, must make the same change but for the rounding. The
    networks are left as they were.
    """
    with replace_atomic(path) as temporary:
        names = checked(lora, format, Names(family, denoiser.config))
        stored = _as_stored(lora, format, names, dtype)
        write_layers(lora.layers.get, lora.layers, temporary, format, names, dtype, lora.metadata if metadata is None else metadata)
        expected, reloaded = stored.rounded(dtype), read(temporary, family, denoiser.config)
        if missing := set(expected.layers) ^ set(reloaded.layers):
            raise LoraError(f"{path} was not saved: {len(missing)} of {len(lora)} layers do not come back: {some(sorted(missing))}.")
        if changed := [name for name, layer in expected.layers.items() if not layer.equals(reloaded.layers[name])]:
            raise LoraError(f"{path} was not saved: {len(changed)} of {len(lora)} layers come back changed: {some(changed)}.")
        restated = [name for name, layer in lora.layers.items() if not layer.equals(stored.layers[name])]
        trained = {family.denoiser_name: denoiser, **(encoders or {})}
        if strangers := set(lora.components()) ^ set(trained):
            raise LoraError(f"{path} was not saved: only one of the adapter and what was trained has {some(sorted(strangers))}.")
        differing = [
            f"{component}.{name}"
            for component, network in trained.items()
            for name in same_output(network, component, lora.rounded(dtype), reloaded)
        ]
        differing = [name for name in differing if name not in restated or not _near(lora.layers[name], reloaded.layers[name], dtype)]
        if differing:
            raise LoraError(f"{path} was not saved: {len(differing)} layers give other outputs when loaded: {some(differing)}.")
    return Path(path)


def _as_stored(lora: Lora, format: str, names: Names, dtype: torch.dtype) -> Lora:
    """The adapter in the factors and alphas that the format holds, not rounded yet."""
    return replace(
        lora, layers={n: layer for found, _ in _stored(lora.layers.get, lora.layers, format, names, dtype) for n, layer in found.items()}
    )


def _near(one: LoraLayer, other: LoraLayer, dtype: torch.dtype) -> bool:
    """Whether two layers of other factors make the same change, up to a rounding of the factors to `dtype`."""
    expected = one.delta()
    return bool((other.delta() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm())
