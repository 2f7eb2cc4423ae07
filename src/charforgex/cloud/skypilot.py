"""hydra/launcher=skypilot: each job on a machine rented for it, from RunPod, Lambda, AWS, GCP, Azure or a Kubernetes cluster, by SkyPilot.

SkyPilot lives in an environment of its own, since it needs other versions of what is needed here, and is spoken to by its command `sky`.
The parcel and the named inputs are copied to the machine, the job's log tells what came of it, and its folders come home by rsync: now and
then while it runs, so that a machine that is taken away costs minutes, and at the end, before the machine is given back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from charforgex.cloud.job import RETURNED
from charforgex.cloud.launching import Job, say
from charforgex.cloud.parcels import Parcel, without_secrets
from charforgex.cloud.settings import SkySettings
from charforgex.errors import ConfigError
from charforgex.runs import write_atomic

JOB, INPUTS = "charforgex_job", "charforgex_inputs"  # folders in the machine's home; SkyPilot's own, where the job runs, is sky_workdir
RUNNING, ENDED = (101,), (0, 100, 103)  # exit codes of `sky logs --status`; others: no such job, or no such machine
LOOK_EVERY = 20.0  # seconds before a log that broke off is followed again
LAST_LINES = 20
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours, in what `sky` prints


class SkyPilot:
    """See `launching.Place`."""

    def __init__(self, settings: SkySettings):
        self.settings = settings
        self.sent: dict[int, dict[str, Any]] = {}  # job's number -> what its machine gets, and what comes home
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    # ---- before anything is asked for ----

    def check(self) -> None:
        settings = self.settings
        if shutil.which(settings.sky) is None:
            raise ConfigError(
                f"hydra.launcher.sky={settings.sky} is not there; install SkyPilot into an environment of its own and name its command, as "
                f"docs/launchers.md shows."
            )
        if shutil.which("rsync") is None and not settings.dry_run:
            raise ConfigError("hydra/launcher=skypilot brings results home by rsync, which this machine has not; install rsync.")
        for setting, names in {"secrets": settings.secrets, "environment": settings.environment}.items():
            if missing := [name for name in names if not os.environ.get(name)]:
                raise ConfigError(
                    f"hydra.launcher.{setting} names {', '.join(missing)}, which this environment does not have; export it first."
                )
        if settings.workdir is not None and not settings.workdir.is_dir():
            raise ConfigError(f"hydra.launcher.workdir={settings.workdir} is not a folder; null sends none.")
        project = settings.workdir is not None and (settings.workdir / "pyproject.toml").is_file()
        if any(re.search(r"pip install( \S+)* ['\"]?\.[\['\"]?", line) for line in settings.setup) and not project:
            raise ConfigError(
                f"hydra.launcher.setup installs the folder it is in, and hydra.launcher.workdir={settings.workdir} is no checkout with a "
                f"pyproject.toml; start it in one, or set hydra.launcher.setup=['pip install charforgex']."
            )

    def prepare(self, job: Job) -> None:
        """Paths of this machine become paths of the other one; a job cannot be sent with those it would not find."""
        from omegaconf import OmegaConf

        settings = OmegaConf.create(job.settings)
        mounts, home = {}, {}
        for name in self.settings.inputs:
            value = OmegaConf.select(settings, name)
            values = list(value) if OmegaConf.is_list(value) else [value]
            there = []
            for one in values:
                if isinstance(one, str) and Path(one).expanduser().exists():
                    place = f"{INPUTS}/{len(mounts)}/{Path(one).absolute().name}"
                    mounts[f"~/{place}"] = str(Path(one).expanduser().absolute())
                    one = f"../{place}"
                there.append(one)
            if there != values:
                OmegaConf.update(settings, name, there if OmegaConf.is_list(value) else there[0])
        sweep = job.sweep_dir if not os.path.isabs(job.sweep_dir) else f"sweeps/{Path(job.sweep_dir).name}"
        home[sweep] = job.sweep_dir
        if job.run_dir is not None:
            there = f"runs/{Path(job.run_dir).name}"
            home[there] = job.run_dir
            settings.run_dir, settings.runs_dir, settings.cache_dir = there, "runs", "runs/cache"
        elif "out" in settings:
            if settings.out is None:
                raise ConfigError("out=null is a folder that nobody knows yet, and results must come home from it; say out=<folder>.")
            there = f"out/{Path(settings.out).name}"
            home[there], settings.out = str(settings.out), there
        if settings.get("resume") is not None:
            raise ConfigError(f"resume={settings.resume} is a run of this machine; give its own settings again, without resume.")
        online = OmegaConf.select(settings, "logger.wandb") and not OmegaConf.select(settings, "logger.offline")
        if online and "WANDB_API_KEY" not in self.settings.secrets:
            raise ConfigError(
                "logger.wandb=true needs a key on the machine; set hydra.launcher.secrets=[WANDB_API_KEY], or logger.offline=true."
            )
        job.settings = OmegaConf.to_container(settings, resolve=True)
        for name, value in paths_of_here(job.settings):
            raise ConfigError(
                f"{name}={value} is a path of this machine; send it along with hydra.launcher.inputs=[{name}], or make it relative."
            )
        job.sweep_dir, job.folder, job.tell = sweep, None, True
        self.sent[job.number] = {"mounts": mounts, "home": home}

    def task(self, parcel: Parcel, job: Job) -> dict[str, Any]:
        """SkyPilot's task YAML. No environment variables and no secrets: `sky` is told their names."""
        settings = self.settings
        task: dict[str, Any] = {
            "name": machine(parcel),
            "resources": settings.resources(),
            "file_mounts": {f"~/{JOB}": str(parcel.folder.absolute())} | self.sent[job.number]["mounts"],
            "run": f"mkdir -p ~/sky_workdir\ncd ~/sky_workdir\n{settings.python} -u -m charforgex.cloud.job ~/{JOB}\n",
        }
        if settings.workdir is not None:
            task["workdir"] = str(settings.workdir.absolute())
        if settings.setup:
            task["setup"] = "\n".join(["set -e", *settings.setup]) + "\n"
        return task

    def write_task(self, parcel: Parcel, job: Job) -> Path:
        import yaml

        return write_atomic(parcel.folder / "task.yaml", yaml.safe_dump(self.task(parcel, job), sort_keys=False))

    def plan(self, parcels: Sequence[Parcel], jobs: Sequence[Job]) -> None:
        """What would be sent, and SkyPilot's own plan with its price, as far as it can reach its catalogues."""
        import yaml

        for parcel, job in zip(parcels, jobs, strict=True):
            say(f"{job.title}\n{yaml.safe_dump(self.task(parcel, job), sort_keys=False)}")
        parcel, job = parcels[0], jobs[0]
        say(f"{len(jobs)} machines, {min(len(jobs), self.settings.parallel)} at a time; of one, SkyPilot says:")
        path = self.write_task(parcel, job)
        done = subprocess.run(self.launching(parcel, path, "--dryrun"), capture_output=True, text=True)
        say(self.clean(done.stdout + done.stderr))
        if done.returncode:
            say(f"sky cannot tell a price here: it ended with exit code {done.returncode}.")

    # ---- the machines ----

    def launching(self, parcel: Parcel, task: Path, *more: str) -> list[str]:
        settings = self.settings
        names = [word for name in settings.environment for word in ("--env", name)]
        names += [word for name in settings.secrets for word in ("--secret", name)]
        # --down after idle minutes: should nobody come to collect, the machine ends by itself
        idle = ["-i", str(settings.idle), "--down"]
        return [settings.sky, "launch", "-y", "-d", "-c", machine(parcel), *idle, *names, *more, str(task)]

    def run(self, parcels: Sequence[Parcel], jobs: Sequence[Job], ended: Callable[[Parcel], None]) -> None:
        for parcel, job in zip(parcels, jobs, strict=True):
            if parcel.state() == "waiting":
                self.sent[job.number] = parcel.submitted()["sent"]
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            left = {pool.submit(self.see_to, parcel, job): parcel for parcel, job in zip(parcels, jobs, strict=True)}
            try:
                while left:
                    done, _ = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        parcel = left.pop(future)
                        future.result()
                        if not self.settings.detach:
                            ended(parcel)
            except BaseException:
                self.stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.terminate()  # only what follows a log here; the machine goes on
                raise

    def see_to(self, parcel: Parcel, job: Job) -> None:
        """One job from its machine's start to its end. The parcel still waits at the end if it was detached, or could not come home."""
        log = parcel.folder / "log.txt"
        attached = parcel.state() == "waiting" and self.status(parcel) in ENDED + RUNNING
        for _ in range(self.settings.retries + 1):
            if not attached and not self.start(parcel, job, log):
                continue
            attached = False
            if self.settings.detach:
                return
            came = self.follow(parcel, job, log)
            if self.stopping.is_set():
                return
            if came is not None or self.status(parcel) in ENDED:
                self.finish(parcel, job, log, came)
                return
            say(f"{job.title}: {machine(parcel)} is gone")
        parcel.fail("LaunchError", f"{machine(parcel)}: {self.settings.retries + 1} machines did not bring it to an end; {last_of(log)}")

    def start(self, parcel: Parcel, job: Job, log: Path) -> bool:
        sent = self.sent[job.number]
        if job.run_dir is not None and (Path(job.run_dir) / "config.yaml").exists():  # what came home of an earlier machine
            sent["mounts"][f"~/sky_workdir/runs/{Path(job.run_dir).name}"] = str(Path(job.run_dir).absolute())
        task = self.write_task(parcel, job)
        parcel.submit(id=machine(parcel), sent=sent)
        say(f"{job.title}: asking for {machine(parcel)}; its log is {log}")
        with log.open("a", encoding="utf-8") as file:
            code = self.stream(self.launching(parcel, task), file)
        if code and not self.stopping.is_set():
            self.sky("down", "-y", machine(parcel))  # half a machine costs as much as a whole one
        return code == 0

    def follow(self, parcel: Parcel, job: Job, log: Path) -> dict[str, Any] | None:
        """What the job says that it returns; None if it ended, or its machine did, without a word."""
        came: list[dict[str, Any]] = []
        over = threading.Event()

        def listen(line: str) -> None:
            _, found, text = line.partition(RETURNED)
            if found:
                came.append(json.loads(text))

        def keep_home_up_to_date() -> None:
            while not over.wait(60 * self.settings.sync):
                self.bring_home(parcel, job)

        syncing = threading.Thread(target=keep_home_up_to_date, daemon=True)
        syncing.start()
        try:
            with log.open("a", encoding="utf-8") as file:
                while not came and not self.stopping.is_set():
                    self.stream([self.settings.sky, "logs", machine(parcel)], file, listen)
                    if came or self.stopping.is_set() or self.status(parcel) not in RUNNING:
                        break
                    self.stopping.wait(LOOK_EVERY)  # the connection broke, not the job
        finally:
            over.set()
            syncing.join()
        return came[0] if came else None

    def finish(self, parcel: Parcel, job: Job, log: Path, came: dict[str, Any] | None) -> None:
        """Results first, then the word that they are here, then the machine's end."""
        at_home = self.bring_home(parcel, job)
        if came is not None and came["status"] == "COMPLETED" and not at_home:
            say(
                f"{job.title}: its results did not come home from {machine(parcel)}, which ends after {self.settings.idle} idle minutes; "
                f"the same command tries again"
            )
            return
        if came is None:
            parcel.fail("LaunchError", f"{machine(parcel)} ended without a result; {last_of(log)}")
        elif came["status"] == "COMPLETED":
            parcel.complete(came["value"])
        else:
            parcel.fail(came["kind"], came["message"])
        self.sky("down", "-y", machine(parcel))

    def bring_home(self, parcel: Parcel, job: Job) -> bool:
        """Whether all folders of the job that are to come home did."""
        fine = True
        for there, here in self.sent[job.number]["home"].items():
            parent = Path(here).absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["rsync", "-az", f"{machine(parcel)}:sky_workdir/{there}", f"{parent}/"], capture_output=True, start_new_session=True
            )
            fine &= done.returncode == 0
        return fine

    def status(self, parcel: Parcel) -> int:
        return self.sky("logs", machine(parcel), "--status")

    def sky(self, *words: str) -> int:
        return subprocess.run([self.settings.sky, *words], capture_output=True, start_new_session=True).returncode

    def stream(self, command: Sequence[str], file: TextIO, listen: Callable[[str], None] = lambda line: None) -> int:
        """Runs `command` into a log, line by line, without colours and secrets; `listen` hears each line. Returns the exit code."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True
        )
        self.running.add(process)
        for line in process.stdout:
            file.write(line := self.clean(line))
            file.flush()
            listen(line)
        self.running.discard(process)
        return process.wait()

    def clean(self, text: str) -> str:
        return without_secrets(ESCAPES.sub("", text), [*self.settings.secrets, *self.settings.environment])

    def farewell(self, parcels: Sequence[Parcel]) -> str:
        names = " ".join(machine(parcel) for parcel in parcels)
        return (
            f"{len(parcels)} machines go on and end after {self.settings.idle} idle minutes; the same command, without detach=true, waits "
            f"and brings results home. To end them now: {self.settings.sky} down {names}"
        )


def machine(parcel: Parcel) -> str:
    """What SkyPilot calls the parcel's machine and its task."""
    return f"charforgex-{parcel.name}"


def last_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:] if log.exists() else ["(empty)"]
    return "\n".join([f"the last of {log}:", *lines])


def paths_of_here(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings that hold absolute paths of what is on this machine."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from paths_of_here(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list):
        for value in settings:
            yield from paths_of_here(value, name)
    elif isinstance(settings, str) and settings.startswith(("/", "~/")) and Path(settings).expanduser().exists():
        yield name, settings
