"""How the modules of a base model are called in LoRA files. Names are made from the denoiser's own modules and looked up, never guessed.

Inside, a layer is "<component>.<diffusers path>". Other tools name the modules of the original networks, in which several of
ours may be one: queries, keys and values of an attention are rows of one weight there. A `Table` says which of our modules
a name in a file stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from charforgex.lora.inject import TEXT_PREFIX

CLIP_LAYERS, T5_LAYERS = 32, 24  # of the deepest ones, OpenCLIP bigG and T5-XXL; whether the loaded one has a layer is checked on loading
CLIP_MODULES = [*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
T5_MODULES = [*(f"0.SelfAttention.{name}" for name in "qkvo"), *(f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))]
KOHYA = {"denoiser": "lora_unet", "clip_l": "lora_te1", "clip_g": "lora_te2", "t5xxl": "lora_te3"}
COMFYUI = {"denoiser": "diffusion_model", **{kind: f"text_encoders.{kind}.transformer" for kind in ("clip_l", "clip_g", "t5xxl")}}


@dataclass(frozen=True)
class Place:
    """Where a module of ours stands in the original network: `path` has dots and no prefix.

    `rows`, from the first to the one after the last, are its part of a weight that joins several; None if it stands alone.
    `swapped`: the two halves of its rows are in the other order there, as shift and scale of a modulation are.
    """

    path: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


Parts = tuple[tuple[str, Place], ...]  # the layers that one name in a file stands for, in the order of their rows
Table = dict[str, Parts]  # by name in a file


class Spelling(Protocol):
    """What a Family tells about the names in its LoRA files."""

    name: str
    denoiser_name: str
    components: Mapping[str, Mapping[str, str]]
    kohya_has_our_names: bool
    lora_unread: Mapping[str, str]
    pictures: str

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]: ...

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]: ...


class Names:
    """Every module that can be adapted, of one family at one size, and the tables of its spellings."""

    def __init__(self, family: Spelling, denoiser_config: Mapping[str, Any]):
        self.family, self.kohya_has_our_names, self.unread = family.name, family.kohya_has_our_names, family.lora_unread
        self.kinds = {family.denoiser_name: "denoiser", **_text_encoders(family)}
        self.modules = {family.denoiser_name: dict(family.lora_names(denoiser_config))}
        self.modules |= {component: _text_modules(kind) for component, kind in self.kinds.items() if kind != "denoiser"}
        self.dialects = {  # format -> its names
            format: _table((f"{family.denoiser_name}.{path}", place) for path, place in places.items())
            for format, places in family.lora_dialects(denoiser_config).items()
        }

    def table(self, format: str) -> Table:
        """The names that `format` is written with: of the modules that its readers know."""
        table, unread = self._spelled(format), self.unread.get(format)
        return {name: parts for name, parts in table.items() if unread not in parts[0][0]} if unread else table

    def places(self, format: str) -> set[str]:
        """Our names of the layers that `format` can hold."""
        return {ours for parts in self.table(format).values() for ours, _ in parts}

    def _spelled(self, format: str) -> Table:
        if format in self.dialects:
            return self.dialects[format]
        if format == "kohya" and self.kohya_has_our_names:
            return self._own(lambda component, kind, path: [f"{'lora_te' if self._is_only_encoder(kind) else KOHYA[kind]}_{_flat(path)}"])
        if format == "kohya":
            return self._original(lambda kind, path: f"{KOHYA[kind]}_{_flat(path)}")
        if format == "comfyui":
            return self._original(lambda kind, path: f"{COMFYUI[kind]}.{path}")
        return self._own(lambda component, kind, path: [f"{component}.{path}"])

    def readable(self) -> Table:
        """All names that are understood, whatever the format: the written ones and those that other tools use besides."""
        return self._readable

    @cached_property
    def _readable(self) -> Table:
        tables = [self._spelled(format) for format in ("diffusers", "kohya", "comfyui", *self.dialects)]
        tables += [self._own(self._also), self._own(self._also_flat)]
        # peft's own prefix, and none, before original paths
        tables += [
            self._original(lambda kind, path: f"base_model.model.{path}", "denoiser"),
            self._original(lambda kind, path: path, "denoiser"),
            self._original(lambda kind, path: f"{KOHYA[kind]}_{_flat(path)}"),
        ]
        if "unet" in self.modules:  # diffusers before its version 0.22, AnimateDiff and MotionDirector: attention processors with LoRA
            tables += [self._own(self._processors)]
            tables += [self._original(lambda kind, path, i=i: _processors(path)[i], "denoiser") for i in (0, 1, -1)]
        merged: Table = {}
        for table in tables:
            clash = [name for name, parts in table.items() if _meant(merged.setdefault(name, parts)) != _meant(parts)]
            assert not clash, f"names that stand for two things: {clash[:9]}"
        return merged

    def _is_only_encoder(self, kind: str) -> bool:
        return kind != "denoiser" and len(self.kinds) == 2

    @staticmethod
    def _processors(component: str, kind: str, path: str) -> list[str]:
        if kind == "denoiser":
            return [start + name for name in _processors(path) for start in ("", f"{component}.")]
        inside, _, last = path.rpartition(".")
        named = f"{inside}.to_{last.removesuffix('_proj')}_lora"
        return [f"{component}.{name}" for name in {named, named.removeprefix(TEXT_PREFIX)}] if inside.endswith("self_attn") else []

    @staticmethod
    def _also(component: str, kind: str, path: str) -> list[str]:
        if kind == "denoiser":
            return [f"base_model.model.{path}", f"diffusion_model.{path}", path]
        return [f"{component}.{path.removeprefix(TEXT_PREFIX)}"]  # as transformers 5 spells CLIPTextModel

    @staticmethod
    def _also_flat(component: str, kind: str, path: str) -> list[str]:
        if kind == "denoiser":  # ComfyUI and A1111; OneTrainer; SimpleTuner
            return [f"{prefix}_{_flat(path)}" for prefix in ("lora_unet", "lora_transformer", "lycoris")]
        number = component.rpartition("_")[2] if component[-1].isdigit() else "1"  # OneTrainer counts the encoders of the pipeline
        prefixes = {KOHYA[kind], f"lora_te{number}", *(["lora_te"] if kind == "clip_l" else [])}
        return [f"{prefix}_{_flat(spelled)}" for prefix in sorted(prefixes) for spelled in {path, path.removeprefix(TEXT_PREFIX)}]

    def _own(self, spell: Callable[[str, str, str], Iterable[str]]) -> Table:
        return {
            name: ((f"{component}.{path}", Place(path)),)
            for component, modules in self.modules.items()
            for path in modules
            for name in spell(component, self.kinds[component], path)
        }

    def _original(self, spell: Callable[[str, str], str], only: str | None = None) -> Table:
        table: Table = {}
        for component, modules in self.modules.items():
            kind = self.kinds[component]
            if only in (None, kind):
                spelled = _table((f"{component}.{path}", place) for path, place in modules.items())
                named = {spell(kind, path): parts for path, parts in spelled.items()}
                assert len(named) == len(spelled) and not named.keys() & table.keys(), "two modules share a name"
                table |= named
        return table


def _table(places: Iterable[tuple[str, Place]]) -> Table:
    joined: dict[str, list[tuple[str, Place]]] = {}
    for ours, place in places:
        joined.setdefault(place.path, []).append((ours, place))
    return {path: tuple(sorted(parts, key=lambda part: part[1].rows or (0, 0))) for path, parts in joined.items()}


def _meant(parts: Parts) -> list[tuple]:
    return [(name, place.rows, place.swapped) for name, place in parts]


def _processors(path: str) -> list[str]:
    """As attention processors and modules were called that held LoRAs: ...attn1.to_out.0 is ...attn1.processor.to_out_lora."""
    head, _, last = path.rpartition(".")
    names = [f"{head}.processor.{last}_lora", f"{path}_lora"]
    if path.endswith(".to_out.0"):
        names.append(f"{path.removesuffix('.to_out.0')}.processor.to_out_lora")
    return names


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _text_encoders(family: Spelling) -> dict[str, str]:
    """Component -> what other tools call this encoder. The first CLIP is CLIP-L, the second OpenCLIP's bigG, for all families."""
    clips = ["clip_l", "clip_g"]
    text = {component: cls for component, cls in family.components["text"].items() if not cls.endswith("Tokenizer")}
    return {component: "t5xxl" if cls.endswith("T5EncoderModel") else clips.pop(0) for component, cls in text.items()}


def _text_modules(kind: str) -> dict[str, Place]:
    if kind == "t5xxl":
        paths = [f"encoder.block.{i}.layer.{module}" for i in range(T5_LAYERS) for module in T5_MODULES]
    else:
        paths = [f"{TEXT_PREFIX}encoder.layers.{i}.{module}" for i in range(CLIP_LAYERS) for module in CLIP_MODULES]
        paths.append("text_projection")
    return {path: Place(path) for path in paths}
