"""How much the character shows when not called."""

from dataclasses import replace

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.identity import Identity
from charforgex.evaluation.metrics.leakage import Leakage
from tests.evaluation.scenes import case, gallery, shots


def asked(number, count=6, pack="leakage"):
    """Pictures of `number` for prompts that call nobody."""
    return Gallery(f"{number}", [replace(s, prompt=f"a woman, {i // 2}", pack=pack) for i, s in enumerate(shots(number, range(count)))])


def test_the_same_pictures_leak_nothing():
    found = Leakage()(asked(2), case(base=asked(2)))
    assert found.rows.tolist() == [0.0] * 6 and (found.estimate, found.low, found.high) == (0, 0, 0)
    assert found.parts["share"] == 0


def test_it_is_identity_less_the_bases():
    pictures = Gallery("half", [*asked(1, 3).shots, *asked(2).shots[3:]])
    found, told = Leakage()(pictures, case(base=asked(2))), case()
    difference = Identity()(pictures, told).rows - Identity()(asked(2), told).rows
    assert found.rows == pytest.approx(difference) and (found.rows[3:] == 0).all() and (found.rows[:3] > 0.8).all()
    real, base = Identity()(told.references, told).estimate, Identity()(asked(2), told).estimate
    assert found.parts["share"] == pytest.approx(difference.mean() / (real - base))


def test_only_the_packs_pictures_that_the_base_drew_as_well_count():
    base = asked(2)
    other = [replace(shot, seed=shot.seed + 100) for shot in asked(1, 2).shots]
    pictures = Gallery("some", [*gallery(1, 2).shots, *other, *asked(1, 2).shots])
    found = Leakage()(pictures, case(base=base))
    assert np.isnan(found.rows).tolist() == [True] * 4 + [False] * 2 and found.count == 2
    again = Leakage()(Gallery("turned", pictures.shots[::-1]), case(base=Gallery("turned", base.shots[::-1])))
    assert again.rows == pytest.approx(found.rows[::-1], nan_ok=True)


def test_what_it_cannot_do_without():
    with pytest.raises(DataError, match="base's pictures of the same prompts and seeds, and there are none"):
        Leakage()(asked(1), case())
    with pytest.raises(DataError, match="no picture is of the prompt pack leakage"):
        Leakage()(asked(1, pack="styles"), case(base=asked(2)))
    with pytest.raises(DataError, match="no picture of the same prompt and seed"):
        Leakage()(asked(1), case(base=gallery(2)))
    with pytest.raises(DataError, match='"a woman, 0" calls the character by A Woman'):
        Leakage()(asked(1), case(base=asked(2), trigger="A Woman"))
    assert Leakage()(asked(1), case(base=asked(2), trigger="oma")).count == 6  # a part of a word calls nobody
