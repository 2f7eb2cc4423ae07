"""The study: which trials there are, what to try next, and what became of those that were begun. Whoever is killed, the study knows.

A trial belongs to the sweep whose folder has its lock, a file that the trial's own process holds; an unlocked one is taken up again.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from charforgex.draws import seed_of
from charforgex.sweeping.settings import SweepSettings
from charforgex.sweeping.space import Space
from charforgex.training.trial import held, lock_of, make_pruner, open_storage, outcome

FOLDER, WHY, LOST = "folder", "why", "lost"  # what a trial's notes are called
MOST_LOST = 3  # sittings that may end without a word before a trial counts as failed
STALE = datetime.timedelta(minutes=1)  # to ask for a trial takes a moment
WAITING, RUNNING = TrialState.WAITING, TrialState.RUNNING


@dataclass
class Sweep:
    """A study together with the folder of this sweep."""

    settings: SweepSettings
    space: Space
    study: optuna.Study
    name: str
    folder: Path
    storage: str
    resource: tuple[int, int]
    seed: int

    def trial_folder(self, number: int) -> Path:
        """Named after the study, too: W&B and reports call a run by its folder."""
        return self.folder / "trials" / f"{self.name}-{number:03d}"

    def trials(self) -> list[FrozenTrial]:
        """All that were begun, by this sweep or by others that share the study."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if FOLDER in trial.user_attrs]

    # ---- what was begun ----

    def collect(self) -> Iterator[FrozenTrial]:
        """Tells the study of trials of this folder that have come to an end, and yields those that have not and that nobody trains."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == RUNNING and FOLDER not in trial.user_attrs:
                self._tidy(trial)
            elif trial.state == RUNNING and lock_of(self.trial_folder(trial.number)).exists():
                with held(lock_of(self.trial_folder(trial.number))) as free:
                    done = outcome(self.trial_folder(trial.number), self.settings.objective)
                if done:
                    self.tell(trial, done)
                elif free:
                    yield trial

    def _tidy(self, trial: FrozenTrial) -> None:
        """A trial whose sweep was ended while it was drawn never ran and does not count."""
        if datetime.datetime.now() - trial.datetime_start > STALE:
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def tell(self, trial: FrozenTrial, done: Mapping[str, Any]) -> None:
        """`done` is a trial's `outcome`."""
        if done["state"] == "complete":
            self.study.tell(trial.number, list(done["numbers"]), skip_if_finished=True)
            return
        if done["state"] == "failed":
            self._note(trial, WHY, done["why"])
        state = TrialState.PRUNED if done["state"] == "pruned" else TrialState.FAIL
        self.study.tell(trial.number, state=state, skip_if_finished=True)

    def lost(self, trial: FrozenTrial, why: str) -> bool:
        """A trial's process ended without a word; it is taken up again, but not for ever. Whether it counts as failed now."""
        count = self.study.trials[trial.number].user_attrs.get(LOST, 0) + 1
        self._note(trial, LOST, count)
        if count >= MOST_LOST:
            self.tell(trial, {"state": "failed", "why": f"ended {count} times without a result, last: {why}"})
        return count >= MOST_LOST

    def _note(self, trial: FrozenTrial, name: str, value: Any) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, name, value)

    # ---- what is to be tried ----

    def ask(self, recipe: Mapping[str, Any] | None) -> FrozenTrial | None:
        """The next trial; None when all have been begun. The recipe as it is comes first, so that every other one has something to beat."""
        known = self.study.get_trials(deepcopy=False)
        begun = [trial for trial in known if FOLDER in trial.user_attrs]
        if len(begun) >= self.settings.trials:
            return None
        if not any(trial.state == WAITING for trial in known):
            is_new = recipe and not any(trial.params == recipe for trial in begun)
            self.study.enqueue_trial(dict(recipe) if is_new else self._proposal(known))
        trial = self.study.ask(self.space.params)
        folder = self.trial_folder(trial.number)
        lock_of(folder).parent.mkdir(parents=True, exist_ok=True)
        lock_of(folder).touch()
        trial.set_user_attr(FOLDER, folder.name)
        return self.study.trials[trial.number]

    def _proposal(self, known: Sequence[FrozenTrial]) -> dict[str, Any]:
        """What to try, given what is known: it depends on that and on the seed, not on how often the sweep was ended in between.

        Optuna's samplers overlook failures and would try their neighbourhood again; here they count as the worst there was.
        """
        sampler = make_sampler(self.settings, seed_of(self.seed, "sweep", len(known)))
        shadow = optuna.create_study(
            study_name=self.name,
            directions=self.settings.directions,
            sampler=sampler,
            pruner=make_pruner(self.settings.pruner, self.resource),
        )
        for trial in known:
            failed = trial.state == TrialState.FAIL and WHY in trial.user_attrs
            worst = {"state": TrialState.PRUNED, "params": trial.params, "distributions": trial.distributions}
            shadow.add_trial(optuna.trial.create_trial(**worst) if failed else trial)
        return shadow.ask(self.space.params).params


def make_sampler(settings: SweepSettings, seed: int) -> optuna.samplers.BaseSampler:
    seed %= 2**32
    at_random = min(10, max(3, settings.trials // 3))  # before there is anything to learn from
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if settings.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=at_random)
    together = settings.at_once > 1  # as if trials that still run had failed, so that neighbours are not tried at once
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random, multivariate=True, constant_liar=together)


def open_sweep(
    settings: SweepSettings, space: Space, name: str, folder: Path, resource: tuple[int, int], seed: int
) -> Sweep:  # fmt: skip
    """The study of that name, made where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = settings.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
    study = optuna.create_study(
        storage=open_storage(storage), study_name=name, directions=settings.directions, load_if_exists=True,
        pruner=make_pruner(settings.pruner, resource),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(settings.objective))
    return Sweep(settings, space, study, name, folder, storage, resource, seed)


def best_of(trials: Sequence[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """Complete trials that no other one beats: the best, or the front where there are several objectives. In order of their numbers."""
    from charforgex.evaluation.choosing import pareto

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    points = [tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)) for trial in complete]
    return [complete[index] for index in pareto(points)]
