"""hydra/launcher=processes: each job of a sweep in a process of its own on this machine, some at a time, each on one of its GPUs.

A job that is killed takes nobody with it: it is a failed job for the sweeper, which may begin it again.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

GRACE_SECONDS = 60  # for jobs to save when the sweep is interrupted


@dataclass
class ProcessesConf:
    _target_: str = "hydra_plugins.charforgex_processes.ProcessesLauncher"
    at_once: int = 2  # jobs that run together
    gpus: bool = True  # give each one GPU of those in CUDA_VISIBLE_DEVICES, where that is set


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="charforgex")


class Killed(RuntimeError):
    """A job's process ended without an answer."""


class ProcessesLauncher(Launcher):
    def __init__(self, at_once: int, gpus: bool):
        if at_once < 1:
            raise ValueError(f"hydra.launcher.at_once={at_once}: at least one job must run; set it to 2, say.")
        self.at_once, self.gpus = at_once, gpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if self.gpus else []
        slots = [device for device in devices if device] or [None]
        left = list(enumerate(job_overrides))
        running: dict[Connection, tuple[int, Any, str | None]] = {}
        found: dict[int, JobReturn] = {}
        context = multiprocessing.get_context("spawn")  # forked, a job would inherit torch's threads and a GPU's state
        try:
            while left or running:
                while left and len(running) < self.at_once:
                    index, overrides = left.pop(0)
                    slot = min(slots, key=lambda slot: sum(used == slot for _, _, used in running.values()))
                    print(f"job {initial_job_idx + index}: {' '.join(filter_overrides(overrides))}", flush=True)
                    receiver, sender = context.Pipe(duplex=False)
                    job = (self.hydra_context, self.task_function, self.config, list(overrides), initial_job_idx + index)
                    process = context.Process(target=_job, args=(sender, slot, list(sys.argv), *job))
                    process.start()
                    sender.close()  # the child's own is the last one, so that its end is heard
                    running[receiver] = index, process, slot
                for receiver in wait(list(running)):
                    index, process, _ = running.pop(receiver)
                    found[index] = _answer(receiver, process, job_overrides[index])
        except BaseException:
            _stop([process for _, process, _ in running.values()])
            raise
        return [found[index] for index in range(len(job_overrides))]


def _job(
    sender: Connection, slot: str | None, argv: list[str], hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig,
    overrides: list[str], number: int,
) -> None:  # fmt: skip
    """In the child."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    from charforgex.config import prepare

    if slot is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot
    sys.argv = argv  # the provenance of a run names the command
    Plugins.instance()  # they know how to read configs
    prepare(next(Path(source.path) for source in config.hydra.runtime.config_sources if source.provider == "main"))
    loader = hydra_context.config_loader
    GlobalHydra.instance().initialize(Hydra(task_name=config.hydra.job.name, config_loader=loader))
    job_config = loader.load_sweep_config(config, overrides)
    with open_dict(job_config):
        job_config.hydra.job.id, job_config.hydra.job.num = str(number), number
    HydraConfig.instance().set_config(job_config)
    done = run_job(
        hydra_context=hydra_context, task_function=task_function, config=job_config, job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip
    sender.send(done)


def _answer(receiver: Connection, process: Any, overrides: Sequence[str]) -> JobReturn:
    """What the job returned, or a failure where it died first. Raises KeyboardInterrupt where it was stopped by one."""
    try:
        done = receiver.recv()
    except EOFError:
        done = None
    process.join()
    if done is not None:
        return done
    if process.exitcode == 130:
        raise KeyboardInterrupt
    ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
    lost = JobReturn(overrides=overrides, status=JobStatus.FAILED)
    lost.return_value = Killed(f"its process ended with {ended}")
    return lost


def _stop(processes: Sequence[Any]) -> None:
    """Jobs save at their next step when asked; a terminal's Ctrl-C has reached them already."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        if process.is_alive() and not sys.stdin.isatty():
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
