"""Mean pairwise distance of galleries."""

import math

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.metrics.pairwise import Pairwise
from charforgex.evaluation.variety import diversity
from tests.evaluation.metrics.sets import case, circle, gallery


def test_three_pictures_by_hand():
    value = Pairwise()(gallery(circle(0.0, math.pi / 2, math.pi)), case([]))
    assert value.estimate == pytest.approx((1 + 2 + 1) / 3, rel=1e-6) and value.count == 3


def test_it_is_training_s_number_and_its_interval_holds_other_prompts():
    rng = np.random.default_rng(1)
    sets = [circle(*rng.normal(0, 0.5, 60)) for _ in range(60)]
    values = [Pairwise()(gallery(vectors), case([])) for vectors in sets]
    assert values[0].estimate == pytest.approx(diversity(sets[0].astype(np.float32)), rel=1e-9)
    middle = np.mean([value.estimate for value in values])
    assert 52 <= sum(value.low <= middle <= value.high for value in values) < 60


def test_one_picture_has_no_pairs():
    with pytest.raises(DataError, match="pictures are too few for this number: 1,"):
        Pairwise()(gallery(circle(0.1)), case([]))
    assert math.isnan(Pairwise()(gallery(circle(0.1, 0.2), ["the same"] * 2), case([])).low)
