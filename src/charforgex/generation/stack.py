"""Which base model and LoRAs make the pictures, and whether they belong together: known from their headers and configs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind, conf_folder
from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families.registry import FAMILIES, SPELLED, get, spelling
from charforgex.families.settings import FamilySettings

if TYPE_CHECKING:
    from torch import Tensor

    from charforgex.families.base import Family
    from charforgex.families.settings import Recipe
    from charforgex.generation.settings import Settings
    from charforgex.lora.state import Lora
    from charforgex.types import Components

DEFAULT_FAMILY = {"picture": "sdxl", "video": "animatediff"}  # without a LoRA that says otherwise
DEFAULT_BASE = "charworld"
IN_CLIPS = {"sd15": "animatediff", "sdxl": "animatediff_sdxl"}  # family of pictures -> of clips, whose network has motion besides


@dataclass(frozen=True)
class Adapter:
    """One LoRA file that was read; every key of it has its place in the base."""

    path: Path
    name: str
    trigger: str | None
    lora: Lora
    tokens: dict[str, Tensor] = field(default_factory=dict)  # new tokens by text encoder, for the trigger's first word
    fps: float | None = None  # of the clips that it was trained on


@dataclass(frozen=True)
class Stack:
    """`bare` is the base without weights: its scheduler and the facts about its sizes."""

    family: Family
    base: str
    bare: Components
    adapters: list[Adapter]
    warnings: list[str]
    recipe: Recipe


def read_stack(settings: Settings) -> Stack:
    """Reads every header and every LoRA, and loads no base model. Raises LoraError, ModelError or ConfigError."""
    from charforgex.families.loading import denoiser_config
    from charforgex.lora import identify
    from charforgex.lora.formats import read, read_header

    paths = settings.lora_paths()
    headers = {path: read_header(path) for path in paths}
    metadata = {path: header for path, (header, _) in headers.items()}
    if len(metadata) < len(paths):
        raise LoraError(f"lora={list(map(str, paths))} names a file twice; name it once with the sum of its strengths.")
    said = {path: family_of(header) or identify.family_of(shapes) for path, (header, shapes) in headers.items()}
    family = get(_family_name(settings, said))
    if settings.mode == "video" and not family.is_video:
        raise ConfigError(_no_clips(family.name, said, _able(settings)))
    base, said_by = _base(settings, metadata)
    try:
        bare = family.load(base, only=(), tokenizer=settings.tokenizers)
        config = denoiser_config(family, base)
    except ModelError as error:
        if settings.mode == "picture" and settings.family is None and not paths and Path(base).expanduser().exists():
            raise ModelError(
                f"{error} Nothing said the family, so {family.name} was taken; say family=<one of {', '.join(_able(settings))}>."
            ) from error
        if said_by is None:
            raise
        raise ModelError(f"{said_by} was trained on {base}, which is not to be had here: {error} Say base=<where it is>.") from error
    adapters = []
    for name, path in _names(paths).items():
        lora = read(path, family, config)
        lora.check()
        tokens, fps = _tokens(path, metadata[path], family), _fps(path, metadata[path])
        adapters.append(Adapter(path, name, trigger_of(metadata[path]), lora, tokens, fps))
    recipe = _recipe(settings, family, base, config)
    return Stack(family, base, bare, adapters, _warnings(family, bare, metadata), recipe)


def _tokens(path: Path, header: Mapping[str, str], family: Family) -> dict[str, Tensor]:
    """The new tokens that the LoRA was trained with, from the file beside it."""
    from charforgex.families.tokens import read_tokens

    name = header.get("charforgex.tokens")
    return read_tokens(path.with_name(Path(name).name), family) if name else {}


def _fps(path: Path, header: Mapping[str, str]) -> float | None:
    said = header.get("charforgex.fps")
    if said is None:
        return None
    if not re.fullmatch(r"\d{1,3}(\.\d+)?", said) or float(said) == 0:
        raise LoraError(f"{path} says of itself that it was trained at charforgex.fps={said}, which is no number of frames a second.")
    return float(said)


def trigger_of(metadata: Mapping[str, str]) -> str | None:
    return metadata.get("charforgex.trigger") or metadata.get("modelspec.trigger_phrase") or None


def family_of(metadata: Mapping[str, str]) -> str | None:
    """The family that a LoRA's metadata names, in our words or in those of other tools."""
    if "charforgex.family" in metadata:
        return metadata["charforgex.family"]
    for name in (*FAMILIES, *SPELLED):
        if any(metadata.get(key) == value for key, value in spelling(name).lora_labels.items() if key != "modelspec.implementation"):
            return name
    return None


def _family_name(settings: Settings, said: Mapping[Path, str | None]) -> str:
    known = {path: name for path, name in said.items() if name is not None}
    goes_into = {name: IN_CLIPS.get(name, name) if settings.mode == "video" else name for name in known.values()}
    for path, name in known.items():
        if goes_into[name] in SPELLED:
            raise LoraError(
                f"{path} is for {name}, of which no base makes pictures here; mode=video takes it, with family={IN_CLIPS[name]}."
            )
    if settings.family is not None:
        for path, name in known.items():
            if goes_into[name] != settings.family.name:
                raise LoraError(f"{path} is for {name} and not for {settings.family.name}; leave family out, or choose another LoRA.")
        return settings.family.name
    if len(set(goes_into.values())) > 1:
        raise LoraError(f"the LoRAs are for different families: {', '.join(f'{path} for {name}' for path, name in known.items())}.")
    if known:
        return next(iter(goes_into.values()))
    if said:
        raise ConfigError(f"{next(iter(said))} does not say which family it is for; say family=<one of {', '.join(_able(settings))}>.")
    return DEFAULT_FAMILY[settings.mode]


def _able(settings: Settings) -> list[str]:
    """The families that can make what is asked for."""
    return [name for name in FAMILIES if get(name).is_video == (settings.mode == "video")]


def _no_clips(name: str, said: Mapping[Path, str | None], able: list[str]) -> str:
    if said:
        kinds = " and ".join([*IN_CLIPS, *able])
        return f"mode=video: {next(iter(said))} is for {name}, which makes pictures; clips take LoRAs of {kinds}. Or say mode=picture."
    return f"mode=video: family={name} makes pictures; say family={' or '.join(able)}, or mode=picture."


def _base(settings: Settings, metadata: Mapping[Path, Mapping[str, str]]) -> tuple[str, Path | None]:
    """The base's address, and the LoRA that named it."""
    if settings.base is not None:
        return settings.base, None
    if settings.family is not None:
        return settings.family.source, None
    said = {header["charforgex.base"]: path for path, header in metadata.items() if header.get("charforgex.base")}
    if len(said) > 1:
        raise ConfigError(f"the LoRAs were trained on different bases, {' and '.join(said)}; say base=<one of them>.")
    if said:
        return next(iter(said.items()))
    if metadata:
        raise ConfigError(
            f"{next(iter(metadata))} does not say which base model it was trained on; say base=<folder, hub id or .safetensors>."
        )
    return DEFAULT_BASE, None


def _recipe(settings: Settings, family: Family, base: str, denoiser_config: Mapping[str, Any]) -> Recipe:
    """The numbers of the choice of conf/family that was made, else of the one that names this base, else of the base most like it."""
    from omegaconf import OmegaConf

    if settings.family is not None:
        return settings.family.recipe
    choices = {path.stem: OmegaConf.load(path) for path in sorted((conf_folder() / "family").glob("*.yaml"))}
    same = (stem for stem, choice in choices.items() if (choice.get("name"), choice.get("source")) == (family.name, base))
    stem = next(same, None) or family.published(denoiser_config)
    return bind(FamilySettings, choices[stem], f"conf/family/{stem}.yaml").recipe


def _names(paths: list[Path]) -> dict[str, Path]:
    """Each LoRA's name: its file's, with a number where two files have the same."""
    names: dict[str, Path] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names[name] = path
    return names


def _warnings(family: Family, bare: Components, metadata: Mapping[Path, Mapping[str, str]]) -> list[str]:
    wanted = {"epsilon": "epsilon", "v": "v_prediction"}
    predicts = family.process(bare).prediction
    found = []
    for path, header in metadata.items():
        said = wanted.get(header.get("modelspec.prediction_type", ""))
        if said is not None and predicts in wanted.values() and said != predicts:  # rectified flows have one, whatever a file says
            found.append(
                f"{path.name} was trained on a base that predicts {said}, and {bare.source} predicts {predicts}; expect poor pictures."
            )
    return found
