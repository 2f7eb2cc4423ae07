"""The rule by which the best is chosen."""

import pytest

from charforgex.evaluation.choosing import gain, pareto, worth


def test_gain_is_the_share_of_the_way_from_base_to_real():
    assert [gain(identity, 0.1, 0.9) for identity in (0.1, 0.5, 0.9, 0.0)] == pytest.approx([0, 0.5, 1, -0.125])


@pytest.mark.parametrize(
    ("gained", "following", "diversity", "value"),
    [
        (0.5, 0.8, 0.6, 0.5),
        (0.5, 0.72, 0.6, 0.5),  # 90 % of the base's is enough
        (0.5, 0.36, 0.6, 0.25),  # half of that halves it
        (0.5, 0.8, 0.3, 0.5),  # half as varied as the base is enough
        (0.5, 0.8, 0.15, 0.25),
        (-0.125, 0.1, 0.0, -0.125),
    ],
)
def test_worth(gained, following, diversity, value):
    assert worth(gained, following, diversity, base_following=0.8, base_diversity=0.6) == pytest.approx(value)


def test_identity_does_not_win_over_obedience():
    learnt_by_heart, faithful = worth(1.0, 0.3, 0.1, 0.8, 0.6), worth(0.8, 0.8, 0.6, 0.8, 0.6)
    assert faithful > learnt_by_heart


def test_the_front_holds_what_nothing_beats():
    points = [(1, 5), (2, 4), (1, 4), (3, 1), (2, 4), (0, 5)]
    assert pareto(points) == [0, 1, 3, 4]  # equals are both on it
    assert pareto([]) == []
