"""Density, precision, recall and coverage of galleries."""

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.metrics.manifold import ManifoldMetric
from tests.evaluation.metrics.sets import case, circle, gallery

STEPS = np.array([0, 0.01, 0.021, 0.033])  # each is nearest to the one before it


def test_pictures_of_one_of_two_scenes_cover_half():
    """References are two heaps of four steps; the pictures are one of the heaps, and two pictures that are like nothing."""
    references = circle(*STEPS, *(1.5 + STEPS))
    value = ManifoldMetric(k=1)(gallery(circle(*STEPS, 3.0, 3.01)), case(references))
    assert value.parts == {"precision": 4 / 6, "recall": 0.5, "coverage": 0.5}
    # balls hold their middle and the one before it, that of the first step the second
    assert value.rows.tolist() == [2, 3, 2, 1, 0, 0] and value.estimate == pytest.approx(8 / 6)


def test_pictures_like_the_references_have_density_one():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 300, 3))
    value = ManifoldMetric()(
        gallery(one / np.linalg.norm(one, axis=1, keepdims=True)), case(other / np.linalg.norm(other, axis=1, keepdims=True))
    )
    assert value.estimate == pytest.approx(1, abs=0.1) and value.low < 1 < value.high
    assert value.parts["coverage"] == pytest.approx(1 - 0.5**5, abs=0.03)  # Naeem et al. 2020, lemma 2: 1 - 2^-k for equal numbers


def test_it_needs_more_pictures_than_k():
    with pytest.raises(DataError, match="references are too few for this number: 5, and it needs at least 6"):
        ManifoldMetric()(gallery(circle(*range(9))), case(circle(*range(5))))
