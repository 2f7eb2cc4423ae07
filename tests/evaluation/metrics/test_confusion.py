"""Several characters in one picture."""

import pytest
from PIL import Image

from charforgex.curation.faces import FaceSettings
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.confusion import Confusion
from tests.evaluation.scenes import case, picture, shots

METRIC = Confusion(faces=FaceSettings("charworld"))
NAMES = {1: "mivo", 2: "tesa", 3: "buri"}


def people(*numbers, start=20):
    return Gallery("people", [shot for number in numbers for shot in shots(number, range(start, start + 2), 96, people=(NAMES[number],))])


def side_by_side(*numbers, asked):
    canvas = Image.new("RGB", (96 * len(numbers), 96))
    for place, number in enumerate(numbers):
        canvas.paste(picture(number, place, 96)[0], (96 * place, 0))
    return Shot(canvas, f"{asked} as {numbers}", people=tuple(NAMES[number] for number in asked))


@pytest.fixture(scope="module")
def three():
    return case(references=people(1), others=people(2, 3))


def test_each_face_is_the_right_one_or_not(three):
    group = [
        side_by_side(1, 2, asked=(1, 2)),  # as asked
        side_by_side(1, 1, asked=(1, 2)),  # one of them twice
        side_by_side(3, 2, asked=(1, 2)),  # somebody else for one of them
        side_by_side(3, 3, asked=(1, 2)),
    ]
    found = METRIC(Gallery("group", group), three)
    assert found.rows.tolist() == [0, 0.5, 0.5, 1]
    assert found.estimate == 0.5
    assert found.parts == {"missing": pytest.approx((0 + 0.5 + 0.5 + 1) / 4), "faces": 2}


def test_who_is_not_named_is_the_character(three):
    alone = [Shot(picture(number, 5, 96)[0], f"picture of {number}") for number in (1, 2)]
    assert METRIC(Gallery("alone", alone), three).rows.tolist() == [0, 1]


def test_prompts_say_who_is_asked_for(three):
    shot = side_by_side(1, 2, asked=(1, 2))
    prompts = {"Mivo and tesa at the beach": 0, "mivo at the beach": 0.5, "somebody, tesaurus": 0.5, "buri": 1}
    said = [Shot(shot.picture, prompt) for prompt in prompts]
    assert METRIC(Gallery("said", said), three).rows.tolist() == list(prompts.values())


def test_references_are_not_compared_with_themselves(three):
    assert METRIC(three.references, three).estimate == 0
    copied = case(references=three.references, others=Gallery("one", [Shot(three.references.shots[0].picture, people=("tesa",))]))
    assert METRIC(Gallery("one", three.references.shots[:1]), copied).rows.tolist() == [0]  # else as near to its copy as can be


def test_a_picture_without_a_face(three):
    empty = Shot(Image.new("RGB", (96, 96), (40, 90, 160)), "empty")
    found = METRIC(Gallery("some", [empty, side_by_side(1, asked=(1,))]), three)
    assert found.count == 1 and found.estimate == 0 and found.parts["missing"] == 0.5
    assert found.notes == ("no face was found in 1 of the 2 pictures",)
    with pytest.raises(DataError, match="no face was found in any of the 1 pictures"):
        METRIC(Gallery("empty", [empty]), three)
    with pytest.raises(DataError, match="no face was found in the pictures of tesa"):
        METRIC(
            Gallery("one", [side_by_side(1, asked=(1,))]),
            case(references=people(1), others=Gallery("o", [Shot(empty.picture, people=("tesa",))])),
        )


def test_who_is_asked_for_must_be_known(three):
    with pytest.raises(DataError, match="asks for buri, of whom there are no pictures; there are mivo, tesa"):
        METRIC(Gallery("one", [side_by_side(1, 3, asked=(1, 3))]), case(references=people(1), others=people(2)))
    with pytest.raises(DataError, match="nobody to be mixed up with"):
        METRIC(Gallery("one", [side_by_side(1, asked=(1,))]), case(references=people(1), others=None))
    with pytest.raises(DataError, match="the references show mivo, tesa"):
        METRIC(Gallery("one", [side_by_side(1, asked=(1,))]), case(references=people(1, 2), others=people(3)))
