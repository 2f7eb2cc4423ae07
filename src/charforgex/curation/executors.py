"""Where shards are worked on: this process, processes here, Ray, or a Slurm array. One interface: `map(entry, jobs)`.

A job is a dict that JSON can hold, and its work ends in files that are whole or not there; so a job may be done twice, anywhere that sees
the same folders, and a killed one is simply done again.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from charforgex.binding import Range
from charforgex.errors import CharForgeError, ConfigError
from charforgex.runs import write_json

Job = dict[str, Any]
AHEAD = 2  # jobs given to each worker at a time: enough to keep it busy, few enough to stop soon
DIED = "A worker died in the middle of its work, most likely because memory ran out. What is done stays: run the same command again, {how}."


class Jobs(Sequence[Job]):
    """`count` jobs, each made by `make(number)` when it is asked for: of a million files only those in work are in memory."""

    def __init__(self, count: int, make: Callable[[int], Job]):
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Job:
        return self.make(range(self.count)[number])


@dataclass(frozen=True)
class ExecutorSettings:
    """Where shards are worked on. `folder` is where Slurm's tasks read and write their jobs; every machine must see it."""

    kind: Literal["local", "ray", "slurm"] = "local"
    workers: Annotated[int, Range(at_least=1)] | None = None
    address: str | None = None
    sbatch: tuple[str, ...] = ()
    folder: Path = Path()

    def __post_init__(self):
        if self.address is not None and self.kind != "ray":
            raise ConfigError(f"curation.address={self.address} has an effect with curation.executor=ray only; leave it null.")
        if self.sbatch and self.kind != "slurm":
            raise ConfigError(f"curation.sbatch={list(self.sbatch)} has an effect with curation.executor=slurm only; leave it empty.")


class Executor(Protocol):
    def map(self, entry: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """(number of the job, what `entry` ("module:function") returned), in the order in which they are done. A job's error is raised."""


def get_executor(settings: ExecutorSettings) -> Executor:
    if settings.kind == "ray":
        return RayCluster(settings)
    if settings.kind == "slurm":
        return SlurmArray(settings)
    return Local(settings.workers or os.cpu_count() or 1)


def resolve(entry: str) -> Callable[[Job], Any]:
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


def call(entry: str, job: Job) -> Any:
    return resolve(entry)(job)


_hiding = threading.RLock()


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hides where `__main__` came from: a spawned process would import it, and a script without a guard would run a second time."""
    with _hiding:
        told = vars(sys.modules["__main__"])
        hidden = {name: told.pop(name) for name in ("__file__", "__spec__") if name in told}
        told["__spec__"] = None
        try:
            yield
        finally:
            del told["__spec__"]
            told |= hidden


class _Worker(SpawnProcess):
    def start(self) -> None:
        with _nameless_main():
            super().start()


class _Spawn(SpawnContext):
    """Spawned, because a fork of a process with threads (torch, cv2) may hang."""

    Process = _Worker


def _begin() -> None:
    """What each worker does first. It computes on one core: more would take turns with the other workers."""
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody tells the workers of a killed run to stop: they would wait for jobs, and hold their memory, for good."""
    parent_process().join()
    os._exit(1)


class Local:
    """`workers` processes, or this one if there is one worker or one job. A worker that is killed ends the run; the shards done stay."""

    def __init__(self, workers: int):
        self.workers = workers

    def map(self, entry: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        workers = min(self.workers, len(jobs))
        if workers <= 1:
            yield from ((number, call(entry, job)) for number, job in enumerate(jobs))
            return
        with ExitStack() as stack:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=_Spawn(), initializer=_begin))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            waiting, queue = {}, iter(enumerate(jobs))
            while True:
                try:
                    while len(waiting) < AHEAD * workers and (following := next(queue, None)) is not None:
                        waiting[pool.submit(call, entry, following[1])] = following[0]
                    done = [(waiting.pop(future), future.result()) for future in wait(waiting, return_when=FIRST_COMPLETED).done]
                except BrokenProcessPool as error:
                    raise CharForgeError(DIED.format(how=f"with fewer than curation.workers={workers} if it happens twice")) from error
                if not done:
                    return
                yield from done


class RayCluster:
    """Ray tasks: on the cluster at `address` ("auto" is the one that `ray start` made here), or on a Ray of this machine's own."""

    def __init__(self, settings: ExecutorSettings):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError('curation.executor=ray needs Ray: pip install "charforgex[ray]".') from error
        self.ray, self.settings = ray, settings

    def map(self, entry: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        ray = self.ray
        if not ray.is_initialized():
            given = {"address": self.settings.address} if self.settings.address else {"num_cpus": self.settings.workers}
            try:
                ray.init(**given, include_dashboard=False, log_to_driver=False, logging_level="error")
            except ConnectionError as error:
                raise ConfigError(f"curation.address={self.settings.address}: no Ray answers there ({error}).") from error
        work = ray.remote(call).options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
        limit = AHEAD * max(1, int(self.settings.workers or ray.cluster_resources().get("CPU", 1)))
        waiting, queue = {}, iter(enumerate(jobs))
        while True:
            while len(waiting) < limit and (following := next(queue, None)) is not None:
                waiting[work.remote(entry, following[1])] = following[0]
            if not waiting:
                return
            for reference in ray.wait(list(waiting), num_returns=1)[0]:
                number = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
                    raise CharForgeError(DIED.format(how="with more memory for each CPU of Ray if it happens twice")) from error
                yield number, result


class SlurmArray:
    """One `sbatch --wait` of an array of `workers` tasks; task i does jobs i, i + workers, ... Folders must be on a shared disk."""

    def __init__(self, settings: ExecutorSettings):
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "curation.executor=slurm needs sbatch, which is not on this machine; start it on a login node of the cluster."
            )
        self.settings = settings

    def map(self, entry: str, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        if not jobs:
            return
        tasks = min(self.settings.workers or 16, len(jobs))
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.settings.folder, prefix="slurm_") as folder:
            with open(Path(folder, "jobs.jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(job) + "\n" for job in jobs)
            command = [sys.executable, "-m", "charforgex.curation.executors", folder, entry, str(tasks)]
            script = Path(folder, "array.sh")
            options = [f"#SBATCH {option}" for option in (f"--array=0-{tasks - 1}", "--cpus-per-task=1", *self.settings.sbatch)]
            lines = ["#!/bin/bash", *options, "export OMP_NUM_THREADS=1", f'{shlex.join(command)} "$SLURM_ARRAY_TASK_ID"']
            script.write_text("\n".join(lines) + "\n", encoding="utf-8")
            run = subprocess.run(["sbatch", "--wait", str(script)], capture_output=True, text=True)
            results = [Path(folder, f"result_{number}.json") for number in range(len(jobs))]
            lacking = [number for number, path in enumerate(results) if not path.exists()]
            if run.returncode or lacking:
                said = (run.stderr or run.stdout).strip()[-500:]
                raise CharForgeError(
                    f"The Slurm array left {len(lacking)} of {len(jobs)} shards undone (sbatch ended with {run.returncode}: {said}). "
                    "What is done stays; the same command does the rest."
                )
            for number, path in enumerate(results):
                yield number, json.loads(path.read_text(encoding="utf-8"))["result"]


def do_task(folder: Path, entry: str, tasks: int, task: int) -> None:
    """What task `task` of the array does."""
    with open(folder / "jobs.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % tasks == task:
                write_json(folder / f"result_{number}.json", {"result": call(entry, json.loads(line))})


if __name__ == "__main__":
    do_task(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
