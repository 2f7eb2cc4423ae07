"""hydra/launcher=slurm and hydra/launcher=skypilot; the work is in charforgex.cloud. See docs/launchers.md.

Hydra imports every module of this namespace at each start, so nothing else is imported here.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PlaceLauncher(Launcher):
    def __init__(self, **settings: Any):
        """Hydra gives the settings here, and all of the config to `setup`, which reads them there."""

    @abstractmethod
    def place(self, config: DictConfig) -> Any:
        """Where the jobs run, a `charforgex.cloud.launching.Place`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.where = self.place(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from charforgex.cloud.launching import launch

        return launch(self.where, self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx)


class SlurmLauncher(PlaceLauncher):
    def place(self, config: DictConfig) -> Any:
        from charforgex.cloud.launching import set_up
        from charforgex.cloud.settings import SlurmSettings
        from charforgex.cloud.slurm import Slurm

        return set_up(Slurm, SlurmSettings, config)


class SkyPilotLauncher(PlaceLauncher):
    def place(self, config: DictConfig) -> Any:
        from charforgex.cloud.launching import set_up
        from charforgex.cloud.settings import SkySettings
        from charforgex.cloud.skypilot import SkyPilot

        return set_up(SkyPilot, SkySettings, config)
