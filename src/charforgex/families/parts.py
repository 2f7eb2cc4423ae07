"""A family's components as classes and configs, without their weights."""

from __future__ import annotations

from collections.abc import Mapping
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


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of one component of a diffusers folder. Raises ModelError."""
    return read_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"))
