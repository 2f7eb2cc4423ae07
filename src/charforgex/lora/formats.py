"""LoRA files: reading, writing, and saving with proof that the file is right.

diffusers    `unet.<path>.lora_A.weight`, `.lora_B.weight`; alpha in the header's `lora_adapter_metadata`
kohya        `lora_unet_<original path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`: ComfyUI, A1111, Forge
comfyui      `diffusion_model.<original path>.lora_down.weight`, ...: ComfyUI's own names
ai-toolkit   as diffusers without the header: alpha is the rank, so the strength goes into lora_B
xlabs        `double_blocks.0.processor.qkv_lora1.down.weight`, ...: attention of Flux alone, alpha is the rank

Every key of a file is accounted for: what is left over is a LoraError that names it. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charforgex.errors import LoraError
from charforgex.lora import lycoris
from charforgex.lora.identify import family_of, identify
from charforgex.lora.inject import TEXT_PREFIX, same_output
from charforgex.lora.joined import alike, join, split, swap_halves
from charforgex.lora.names import Names, Parts, Spelling, Table
from charforgex.lora.state import Layer, Lora, LoraLayer, some
from charforgex.runs import replace_atomic


@dataclass(frozen=True)
class Format:
    """How a format's keys end. Without an `alpha` of its own, and without a header, alpha is the rank."""

    down: str
    up: str
    alpha: str | None = None
    header: bool = False


FORMATS = {  # of every family and layer
    "diffusers": Format(".lora_A.weight", ".lora_B.weight", header=True),
    "kohya": Format(".lora_down.weight", ".lora_up.weight", ".alpha"),
    "comfyui": Format(".lora_down.weight", ".lora_up.weight", ".alpha"),
}
WRITTEN = FORMATS | {"ai-toolkit": Format(".lora_A.weight", ".lora_B.weight"), "xlabs": Format(".down.weight", ".up.weight")}
SIDES = {  # how the keys end that are read, whatever the names
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down", ".down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up", ".up.weight": "up",
    ".alpha": "alpha",
} | lycoris.SIDES  # fmt: skip
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' and peft's settings, as JSON; diffusers refuses it in kohya files


# ---- reading ----


def read(path: str | Path, family: Spelling, denoiser_config: Mapping[str, Any]) -> Lora:
    """A `.safetensors` LoRA of any format, in float32. A missing alpha means alpha = rank.

    Raises LoraError if the file is unreadable, of an unknown format, or has keys that are left over.
    """
    with _opened(Path(path)) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    try:
        return from_tensors(tensors, metadata, family, denoiser_config)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error


def read_header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """A LoRA file's metadata, and its shapes by key; no tensor is read. Raises LoraError if it is no LoRA file that can be read."""
    path = Path(path)
    with _opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    try:
        identify(shapes)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error
    return metadata, shapes


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoraError(f"There is no LoRA file {path}.")
    if path.suffix != ".safetensors":
        raise LoraError(f"{path} is not a .safetensors file. Other formats can run code when they are opened; convert it first.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is damaged or no safetensors file: {error}") from error


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Spelling, denoiser_config: Mapping[str, Any]) -> Lora:
    """`read` for a file that is in memory."""
    identify(tensors)
    readable = Names(family, denoiser_config).readable()
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by name in the file
    left_over = []
    for key, tensor in tensors.items():
        end = next((end for end in SIDES if key.endswith(end)), None)
        module = key.removesuffix(end) if end else key
        if end is None or module not in readable:
            left_over.append(key)
        elif SIDES[end] in found[module]:
            raise LoraError(f"{_said(readable[module])} is there twice under two spellings, one of them {key}.")
        else:
            found[module][SIDES[end]] = tensor
    left_over = [key for key in left_over if not (key.endswith((".diff", ".diff_b")) and not tensors[key].any())]  # they change nothing
    if left_over:
        raise LoraError(
            f"{len(left_over)} of {len(tensors)} keys belong to no module of this {family.name} model: {some(left_over)}."
            f"{_hint(tensors, left_over, family)}"
        )
    spelled: dict[str, str] = {}
    for module in found:
        for name, _ in readable[module]:
            if spelled.setdefault(name, module) != module:
                raise LoraError(f"{name} is there twice under two spellings, {spelled[name]} and {module}.")
    incomplete = [_said(readable[module]) for module, sides in found.items() if not lycoris.is_whole(sides)]
    if incomplete:
        raise LoraError(f"{len(incomplete)} layers lack one of their two factors: {some(incomplete)}.")

    downs = {name: found[module]["down"] for name, module in spelled.items() if "down" in found[module]}
    plain = [name for name, module in spelled.items() if "magnitude" not in found[module]]
    said = _said_alphas(metadata, {name: down.shape[0] for name, down in downs.items() if down.ndim}, plain)
    layers = {}
    for module, sides in found.items():
        layers |= _layers(readable[module], sides, said)
    return Lora(layers, dict(metadata))


def _said(parts: Parts) -> str:
    return " + ".join(name for name, _ in parts)


def _hint(tensors: Mapping[str, Tensor], left_over: list[str], family: Spelling) -> str:
    looks = family_of({key: tensor.shape for key, tensor in tensors.items()})
    if looks not in (None, family.name):
        return f" It looks like a LoRA of {looks}."
    return ""


def _layers(parts: Parts, sides: Mapping[str, Tensor], said_alphas: Mapping[str, float]) -> dict[str, Layer]:
    """What one name of the file stands for, by our names."""
    alpha = sides.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{_said(parts)} has an alpha of {alpha.numel()} values; it must be one.")
    (name, place), *others = parts
    if alpha is None and not others:
        alpha = said_alphas.get(name)
    try:
        if sides.keys() - {"down", "up", "alpha"}:
            return {name: lycoris.layer_of(parts, sides, None if alpha is None else float(alpha))}
        down, up = sides["down"], sides["up"]
        if alpha is None:
            alpha = down.shape[0] if down.ndim else 1
        layer = LoraLayer(down.float(), up.float(), float(alpha))
        if place.rows is None:
            return {name: swap_halves(layer) if place.swapped else layer}
        layers = split(layer, [place.rows for _, place in parts])
    except LoraError as error:
        raise LoraError(f"{_said(parts)}: {error}") from error
    return {name: layer for (name, _), layer in zip(parts, layers, strict=True) if layer is not None}


def _said_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int], plain: Sequence[str]) -> dict[str, float]:
    """Alphas by layer as diffusers' header gives them: one for each component, and patterns for exceptions. `plain` have no magnitude."""
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        settings = json.loads(metadata[ADAPTER_METADATA])
        unreadable = [key for key, value in settings.items() if value and key.endswith(".lora_bias")]
        lost = [key for key in settings if key.endswith(".use_dora") and settings[key] and any(n.startswith(key[:-8]) for n in plain)]
        if lost:
            raise LoraError(f"It was trained with {some(lost)}, and its magnitudes are missing.")
        if unreadable:
            raise LoraError(f"It was trained with {some(unreadable)}, which cannot be read.")
        components = {key.removesuffix(".lora_alpha"): value for key, value in settings.items() if key.endswith(".lora_alpha")}
        patterns = {component: settings.get(f"{component}.alpha_pattern") or {} for component in components}
        compiled = {component: [(re.compile(rf"(.*\.)?({key})$"), key) for key in patterns[component]] for component in components}
        alphas = {}
        for name, rank in ranks.items():
            component, _, path = name.partition(".")
            if component in components:
                # peft's rule: the first pattern that fits the end of the path. Most patterns are the path itself.
                bare, said = path.removeprefix(TEXT_PREFIX), patterns[component]
                key = bare if bare in said else next((key for pattern, key in compiled[component] if pattern.match(path)), None)
                alphas[name] = float(components[component] if key is None else said[key])
                if settings.get(f"{component}.use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)
                    alphas[name] *= math.sqrt(rank)
        return alphas
    except (ValueError, TypeError, AttributeError, re.error) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"Its header's {ADAPTER_METADATA} cannot be understood: {error}") from error


# ---- writing ----


def write(
    lora: Lora, path: str | Path, format: str, family: Spelling, denoiser_config: Mapping[str, Any],
    dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Writes `path` atomically; equal arguments give equal bytes. `metadata` None keeps the adapter's own.

    Raises LoraError for an adapter that is not finite or all zero, also if only `dtype` makes it so.
    """
    with replace_atomic(path) as temporary:
        _write(lora, temporary, format, family, denoiser_config, dtype, metadata)
    return Path(path)


def _write(lora, path, format, family, denoiser_config, dtype, metadata) -> Lora:
    stored, table = _stored(lora, format, family, denoiser_config, dtype)
    metadata = dict(lora.metadata if metadata is None else metadata)
    metadata.pop(ADAPTER_METADATA, None)
    if WRITTEN[format].header:
        metadata[ADAPTER_METADATA] = json.dumps(_adapter_metadata(stored), sort_keys=True)
    header, data = _serialised(_tensors(stored, format, table, dtype), metadata)
    with path.open("wb") as file:
        file.write(header)
        file.write(data)
    return stored


def to_tensors(lora: Lora, format: str, family: Spelling, denoiser_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file by key. Alphas are float32, or float64 where that would round them, so that the strength stays."""
    stored, table = _stored(lora, format, family, denoiser_config, dtype)
    return _tensors(stored, format, table, dtype)


def _stored(lora: Lora, format: str, family: Spelling, denoiser_config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Lora, Table]:
    """The adapter as the format holds it, in values that are not rounded yet, and the names of its modules there.

    The change is the same. Where the format has no alpha, it is the rank; layers that are joined have one alpha and rank.
    """
    names = Names(family, denoiser_config)
    if format not in FORMATS and format not in ("ai-toolkit", *names.dialects):
        raise LoraError(f"{family.name} has no LoRA format {format}; choose {', '.join([*FORMATS, 'ai-toolkit', *names.dialects])}.")
    lycoris.check_kinds(lora, format)
    lora.check()
    table = names.table(format)
    known = {name for parts in table.values() for name, _ in parts}
    unknown = [name for name in lora.layers if name not in known]
    if unknown:
        where = f"have no place in the format {format}" if format in names.dialects else f"are on no module of this {family.name} model"
        raise LoraError(f"{len(unknown)} of {len(lora)} layers {where}: {some(unknown)}.")
    layers = dict(lora.layers)
    if WRITTEN[format].alpha is None and not WRITTEN[format].header:
        layers = {name: replace(layer, up=layer.up * layer.scale, alpha=float(layer.rank)) for name, layer in layers.items()}
    for parts in table.values():
        if present := [name for name, _ in parts if name in layers and layers[name].kind == "lora"]:
            layers |= dict(zip(present, alike([layers[name] for name in present]), strict=True))
    stored = replace(lora, layers=layers)
    try:
        stored.rounded(dtype).check()
    except LoraError as error:
        raise LoraError(f"The adapter does not fit into {dtype}; save it in float32 or bfloat16. {error}") from error
    return stored, table


def _tensors(stored: Lora, format: str, table: Table, dtype: torch.dtype) -> dict[str, Tensor]:
    plain = {name: layer for name, layer in stored.layers.items() if layer.kind == "lora"}
    ends, tensors = WRITTEN[format], lycoris.tensors_of({k: v for k, v in stored.layers.items() if k not in plain}, format, table, dtype)
    for module, parts in table.items():
        layers = [plain.get(name) for name, _ in parts]
        if not any(layers):
            continue
        place = parts[0][1]
        layer = layers[0] if place.rows is None else join(layers, [place.rows for _, place in parts])
        layer = swap_halves(layer) if place.swapped else layer
        tensors[module + ends.down] = layer.down.detach().to("cpu", dtype).contiguous()
        tensors[module + ends.up] = layer.up.detach().to("cpu", dtype).contiguous()
        if ends.alpha:
            alpha = torch.tensor(layer.alpha, dtype=torch.float32)
            tensors[module + ends.alpha] = alpha if alpha.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float64)
    return tensors


def _adapter_metadata(lora: Lora) -> dict[str, Any]:
    """peft's settings by component, from which diffusers' `load_lora_weights` makes its layers."""
    settings = {}
    for component in lora.components():
        # without text_model. a target fits CLIPTextModel in transformers 4 and in 5
        layers = {path.removeprefix(TEXT_PREFIX): layer for path, layer in lora.of(component).items()}
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


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Header and data of a safetensors file. The library writes metadata in a random order; this header is sorted.

    Hashes of the data alone are added: modelspec's, and the one by which A1111 and Civitai know a LoRA.
    """
    from safetensors.torch import save

    whole = save(tensors)
    size = int.from_bytes(whole[:8], "little")
    data = memoryview(whole)[8 + size :]
    digest = hashlib.sha256(data).hexdigest()
    metadata = {**metadata, "format": "pt", "sshs_model_hash": digest}
    if "modelspec.sai_model_spec" in metadata:
        metadata["modelspec.hash_sha256"] = f"0x{digest}"
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    assert not wrong, f"safetensors metadata must be strings: {wrong}"
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(whole[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, data


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
        stored = _write(lora, temporary, format, family, denoiser.config, dtype, metadata)
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


def _near(one: LoraLayer, other: LoraLayer, dtype: torch.dtype) -> bool:
    """Whether two layers of other factors make the same change, up to a rounding of the factors to `dtype`."""
    expected = one.delta()
    return bool((other.delta() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm())
