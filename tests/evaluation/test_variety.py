"""Vendi scores and pairwise distances, by hand."""

import math

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.variety import diversities, diversity, vendi


def unit(*angles):
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_diversity_by_hand():
    assert diversity(unit(0.0, 0.0, 0.0)) == pytest.approx(0, abs=1e-12)
    assert diversity(unit(0.0, math.pi / 2)) == pytest.approx(1)
    assert diversity(unit(0.0, 0.0, math.pi)) == pytest.approx((0 + 2 + 2) / 3)  # three pairs
    assert diversity(unit(0.0)) == 0


def test_diversity_is_the_mean_of_the_matrix_of_cosines():
    vectors = np.random.default_rng(0).normal(size=(50, 7))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors @ vectors.T)[~np.eye(50, dtype=bool)]
    assert diversity(vectors) == pytest.approx(1 - cosines.mean(), rel=1e-12)


def test_groups_drawn_again_make_no_pairs_with_themselves():
    vectors, groups = unit(0.0, math.pi / 2, math.pi), np.array([0, 1, 1])
    assert diversities(vectors, groups).tolist() == pytest.approx([(1 + 2 + 1) / 3])
    assert diversities(vectors, groups, np.array([[0, 2], [2, 1]])).tolist() == pytest.approx([1.0, (2 * (1 + 2) + 1) / 5])
    assert np.isnan(diversities(vectors, groups, np.array([[2, 0]]))[0])


@pytest.mark.parametrize("copies", [1, 3, 40])
def test_vendi_of_k_different_pictures_is_k(copies):
    """Also where they are more than the vectors' width, and the other matrix is taken."""
    assert vendi(np.repeat(np.eye(8)[:5], copies, axis=0)) == pytest.approx(5)


def test_vendi_of_two_by_hand():
    p = (1 + 0.5) / 2  # eigenvalues of [[1, 0.5], [0.5, 1]] / 2
    assert vendi(unit(0.0, math.pi / 3)) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))


def test_one_picture_has_no_variety_to_tell():
    with pytest.raises(DataError, match="pictures are too few for this number: 1,"):
        vendi(unit(0.0))
    with pytest.raises(DataError, match="number 2 of the pictures is not finite"):
        vendi(unit(0.0, math.nan))
