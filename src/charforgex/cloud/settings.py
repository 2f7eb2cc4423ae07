"""The schema of conf/hydra/launcher/: what each setting of a launcher may be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.binding import Range
from charforgex.errors import ConfigError

Positive = Annotated[int, Range(at_least=1)]
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SIZE = re.compile(r"\d+(\.\d+)?\+?")  # of SkyPilot: 8 exactly, 8+ at least


@dataclass(frozen=True)
class LaunchSettings:
    """What all launchers of jobs that outlive their launch have."""

    folder: Path
    dry_run: bool
    detach: bool


@dataclass(frozen=True)
class SlurmSettings(LaunchSettings):
    cluster: Literal["slurm", "local"]
    time: Positive  # minutes
    gpus: Annotated[int, Range(at_least=0)]
    cpus: Positive
    memory: Annotated[float, Range(above=0)] | None  # GB
    partition: str | None
    constraint: str | None
    account: str | None
    qos: str | None
    parallel: Positive
    setup: list[str]
    extra: dict[str, str | int | float | bool]
    warning: Annotated[int, Range(at_least=1)]  # seconds
    requeues: Annotated[int, Range(at_least=0)]

    def __post_init__(self):
        if self.warning >= 60 * self.time:
            raise ConfigError(
                f"hydra.launcher.warning={self.warning} seconds before the end of hydra.launcher.time={self.time} minutes is before the "
                f"beginning; shorten it, or ask for more time."
            )
        given = {name.replace("-", "_") for name in self.extra}
        ours = {
            "array": "parallel", "signal": "warning", "requeue": "requeues", "time": "time", "partition": "partition", "account": "account",
            "constraint": "constraint", "qos": "qos", "mem": "memory", "cpus_per_task": "cpus", "gpus_per_node": "gpus", "output": "folder",
            "error": "folder", "open_mode": "folder", "nodes": None, "ntasks": None, "ntasks_per_node": None,
        }  # fmt: skip
        for name in sorted(given & set(ours)):
            way_out = f"set hydra.launcher.{ours[name]}" if ours[name] else "a job is one process on one node; trainer.devices starts more"
            raise ConfigError(f"hydra.launcher.extra.{name} is not sbatch's to be told apart from the rest; {way_out}.")


@dataclass(frozen=True)
class SkySettings(LaunchSettings):
    sky: str
    infra: str | None
    accelerators: str | None
    cpus: str | int | None
    memory: str | int | None
    disk: Positive | None  # GB
    image: str | None
    spot: bool
    max_price: Annotated[float, Range(above=0)] | None  # dollars an hour
    parallel: Positive
    retries: Annotated[int, Range(at_least=0)]
    idle: Positive  # minutes
    sync: Annotated[float, Range(above=0)]  # minutes
    workdir: Path | None
    inputs: list[str]
    setup: list[str]
    python: str
    secrets: list[str]
    environment: list[str]

    def __post_init__(self):
        for setting in ("secrets", "environment"):
            for name in getattr(self, setting):
                if not VARIABLE.fullmatch(name):
                    # not said: somebody may have put a secret itself here
                    raise ConfigError(
                        f"hydra.launcher.{setting} holds something that is no name of an environment variable; name them: [HF_TOKEN]."
                    )
        for name in ("cpus", "memory"):
            value = getattr(self, name)
            if value is not None and not SIZE.fullmatch(str(value)):
                raise ConfigError(f"hydra.launcher.{name}={value} is not a size of SkyPilot's; 8 is exactly 8, 8+ at least 8.")
        if self.accelerators is not None and not re.fullmatch(r"[A-Za-z0-9_-]+(:\d+)?", self.accelerators):
            raise ConfigError(f"hydra.launcher.accelerators={self.accelerators} is not a GPU and its number; write A100 or A100:2.")
        if self.image is not None and not self.image.strip():
            raise ConfigError("hydra.launcher.image is empty; null takes the cloud's own.")

    def resources(self) -> dict[str, Any]:
        """As SkyPilot's task YAML spells them; what nobody asked for is left to its choice."""
        asked = {
            "infra": self.infra, "accelerators": self.accelerators, "cpus": self.cpus, "memory": self.memory, "disk_size": self.disk,
            "image_id": self.image, "max_hourly_cost": self.max_price, "use_spot": self.spot or None,
        }  # fmt: skip
        return {name: value for name, value in asked.items() if value is not None}
