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


def unet_facts(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Pixels per latent, what picture sides must be a multiple of, and the side at which the base was trained."""
    unet, vae = configs["unet"], configs["vae"]
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "latent_stride": stride,
        "pixel_multiple": stride * 2 ** (len(unet["block_out_channels"]) - 1),
        "default_size": stride * unet["sample_size"],
    }


def adaptable(family: Family, denoiser_config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """The weight's shape of each of the denoiser's modules that a LoRA can adapt, by path: the linear and convolutional ones.

    Known without diffusers for the bases that are listed.
    """
    from charforgex.families.bases import listed

    found = listed(denoiser_config)
    return measure_adaptable(family, family.denoiser_name, denoiser_config) if found is None else found


def measure_adaptable(family: Family, name: str, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """`adaptable` of any of the family's networks, from the network itself on the meta device."""
    return _measured(family.name, name, json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _measured(family_name: str, name: str, config: str) -> Mapping[str, tuple[int, ...]]:
    import torch

    from charforgex.families.registry import spelling

    with torch.device("meta"):
        network = build(spelling(family_name), name, json.loads(config))
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {path: tuple(module.weight.shape) for path, module in network.named_modules() if isinstance(module, kinds)}


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of one component of a diffusers folder. Raises ModelError."""
    return read_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"))
