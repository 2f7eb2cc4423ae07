"""A run as a trial of a sweep: what the sweep learns of it while it trains and at its end, and how it may be ended early.

A sweep that began a trial finds the outcome in the trial's own folder, whoever was killed in between: result.json of a whole one,
pruned.json of one that was ended. Optuna is imported when a study is opened.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from charforgex import runs
from charforgex.config import Range, bind
from charforgex.errors import CharForgeError, ConfigError

if TYPE_CHECKING:
    import optuna
    from omegaconf import DictConfig

Word = Literal["value", "identity", "prompt_following", "diversity", "validation", "seconds", "memory"]
Pruner = Literal["none", "median", "hyperband"]
LESS_IS_BETTER = ("validation", "seconds", "memory")
AT_THE_END = ("seconds", "memory")  # words that have no curve
OF_MOTION = ("value", "validation", "seconds", "memory")  # what a training of motion has of them
PRUNED = "pruned.json"
UNPRUNED_TRIALS = 4  # that the median rule waits for
INSTALL = 'pip install ".[sweeps]"'


@dataclass(frozen=True)
class TrialSettings:
    """`trial` of train.yaml, which the sweeper fills."""

    study: str
    number: Annotated[int, Range(at_least=0)]
    objective: tuple[Word, ...]
    storage: str | None = None  # of the study, where the trial may be ended early
    pruner: Pruner = "none"
    resource: tuple[int, int] | None = None  # steps of the first evaluation and of the last


class Pruned(Exception):
    """The trial is behind the others and ends here; what was saved stays."""

    def __init__(self, step: int, number: float):
        super().__init__(f"ended at step {step}, behind the sweep's other trials with {number:.4g}")
        self.step, self.number = step, number


# ---- in the trial ----


def as_trial(cfg: DictConfig, run: Callable[[DictConfig], Any]) -> dict[str, Any]:
    """Trains `cfg` by `run` and returns what `outcome` does, also when the trial has failed: a sweep goes on without it.

    Nothing is trained twice: a trial that is done already is read from its folder, one that another process trains is left to it.
    """
    trial, folder = bind(TrialSettings, cfg.trial, "trial"), Path(cfg.run_dir)
    with held(lock_of(folder)) as mine:
        if not mine:
            return {"state": "elsewhere"}
        if done := outcome(folder, trial.objective):
            return done
        try:
            run(cfg)
        except Pruned as pruned:
            runs.write_json(folder / PRUNED, {"step": pruned.step, trial.objective[0]: pruned.number})
            print(f"{folder.name} {pruned}", flush=True)
        except Exception as error:
            if not isinstance(error, CharForgeError):
                traceback.print_exception(error)
            return {"state": "failed", "why": f"{type(error).__name__}: {error}"}
        finally:
            end_wandb()
        return outcome(folder, trial.objective) or {"state": "failed", "why": "it left no result.json"}


def end_wandb() -> None:
    """A run of W&B that pruning or an error left open would get the next trial's numbers, too."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def report(trial: TrialSettings | None, step: int, last_step: int, numbers: Mapping[str, float]) -> None:
    """Tells the study where the trial stands after `step`. Raises Pruned where the study's rule ends it; not after the last step."""
    if trial is None or trial.storage is None:
        return
    import optuna

    study = open_study(trial)
    (word,) = trial.objective
    number = numbers[word]
    told = optuna.Trial(study, study.trials[trial.number]._trial_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is already reported.*")  # before this trial was taken up again, and the same number
        told.report(number, step)
    if step < last_step and told.should_prune():
        raise Pruned(step, number)


# ---- what both sides know ----


def outcome(folder: Path, objective: Sequence[str]) -> dict[str, Any] | None:
    """`state` complete with `numbers`, pruned with `step`, or failed with `why`; None while the trial has not come to an end."""
    if (path := folder / "result.json").exists():
        result = json.loads(path.read_text())
        found = {word: number_of(result, word) for word in objective}
        if lacking := [word for word, number in found.items() if number is None]:
            return {"state": "failed", "why": f"{', '.join(lacking)} of {path} is no number"}
        return {"state": "complete", "numbers": list(found.values())}
    if (path := folder / PRUNED).exists():
        return {"state": "pruned", "step": json.loads(path.read_text())["step"]}
    return None


def number_of(result: Mapping[str, Any], word: str) -> float | None:
    """Of a training's result.json; memory is in GiB."""
    if word == "memory":
        return result["peak_memory_bytes"] / 2**30
    number = result[word] if word in ("value", "seconds") else result.get(word, {}).get("lora")
    return float(number) if number is not None and math.isfinite(number) else None


def lock_of(folder: Path) -> Path:
    """Beside the trials' folders: what a run's folder may hold is the training's business."""
    return folder.parent.parent / "locks" / folder.name


@contextlib.contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Whether this process holds `lock` within the block; the system gives it up when the process ends, however it ends."""
    if os.name == "nt":  # has no such locks: there, one sweep at a time is up to the user
        yield True
        return
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def open_study(trial: TrialSettings) -> optuna.Study:
    import optuna

    storage = open_storage(trial.storage)
    try:
        return optuna.load_study(study_name=trial.study, storage=storage, pruner=make_pruner(trial.pruner, trial.resource))
    except KeyError as error:
        raise ConfigError(
            f"the study {trial.study} is not in {trial.storage}; machines without a common folder need a database for "
            "hydra.sweeper.storage, such as postgresql+psycopg://user@host/name."
        ) from error


def make_pruner(name: Pruner, resource: tuple[int, int] | None) -> optuna.pruners.BasePruner:
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=resource[0], max_resource=resource[1])
    return optuna.pruners.NopPruner()


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """By URL, or by `env:NAME` of a variable that holds it. Raises ConfigError for one that cannot be opened."""
    try:
        import optuna
        from sqlalchemy.exc import DBAPIError, SQLAlchemyError
    except ModuleNotFoundError as error:
        raise ConfigError(f"hydra/sweeper=charforgex needs Optuna: {INSTALL}.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = storage
    if storage.startswith("env:"):
        url = os.environ.get(storage.removeprefix("env:"), "")
        if not url:
            raise ConfigError(f"hydra.sweeper.storage={storage}: this environment variable is not set; it is to hold a database's URL.")
    # Trials and sweep write to one file: who finds it busy waits instead of failing.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except DBAPIError:  # two that find a database empty make its tables, and one of them fails
            time.sleep(2)
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"hydra.sweeper.storage={storage} needs {error.name}: pip install {error.name}.") from error
    except (SQLAlchemyError, ValueError, ImportError) as error:
        raise ConfigError(f"hydra.sweeper.storage={storage} cannot be opened: {str(error).splitlines()[0]}.") from error
