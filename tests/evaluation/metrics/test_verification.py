"""Accepted at a stated false-accept rate."""

import numpy as np
import pytest

from charforgex.config import bind
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.identity import Identity
from charforgex.evaluation.metrics.verification import Verification
from tests.evaluation.scenes import case, gallery, strangers


def test_the_threshold_lets_in_the_stated_share_of_strangers():
    for rate, allowed in ((0.05, 1), (0.1, 2), (0.5, 10)):
        lock = Verification(false_accept=rate)
        assert lock(strangers(), case()).estimate == pytest.approx(allowed / 20)
        impostors = np.sort(Identity()(strangers(), case()).rows)[::-1]
        assert lock(gallery(1), case()).parts["threshold"] == pytest.approx(impostors[allowed])


def test_the_character_is_let_in_and_another_is_not():
    found = Verification()(Gallery("both", [*gallery(1, 3).shots, *gallery(2, 3).shots]), case())
    assert found.rows.tolist() == [1, 1, 1, 0, 0, 0] and found.estimate == 0.5
    assert "1 of 20 pictures of other people" in found.notes[0] and "60 would make the rate of 0.05 sure" in found.notes[0]


def test_too_few_strangers_for_the_rate():
    with pytest.raises(DataError, match=r"rate of 0\.01 needs 100 pictures of other people, and there are 20"):
        Verification(false_accept=0.01)(gallery(1), case())
    with pytest.raises(DataError, match="needs 20 pictures of other people, and there are 0"):
        Verification()(gallery(1), case(others=None))


@pytest.mark.parametrize("rate", [0, 1, -0.1])
def test_rates_are_between_none_and_all(rate):
    with pytest.raises(ConfigError, match="false_accept"):
        bind(Verification, {"false_accept": rate}, "metrics.verification")
