"""The learning curve: known curves are found again, and what would be a guess is not answered."""

import re

import numpy as np
import pytest

from charforgex.curation.sizing import learning_curve, reach, variety_curve

SIZES = [4, 8, 12, 16, 24, 32, 48]


def curve(a=0.8, b=-0.6, c=0.8, noise=0.0, repeats=5):
    values = a + b * np.array(SIZES, float)[:, None] ** -c
    return values + np.random.default_rng(0).normal(0, noise, (len(SIZES), repeats)) if noise else values[:, 0]


def test_reach():
    assert reach(1.0, -1.0, 1.0, 0.95) == pytest.approx(20)  # 1 - 1 / 20
    assert reach(1.0, 0.5, 1.0, 0.95) == reach(-1.0, -1.0, 1.0, 0.95) == np.inf


def test_an_exact_curve_is_found():
    found = learning_curve(SIZES, curve())
    assert (found["a"], found["b"], found["c"]) == pytest.approx((0.8, -0.6, 0.8), abs=1e-5)
    assert found["enough"] and found["n"] == 30 and found["why"] is None  # (0.6 / 0.04) ** 1.25 = 29.5


@pytest.mark.parametrize("repeats", [1, 5])
def test_the_interval_holds_the_truth(repeats):
    found = learning_curve(SIZES, curve(noise=0.005, repeats=repeats))
    low, high = found["n_interval"]
    assert found["enough"] and low < 29.5 < high and low <= found["n"] <= high
    assert found["a_interval"][0] < 0.8 < found["a_interval"][1]


@pytest.mark.parametrize(
    ("sizes", "values", "why"),
    [
        ([4, 8], np.array([0.1, 0.2]), "measured at 2 sizes"),
        ([], np.zeros((0, 24)), "measured at 0 sizes"),
        (SIZES, np.full(7, 0.5), "the same at every size"),
        (SIZES, curve(b=0.6), "does not rise"),
        (SIZES, np.log(SIZES), "still rises, with no limit in sight"),
        (SIZES, np.random.default_rng(1).random(7), "scatter|does not rise"),
        (SIZES, curve(c=0.35, noise=0.01), "or more|no limit in sight"),
    ],
)
def test_too_little_evidence(sizes, values, why):
    found = learning_curve(sizes, values)
    assert not found["enough"] and found["n"] is None
    assert re.search(why, found["why"])


def test_the_variety_of_parts_of_a_set():
    features = np.repeat(np.eye(8), 50, axis=0)  # eight different pictures, each often
    sizes, values = variety_curve(features)
    assert values.shape == (len(sizes), 24) and sizes[-1] == 320
    assert values[-1].mean() == pytest.approx(8, abs=0.2) and (np.diff(values.mean(axis=1)) > 0).all()
    again = variety_curve(features)[1]
    assert (again == values).all()
    assert learning_curve(sizes, values)["enough"]
    assert variety_curve(features[:3])[0] == []
