"""FID of galleries."""

import math

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.metric import Case
from charforgex.evaluation.metrics.fid import Fid
from tests.evaluation.metrics.sets import case, circle, gallery


def test_two_arcs_by_hand():
    """Two pictures at angles of +-a have the mean (cos a, 0) and the variance 2 sin^2 a across it."""
    a, b = 0.3, 0.7
    value = Fid()(gallery(circle(a, -a)), case(circle(b, -b)))
    assert value.estimate == pytest.approx((math.cos(a) - math.cos(b)) ** 2 + 2 * (math.sin(a) - math.sin(b)) ** 2, rel=1e-5)
    assert value.count == 2 and value.rows is None
    assert "FID of 2 pictures and 2 references is too large; it needs 20 of each" in value.notes[0]


def test_enough_pictures_are_not_warned_of():
    angles = np.random.default_rng(0).normal(size=(2, 25))
    assert Fid()(gallery(circle(*angles[0])), case(circle(*angles[1]))).notes == ()


def test_the_interval_holds_other_prompts_of_the_same_kind():
    """Of 100 sets, the mean of all lies in nearly all of the intervals, as far as few pictures allow."""
    rng = np.random.default_rng(1)
    references = case(circle(*rng.normal(0, 0.3, 60)))
    values = [Fid()(gallery(circle(*rng.normal(0.5, 0.4, 60))), references) for _ in range(100)]
    middle = np.mean([value.estimate for value in values])
    assert 88 <= sum(value.low <= middle <= value.high for value in values) <= 99
    one_prompt = Fid()(gallery(circle(*rng.normal(0.5, 0.4, 60)), ["the same"] * 60), references)
    assert math.isnan(one_prompt.low) and math.isnan(one_prompt.high)


def test_pictures_that_are_references_are_told():
    both = gallery(circle(0.0, 0.1, 0.2))
    value = Fid()(both, Case(both))
    assert value.estimate == pytest.approx(0, abs=1e-6) and value.notes[0] == "3 of the pictures are references themselves"


@pytest.mark.parametrize(
    ("pictures", "references", "why"),
    [
        (1, 5, "pictures are too few for this number: 1,"),
        (5, 1, "references are too few for this number: 1,"),
        (0, 5, "no pictures"),
        (5, 0, "no references"),
    ],
)
def test_too_few_are_refused(pictures, references, why):
    with pytest.raises(DataError, match=why):
        Fid()(gallery(circle(*range(pictures)) if pictures else []), case(circle(*range(references)) if references else []))
