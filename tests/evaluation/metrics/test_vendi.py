"""Vendi score of galleries."""

import math

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.metrics.vendi import Vendi
from tests.evaluation.metrics.sets import case, circle, gallery


def test_four_different_pictures_three_times_each_count_as_four():
    value = Vendi()(gallery(np.repeat(np.eye(6)[:4], 3, axis=0)), case([]))
    assert value.estimate == pytest.approx(4) and value.parts == {"share": pytest.approx(1 / 3)}
    assert value.low == pytest.approx(4) and value.high == pytest.approx(4), "whichever prompt is left out, four are left"


def test_the_interval_holds_other_prompts_of_the_same_kind():
    rng = np.random.default_rng(1)
    values = [Vendi()(gallery(circle(*rng.normal(0, 0.5, 80))), case([])) for _ in range(100)]
    middle = np.mean([value.estimate for value in values])
    assert 88 <= sum(value.low <= middle <= value.high for value in values) <= 99


def test_one_picture_or_one_prompt():
    with pytest.raises(DataError, match="pictures are too few for this number: 1,"):
        Vendi()(gallery(circle(0.1)), case([]))
    assert math.isnan(Vendi()(gallery(circle(0.1, 0.2), ["the same"] * 2), case([])).low)
