"""A family's components as classes and configs, without their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.families.sources import read_json

if TYPE_CHECKING:
    from torch import nn

    from charforgex.families.base import Family


def library(family: Family, name: str) -> str:
    """ "diffusers" or "transformers"."""
    return _address(family, name).partition(".")[0]


def component_class(family: Family, name: str) -> type:
    module, _, cls = _address(family, name).partition(".")
    return getattr(import_module(module), cls)


def _address(family: Family, name: str) -> str:
    return next(group[name] for group in family.components.values() if name in group)


def build(family: Family, name: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a config, with random weights."""
    cls = component_class(family, name)
    return cls.from_config(dict(config)) if library(family, name) == "diffusers" else cls(cls.config_class(**config))


def adaptable(family: Family, denoiser_config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """The weight's shape of each of the denoiser's modules that a LoRA can adapt, by path: the linear and convolutional ones."""
    config = json.dumps(dict(denoiser_config), sort_keys=True, default=str)
    return _adaptable(component_class(family, family.denoiser_name), config)


@lru_cache(maxsize=8)
def _adaptable(cls: type, config: str) -> Mapping[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        denoiser = cls.from_config(json.loads(config))
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {path: tuple(module.weight.shape) for path, module in denoiser.named_modules() if isinstance(module, kinds)}


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of one component of a diffusers folder. Raises ModelError."""
    return read_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"))
