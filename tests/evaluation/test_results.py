"""Which contestant is recommended, the front of identity and diversity, and the numbers that sweeps get: by hand."""

import json

import numpy as np
import pytest

from charforgex.config import Search, complaints, conf_folder
from charforgex.errors import ConfigError
from charforgex.evaluation.contestants import Contestant
from charforgex.evaluation.metric import Card, Value
from charforgex.evaluation.results import check_objective, chosen, comparison, metrics_of, objective, spread, write

CARD = Card("a", "b", "c", "higher", "d", "e")
WHO = [Contestant("base", "base"), *(Contestant(f"step {n}", "checkpoint", step=n) for n in (100, 200, 300)), Contestant("mine", "folder")]


def metric(ceiling=None, **estimates):
    values = {name.replace("_", " "): {"estimate": number, "low": None, "high": None} for name, number in estimates.items()}
    return {"values": values, "ceiling": ceiling, "floor": None, "card": {"better": "higher"}}


def numbers():
    return {
        "identity": metric(0.9, base=0.1, step_100=0.5, step_200=0.7, step_300=0.8, mine=0.95),
        "attributes": metric(base=0.8, step_100=0.8, step_200=0.72, step_300=0.36, mine=1.0),
        "pairwise": metric(base=0.6, step_100=0.5, step_200=0.4, step_300=0.4, mine=0.9),
    }


def test_the_recommended_one_has_most_of_what_counts():
    """0.5 of the way at step 100; 0.75 at 200, whose 0.72 is 90 % of the base's; 0.875 at 300, of which half obeys."""
    front, found = chosen(WHO, numbers())
    assert (found["contestant"], found["value"]) == ("step 200", pytest.approx(0.75))
    assert "what attributes falls below 90% of the base's" in found["why"] and "pairwise is below 50% of the base's" in found["why"]
    assert front == ["base", "step 100", "step 300"]  # 200 is as varied as 300 and less the character; a finished folder does not race
    less_varied = numbers()
    less_varied["pairwise"]["values"]["step 200"]["estimate"] = 0.15
    assert chosen(WHO, less_varied)[1]["contestant"] == "step 100"  # 0.75 * 0.15 / 0.3


def test_without_what_the_rule_needs_identity_decides_and_says_so():
    for lacking, told in (("attributes", "prompt-following"), ("pairwise", "diversity")):
        found = chosen(WHO, {name: value for name, value in numbers().items() if name != lacking})[1]
        assert (found["contestant"], found["value"]) == ("step 300", None) and f"to weigh more, {told} must be measured" in found["why"]
    assert "the base model must be measured" in chosen(WHO[1:], numbers())[1]["why"]
    unread = numbers()
    unread["identity"]["ceiling"] = None
    assert "real pictures must be measured" in chosen(WHO, unread)[1]["why"]
    assert chosen(WHO, {"pairwise": numbers()["pairwise"]}) == ([], None)
    assert chosen([WHO[0], WHO[-1]], numbers()) == (["base"], None)


def test_objectives():
    result = {
        "contestants": [{"name": one.name, "kind": one.kind} for one in WHO], "metrics": numbers(), "seconds": {"picture": 1.5},
        "recommended": {"contestant": "step 200", "value": 0.75},
    }  # fmt: skip
    assert objective(result, ["value"]) == 0.75
    assert objective(result, ["identity", "prompt_following", "diversity", "seconds", "pairwise"]) == (0.7, 0.72, 0.4, 1.5, 0.4)
    result["recommended"] = None
    assert objective(result, ["identity"]) == 0.5  # the first with a LoRA
    for name in ("value", "fid"):
        with pytest.raises(ConfigError, match=f"objective={name} was not measured of step 100"):
            objective(result, [name])
    check_objective(["value", "seconds", "diversity", "fid"], ["fid"])
    with pytest.raises(ConfigError, match=r"objective=kid is not among the choices"):
        check_objective(["kid"], ["fid"])


def test_numbers_that_are_none_stay_none(tmp_path):
    rows = np.array([0.5, np.nan, 0.7])
    value = Value(0.6, float("nan"), float("nan"), 2, rows, ("a note",), {"part": 1.0})
    whole = spread(value, [4, 0, 1], 5)
    assert np.array_equal(whole.rows, [np.nan, 0.7, np.nan, np.nan, 0.5], equal_nan=True) and spread("why", [0], 2) == "why"
    one = type("One", (), {"card": CARD})()
    told = metrics_of({"one": one}, {"one": {"a": value, "b": "too few"}}, {"one": {"floor": "no others", "ceiling": value}})
    assert told["one"]["values"]["b"] == {"why": "too few"} and (told["one"]["floor"], told["one"]["ceiling"]) == (None, 0.6)
    assert told["one"]["unknown"] == {"floor": "no others"}
    write(tmp_path, {"metrics": told}, [{"file": "a.png", "scores": {"one": float("nan")}}])
    read = json.loads((tmp_path / "result.json").read_text())["metrics"]["one"]["values"]["a"]
    assert read == {"estimate": 0.6, "low": None, "high": None, "count": 2, "notes": ["a note"], "parts": {"part": 1.0}}
    assert json.loads((tmp_path / "shots.jsonl").read_text()) == {"file": "a.png", "scores": {"one": None}}


def test_contestants_meet_on_template_and_seed():
    """Whatever order their pictures come in; pictures of unknown ones meet nobody."""
    one = type("One", (), {"card": CARD})()
    values = {"a": Value(0, 0, 0, 3, np.array([1.0, 2.0, 9.0])), "b": Value(0, 0, 0, 3, np.array([1.5, 1.0, 9.0])), "c": "too few"}
    places = {"a": [("x", 1), ("y", 1), None], "b": [("y", 1), ("x", 1), ("x", 2)], "c": []}
    (row,) = comparison({"one": values}, {"one": one}, places)["rows"]
    assert row["pictures"] == 2 and row["difference"]["estimate"] == pytest.approx((0.0 + 0.5) / 2)


def test_lists_of_choices_can_be_swept_over():
    search = Search("evaluate", conf_folder())
    assert list(complaints(search, ["pack=[contexts],[character,stress]", "metric=[fid],[kid]"])) == []
    (told,) = complaints(search, ["pack=[contexts],[charakter]"])
    assert told.startswith("pack=charakter is not among the choices") and told.endswith("did you mean character?")
