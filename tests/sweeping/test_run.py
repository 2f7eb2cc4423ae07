"""A whole sweep with trials that only write down their numbers: taken up again after any death, told what came of each, reported."""

import math
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from optuna.trial import TrialState
from rich.console import Console

from charforgex import cli, runs
from charforgex.errors import ConfigError
from charforgex.sweeping.run import run_trials, sweep
from charforgex.sweeping.settings import SweepSettings
from charforgex.sweeping.space import read_space
from charforgex.sweeping.study import MOST_LOST, best_of, open_sweep
from charforgex.training.trial import held, lock_of

QUIET = Console(quiet=True)


class Died(BaseException):
    """kill -9 of the sweep."""


class Launcher:
    """Trials as a formula; `deaths` are the launches at which everything ends before or after the trial has written its result."""

    def __init__(self, found, deaths=(), lost=()):
        self.found, self.deaths, self.lost, self.launched = found, dict(deaths), dict(lost), []

    def launch(self, job_overrides, initial_job_idx):
        return [self.job(overrides) for overrides in job_overrides]

    def job(self, overrides):
        settings = dict(override.split("=", 1) for override in overrides)
        folder = Path(settings["run_dir"].strip("'"))
        number = int(folder.name[-3:])
        self.launched.append(number)
        when = self.deaths.pop(len(self.launched) - 1, None)
        if when == "before":
            raise Died
        if self.lost.get(number, 0) > 0:
            self.lost[number] -= 1
            gone = JobReturn(status=JobStatus.FAILED)
            gone.return_value = RuntimeError("killed")
            return gone
        lr = float(settings["lr"])
        folder.mkdir(parents=True, exist_ok=True)
        if lr > 0.5:
            return JobReturn(status=JobStatus.COMPLETED, _return_value={"state": "failed", "why": "too fast"})
        value = -(math.log10(lr / 0.01) ** 2)
        runs.write_result(folder, {"value": value, "seconds": lr})
        if when == "after":
            raise Died
        return JobReturn(status=JobStatus.COMPLETED, _return_value={"state": "complete", "numbers": [value]})


def opened(folder, **more):
    settings = SweepSettings(study="small", **({"trials": 8} | more))
    return open_sweep(settings, read_space({"lr": "tag(log,interval(1e-4,1))"}, [], None), "small-1", folder, (1, 2), seed=0)


def numbers(found):
    return [(trial.params, trial.state.name, trial.values) for trial in found.trials()]


def test_a_sweep_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    whole = opened(tmp_path / "whole")
    run_trials(whole, {"lr": 0.1}, Launcher(whole), QUIET)
    assert len(whole.trials()) == 8 and whole.trials()[0].params == {"lr": 0.1}
    assert {trial.state.name for trial in whole.trials()} <= {"COMPLETE", "FAIL"}

    deaths = {1: "before", 3: "after", 4: "after", 7: "before"}
    launched = []
    while True:
        found = opened(tmp_path / "killed")
        launcher = Launcher(found, deaths)
        try:
            run_trials(found, {"lr": 0.1}, launcher, QUIET)
            break
        except Died:
            deaths = {at - len(launcher.launched): when for at, when in deaths.items() if at >= len(launcher.launched)}
        finally:
            launched += launcher.launched
    assert numbers(found) == numbers(whole)
    assert launched == [0, 1, 1, 2, 3, 4, 5, 6, 6, 7]  # what died before its result was taken up again; nothing was trained twice
    run_trials(found, {"lr": 0.1}, again := Launcher(found), QUIET)
    assert again.launched == []


def test_a_trial_that_fails_is_not_repeated_and_one_that_dies_is_a_few_times(tmp_path):
    found = opened(tmp_path, trials=3, sampler="random")
    run_trials(found, {"lr": 0.9}, launcher := Launcher(found, lost={1: 1, 2: 99}), QUIET)
    assert launcher.launched == [0, 1, 1, *[2] * MOST_LOST]
    failed, complete, lost = found.trials()
    assert failed.state == TrialState.FAIL and failed.user_attrs["why"] == "too fast"
    assert complete.state in (TrialState.COMPLETE, TrialState.FAIL) and complete.user_attrs["lost"] == 1
    assert lost.state == TrialState.FAIL and lost.user_attrs["why"] == "ended 3 times without a result, last: RuntimeError: killed"


def test_what_another_process_trains_is_left_to_it(tmp_path):
    found = opened(tmp_path, trials=2)
    trial = found.ask(None)
    with held(lock_of(found.trial_folder(trial.number))):
        run_trials(found, None, launcher := Launcher(found), QUIET)
        assert launcher.launched == [1] and found.trials()[0].state == TrialState.RUNNING
    run_trials(found, None, launcher := Launcher(found), QUIET)
    assert launcher.launched == [0]


def test_machines_share_a_study_and_begin_no_more_than_its_trials(tmp_path):
    storage = f"sqlite:///{tmp_path}/shared.db"
    one, other = (opened(tmp_path / name, storage=storage, trials=5) for name in ("one", "other"))
    trial = one.ask(None)  # begun on the one machine, and still running there
    run_trials(other, None, launcher := Launcher(other), QUIET)
    assert launcher.launched == [1, 2, 3, 4] and trial.number == 0
    run_trials(one, None, launcher := Launcher(one), QUIET)
    assert launcher.launched == [0] and len(other.trials()) == 5


def test_pruned_trials_are_told_as_such(tmp_path):
    found = opened(tmp_path, trials=1)
    trial = found.ask(None)
    runs.write_json(found.trial_folder(trial.number) / "pruned.json", {"step": 3, "value": 0.1})
    assert list(found.collect()) == [] and found.trials()[0].state == TrialState.PRUNED


def test_a_search_learns_from_failures(tmp_path):
    """Above 0.5 all fail; whoever overlooks that goes on trying there."""
    found = opened(tmp_path, trials=12)
    run_trials(found, None, Launcher(found), QUIET)
    late = found.trials()[6:]
    assert sum(trial.state == TrialState.FAIL for trial in late) <= 1
    assert abs(math.log10(best_of(found.trials(), ["maximize"])[0].params["lr"] / 0.01)) < 0.3


def test_the_front_is_of_trials_that_nothing_beats(tmp_path):
    found = opened(tmp_path, trials=4, objective=("value", "seconds"))
    for values in ((0.5, 10.0), (0.4, 5.0), (0.4, 12.0)):
        found.study.tell(found.ask(None).number, values)
    assert [trial.number for trial in best_of(found.trials(), found.settings.directions)] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"objective": ("value", "seconds"), "pruner": "median"}, "compares one curve"),
        ({"objective": ("seconds",), "pruner": "hyperband"}, "known at the end only"),
        ({"objective": ()}, "name one number"),
        ({"study": "a/b"}, "names files"),
        ({"storage": "postgresql+psycopg://me:secret@host/sweeps"}, "holds a password"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why) as raised:
        SweepSettings(**settings)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["lora.rnk=4,8"], "lora.rnk is unknown; did you mean lora.rank or lora.ranks?"),
        (["lora.rank=interval(4.5,8)"], "with lora.rank=4.5: lora.rank=4.5 is a number; a whole number is needed"),
        (["hydra.sweeper.objective=[valu]"], "objective"),
        (["hydra.sweeper.storage=nonsense"], "cannot be opened"),
    ],
)
def test_a_wrong_sweep_ends_before_its_first_trial(arguments, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.guarded("charforgex.training.run:train", "train", ["-m", "+sweeps=bayes", "debug=tiny", *arguments], "train.py")
    assert code == 2 and why in capsys.readouterr().err
    assert not list(tmp_path.rglob("trials"))


def test_a_wrong_name_in_a_sweeps_file_is_told_as_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "sweeps").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [override /hydra/sweeper: charforgex]\nhydra: {sweeper: {params: {lora.rnk: '4,8'}}}\n"
    (tmp_path / "own" / "sweeps" / "mine.yaml").write_text(text)
    arguments = ["-m", "--config-dir", "own", "+sweeps=mine", "debug=tiny"]
    assert cli.guarded("charforgex.training.run:train", "train", arguments, "train.py") == 2
    assert "lora.rnk is unknown; did you mean lora.rank or lora.ranks?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["dry_run", "detach"])
def test_a_launcher_that_does_not_wait_is_refused(option):
    from omegaconf import OmegaConf

    config = OmegaConf.create({"hydra": {"job": {"config_name": "train"}, "launcher": {option: True}}})
    with pytest.raises(ConfigError, match=f"hydra.launcher.{option}=true returns before a trial has ended"):
        sweep({"params": {"lora.rank": "4,8"}}, [], None, config, None)


def test_other_commands_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.guarded("charforgex.merging.run:merge", "merge", ["-m", "hydra/sweeper=charforgex", "lora=[a,b]", "method=slerp"], "x") == 2
    assert "searches among trainings, and this is merge" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_is_the_same_study_and_a_changed_one_another(tmp_path, monkeypatch, capsys):
    """As far as the first launch."""
    from charforgex.sweeping import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_trials", lambda found, recipe, *_: names.append((found.folder.name, recipe)) or [])
    monkeypatch.setattr("charforgex.sweeping.report.write_report", lambda *_: None)
    names = []
    for more in ([], ["hydra.sweeper.trials=9", "runs_dir=runs"], ["seed=1", "lora.rank=4,8"]):
        pruner = ["hydra.sweeper.pruner=none"]
        assert cli.guarded("charforgex.training.run:train", "train", ["-m", "+sweeps=bayes", "debug=tiny", *pruner, *more], "train.py") == 0
    folders = [name for name, _ in names]
    assert folders[0] == folders[1] != folders[2] and all(name.startswith("bayes-") for name in folders)
    assert names[0][1] == {"lora.rank": 4, "optimizer.lr": 0.002, "data.caption_dropout": 0.05}
    assert names[2][1]["lora.rank"] == "4"
