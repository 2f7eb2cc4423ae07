"""`python train.py -m +sweeps=bayes`: a search among the settings of a training. Called by the sweeper of hydra_plugins.

Everything that can be wrong about the space is said before the first trial. Ended at any instant, the same command goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf, open_dict, read_write

from charforgex import runs
from charforgex.config import bind, complaints
from charforgex.errors import CharForgeError, ConfigError
from charforgex.overrides import written
from charforgex.sweeping.composing import Composer
from charforgex.sweeping.settings import SweepSettings
from charforgex.sweeping.space import Space, read_space
from charforgex.training.trial import INSTALL, OF_MOTION

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher
    from omegaconf import DictConfig
    from optuna.trial import FrozenTrial
    from rich.console import Console

    from charforgex.sweeping.study import Sweep


def sweep(
    given: Mapping[str, Any], arguments: Sequence[str], loader: ConfigLoader, config: DictConfig, launcher: Launcher
) -> list[Sequence[JobReturn]]:
    """Runs what is missing of the trials and writes the report. Returns what the launcher returned, a list for each batch."""
    from rich.console import Console

    settings = bind(SweepSettings, given, "hydra.sweeper")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"hydra/sweeper=charforgex needs Optuna: {INSTALL}.")
    if config.hydra.job.config_name != "train":
        raise ConfigError(
            f"hydra/sweeper=charforgex searches among trainings, and this is {config.hydra.job.config_name}; use plain -m a=1,2 there."
        )
    for option in ("dry_run", "detach"):
        if config.hydra.launcher.get(option):
            raise ConfigError(
                f"hydra.launcher.{option}=true returns before a trial has ended, and a search goes by its result; leave it out."
            )
    composer = Composer(loader, config)
    space = read_space(settings.params, arguments, loader)
    base, choices = checked(settings, space, composer)
    from charforgex.sweeping.report import write_report
    from charforgex.sweeping.study import open_sweep

    name = f"{settings.study}-{identity(settings, space, base)[:8]}"
    found = open_sweep(settings, space, name, composer.folder() or Path(base.runs_dir) / name, resource(base), base.seed)
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(found.folder)  # launchers put their own files there
    console = Console()
    console.print(f"[bold]{name}[/], {len(found.trials())} of {settings.trials} trials begun, in {found.folder}", highlight=False)
    values = OmegaConf.to_container(base, resolve=True)
    recipe = space.recipe({key: choices[key] if key in choices else select(values, key) for key in space.params})
    returns = run_trials(found, recipe, launcher, console)
    write_report(found, recipe, composer, console)
    return returns


# ---- before the first trial ----


def checked(settings: SweepSettings, space: Space, composer: Composer) -> tuple[DictConfig, Mapping[str, Any]]:
    """What all trials share: the config and the choices of its groups. Raises ConfigError for whatever is wrong with it, with a value of
    the space by itself, or with the objective."""
    from charforgex.training.run import check as check_training

    if found := list(complaints(composer.search(), [f"{name}={text}" for name, text in space.texts.items()])):
        raise ConfigError("\n".join(found))
    base, choices = composer(space.fixed)
    devices = check_training(base).trainer.count
    if settings.pruner != "none" and devices > 1:
        raise ConfigError(
            f"hydra.sweeper.pruner={settings.pruner} ends trials that one process trains, and trainer.devices asks for {devices}; "
            "set hydra.sweeper.pruner=none."
        )
    for group in ("pretrain", "backend"):
        if group in base:
            raise ConfigError(f"with {group} a training has no value to search by; leave {group} out.")
    if "motion" in base and (wrong := [word for word in settings.objective if word not in OF_MOTION]):
        raise ConfigError(
            f"hydra.sweeper.objective={', '.join(wrong)} is no number of a motion's training; those are {', '.join(OF_MOTION)}."
        )
    for override in space.ends():
        try:
            check_training(composer([*space.fixed, override])[0])
        except CharForgeError as error:
            raise ConfigError(f"with {override}: {error}") from error
    return base, choices


def identity(settings: SweepSettings, space: Space, base: DictConfig) -> str:
    """A hash of what makes two trials comparable: another command is another study, the same one goes on, on any machine."""
    return runs.config_hash({"base": runs.config_hash(base), "space": space.texts, "objective": settings.objective})


def resource(base: DictConfig) -> tuple[int, int]:
    return base.evaluation.every, base.trainer.steps


def select(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


# ---- the trials ----


def run_trials(found: Sweep, recipe: Mapping[str, Any] | None, launcher: Launcher, console: Console) -> list[Sequence[JobReturn]]:
    """Takes up what was begun, and begins what is missing, a batch at a time."""
    returns, elsewhere = [], set()
    while True:
        batch = [trial for trial in found.collect() if trial.number not in elsewhere][: found.settings.at_once]
        while len(batch) < found.settings.at_once and (trial := found.ask(recipe)) is not None:
            batch.append(trial)
        if not batch:
            return returns
        for trial in batch:
            console.print(f"trial {trial.number}: {' '.join(found.space.overrides(trial.params))}", highlight=False)
        returns.append(launcher.launch([overrides_of(found, trial) for trial in batch], initial_job_idx=batch[0].number))
        for trial, done in zip(batch, returns[-1], strict=True):
            if settle(found, trial, done, console) == "elsewhere":
                elsewhere.add(trial.number)


def overrides_of(found: Sweep, trial: FrozenTrial) -> list[str]:
    """What the launcher is given: the settings that trials share, this one's, and where it lies."""
    settings = found.settings
    told = {"study": found.name, "number": trial.number, "objective": list(settings.objective)}
    if settings.pruner != "none":
        told |= {"storage": found.storage, "pruner": settings.pruner, "resource": list(found.resource)}
    own = {"run_dir": found.trial_folder(trial.number).absolute(), "trial": told, "hydra.sweep.dir": found.folder.absolute()}
    return [*found.space.fixed, *found.space.overrides(trial.params), *(f"{key}={written(value)}" for key, value in own.items())]


def settle(found: Sweep, trial: FrozenTrial, job: JobReturn, console: Console) -> str:
    """Tells the study what came of a trial, and returns it in a word."""
    from hydra.core.utils import JobStatus

    from charforgex.training.trial import outcome

    value = job._return_value  # `return_value` raises what the job did
    done = value if isinstance(value, dict) else outcome(found.trial_folder(trial.number), found.settings.objective)
    if done is None and job.status == JobStatus.FAILED and isinstance(value, CharForgeError):
        done = {"state": "failed", "why": str(value)}
    if done is None:
        failed = found.lost(trial, f"{type(value).__name__}: {value}")
        console.print(f"[yellow]trial {trial.number} ended without a result ({value})" + ("" if failed else "; it is taken up again"))
        return "lost"
    if done["state"] != "elsewhere":
        found.tell(trial, done)
    console.print(f"trial {trial.number}: {said(done, found.settings.objective)}", highlight=False)
    return done["state"]


def said(done: Mapping[str, Any], objective: Sequence[str]) -> str:
    if done["state"] == "complete":
        return ", ".join(f"{word} {number:.4g}" for word, number in zip(objective, done["numbers"], strict=True))
    if done["state"] == "pruned":
        return f"pruned at step {done['step']}"
    return "is being trained by another process" if done["state"] == "elsewhere" else f"failed, {done['why']}"
