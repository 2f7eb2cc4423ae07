"""What metrics give on sets of which it is known what they are."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from charforgex.errors import DataError
from charforgex.evaluation.calibration import Sets, calibrate, deranged
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.registry import load
from tests.evaluation.scenes import case, gallery, strangers

NAMES = ("identity", "verification", "retrieval", "prompt_following", "attributes", "tone", "sharpness", "artefacts")


@pytest.fixture(scope="module")
def found():
    return calibrate(load({name: {} for name in NAMES}), case(base=gallery(2)))


def test_ceilings_are_better_than_floors(found):
    metrics = load({name: {} for name in NAMES})
    for name, ends in found.items():
        if ends["floor"] is not None:
            low, high = ends["floor"].estimate, ends["ceiling"].estimate
            assert (low < high) == (metrics[name].card.better == "higher"), name
    assert found["sharpness"]["floor"] is None


def test_numbers_of_charworld(found):
    assert found["identity"]["ceiling"].estimate > 0.9 and found["identity"]["floor"].estimate < 0.2
    assert found["verification"]["ceiling"].estimate == 1 and found["verification"]["floor"].estimate == 0.05
    assert found["retrieval"]["ceiling"].estimate == 1 and found["retrieval"]["floor"].estimate < 0.1
    assert found["attributes"]["ceiling"].estimate > 0.9 and found["attributes"]["floor"].estimate < 0.5
    assert found["artefacts"]["floor"].estimate == 1 and found["artefacts"]["ceiling"].estimate < 0.4


def test_why_there_is_none_is_said():
    unwritten = Gallery("references", [replace(shot, prompt="") for shot in gallery(1).shots])
    ends = calibrate(load({name: {} for name in NAMES}), case(references=unwritten, others=None))
    assert ends["identity"]["floor"] == "there are no pictures of other people"
    assert ends["prompt_following"]["floor"] == "neither the references have captions nor the base's pictures prompts"
    assert ends["prompt_following"]["ceiling"] == "no picture has a prompt or a caption"
    assert ends["tone"]["ceiling"] == "there are no pictures of the base"
    assert ends["identity"]["ceiling"].estimate > 0.9


def test_the_base_lends_its_prompts_to_references_without():
    unwritten = Gallery("references", [replace(shot, prompt="") for shot in gallery(1).shots])
    shuffled = Sets(case(references=unwritten, base=gallery(2)))["shuffled"]
    assert sorted(shuffled.prompts) == sorted(gallery(2).prompts)


def test_the_character_everywhere_is_what_leakage_is_at_worst():
    base = Gallery("base", [replace(shot, pack="leakage") for shot in gallery(2, 8).shots])
    told = case(base=base)
    ends = calibrate(load({"leakage": {}}), told)["leakage"]
    assert ends["ceiling"].estimate == 0 and ends["floor"].parts["share"] == pytest.approx(1, abs=0.05)
    shown = Sets(told)["everywhere"]
    assert [shot.picture for shot in shown.shots[6:]] == [shot.picture for shot in told.references.shots[:2]]
    assert calibrate(load({"leakage": {}}), case())["leakage"]["floor"] == "there are no pictures of the base"


def test_others_are_shown_as_if_asked_for():
    named = strangers(3, people=("somebody",))
    assert [shot.people for shot in Sets(case(others=named))["others"].shots] == [()] * 3


def test_noise_has_the_sizes_prompts_and_seeds_and_is_always_the_same():
    base = Gallery("base", [*gallery(2, 20, pack="a").shots, *gallery(2, 3, 30, size=96, pack="b").shots])
    one, again = (Sets(case(base=base))["noise"] for _ in range(2))
    assert Counter(shot.pack for shot in one.shots) == {"a": 16, "b": 3}
    assert (one.partners(base) >= 0).all()
    assert {shot.picture.size for shot in one.shots if shot.pack == "b"} == {(96, 96)}
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(one.shots, again.shots, strict=True))
    assert len({shot.key for shot in one.shots}) == len(one)


@pytest.mark.parametrize("prompts", [["a", "b"], ["a", "a", "b", "b"], ["a", "b", "a", "c", "a", "d"], [f"{i % 7}" for i in range(20)]])
def test_no_prompt_stays_where_it_was(prompts):
    moved = deranged(prompts)
    assert sorted(moved) == sorted(prompts)
    assert all(a != b for a, b in zip(moved, prompts, strict=True))


def test_equal_prompts_cannot_be_shuffled():
    with pytest.raises(DataError, match="3 of 4 captions are the same"):
        deranged(["a", "a", "b", "a"])
