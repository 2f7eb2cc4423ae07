"""LoRA files: reading, writing, and saving with proof that the file is right.

diffusers   `unet.<path>.lora_A.weight`, `.lora_B.weight`; alpha in the header's `lora_adapter_metadata`
kohya       `lora_unet_<SGM path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`: ComfyUI, A1111, Forge

Every key of a file is accounted for: what is left over is a LoraError that names it. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from charforgex.errors import LoraError
from charforgex.lora.inject import TEXT_PREFIX, same_output
from charforgex.lora.state import Lora, LoraLayer, some
from charforgex.runs import replace_atomic

FORMATS = ("diffusers", "kohya")
SIDES = {  # how a format's keys end
    "diffusers": {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"},
    "kohya": {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"},
}
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' and peft's settings, as JSON; diffusers refuses it in kohya files
TEXT_MODULES = [*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
TEXT_LAYERS = 32  # of the deepest CLIP text encoder, OpenCLIP bigG; whether the loaded one has a layer is checked on loading


class Spelling(Protocol):
    """What a Family tells about the names in its LoRA files."""

    name: str
    denoiser_name: str
    kohya_prefixes: Mapping[str, str]

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> dict[str, str]: ...


# ---- names ----


def kohya_names(family: Spelling, denoiser_config: Mapping[str, Any]) -> dict[str, str]:
    """Every module that can be adapted, as in `Lora.layers`, to its name in a kohya file."""
    names = {}
    for component, prefix in family.kohya_prefixes.items():
        if component == family.denoiser_name:
            spelled = family.lora_names(denoiser_config)
        else:
            spelled = [f"{TEXT_PREFIX}encoder.layers.{i}.{module}" for i in range(TEXT_LAYERS) for module in TEXT_MODULES]
            spelled = {path: path for path in spelled}
        names |= {f"{component}.{path}": f"{prefix}_{other.replace('.', '_')}" for path, other in spelled.items()}
    assert len(set(names.values())) == len(names), "two modules share a kohya name"
    return names


def _readable(format: str, family: Spelling, denoiser_config: Mapping[str, Any]) -> dict[str, str]:
    """Every module name that a file may hold, to the one in `Lora.layers`."""
    kohya = kohya_names(family, denoiser_config)
    readable = {}
    for ours, theirs in kohya.items():
        component, _, path = ours.partition(".")
        bare = path.removeprefix(TEXT_PREFIX)  # as transformers 5 spells CLIPTextModel
        if format == "diffusers":
            readable |= {ours: ours, f"{component}.{bare}": ours}
        else:  # some tools flatten diffusers' own paths
            flat = [f"{family.kohya_prefixes[component]}_{name.replace('.', '_')}" for name in (path, bare)]
            readable |= dict.fromkeys((theirs, *flat), ours)
    return readable


def identify(keys: Iterable[str]) -> str:
    """The format of a file with these keys. Raises LoraError if it is none that can be read."""
    keys = list(keys)
    for format, sides in SIDES.items():
        if any(key.endswith(side) for key in keys for side in sides if side != ".alpha"):
            return format
    guess = ""
    if any("hada_" in key or "lokr_" in key for key in keys):
        guess = " They look like LyCORIS LoHa or LoKr, which cannot be read."
    elif any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        guess = " They look like a whole checkpoint, not an adapter."
    raise LoraError(f"None of the {len(keys)} keys is a LoRA's in diffusers or kohya format: {some(keys)}.{guess}")


# ---- reading ----


def read(path: str | Path, family: Spelling, denoiser_config: Mapping[str, Any]) -> Lora:
    """A `.safetensors` LoRA of either format, in float32. A missing alpha means alpha = rank.

    Raises LoraError if the file is unreadable, of an unknown format, or has keys that are left over.
    """
    tensors, metadata = _load(Path(path))
    try:
        return from_tensors(tensors, metadata, family, denoiser_config)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in a LoRA file's header; no tensor is read. Raises LoraError if it is no LoRA file that can be read."""
    path = Path(path)
    with _opened(path) as file:
        try:
            identify(file.keys())
        except LoraError as error:
            raise LoraError(f"{path}: {error}") from error
        return dict(file.metadata() or {})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


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
    format = identify(tensors)
    readable = _readable(format, family, denoiser_config)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    left_over = []
    for key, tensor in tensors.items():
        end = next((end for end in SIDES[format] if key.endswith(end)), None)
        name = readable.get(key.removesuffix(end)) if end else None
        if name is None:
            left_over.append(key)
        elif SIDES[format][end] in found[name]:
            raise LoraError(f"{name} is there twice under two spellings, one of them {key}.")
        else:
            found[name][SIDES[format][end]] = tensor
    if left_over:
        dora = " DoRA cannot be read." if any("dora_scale" in key or "lora_magnitude" in key for key in left_over) else ""
        raise LoraError(
            f"{len(left_over)} of {len(tensors)} keys belong to no module of this {family.name} model: {some(left_over)}.{dora}"
        )
    incomplete = [name for name, sides in found.items() if not {"down", "up"} <= sides.keys()]
    if incomplete:
        raise LoraError(f"{len(incomplete)} layers lack one of their two factors: {some(incomplete)}.")

    said = _said_alphas(metadata, found)
    return Lora({name: _layer(name, sides, said.get(name)) for name, sides in found.items()}, dict(metadata))


def _layer(name: str, sides: Mapping[str, Tensor], said_alpha: float | None) -> LoraLayer:
    down, up, alpha = sides["down"], sides["up"], sides.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{name} has an alpha of {alpha.numel()} values; it must be one.")
    if alpha is None:
        alpha = said_alpha if said_alpha is not None else down.shape[0] if down.ndim else 1
    try:
        return LoraLayer(down.float(), up.float(), float(alpha))
    except LoraError as error:
        raise LoraError(f"{name}: {error}") from error


def _said_alphas(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, float]:
    """Alphas by layer as diffusers' header gives them: one for each component, and patterns for exceptions."""
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        settings = json.loads(metadata[ADAPTER_METADATA])
        unreadable = [key for key, value in settings.items() if value and key.endswith((".use_rslora", ".use_dora", ".lora_bias"))]
        if unreadable:
            raise LoraError(f"It was trained with {some(unreadable)}, which cannot be read.")
        components = {key.removesuffix(".lora_alpha"): value for key, value in settings.items() if key.endswith(".lora_alpha")}
        patterns = {component: settings.get(f"{component}.alpha_pattern") or {} for component in components}
        compiled = {component: [(re.compile(rf"(.*\.)?({key})$"), key) for key in patterns[component]] for component in components}
        alphas = {}
        for name in names:
            component, _, path = name.partition(".")
            if component in components:
                # peft's rule: the first pattern that fits the end of the path. Most patterns are the path itself.
                bare, said = path.removeprefix(TEXT_PREFIX), patterns[component]
                key = bare if bare in said else next((key for pattern, key in compiled[component] if pattern.match(path)), None)
                alphas[name] = float(components[component] if key is None else said[key])
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


def _write(lora, path, format, family, denoiser_config, dtype, metadata) -> None:
    tensors = to_tensors(lora, format, family, denoiser_config, dtype)
    metadata = dict(lora.metadata if metadata is None else metadata)
    metadata.pop(ADAPTER_METADATA, None)
    if format == "diffusers":
        metadata[ADAPTER_METADATA] = json.dumps(_adapter_metadata(lora), sort_keys=True)
    header, data = _serialised(tensors, metadata)
    with path.open("wb") as file:
        file.write(header)
        file.write(data)


def to_tensors(lora: Lora, format: str, family: Spelling, denoiser_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file by key. Alphas are float32, so that no rounding changes the strength."""
    if format not in FORMATS:
        raise LoraError(f"The LoRA format {format} is unknown; choose {' or '.join(FORMATS)}.")
    lora.check()
    try:
        lora.rounded(dtype).check()
    except LoraError as error:
        raise LoraError(f"The adapter does not fit into {dtype}; save it in float32 or bfloat16. {error}") from error
    names = kohya_names(family, denoiser_config)
    unknown = [name for name in lora.layers if name not in names]
    if unknown:
        raise LoraError(f"{len(unknown)} of {len(lora)} layers are on no module of this {family.name} model: {some(unknown)}.")
    tensors = {}
    for name, layer in lora.layers.items():
        factors = {"down": layer.down, "up": layer.up}
        module = name if format == "diffusers" else names[name]
        for end, side in SIDES[format].items():
            if side in factors:
                tensors[module + end] = factors[side].detach().to("cpu", dtype).contiguous()
            elif format == "kohya":
                tensors[module + end] = torch.tensor(layer.alpha, dtype=torch.float32)
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
            "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
            "target_modules": sorted(layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
        }
        settings |= {f"{component}.{key}": value for key, value in config.items()}
    return settings


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

    `denoiser`, and text `encoders` by component, hold the adapter that was trained; `lora` is a copy of it, or its moving average. Before the file gets its
    name it is read back: every layer must be there with the values that `dtype` can hold, and, put into peft layers by
    the code that generation uses, must give the very outputs of the trained layers. The denoiser is left as it was.
    """
    expected = lora.rounded(dtype)
    with replace_atomic(path) as temporary:
        _write(lora, temporary, format, family, denoiser.config, dtype, metadata)
        reloaded = read(temporary, family, denoiser.config)
        if missing := set(expected.layers) ^ set(reloaded.layers):
            raise LoraError(f"{path} was not saved: {len(missing)} of {len(lora)} layers do not come back: {some(sorted(missing))}.")
        if changed := [name for name, layer in expected.layers.items() if not layer.equals(reloaded.layers[name])]:
            raise LoraError(f"{path} was not saved: {len(changed)} of {len(lora)} layers come back changed: {some(changed)}.")
        trained = {family.denoiser_name: denoiser, **(encoders or {})}
        if strangers := set(lora.components()) ^ set(trained):
            raise LoraError(f"{path} was not saved: only one of the adapter and what was trained has {some(sorted(strangers))}.")
        differing = [
            f"{component}.{name}"
            for component, network in trained.items()
            for name in same_output(network, component, expected, reloaded)
        ]
        if differing:
            raise LoraError(f"{path} was not saved: {len(differing)} layers give other outputs when loaded: {some(differing)}.")
    return Path(path)
