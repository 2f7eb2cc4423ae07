"""hydra/launcher=slurm and hydra/launcher=skypilot; the work is in charforgex.cloud. See docs/launchers.md.

Hydra imports every module of this namespace at each start, so nothing else is imported here.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from charforgex.binding import bind
        from charforgex.cloud.launching import launch
        from charforgex.cloud.settings import SlurmSettings
        from charforgex.cloud.slurm import Slurm

        place = Slurm(bind(SlurmSettings, self.settings, "hydra.launcher"))
        return launch(place, self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx)


class SkyPilotLauncher(Launcher):
    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from charforgex.binding import bind
        from charforgex.cloud.launching import launch
        from charforgex.cloud.settings import SkySettings
        from charforgex.cloud.skypilot import SkyPilot

        place = SkyPilot(bind(SkySettings, self.settings, "hydra.launcher"))
        return launch(place, self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx)
