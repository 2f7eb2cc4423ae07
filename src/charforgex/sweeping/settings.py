"""The schema of `hydra.sweeper` for hydra/sweeper=charforgex. No torch and no Optuna here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from charforgex.config import Range
from charforgex.errors import ConfigError
from charforgex.training.trial import AT_THE_END, LESS_IS_BETTER, Pruner, Word

Positive = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class SweepSettings:
    study: str = "sweep"  # names the folder and, with a hash of what is compared, the study
    trials: Positive = 20
    at_once: Positive = 1  # trials handed to the launcher together
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Pruner = "none"
    objective: tuple[Word, ...] = ("value",)
    storage: str | None = None  # a database's URL, or env:NAME; None: a file in the sweep's folder
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.study):
            raise ConfigError(f"hydra.sweeper.study={self.study} names files; use letters, digits, dots, - and _.")
        if not self.objective or len(set(self.objective)) < len(self.objective):
            raise ConfigError(f"hydra.sweeper.objective={list(self.objective)}: name one number, or several different ones.")
        if self.pruner != "none" and len(self.objective) > 1:
            raise ConfigError(
                f"hydra.sweeper.pruner={self.pruner} compares one curve; name one objective, or set hydra.sweeper.pruner=none."
            )
        if self.pruner != "none" and self.objective[0] in AT_THE_END:
            raise ConfigError(
                f"hydra.sweeper.pruner={self.pruner}: {self.objective[0]} is known at the end only; set hydra.sweeper.pruner=none."
            )
        if self.storage and not self.storage.startswith("env:") and urlsplit(self.storage).password:
            raise ConfigError(
                "hydra.sweeper.storage holds a password, which every trial's files would repeat; put the URL into an environment variable "
                "and say hydra.sweeper.storage=env:NAME."
            )

    @property
    def directions(self) -> list[str]:
        return ["minimize" if word in LESS_IS_BETTER else "maximize" for word in self.objective]
