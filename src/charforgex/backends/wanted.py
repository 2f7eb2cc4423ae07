"""A training's settings, ticked off as another tool takes them over.

Each is handed on, is of no concern to the tool, or differs there. What the user set and the tool cannot do is refused by name; where only
our default differs, a note says what the tool does instead. So nothing is dropped unseen, settings of tomorrow included.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from charforgex.config import compose
from charforgex.errors import ConfigError

# What is done here, before or after the tool: which pictures with which captions, and what the result is called, told and measured by
OURS = (
    "name", "seed", "runs_dir", "run_dir", "resume", "fresh", "cache_dir", "family", "backend", "curation", "data.source", "data.trigger",
    "data.add_trigger", "data.default_caption", "data.val_count", "data.background", "data.num_workers", "evaluation.embedder",
    "evaluation.follower", "evaluation.others", "data.regularisation.source", "data.regularisation.default_caption",
    "logger.tensorboard", "logger.offline",
)  # fmt: skip


class Wanted:
    """`wanted["lora.rank"]` hands a setting on. `check` raises ConfigError with all that cannot be."""

    def __init__(self, cfg: Any, tool: str):
        from omegaconf import OmegaConf

        self.tool, self.notes, self.problems = tool, [], []
        self._tree = OmegaConf.to_container(cfg, resolve=True)
        self._defaults = defaults(cfg)
        self._taken: set[str] = set(OURS)

    @property
    def base(self) -> Mapping[str, Any]:
        """The group `family`."""
        return self._tree["family"]

    @property
    def family(self) -> str:
        return self.base["name"]

    def __getitem__(self, key: str) -> Any:
        self._taken.add(key)
        return _at(self._tree, key)

    def is_changed(self, key: str) -> bool:
        """Whether it is not as the family's recipe and the group's yaml have it."""
        return _at(self._tree, key) != _at(self._defaults, key)

    def differs(self, key: str, theirs: str, way_out: str = "leave it as it was") -> None:
        """The tool has no equal of a setting's value, but does something else: fine for a default, refused for a choice."""
        if self.is_changed(key):
            self.refuse(key, theirs, way_out)
        else:
            self.notes.append(f"{key}={self[key]}: {self.tool} {theirs}")

    def refuse(self, key: str, why: str, way_out: str) -> None:
        self.problems.append(f"{key}={self[key]}: {self.tool} {why}; {way_out}.")

    def only(self, key: str, *values: Any, why: str, way_out: str = "") -> Any:
        """Hands on a setting of which the tool knows these values. The first is what a default that is none of them becomes."""
        value = self[key]
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            return value
        if self.is_changed(key):
            self.refuse(key, why, way_out or f"set it to {' or '.join(str(one) for one in values)}")
        else:
            self.notes.append(f"{key}={value}: {self.tool} {why}, so it is {values[0]} there")
        return values[0]

    def check(self) -> None:
        left = [key for key in _leaves(self._tree) if not self._is_taken(key) and self.is_changed(key)]
        left = [f"{key}={_at(self._tree, key)}: {self.tool} has no equal of it; leave it out, or train without backend." for key in left]
        if self.problems or left:
            raise ConfigError("\n".join([*self.problems, *left]))

    def _is_taken(self, key: str) -> bool:
        return any(key == taken or key.startswith(f"{taken}.") for taken in self._taken)


def defaults(cfg: Any) -> dict[str, Any]:
    """What `train.yaml` asks for with this family and nothing else said."""
    from omegaconf import OmegaConf, open_dict

    plain = _plain().copy()
    with open_dict(plain):
        plain.family = OmegaConf.create(OmegaConf.to_container(cfg.family, resolve=True))
    return OmegaConf.to_container(plain, resolve=True)


@functools.cache
def _plain() -> Any:
    return compose("train")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return found


def _at(tree: Any, key: str) -> Any:
    """None also where there is no such key: of another choice of its group."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
