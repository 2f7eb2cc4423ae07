"""KID of galleries."""

import math

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.metrics.kid import Kid
from tests.evaluation.metrics.sets import case, circle, gallery


def test_four_pictures_by_hand():
    """Unit vectors have (1 + 1)^3 = 8 with themselves and 1 with what is orthogonal: 1 + 1 - 2 (8 + 1 + 1 + 1) / 4."""
    value = Kid()(gallery(np.eye(3)[[0, 1]]), case(np.eye(3)[[0, 2]]))
    assert value.estimate == pytest.approx(-3.5, rel=1e-6)


def test_the_interval_holds_other_prompts_of_the_same_kind():
    rng = np.random.default_rng(1)
    references = case(circle(*rng.normal(0, 0.3, 60)))
    values = [Kid()(gallery(circle(*rng.normal(0.5, 0.4, 60))), references) for _ in range(60)]
    middle = np.mean([value.estimate for value in values])
    assert 52 <= sum(value.low <= middle <= value.high for value in values) < 60


def test_seeds_of_one_prompt_count_as_one():
    """Four seeds of a prompt that are nearly one picture make no interval narrower."""
    rng = np.random.default_rng(2)
    angles, references = rng.normal(0.5, 0.4, 20), case(circle(*rng.normal(0, 0.3, 60)))
    one = Kid()(gallery(circle(*angles)), references)
    four = Kid()(gallery(circle(*np.repeat(angles, 4)), [f"prompt {i // 4}" for i in range(80)]), references)
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.1)
    apart = Kid()(gallery(circle(*np.repeat(angles, 4))), references)
    assert apart.high - apart.low < 0.7 * (one.high - one.low)


def test_one_prompt_has_no_interval_and_one_picture_no_number():
    alone = Kid()(gallery(circle(0.1, 0.2, 0.3), ["the same"] * 3), case(circle(0.0, 1.0)))
    assert math.isnan(alone.low) and math.isfinite(alone.estimate)
    two = Kid()(gallery(circle(0.1, 0.2)), case(circle(0.0, 1.0)))
    assert two.low == two.high == pytest.approx(two.estimate), "half of the draws are one picture twice, and have no pairs"
    with pytest.raises(DataError, match="pictures are too few for this number: 1,"):
        Kid()(gallery(circle(0.1)), case(circle(0.0, 1.0)))
