"""Hydra's grammar as a space to search in."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from charforgex.errors import ConfigError
from charforgex.sweeping.space import read_space


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("4,16,64", CategoricalDistribution(["4", "16", "64"])),
        ("choice([a,b],'x y')", CategoricalDistribution(["[a,b]", "x\\ y"])),
        ("range(8,40,8)", IntDistribution(8, 32, step=8)),
        ("range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("interval(0,0.3)", FloatDistribution(0.0, 0.3)),
        ("int(interval(4,64))", IntDistribution(4, 64)),
        ("int(tag(log,interval(4,64)))", IntDistribution(4, 64, log=True)),
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
    ],
)
def test_each_kind_of_value(text, distribution):
    assert read_space({"x": text}, [], None).params == {"x": distribution}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tag(fast,interval(0,1))", "the tag fast means nothing here"),
        ("tag(log,interval(0,1))", "begin above 0"),
        ("tag(log,choice(1,2))", "log is of intervals"),
        ("tag(log,1,2)", "cannot be read; write a,b,c or"),
        ("interval(2,1)", "not above its start"),
        ("shuffle(range(1,5))", "leave shuffle out"),
        ("choice(4)", "two values or more"),
        ("4,4", "two values or more"),
        ("4", "nothing to try"),
    ],
)
def test_what_is_no_space_is_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        read_space({"x": text}, [], None)


def test_the_command_line_wins_and_what_has_one_value_is_shared():
    space = read_space({"lora.rank": "4,8", "optimizer.lr": "interval(0,1)", "seed": 3}, ["lora.rank=16,32", "family=flux"], None)
    assert space.params["lora.rank"].choices == ("16", "32") and space.fixed == ["seed=3", "family=flux"]
    assert space.texts == {"lora.rank": "16,32", "optimizer.lr": "interval(0,1)"}
    assert space.overrides({"lora.rank": "16", "optimizer.lr": 0.00123456789}) == ["lora.rank=16", "optimizer.lr=0.00123457"]
    assert list(space.ends()) == ["lora.rank=16", "lora.rank=32", "optimizer.lr=0", "optimizer.lr=1"]


@pytest.mark.parametrize("own", ["run_dir=x", "resume=x", "fresh=true", "trial=null"])
def test_a_trials_folder_is_the_sweeps_business(own):
    with pytest.raises(ConfigError, match="has no place in a sweep"):
        read_space({"x": "1,2"}, [own], None)


def test_the_recipe_is_a_trial_where_the_space_has_it():
    space = read_space({"a": "4,16", "b": "int(tag(log,interval(4,64)))", "c": "interval(0,0.3)", "d": "range(10,50,10)"}, [], None)
    assert space.recipe({"a": 16, "b": 16, "c": 0.05, "d": 20}) == {"a": "16", "b": 16, "c": 0.05, "d": 20}
    for outside in ({"a": 8}, {"b": 65}, {"c": 0.5}, {"d": 25}, {"c": None}):
        assert space.recipe({"a": 16, "b": 16, "c": 0.05, "d": 20} | outside) is None
