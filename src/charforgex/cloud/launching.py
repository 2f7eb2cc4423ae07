"""What every launcher does around the place where the jobs run: compose and check them all, and only then ask for what costs time or money;
wait, and hand back what came of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from charforgex.binding import bind, plain
from charforgex.cloud.parcels import Parcel, find, key_of, refuse_secrets, waiting
from charforgex.cloud.settings import LaunchSettings
from charforgex.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

SWEEP = re.compile(r"\+{0,2}sweeps?(@[^=]*)?=")  # a job that was given it would begin the sweep again


class Place(Protocol):
    """Where jobs run."""

    settings: LaunchSettings

    def __init__(self, settings: LaunchSettings): ...

    def check(self) -> None:
        """Raises ConfigError unless the place can be asked for something from here."""

    def prepare(self, job: Job) -> None:
        """Raises ConfigError for what cannot be there, and fits the job's settings and files to the place."""

    def plan(self, parcels: Sequence[Parcel], jobs: Sequence[Job]) -> None:
        """Prints what would be asked for."""

    def run(self, parcels: Sequence[Parcel], jobs: Sequence[Job], ended: Callable[[Parcel], None]) -> None:
        """Submits those that are not waiting already and, unless detached, waits until each has its return.json, which it may write itself;
        `ended` is called as they end. Leaves the jobs alone when interrupted."""

    def farewell(self, parcels: Sequence[Parcel]) -> str:
        """How to wait for jobs that were left alone again, and how to end them."""


@dataclass
class Job:
    """One job of a sweep. `settings` and `hydra` are what is sent."""

    number: int
    overrides: list[str]
    cfg: DictConfig
    entry: str
    settings: dict[str, Any]
    folder: str | None  # that it runs in
    run_dir: str | None  # of a training: known here, so that whoever runs it again finds it
    tell: bool = False  # whether the log has to say what return.json holds
    sweep_dir: str = ""
    subdir: str = ""

    @property
    def title(self) -> str:
        return f"job {self.number} ({' '.join(self.overrides) or 'as it is'})"

    def send(self, parcel: Parcel) -> None:
        from omegaconf import OmegaConf

        hydra = OmegaConf.to_container(OmegaConf.masked_copy(self.cfg, "hydra"), resolve=False, enum_to_str=True)
        own = hydra["hydra"]
        own["overrides"]["task"] = self.overrides
        own["sweep"] |= {"dir": self.sweep_dir, "subdir": self.subdir}
        own["job"]["chdir"] = chdir(self.cfg)
        own["launcher"] = own["sweeper"] = None  # what began the sweep is no business of its jobs
        job = {"entry": self.entry, "folder": self.folder, "overrides": self.overrides, "run_dir": self.run_dir, "tell": self.tell}
        job["command"] = sys.argv  # that began the sweep, which a run's provenance names
        parcel.pack(job, self.settings, OmegaConf.to_yaml(OmegaConf.create(hydra)))


def set_up(kind: type[Place], schema: type[LaunchSettings], config: DictConfig) -> Place:
    """The place that `hydra.launcher` describes, before the sweep has so much as a folder. Raises ConfigError."""
    from omegaconf import OmegaConf

    node = plain(config.hydra.launcher, "hydra.launcher")
    place = kind(bind(schema, {name: value for name, value in node.items() if name != "_target_"}, "hydra.launcher"))
    refuse_without_values(place.settings, config)
    refuse_secrets("multirun.yaml", OmegaConf.to_yaml(config))
    place.check()
    return place


def launch(
    place: Place, context: HydraContext, task: TaskFunction, config: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """What Hydra's launchers do: the jobs' returns, in their order. One that failed does not keep the others from ending."""
    from hydra.core.utils import configure_log, setup_globals

    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    settings = place.settings
    taken: list[Parcel] = []
    folders = {parcel.job()["run_dir"] for parcel in waiting(settings.folder)}
    jobs = []
    for number, given in enumerate(overrides, start=first):
        job = compose(context, task, config, list(given), number)
        fresh = bool(job.settings.get("fresh"))
        parcel = find(settings.folder, key_of(job.entry, job.settings), taken, fresh)
        taken.append(parcel)
        choose_run_dir(job, parcel, folders)
        place.prepare(job)
        jobs.append(job)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    if settings.dry_run:
        place.plan(taken, jobs)
        return [returned(job, None) for job in jobs]
    for parcel, job in zip(taken, jobs, strict=True):
        if parcel.state() in ("new", "failed"):
            job.send(parcel)
        else:
            say(f"{job.title}: {'waits' if parcel.state() == 'waiting' else 'ended'} in {parcel.folder}")
    titles = {parcel: job.title for parcel, job in zip(taken, jobs, strict=True)}
    todo = [(parcel, job) for parcel, job in zip(taken, jobs, strict=True) if parcel.state() != "done"]
    try:
        place.run([parcel for parcel, _ in todo], [job for _, job in todo], lambda parcel: report(titles[parcel], parcel))
    except KeyboardInterrupt:
        say(place.farewell([parcel for parcel in taken if parcel.state() == "waiting"]))
        raise
    if settings.detach:
        say(place.farewell([parcel for parcel in taken if parcel.state() == "waiting"]))
        return [returned(job, None) for job in jobs]
    if all(parcel.state() == "done" for parcel in taken):  # else the same command is to find those that are
        for parcel in taken:
            (parcel.folder / "delivered").touch()
    return [returned(job, parcel) for job, parcel in zip(jobs, taken, strict=True)]


def refuse_without_values(settings: LaunchSettings, config: DictConfig) -> None:
    """Raises ConfigError for a launch that returns no values, if a sweeper would choose by them."""
    for name in ("dry_run", "detach"):
        if getattr(settings, name) and not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            raise ConfigError(
                f"hydra.launcher.{name}=true brings no values back, by which this sweeper chooses what to try next; leave it out, "
                f"or set hydra/sweeper=basic."
            )


def compose(context: HydraContext, task: TaskFunction, config: DictConfig, overrides: list[str], number: int) -> Job:
    """The job's settings, known to be right. Raises ConfigError."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    cfg = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(cfg):
        cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
    with of_job(cfg):
        sweep_dir, subdir = str(cfg.hydra.sweep.dir), str(cfg.hydra.sweep.subdir)
        with open_dict(cfg.hydra.runtime):
            OmegaConf.set_readonly(cfg.hydra.runtime, False)
            cfg.hydra.runtime.output_dir = os.path.abspath(os.path.join(sweep_dir, subdir))
        HydraConfig.instance().set_config(cfg)
        values = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        values._set_parent(cfg)
        if hasattr(task, "check"):
            task.check(values)
        settings = OmegaConf.to_container(values, resolve=True)
    kept = [override for override in OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False) if not SWEEP.match(override)]
    return Job(number, kept, cfg, entry_of(task), settings, os.getcwd(), None, sweep_dir=sweep_dir, subdir=subdir)


@contextlib.contextmanager
def of_job(cfg: DictConfig) -> Iterator[None]:
    """Hydra's global settings are those of a job, so that references to them can be resolved."""
    from hydra.core.hydra_config import HydraConfig

    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def chdir(cfg: DictConfig) -> bool:
    """Whether the job changes into its output folder, as Hydra decides it."""
    from hydra import version

    return bool(cfg.hydra.job.chdir) if cfg.hydra.job.chdir is not None else not version.base_at_least("1.2")


def entry_of(task: TaskFunction) -> str:
    """A name by which another process finds the function: nothing of it is pickled."""
    if entry := getattr(task, "entry", None):
        return entry
    module, name = getattr(task, "__module__", None), getattr(task, "__qualname__", "<locals>")
    if module is None or "<locals>" in name:
        raise ConfigError(f"{task!r} has no name by which another process could import it; define it at the top of a module.")
    if module != "__main__":
        return f"{module}:{name}"
    return f"{os.path.relpath(sys.modules['__main__'].__file__)}:{name}"


def choose_run_dir(job: Job, parcel: Parcel, taken: set[str | None]) -> None:
    """Decides now in which folder a training is to go on whenever it is started again; no other that waits has it. A sweeper may have."""
    if "run_dir" not in job.settings or job.settings["resume"] is not None:
        return
    if parcel.state() in ("waiting", "done"):
        job.run_dir = parcel.job()["run_dir"]
    elif job.settings["run_dir"] is not None:
        job.run_dir = str(job.settings["run_dir"])
        if job.run_dir in taken:
            raise ConfigError(f"run_dir={job.run_dir} is another job's of this launch, or of one that still waits; leave run_dir null.")
    else:
        from omegaconf import OmegaConf

        module = importlib.import_module(job.entry.rpartition(":")[0])
        path, _ = module.choose_run_dir(OmegaConf.create(job.settings))
        numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
        job.run_dir = str(next(one for one in (path, *numbered) if str(one) not in taken and module.state_of(one) != "finished"))
    taken.add(job.run_dir)
    job.settings |= {"run_dir": job.run_dir, "fresh": False}


def returned(job: Job, parcel: Parcel | None) -> JobReturn:
    """The job's return as Hydra knows it; without a parcel, of one that nobody waited for."""
    from hydra.core.utils import JobReturn, JobStatus
    from omegaconf import OmegaConf

    working_dir = os.path.join(job.cfg.hydra.sweep.dir, job.subdir) if chdir(job.cfg) else os.getcwd()
    done = JobReturn(
        overrides=job.overrides, cfg=OmegaConf.create(job.settings), hydra_cfg=OmegaConf.masked_copy(job.cfg, "hydra"),
        working_dir=working_dir, task_name=job.cfg.hydra.job.name, status=JobStatus.COMPLETED,
    )  # fmt: skip
    if parcel is None:
        done.return_value = None
    elif parcel.state() in ("failed", "waiting"):
        done.status = JobStatus.FAILED
        unknown = LaunchError(f"{job.title} has not come home from {parcel.submitted()['id']}.")
        done.return_value = parcel.error() if parcel.state() == "failed" else unknown
    else:
        done.return_value = parcel.returned()["value"]
    return done


def report(title: str, parcel: Parcel) -> None:
    if parcel.state() == "waiting":
        return
    came = parcel.returned()
    say(f"{title}: {came['value'] if came['status'] == 'COMPLETED' else (came['message'].splitlines() or [came['kind']])[0]}")


def say(text: str) -> None:
    print(text, flush=True)
