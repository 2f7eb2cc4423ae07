"""From the command line to the report, with a training that only pretends: what is written, and that the best is what it says."""

import json
import math

import pytest
from omegaconf import OmegaConf

from charforgex import cli, runs
from charforgex.config import bind
from charforgex.overrides import quote_texts
from charforgex.training.trial import TrialSettings, report

TRAIN = "charforgex.training.run:train"


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs a sweep and returns its folder. The nearer lr is to 0.005, the better, and the larger the rank, the slower."""
    monkeypatch.chdir(tmp_path)

    def pretend(cfg):
        value = 1 - abs(math.log10(cfg.optimizer.lr / 0.005))
        for step in (2, 4):
            report(bind(TrialSettings, cfg.trial, "trial"), step, 4, {"value": value * step / 4})
        runs.save_config(cfg.run_dir, cfg)
        runs.write_result(cfg.run_dir, {"value": value, "identity": {"lora": value}, "seconds": cfg.lora.rank * 1.0})

    monkeypatch.setattr("charforgex.training.run.run", pretend)

    def sweep(*arguments):
        assert cli.guarded(TRAIN, "train", ["-m", *arguments], "train.py") == 0
        (folder,) = (path.parent for path in tmp_path.glob("runs/*/result.json"))
        return folder

    return sweep


def same(folder, experiment, trial):
    """Whether an experiment of the sweep is what the trial was trained with."""
    from hydra import compose, initialize_config_dir

    from charforgex.config import conf_folder, prepare

    with initialize_config_dir(str(prepare(conf_folder())), version_base="1.3"):
        searchpath = f"hydra.searchpath=[file://{folder},file://{conf_folder().parent}/sweeps]"
        cfg = compose("train", quote_texts([searchpath, f"experiment={experiment}"]))
    return runs.config_hash(cfg) == runs.config_hash(OmegaConf.load(f"{trial['folder']}/config.yaml"))


@pytest.mark.slow
def test_a_search_ends_bad_trials_and_leaves_the_best_as_an_experiment(swept, capsys):
    folder = swept("+sweeps=bayes", "debug=tiny", "hydra.sweeper.trials=7", "optimizer=adamw,adafactor", "loss=plain")
    result = json.loads((folder / "result.json").read_text())
    trials = result["trials"]
    assert len(trials) == 7 and trials[0]["is_recipe"] and trials[0]["settings"]["lora.rank"] == "4"
    assert {trial["state"] for trial in trials} == {"complete", "pruned"}
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert all(trial["number"] >= 4 and trial["steps"] == 2 for trial in pruned)
    best = max((trial for trial in trials if trial["numbers"]), key=lambda trial: trial["numbers"]["value"])
    assert result["best"] == best["number"] and result["front"] == [best["number"]]
    assert next(iter(result["importances"])) == "optimizer.lr" and math.isclose(sum(result["importances"].values()), 1)
    assert same(folder, "best", best)
    command = f"python train.py --config-dir {folder.relative_to(folder.parents[1])} experiment=best"
    assert result["experiments"] == {str(best["number"]): command}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4 and f"Trial <b>{best['number']}</b> is the best" in page
    out = capsys.readouterr().out
    assert "pruned at step 2" in out and "the recipe as it is  value 0.6" in out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # Hydra leaves no folder of its own


def test_a_front_has_an_experiment_for_each(swept):
    folder = swept("+sweeps=front", "debug=tiny", "hydra.sweeper.trials=3", "hydra.sweeper.objective=[value,seconds]")
    result = json.loads((folder / "result.json").read_text())
    numbers = {trial["number"]: trial["numbers"] for trial in result["trials"]}
    for number in result["front"]:
        assert not any(n["value"] > numbers[number]["value"] and n["seconds"] < numbers[number]["seconds"] for n in numbers.values())
    assert result["best"] == max(numbers, key=lambda number: numbers[number]["value"])
    names = {path.stem for path in (folder / "experiment").iterdir()}
    assert names == {"best", *(f"trial-{number:03d}" for number in result["front"] if number != result["best"])}
    assert "The front" in (folder / "report.html").read_text()
