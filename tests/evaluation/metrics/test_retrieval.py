"""Which of several people a picture resembles most."""

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation import sight
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.retrieval import Retrieval
from tests.evaluation.scenes import case, gallery, shots, strangers


def test_the_character_is_found_among_twenty_others_and_another_is_not():
    found = Retrieval()(gallery(1), case())
    assert (found.estimate, found.parts["mean_reciprocal_rank"], found.parts["people"]) == (1, 1, 21)
    assert Retrieval()(gallery(2), case()).estimate == 0


def test_ranks_agree_with_sorting():
    pictures = Gallery("mixed", [*gallery(1, 2).shots, *gallery(2, 2).shots, *gallery(7, 2).shots])
    who = sight.recogniser("charworld")
    vectors, references, others = (who(one).astype(np.float64) for one in (pictures, case().references, strangers()))
    expected = []
    for vector in vectors:
        scores = [(references @ vector).mean(), *(others @ vector)]
        expected.append(1 + sorted(scores, reverse=True).index(scores[0]))
    found = Retrieval()(pictures, case())
    assert found.rows.tolist() == [float(rank == 1) for rank in expected]
    assert found.parts["mean_reciprocal_rank"] == pytest.approx(np.mean([1 / rank for rank in expected]))
    assert found.parts["median_rank"] == np.median(expected)


def test_pictures_of_one_person_count_together():
    people = [shot for number in (2, 3) for shot in shots(number, [0, 1, 2], people=(f"person {number}",))]
    found = Retrieval()(gallery(1), case(others=Gallery("people", people)))
    assert found.parts["people"] == 3


def test_nobody_to_be_told_from():
    with pytest.raises(DataError, match="nobody to be told from"):
        Retrieval()(gallery(1), case(others=None))
