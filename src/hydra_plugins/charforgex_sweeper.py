"""hydra/sweeper=charforgex: a search by Optuna among the settings of `train`. See docs/sweeps.md; the work is in charforgex.sweeping.

Hydra runs every module of this namespace at each start, so nothing heavy is imported here; and before `sys.modules` has it, so that
dataclasses could not resolve annotations that are texts.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SweeperConf:
    """`charforgex.sweeping.settings.SweepSettings` says what each may be."""

    _target_: str = "hydra_plugins.charforgex_sweeper.CharforgexSweeper"
    study: str = "sweep"
    trials: int = 20
    at_once: int = 1
    sampler: str = "tpe"
    pruner: str = "none"
    objective: list[str] = field(default_factory=lambda: ["value"])
    storage: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="charforgex", node=SweeperConf, provider="charforgex")


class CharforgexSweeper(Sweeper):
    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        from charforgex.sweeping.run import sweep

        return sweep(self.settings, arguments, self.hydra_context.config_loader, self.config, self.launcher)
