"""LoRA files: what formats there are, and reading them. `writing.py` writes.

diffusers    `unet.<path>.lora_A.weight`, `.lora_B.weight`; alpha in the header's `lora_adapter_metadata`
kohya        `lora_unet_<original path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`: ComfyUI, A1111, Forge
comfyui      `diffusion_model.<original path>.lora_down.weight`, ...: ComfyUI's own names
ai-toolkit   as diffusers without the header: alpha is the rank, so the strength goes into lora_B
xlabs        `double_blocks.0.processor.qkv_lora1.down.weight`, ...: attention of Flux alone, alpha is the rank
animatediff  `<motion module>.attention_blocks.0.processor.to_q_lora.down.weight`, ...: its motion modules' attention, alpha is the rank

Every key of a file is accounted for: what is left over is a LoraError that names it. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora import lycoris
from charforgex.lora.identify import family_of, identify, unreadable
from charforgex.lora.inject import TEXT_PREFIX
from charforgex.lora.joined import split
from charforgex.lora.names import Names, Parts, Spelling
from charforgex.lora.quantized import whole
from charforgex.lora.reading import Streamed
from charforgex.lora.state import Layer, Lora, is_finite, shown, some


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
WRITTEN = FORMATS | {"ai-toolkit": Format(".lora_A.weight", ".lora_B.weight")}
WRITTEN |= dict.fromkeys(("xlabs", "animatediff"), Format(".down.weight", ".up.weight"))
SIDES = {  # how the keys end that are read, whatever the names; of two that fit, the first
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora.down.weight": "down", ".down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora.up.weight": "up", ".up.weight": "up",
    ".alpha": "alpha",
} | lycoris.SIDES  # fmt: skip
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' and peft's settings, as JSON; diffusers refuses it in kohya files
# What no adapter needs, and a hostile file may have: the largest published LoRAs have some thousand keys and 2 MB of captions' tags
MAX_HEADER, MAX_KEYS, MAX_KEY, MAX_PATTERNS = 32 << 20, 50_000, 500, 8
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # an alpha may be one
PACKED = {torch.float4_e2m1fn_x2, torch.float8_e8m0fnu}  # two values in a byte; exponents alone


# ---- reading ----


def read(path: str | Path, family: Spelling, denoiser_config: Mapping[str, Any]) -> Lora:
    """A `.safetensors` LoRA of any format, in float32. A missing alpha means alpha = rank.

    Raises LoraError if the file is unreadable, of an unknown format, or has keys that are left over.
    """
    with open_lora(path, Names(family, denoiser_config)) as file:
        return file.load()


@contextmanager
def open_lora(path: str | Path, names: Names) -> Iterator[LoraFile]:
    """`read` for what need not be in memory as a whole."""
    path = Path(path)
    with opened(path) as file:
        yield LoraFile(shapes_of(file), file.metadata() or {}, names, file.get_tensor, path)


def shapes_of(file: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors of an opened file, by key."""
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """A LoRA file's metadata, and its shapes by key; no tensor is read. Raises LoraError if it is no LoRA file that can be read."""
    path = Path(path)
    with opened(path) as file, _named(path):
        shapes = shapes_of(file)
        identify(shapes)
        return dict(file.metadata() or {}), shapes


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is quantised in it is read as what it stands for. Raises LoraError, also for a header that is out of all
    proportion to an adapter's: reading a million keys would take seconds and gigabytes.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LoraError(f"There is no LoRA file {path}.")
    if path.suffix != ".safetensors":
        raise LoraError(f"{path} is not a .safetensors file. Other formats can run code when they are opened; convert it first.")
    try:
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MAX_HEADER < length <= path.stat().st_size:
            raise LoraError(f"{path} has a header of {length} bytes; an adapter's has at most {MAX_HEADER}.")
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is damaged or no safetensors file: {shown(str(error))}") from error
    with file, path.open("rb") as binary:
        keys = file.keys()
        if len(keys) > MAX_KEYS or max(map(len, keys), default=0) > MAX_KEY:
            raise LoraError(
                f"{path} has {len(keys)} keys of up to {max(map(len, keys))} characters; an adapter has at most {MAX_KEYS} of {MAX_KEY}."
            )
        with _named(path):
            file = whole(Streamed(file, binary))
        yield file


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Errors say in which file it is."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{path}: {error}" if path else str(error)) from error


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Spelling, denoiser_config: Mapping[str, Any]) -> Lora:
    """`read` for a file that is in memory."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return LoraFile(shapes, metadata, Names(family, denoiser_config), tensors.__getitem__).load()


class LoraFile:
    """A LoRA file with its keys understood and its layers made when asked for, in float32: one module of the file is held at a time.

    `shapes` and `get` are of its tensors, by key; `path` is for messages. Raises LoraError for keys of no module, of two spellings, or
    without their other half, and when a layer is read, for factors that do not fit together, are no numbers or not finite.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], names: Names, get: Callable[[str], Tensor],
        path: Path | None = None,
    ):  # fmt: skip
        self.metadata, self.shapes, self.path, self._get = dict(metadata), shapes, path, get
        self.dtypes: dict[str, torch.dtype] = {}  # by key, of what has been read
        self._last: tuple[str, dict[str, Layer]] = "", {}
        with _named(path):
            identify(shapes)
            self._understand(names)

    def _understand(self, names: Names) -> None:
        readable, shapes = names.readable(), self.shapes
        self.sides: dict[str, dict[str, str]] = defaultdict(dict)  # by name in the file: which factor -> its key
        left_over = []
        for key in shapes:
            end = next((end for end in SIDES if key.endswith(end)), None)
            module = key.removesuffix(end) if end else key
            if end is None or module not in readable:
                left_over.append(key)
            elif SIDES[end] in self.sides[module]:
                raise LoraError(f"{_said(readable[module])} is there twice under two spellings, one of them {some([key])}.")
            else:
                self.sides[module][SIDES[end]] = key
        left_over = [key for key in left_over if not (key.endswith((".diff", ".diff_b")) and not self._tensor(key).any())]  # no change
        if left_over:
            raise LoraError(
                f"{len(left_over)} of {len(shapes)} keys belong to no module of this {names.family} model: {some(left_over)}."
                f"{_hint(shapes, names.family)}{unreadable(left_over)}"
            )
        self.parts = {module: readable[module] for module in self.sides}
        self.spelled: dict[str, str] = {}  # our names -> names in the file
        for module, parts in self.parts.items():
            for name, _ in parts:
                if self.spelled.setdefault(name, module) != module:
                    raise LoraError(f"{name} is there twice under two spellings, {self.spelled[name]} and {module}.")
        incomplete = [_said(self.parts[module]) for module, sides in self.sides.items() if not lycoris.is_whole(sides)]
        if incomplete:
            raise LoraError(f"{len(incomplete)} layers lack one of their two factors: {some(incomplete)}.")
        downs = {name: shapes[self.sides[module]["down"]] for name, module in self.spelled.items() if "down" in self.sides[module]}
        plain = [name for name, module in self.spelled.items() if "magnitude" not in self.sides[module]]
        self._alphas = _said_alphas(self.metadata, {name: down[0] for name, down in downs.items() if down}, plain)

    @property
    def names(self) -> list[str]:
        """Our names of the layers. Of a weight that joins several of ours, some may turn out to be unchanged."""
        return list(self.spelled)

    def kinds(self) -> dict[str, str]:
        """Of what kind each layer is, by our names. Nothing is read."""
        return {name: lycoris.kind_of(self.sides[module]) for name, module in self.spelled.items()}

    def dtype(self, sides: Mapping[str, str]) -> torch.dtype:
        """In which the factors of one of `sides` are stored; magnitudes are float32 in every file. Reads one of them."""
        return self._tensor(min(key for side, key in sides.items() if side not in ("alpha", "magnitude", "dora_scale"))).dtype

    def layer(self, name: str) -> Layer | None:
        """None if this module is not adapted. Raises LoraError."""
        module = self.spelled.get(name)
        return None if module is None else self._module(module).get(name)

    def _module(self, module: str) -> dict[str, Layer]:
        if self._last[0] != module:
            with _named(self.path):
                sides = {side: self._tensor(key) for side, key in self.sides[module].items()}
                self._last = module, _layers(self.parts[module], sides, self._alphas)
        return self._last[1]

    def _tensor(self, key: str) -> Tensor:
        """Raises LoraError for one that cannot be read, is no tensor of real numbers, or not of the shape that was listed."""
        from safetensors import SafetensorError

        try:
            tensor = self._get(key)
        except SafetensorError as error:
            raise LoraError(f"{shown(key)} cannot be read: {shown(str(error))}") from error
        real = tensor.is_floating_point() and tensor.dtype not in PACKED
        if not (real or (key.endswith(".alpha") and tensor.dtype in INTEGERS)) or tuple(tensor.shape) != self.shapes[key]:
            raise LoraError(f"{shown(key)} is {tensor.dtype} {tuple(tensor.shape)}, which is no factor; floating-point numbers are.")
        if not is_finite(tensor):
            raise LoraError(f"{shown(key)} holds values that are not finite.")
        self.dtypes[key] = tensor.dtype
        return tensor

    def __iter__(self) -> Iterator[tuple[str, Layer]]:
        for module in self.sides:
            yield from self._module(module).items()

    def load(self) -> Lora:
        return Lora(dict(self), self.metadata)


def _said(parts: Parts) -> str:
    return " + ".join(name for name, _ in parts)


def _hint(shapes: Mapping[str, Sequence[int]], family: str) -> str:
    looks = family_of(shapes)
    if looks not in (None, family):
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
        layer = lycoris.layer_of(sides, None if alpha is None else float(alpha))
        if place.rows is None:
            return {name: lycoris.swapped(layer) if place.swapped else layer}
        rows = [place.rows for _, place in parts]
        layers = split(layer, rows) if layer.kind == "lora" else lycoris.split_rows(layer, rows)
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
        matching = {component: _matching(list(said)) for component, said in patterns.items()}
        alphas = {}
        for name, rank in ranks.items():
            component, _, path = name.partition(".")
            if component in components:
                bare, said = path.removeprefix(TEXT_PREFIX), patterns[component]
                key = bare if bare in said else matching[component](path)
                alphas[name] = float(components[component] if key is None else said[key])
                if settings.get(f"{component}.use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)
                    alphas[name] *= math.sqrt(rank)
                if not math.isfinite(alphas[name]):
                    raise LoraError(f"Its header's {ADAPTER_METADATA} gives {name} an alpha of {alphas[name]}.")
        return alphas
    except LoraError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise LoraError(f"Its header's {ADAPTER_METADATA} cannot be understood: {error}") from error


def _matching(patterns: Sequence[str]) -> Callable[[str], str | None]:
    """peft's rule: of patterns for the end of a path, at a dot, the first that fits. Nearly all are plain names, which are looked up.

    Raises LoraError for regular expressions that could take for ever to try.
    """
    order = {pattern: i for i, pattern in enumerate(patterns)}
    plain = {pattern.replace("\\.", "."): pattern for pattern in reversed(patterns) if re.fullmatch(r"\^?([\w-]|\\?\.)+", pattern)}
    others = [pattern for pattern in patterns if not re.fullmatch(r"\^?([\w-]|\\?\.)+", pattern)]
    slow = [one for one in others if len(re.findall(r"[*+?{]", one)) > 2 or re.search(r"\)[*+?{]|\(\?|\\\d", one) or len(one) > 100]
    if slow or len(others) > MAX_PATTERNS:
        raise LoraError(f"Its {len(others)} patterns for alphas are more than can be tried, such as {some(slow or others)}.")
    compiled = {re.compile(rf"(.*\.)?({pattern})$"): pattern for pattern in others}

    def find(path: str) -> str | None:
        names = path.split(".")
        ends = ["^" + path, *(".".join(names[i:]) for i in range(len(names)))]
        found = [plain[end] for end in ends if end in plain] + [pattern for one, pattern in compiled.items() if one.match(path)]
        return min(found, key=order.__getitem__, default=None)

    return find
