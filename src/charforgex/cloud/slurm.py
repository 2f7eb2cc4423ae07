"""hydra/launcher=slurm: jobs on a Slurm cluster, by submitit; one process on one node each, together an array.

What submitit pickles is the name of `supervise` and a path; settings and results are the parcel's files, on a disk that all nodes see.
Its own way of putting a job into the queue again ends the process inside the signal's handler. Here the training is a process of its own,
which a signal asks to stop at its next step: when it has saved and ended, the job is queued again, and goes on in the same run folder.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from charforgex.cloud.launching import Job, say
from charforgex.cloud.parcels import Parcel, without_secrets
from charforgex.cloud.settings import SlurmSettings
from charforgex.errors import ConfigError
from charforgex.runs import EXIT_ERROR, EXIT_TERMINATED, write_atomic

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of Slurm, by what sbatch's --signal names: this sitting ends soon
LOOK_EVERY, ASK_EVERY = 0.5, 30.0  # seconds between looks at the files, and between questions to Slurm, which it does not like often
LAG = 15.0  # seconds after a job's end until its files are seen from here
LAST_LINES = 20
# What tells a process that srun started it, which the training must not take for one among several of its own
OF_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP", "SLURM_TASKS_PER_NODE")


class Slurm:
    """See `launching.Place`."""

    def __init__(self, settings: SlurmSettings):
        self.settings = settings

    @property
    def logs(self) -> Path:
        return self.settings.folder.absolute() / "logs"

    def check(self) -> None:
        try:
            import submitit  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError('hydra/launcher=slurm needs submitit: pip install ".[slurm]".') from error
        missing = [command for command in ("sbatch", "srun", "sacct", "scontrol") if shutil.which(command) is None]
        if self.settings.cluster == "slurm" and missing and not self.settings.dry_run:
            raise ConfigError(
                f"hydra/launcher=slurm needs {', '.join(missing)}, which this machine has not; start it where sbatch is, or set "
                f"hydra.launcher.cluster=local to try it here."
            )

    def prepare(self, job: Job) -> None:
        trainer, gpus = job.settings.get("trainer") or {}, self.settings.gpus
        if (nodes := trainer.get("nodes") or 1) > 1:
            raise ConfigError(f"trainer.nodes={nodes}: hydra/launcher=slurm gives a job one node; set trainer.nodes=1.")
        devices, on_gpus = trainer.get("devices") or 1, trainer.get("accelerator") != "cpu"
        if devices > 1 and on_gpus and devices > gpus:
            raise ConfigError(f"trainer.devices={devices} are more than hydra.launcher.gpus={gpus}; set hydra.launcher.gpus={devices}.")
        if trainer.get("accelerator") == "gpu" and not gpus:
            raise ConfigError("trainer.accelerator=gpu, and hydra.launcher.gpus=0 asks Slurm for none; set hydra.launcher.gpus=1.")

    def plan(self, parcels: Sequence[Parcel], jobs: Sequence[Job]) -> None:
        from submitit.slurm.slurm import _make_sbatch_string

        for parcel, job in zip(parcels, jobs, strict=True):
            say(f"{job.title}: {job.run_dir or parcel.folder}")
        count = {"map_count": len(parcels)} if len(parcels) > 1 else {}
        say(_make_sbatch_string(command=f"{sys.executable} -u -m submitit.core._submit", folder=self.logs, **self.sbatch(), **count))

    def run(self, parcels: Sequence[Parcel], jobs: Sequence[Job], ended: Callable[[Parcel], None]) -> None:
        executor = self.executor()
        new = [parcel for parcel in parcels if parcel.state() != "waiting"]
        handles = {parcel: executor.job_class(folder=self.logs, job_id=parcel.submitted()["id"]) for parcel in parcels if parcel not in new}
        if new:
            self.logs.mkdir(parents=True, exist_ok=True)
            folders = [str(parcel.folder.absolute()) for parcel in new]
            submitted = executor.map_array(supervise, folders, [self.settings.requeues] * len(new))
            for parcel, handle in zip(new, submitted, strict=True):
                parcel.submit(id=handle.job_id)
            say(f"submitted {', '.join(handle.job_id for handle in submitted)}; logs are in {self.logs}")
            handles |= dict(zip(new, submitted, strict=True))
        if not self.settings.detach:
            self.wait(handles, set(new), ended)

    def wait(self, handles: dict[Parcel, Any], new: set[Parcel], ended: Callable[[Parcel], None]) -> None:
        asked, over_since = time.monotonic(), {}
        while handles:
            ask = time.monotonic() - asked > ASK_EVERY
            asked = time.monotonic() if ask else asked
            for parcel, handle in list(handles.items()):
                if self.settings.cluster == "local" and parcel not in new:
                    over = not is_alive(int(handle.job_id))  # submitit knows those of this launch alone
                else:
                    over = handle.done(force_check=ask)
                over_since[parcel] = min(over_since.get(parcel, math.inf), time.monotonic()) if over else math.inf
                if parcel.state() == "waiting" and time.monotonic() - over_since[parcel] > LAG:
                    parcel.fail("LaunchError", self.lost(handle))
                if parcel.state() != "waiting":
                    del handles[parcel]
                    ended(parcel)
            if handles:
                time.sleep(LOOK_EVERY)

    def lost(self, handle: Any) -> str:
        """What is known of a job that came to an end without a word of its own."""
        handle.get_info()  # asks
        log = handle.paths.stdout
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.exists() else ["(no log)"]
        what = f"Slurm's job {handle.job_id} ended without a result ({handle.state}); the last of {log}:"
        return without_secrets("\n".join([what, *lines]))

    def farewell(self, parcels: Sequence[Parcel]) -> str:
        ids = [parcel.submitted()["id"] for parcel in parcels]
        return f"{len(ids)} jobs go on; the same command, without detach=true, waits for them. To end them: scancel {' '.join(ids)}"

    def executor(self) -> Any:
        import submitit

        if self.settings.cluster == "slurm":
            executor = submitit.SlurmExecutor(folder=self.logs)
            executor.update_parameters(**self.sbatch())
        else:
            executor = submitit.LocalExecutor(folder=self.logs)
            executor.update_parameters(
                timeout_min=self.settings.time, signal_delay_s=self.settings.warning, gpus_per_node=self.settings.gpus,
                stderr_to_stdout=True, setup=self.settings.setup,
            )  # fmt: skip
        return executor

    def sbatch(self) -> dict[str, Any]:
        """As submitit spells them."""
        settings = self.settings
        asked = {
            "partition": settings.partition, "constraint": settings.constraint, "account": settings.account, "qos": settings.qos,
            "mem": None if settings.memory is None else f"{round(settings.memory * 1024)}MB", "gpus_per_node": settings.gpus or None,
            "setup": settings.setup or None,
        }  # fmt: skip
        return {name: value for name, value in asked.items() if value is not None} | {
            "job_name": "charforgex", "time": settings.time, "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": settings.cpus,
            "srun_args": [f"--cpus-per-task={settings.cpus}"],  # which srun does not take over from sbatch since Slurm 22.05
            "array_parallelism": settings.parallel, "signal_delay_s": settings.warning, "stderr_to_stdout": True,
            # a job that is preempted, or whose node fails, is queued again by Slurm itself
            "additional_parameters": {"requeue": True} | settings.extra,
        }  # fmt: skip


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# ---- on the node ----


def supervise(folder: str, requeues: int) -> None:
    """Runs the parcel in `folder`, and has Slurm queue the job again when it warned that this sitting ends.

    SIGTERM alone, which a preempted and a cancelled job get alike, asks the training to save, too; whether it comes back is Slurm's to say.
    Raises SystemExit if it ended without a result, which the launch tells from Slurm's word and the log.
    """
    parcel = Parcel(Path(folder))
    child: subprocess.Popen | None = None
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) == 1 and child is not None:  # asked twice, a training ends at once
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hear) for number in (*WARNINGS, signal.SIGTERM)}
    try:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_STEP)}
        # A group of its own: Slurm's signals go to all of this one, and the training is to be asked once.
        child = subprocess.Popen([sys.executable, "-u", "-m", "charforgex.cloud.job", folder], env=environment, start_new_session=True)
        if heard:
            child.send_signal(signal.SIGTERM)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if (parcel.folder / "return.json").exists():
        return
    if set(heard) & set(WARNINGS):
        queue_again(parcel, requeues)
    if not heard:
        print(f"the job ended with {f'signal {-code}' if code < 0 else f'exit code {code}'} and left no result", flush=True)
    raise SystemExit(EXIT_TERMINATED if heard else EXIT_ERROR)


def queue_again(parcel: Parcel, requeues: int) -> None:
    """Unless it has been done `requeues` times."""
    import submitit

    path = parcel.folder / "requeued"
    times = int(path.read_text()) if path.exists() else 0
    if times >= requeues:
        print(f"its time ran out {times + 1} times, and hydra.launcher.requeues={requeues} allows no more; all is saved", flush=True)
        return
    write_atomic(path, str(times + 1))
    print(f"asking to be queued again, {times + 1} of {requeues} times", flush=True)
    submitit.JobEnvironment()._requeue(requeues - times - 1)
