"""A run as a trial: its outcome is found in its folder, it is trained once, and it ends early where its study's rule says so."""

import json
import multiprocessing
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf

from charforgex import runs
from charforgex.errors import ConfigError, TrainingError
from charforgex.training.trial import Pruned, TrialSettings, as_trial, held, lock_of, make_pruner, open_storage, outcome, report

RESULT = {
    "value": 0.5, "identity": {"lora": 0.6, "base": 0.1}, "prompt_following": {"lora": 0.7}, "diversity": {"lora": 0.3},
    "validation": {"lora": 0.05}, "seconds": 20.0, "peak_memory_bytes": 2**30,
}  # fmt: skip
WORDS = ("value", "identity", "prompt_following", "diversity", "validation", "seconds", "memory")


def config(folder: Path, objective=("value",)):
    return OmegaConf.create({"run_dir": str(folder), "trial": {"study": "s", "number": 0, "objective": list(objective)}})


def test_an_outcome_is_read_from_the_trials_folder(tmp_path):
    assert outcome(tmp_path, WORDS) is None
    runs.write_json(tmp_path / "pruned.json", {"step": 20, "value": 0.1})
    assert outcome(tmp_path, WORDS) == {"state": "pruned", "step": 20}
    runs.write_result(tmp_path, RESULT)  # somebody trained it to its end by hand
    assert outcome(tmp_path, WORDS) == {"state": "complete", "numbers": [0.5, 0.6, 0.7, 0.3, 0.05, 20.0, 1.0]}
    runs.write_result(tmp_path, RESULT | {"value": float("nan"), "identity": {}})
    assert outcome(tmp_path, WORDS)["why"].startswith("value, identity of ")


def test_a_trial_is_trained_once_and_tells_what_came_of_it(tmp_path):
    folder, calls = tmp_path / "trials" / "s-000", []

    def train(cfg):
        calls.append(cfg.run_dir)
        runs.write_result(folder, RESULT)

    assert as_trial(config(folder), train) == as_trial(config(folder), train) == {"state": "complete", "numbers": [0.5]}
    assert calls == [str(folder)]


def test_a_failed_trial_is_an_answer_and_a_pruned_one_keeps_what_it_knows(tmp_path, capsys):
    def fails(cfg):
        raise TrainingError("not finite")

    def breaks(cfg):
        raise ZeroDivisionError("our own mistake")

    def is_pruned(cfg):
        raise Pruned(30, 0.25)

    assert as_trial(config(tmp_path / "trials" / "a"), fails) == {"state": "failed", "why": "TrainingError: not finite"}
    assert "Traceback" not in capsys.readouterr().err
    assert as_trial(config(tmp_path / "trials" / "b"), breaks)["why"] == "ZeroDivisionError: our own mistake"
    assert "Traceback" in capsys.readouterr().err
    folder = tmp_path / "trials" / "c"
    assert as_trial(config(folder, ["identity"]), is_pruned) == {"state": "pruned", "step": 30}
    assert json.loads((folder / "pruned.json").read_text()) == {"step": 30, "identity": 0.25}


def _hold(lock, holding, end):
    with held(lock) as mine:
        holding.put(mine)
        end.wait(60)


def test_a_lock_is_free_again_when_its_process_is_killed(tmp_path):
    folder = tmp_path / "trials" / "s-000"
    context = multiprocessing.get_context("spawn")
    holding, end = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=(lock_of(folder), holding, end))
    process.start()
    assert holding.get(timeout=60)
    assert as_trial(config(folder), lambda cfg: pytest.fail("trained twice")) == {"state": "elsewhere"}
    process.kill()
    process.join()
    with held(lock_of(folder)) as mine:
        assert mine


def study_of(tmp_path, pruner="median"):
    """Four whole trials with 0.1, 0.2, 0.3 and 0.4 at steps 10 and 20, and one that has begun."""
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="s", storage=open_storage(storage), direction="maximize")
    for value in (0.1, 0.2, 0.3, 0.4):
        trial = study.ask()
        for step in (10, 20):
            trial.report(value, step)
        study.tell(trial, value)
    return study, TrialSettings("s", study.ask().number, ("identity",), storage, pruner, (10, 30))


def test_a_trial_behind_the_median_ends(tmp_path):
    study, trial = study_of(tmp_path)
    report(trial, 10, 30, {"identity": 0.26, "value": 0.0})  # the median is 0.25
    report(trial, 10, 30, {"identity": 0.26, "value": 0.0})  # measured again, by a later sitting
    with pytest.raises(Pruned, match="ended at step 20, behind the sweep's other trials with 0"):
        second = TrialSettings("s", study.ask().number, ("identity",), trial.storage, "median", (10, 30))
        report(second, 20, 30, {"identity": 0.1})
    assert study.trials[trial.number].intermediate_values == {10: 0.26}


def test_the_last_step_prunes_nothing_and_neither_does_no_pruner(tmp_path):
    study, trial = study_of(tmp_path)
    report(trial, 30, 30, {"identity": -1.0})
    report(TrialSettings("s", trial.number, ("identity",)), 10, 30, {"identity": -1.0})
    report(None, 10, 30, {})
    assert study.trials[trial.number].intermediate_values == {30: -1.0}


def test_hyperband_has_the_trainings_length():
    pruner = make_pruner("hyperband", (10, 90))
    assert (pruner._min_resource, pruner._max_resource) == (10, 90)


def test_a_study_that_is_elsewhere_is_said_so(tmp_path):
    _, trial = study_of(tmp_path)
    with pytest.raises(ConfigError, match="the study other is not in sqlite"):
        report(TrialSettings("other", 0, ("value",), trial.storage), 1, 2, {"value": 0.0})
