"""What the prompt asks for, asked of charworld's judge."""

import random
from dataclasses import replace

import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.errors import DataError
from charforgex.evaluation.alignment import CharworldFollower
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.attributes import Attributes
from tests.evaluation.scenes import case, gallery

CONTEXT = world.Context("smiling", "hoodie", "red", "forest", "red", "portrait")


def drawn(context, prompt_of=CONTEXT):
    picture = Image.fromarray(drawing.render(held_out_character(1), context))
    return Shot(picture, world.caption(held_out_character(1), prompt_of, name="mivo")[0])


def test_each_attribute_that_is_wrong_costs_its_share():
    wrong = [CONTEXT]
    for change in ({"scene": "beach"}, {"garment_colour": "blue"}, {"garment": "suit"}, {"frame": "close-up"}):
        wrong.append(replace(wrong[-1], **change))
    found = Attributes()(Gallery("drawn", [drawn(context) for context in wrong]), case())
    assert found.rows == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])  # of expression, scene, frame, garment and its colour
    assert found.parts == pytest.approx({"expression": 1, "frame": 0.8, "garment": 0.6, "garment_colour": 0.4, "scene": 0.2})


def test_it_is_what_training_measures():
    rng = random.Random("attributes")
    pictures = Gallery("mixed", [drawn(world.draw_context(rng), world.draw_context(rng)) for _ in range(6)])
    found = CharworldFollower().score([shot.open() for shot in pictures.shots], pictures.prompts)
    assert Attributes()(pictures, case()).rows == pytest.approx(found)


def test_prompts_that_ask_for_nothing_count_for_nothing():
    asked = gallery(1, 2)
    found = Attributes()(Gallery("some", [*asked.shots, replace(asked.shots[0], prompt="hello")]), case())
    assert found.count == 2 and found.estimate == pytest.approx(Attributes()(asked, case()).estimate)
    with pytest.raises(DataError, match="no prompt asks for anything"):
        Attributes()(Gallery("none", [replace(asked.shots[0], prompt="hello")]), case())
