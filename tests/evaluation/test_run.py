"""evaluate from end to end on the tiny base: what is drawn, measured, told and kept; and what stops before anything is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import charforgex
from charforgex.config import compose
from charforgex.errors import CharForgeError, ConfigError, DataError, ModelError
from charforgex.evaluation import drawing, run
from charforgex.evaluation.metric import Card, Value
from charforgex.evaluation.metrics import registry
from charforgex.evaluation.results import objective
from tests.evaluation.made_runs import TINY, TRIGGER, write_run

PACKS = {"contexts": {"prompts": ["a portrait of a {trigger}, smiling", "a close-up of a {trigger}, at sunset"]}}
PACKS |= {"leakage": {"prompts": ["a portrait of a {class}, smiling"]}}
ASKED = TINY | {"pack": ["contexts", "leakage"], "packs": PACKS, "count": 1, "with_base": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where everything lies: a run, and its evaluation by two metrics."""
    folder = tmp_path_factory.mktemp("home")
    write_run(folder / "anna")
    asked = ASKED | {"cache_dir": folder / "cache", "lora": folder / "anna", "scales": [0.5, 1]}
    result = charforgex.evaluate(**asked, metric=["identity", "leakage"], out=folder / "first")
    return folder, asked, result


def shots_of(folder):
    return [json.loads(line) for line in (folder / "shots.jsonl").read_text().splitlines()]


def test_what_an_evaluation_leaves(home):
    folder, _, result = home
    names = ["base", "step 2 x0.5", "step 2 x1", "step 4, best x0.5", "step 4, best x1"]
    assert [one["name"] for one in result["contestants"]] == names
    best = result["contestants"][-1]
    assert (best["kind"], best["step"], best["scale"], best["pictures"], best["run"]) == ("checkpoint", 4, 1.0, 3, str(folder / "anna"))
    assert len(best["loras"][0]["sha256"]) == 64 and result["contestants"][0]["loras"] == []
    assert json.loads((folder / "first" / "result.json").read_text()) == result
    left = {path.name for path in (folder / "first").glob("*")}
    assert left >= {"config.yaml", "provenance.json", "report.html", "shots.jsonl", "pictures"}
    assert (result["seeds"], result["prompts"]) == ([0], [*PACKS["contexts"]["prompts"], *PACKS["leakage"]["prompts"]])
    assert result["seconds"]["drawn"] == 15 and result["seconds"]["picture"] > 0

    identity = result["metrics"]["identity"]
    assert set(identity["values"]) == set(names) and all(value["count"] == 2 for value in identity["values"].values())
    assert identity["ceiling"] > identity["values"]["base"]["estimate"] and identity["card"]["better"] == "higher"
    assert result["metrics"]["leakage"]["values"]["base"]["estimate"] == 0
    assert result["metrics"]["leakage"]["values"]["step 2 x1"]["count"] == 1
    assert result["recommended"]["contestant"] in names[1:] and "identity" in result["recommended"]["why"]
    assert result["comparison"]["rows"] and {row["metric"] for row in result["comparison"]["rows"]} == {"identity", "leakage"}
    assert OmegaConf.load(folder / "first" / "config.yaml").references == str(folder / "anna")

    shots = shots_of(folder / "first")
    assert len(shots) == 15 and all((folder / "first" / shot["file"]).is_file() for shot in shots)
    assert {shot["prompt"] for shot in shots} == {
        f"a portrait of a {TRIGGER}, smiling",
        f"a close-up of a {TRIGGER}, at sunset",
        "a portrait of a woman, smiling",
    }
    for shot in shots:
        assert (shot["scores"]["identity"] is None) == (shot["pack"] == "leakage") == (shot["scores"]["leakage"] is not None)
    own = [shot["scores"]["identity"] for shot in shots if shot["contestant"] == "step 2 x1" and shot["pack"] == "contexts"]
    assert np.mean(own) == pytest.approx(identity["values"]["step 2 x1"]["estimate"])


def test_another_metric_and_another_prompt_draw_nothing_again(home, tmp_path, monkeypatch):
    _, asked, first = home
    drawn = []
    save = drawing.save_png
    monkeypatch.setattr(drawing, "save_png", lambda *args: drawn.append(1) or save(*args))
    again = charforgex.evaluate(**asked, metric=["identity", "pairwise", "leakage"], out=tmp_path / "again")
    assert not drawn and again["seconds"]["drawn"] == 0 and again["seconds"]["picture"] == first["seconds"]["picture"]
    assert again["metrics"]["identity"] == first["metrics"]["identity"] and set(again["metrics"]) == {"identity", "pairwise", "leakage"}
    assert again["pareto"] and set(again["pareto"]) <= {one["name"] for one in again["contestants"]}

    more = asked | {"scales": [1], "prompt": "{trigger} in space"}
    charforgex.evaluate(**more, metric=["identity"], out=tmp_path / "more")
    assert len(drawn) == 3  # of the base and the two checkpoints


def test_a_dry_run_tells_what_would_be_drawn(home, tmp_path, monkeypatch, capsys):
    _, asked, _ = home
    monkeypatch.setattr(drawing.Studio, "draw", None)
    told = charforgex.evaluate(**asked | {"count": 2}, metric=["identity"], dry_run=True, out=tmp_path / "out")
    assert [(row["pictures"], row["cached"]) for row in told["plan"]["rows"]] == [(6, 3)] * 5
    assert (told["plan"]["pictures"], told["plan"]["cached"]) == (30, 15) and told["plan"]["seconds"] > 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "to draw 15, about" in said and "references 3, training 5, others none" in said


def test_finished_pictures_need_no_base(home, tmp_path, monkeypatch):
    """They are measured where they lie; prompts and seeds of our own PNGs make them comparable with what was drawn."""
    folder, _, _ = home
    monkeypatch.setattr(run, "_studio", None)
    (folder / "first" / "pictures" / "base" / "broken.png").write_bytes(b"nothing")
    try:
        result = charforgex.evaluate(
            pictures=[folder / "first" / "pictures" / name for name in ("base", "step-2-x1")], references=folder / "anna",
            cache_dir=folder / "cache", metric=["identity", "leakage"], out=tmp_path / "out",
        )  # fmt: skip
    finally:
        (folder / "first" / "pictures" / "base" / "broken.png").unlink()
    assert [(one["name"], one["kind"], one["pictures"]) for one in result["contestants"]] == [
        ("base", "folder", 3),
        ("step-2-x1", "folder", 3),
    ]
    assert any("broken.png cannot be read" in note for note in result["notes"])
    assert (
        "no picture" in result["metrics"]["leakage"]["values"]["base"]["why"]
        or "base" in result["metrics"]["leakage"]["values"]["base"]["why"]
    )
    identity = result["metrics"]["identity"]["values"]["base"]
    assert identity["count"] == 3  # nothing says here which of them called nobody
    assert result["recommended"] is None and result["pareto"] == []
    assert all(Path(shot["file"]).is_absolute() for shot in shots_of(tmp_path / "out"))
    row = next(row for row in result["comparison"]["rows"] if row["metric"] == "identity")
    assert row["pictures"] == 3


class Broken:
    """A metric that has nothing to say."""

    name, floor, ceiling = "broken", "others", None
    card = Card("broken", "", "", "higher", "", "")

    def __call__(self, gallery, case):
        if gallery.name == "base":
            raise DataError("the base has no number")
        return Value(1.0, 1.0, 1.0, len(gallery))


def test_a_metric_without_a_number_has_a_reason(home, tmp_path, monkeypatch):
    _, asked, _ = home
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda node: load(node) | {"broken": Broken()})
    result = charforgex.evaluate(**asked | {"scales": [1]}, metric=["identity"], out=tmp_path / "out")
    values = result["metrics"]["broken"]["values"]
    assert values["base"] == {"why": "the base has no number"} and values["step 2"]["estimate"] == 1
    assert result["metrics"]["broken"]["unknown"] == {"floor": "there are no pictures of other people"}


def test_a_sweep_gets_numbers(home, monkeypatch):
    _, _, first = home
    monkeypatch.setattr(run, "run", lambda cfg: first | {"objective": cfg})
    assert run.evaluate(["identity"]) is None  # no sweep, and nobody who asks
    monkeypatch.setattr(run, "_in_sweep", lambda: True)
    who = first["recommended"]["contestant"]
    identity = first["metrics"]["identity"]["values"][who]["estimate"]
    assert run.evaluate(["identity"]) == identity
    assert run.evaluate(["identity", "seconds"]) == (identity, first["seconds"]["picture"])
    with pytest.raises(ConfigError, match="objective=diversity was not measured"):
        objective(first, ["diversity"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": []}, "nothing is measured"),
        ({"objective": "identiti"}, "objective=identiti is not among the choices: .*did you mean identity"),
        ({"lora": None, "references": None}, "nothing says how the character looks"),
        ({"width": 33}, "width=33: 33 is not a multiple"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"device": "cuda:99"}, "is not on this machine"),
        ({"packs": {"contexts": {"prompts": ["a {trigger"]}}}, "is never closed"),
        ({"base": "nowhere/at-all-not-there.safetensors"}, "nowhere"),
        ({"out": __file__}, "is a file; name a folder"),
    ],
)
def test_bad_settings_stop_before_anything_is_loaded(home, monkeypatch, settings, words):
    _, asked, _ = home
    monkeypatch.setattr(drawing.Studio, "draw", None)
    monkeypatch.setattr(run, "_try", None)
    with pytest.raises(CharForgeError, match=words):
        charforgex.evaluate(**{"metric": ["identity"], **asked, **settings} | ({} if settings.get("lora", 1) else {"scales": [1]}))


def test_an_embedder_that_cannot_be_loaded_stops_before_drawing(home, tmp_path, monkeypatch):
    _, asked, _ = home
    monkeypatch.setattr(drawing.Studio, "draw", None)
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        charforgex.evaluate(**asked, metric=["identity"], **{"metrics.identity.embedder": str(tmp_path / "model")}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_evaluation_is_kept(home):
    folder, asked, _ = home
    with pytest.raises(ConfigError, match="holds an earlier evaluation"):
        charforgex.evaluate(**asked, metric=["identity"], out=folder / "first")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metric=[identiy]"], r"metric=identiy is not among the choices: .*did you mean identity"),
        (
            ["metric=[identity]", "metrics.identity.embeder=x"],
            r"metrics.identity.embeder is unknown; did you mean metrics.identity.embedder",
        ),
        (["metric=[identity]", "metrics.fid.features=x"], r"metrics.fid.features is unknown"),
    ],
)
def test_metrics_are_chosen_by_a_list(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose("evaluate", overrides)


def test_every_metric_binds_and_takes_its_settings():
    cfg = compose(
        "evaluate", [f"metric=[{','.join(registry.METRICS)}]", "metrics.identity.embedder=mine", "metrics.leakage.embedder=yours"]
    )
    metrics = registry.load(cfg.metrics)
    assert list(metrics) == list(registry.METRICS)
    assert (metrics["identity"].embedder, metrics["leakage"].embedder) == ("mine", "yours")


def test_losses_of_whoever_draws_are_measured_once_and_people_are_asked_about_pictures(home, tmp_path, monkeypatch):
    _, asked, _ = home
    wanted = asked | {"scales": [1], "metric": ["levels"], "vote": "page", "vote.pairs": 4, "metrics.levels.levels": 4}
    result = charforgex.evaluate(**wanted, out=tmp_path / "out")
    values = result["metrics"]["levels"]["values"]
    assert set(values) == {"base", "step 2", "step 4, best"}
    for value in values.values():
        assert list(value["parts"]) == ["t=0.125", "t=0.375", "t=0.625", "t=0.875"] and value["count"] == 3
        assert value["estimate"] == pytest.approx(np.mean(list(value["parts"].values())))
    assert len({value["estimate"] for value in values.values()}) == 3
    key = json.loads((tmp_path / "out" / "vote_key.json").read_text())
    assert result["vote"] == str(tmp_path / "out" / "vote.html") and key["contestants"] == ["step 2", "step 4, best"]

    monkeypatch.setattr("charforgex.evaluation.levels.losses", None)
    again = charforgex.evaluate(**wanted, out=tmp_path / "again")
    assert again["metrics"]["levels"]["values"] == values


def test_a_vote_needs_two(home):
    _, asked, _ = home
    with pytest.raises(ConfigError, match="alone is no choice"):
        alone = {"lora": None, "base": "tiny", "scales": [1], "references": asked["lora"]}
        charforgex.evaluate(**asked | alone, metric=["identity"], vote="page")
