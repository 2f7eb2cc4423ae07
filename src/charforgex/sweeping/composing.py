"""Configs of trials, and the best one's as an experiment's yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from charforgex import runs
from charforgex.config import Search, check

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

PRESETS = ("experiment", "debug", "sweeps")  # groups whose values an experiment spells out


class Composer:
    """Composes as the sweep's own command does, with other settings."""

    def __init__(self, loader: ConfigLoader, config: DictConfig):
        self.loader, self.config = loader, config

    def __call__(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """The checked config, and what is chosen of its groups."""
        elsewhere = [override for override in self.config.hydra.overrides.hydra if override.startswith("hydra.searchpath")]
        cfg = self.loader.load_configuration(self.config.hydra.job.config_name, [*elsewhere, *overrides], RunMode.RUN)
        choices = {group: choice for group, choice in cfg.hydra.runtime.choices.items() if group.partition("/")[0] != "hydra"}
        with open_dict(cfg):
            cfg.pop("hydra")
        check(cfg, self.loader, self.config.hydra.job.config_name, [*elsewhere, *overrides])
        return cfg, choices

    def search(self) -> Search:
        sources = {source.provider: source.path for source in self.config.hydra.runtime.config_sources}
        return Search(self.config.hydra.job.config_name, Path(sources["main"]), sources.get("command-line"))

    def folder(self) -> Path | None:
        """hydra.sweep.dir, where it is not the usual one, which is another folder every second."""
        given = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["dir"]
        return None if "${now:" in given else Path(self.config.hydra.sweep.dir)

    def experiment(self, overrides: Sequence[str], command: str, said: str) -> str:
        """The yaml of an experiment that trains what `overrides` do, without them. `said` is what speaks for it."""
        cfg, choices = self(overrides)
        _, usual = self([])
        chosen = {group: choice for group, choice in choices.items() if group not in PRESETS and choice != usual.get(group)}
        plain, _ = self([f"{group}={'null' if choice is None else choice}" for group, choice in chosen.items()])
        wanted, there = (OmegaConf.to_container(node, resolve=True) for node in (cfg, plain))
        changed = difference({key: value for key, value in wanted.items() if key not in runs.LOCATIONS}, there)
        defaults = {"defaults": [{f"override /{group}": choice} for group, choice in chosen.items()]} if chosen else {}
        return f"# @package _global_\n# {command}\n# {said}\n{OmegaConf.to_yaml(defaults | changed)}"


def difference(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` `there` lacks or has otherwise, nested as it was."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        if key in there and isinstance(value, dict) and isinstance(there[key], dict):
            if inner := difference(value, there[key]):
                found[key] = inner
        elif key not in there or value != there[key]:
            found[key] = value
    return found
