"""Characters, contexts, captions: deterministic, held out, and saying what is shown."""

import random

import numpy as np
import pytest

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.data.rendered import RenderedBank, scene_of


def draw(seed, held_out=False):
    rng = random.Random(seed)
    return world.draw_identity(rng, held_out), world.draw_context(rng)


def test_a_seed_is_a_picture():
    assert draw(3) == draw(3) and draw(3) != draw(4)
    assert np.array_equal(drawing.render(*draw(3)), drawing.render(*draw(3)))


@pytest.mark.parametrize("size", [64, 96, 192])
def test_pictures_have_the_size_asked_for(size):
    picture = drawing.render(*draw(5), size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert picture.std() > 20


def test_held_out_characters_have_hair_that_pre_training_never_shows():
    trained = {(i.hair, i.hair_colour) for i, _ in (draw(seed) for seed in range(3000))}
    held = {(i.hair, i.hair_colour) for i, _ in (draw(seed, True) for seed in range(300))}
    assert held <= world.HELD_OUT_HAIR and not trained & world.HELD_OUT_HAIR
    assert all((held_out_character(n).hair, held_out_character(n).hair_colour) in world.HELD_OUT_HAIR for n in range(10))
    assert {i for _, i in trained} == set(world.HAIR_COLOURS)


def test_every_value_of_every_attribute_draws():
    seen: dict[str, set[str]] = {}
    for seed in range(1500):
        identity, context = draw(seed)
        if seed % 10 == 0:
            drawing.render(identity, context)
        for name, value in world.visible_attributes(identity, context).items():
            seen.setdefault(name, set()).add(value)
    assert seen == {name: set(values) for name, values in world.ATTRIBUTES.items()}


def test_a_whole_caption_names_all_that_is_visible_and_true():
    for seed in range(200):
        identity, context = draw(seed)
        sentence, named = world.caption(identity, context)
        visible = world.visible_attributes(identity, context)
        assert named.items() <= visible.items()
        unsaid = set(visible) - set(named)
        assert unsaid <= {name for name in ("glasses", "beard", "mark", "hat") if visible.get(name) == "none"}
        for name in ("skin", "garment_colour", "scene_colour"):
            assert name not in named or named[name] in sentence


def test_a_caption_by_name_says_nothing_of_the_character():
    identity, context = draw(1)
    sentence, named = world.caption(identity, context, name="mivozu")
    assert "mivozu " + identity.kind in sentence
    assert set(named) <= {"kind", *world.CONTEXT_ATTRIBUTES}
    assert "hair" not in sentence and "skin" not in sentence


def test_prompts_are_read_back():
    for seed in range(300):
        identity, context = draw(seed)
        sentence, named = world.caption(identity, context)
        expected = {name: value for name, value in named.items() if name in world.CONTEXT_ATTRIBUTES}
        assert world.read_prompt(sentence) == expected, sentence


def test_unnamed_traits_change_the_picture_and_not_the_caption():
    identity, context = draw(2)
    other = world.Identity(
        **{**identity.__dict__, "eye_spacing": -identity.eye_spacing, "jaw": -identity.jaw, "hair_tone": -identity.hair_tone}
    )
    assert world.caption(identity, context) == world.caption(other, context)
    assert np.abs(drawing.render(identity, context).astype(int) - drawing.render(other, context)).mean() > 0.3


def test_motion_parameters_move_it():
    identity, context = draw(7)
    still = drawing.render(identity, context)
    for change in ({"yaw": 0.9}, {"talk": 1.0}, {"wave": 0.8}, {"tilt": 12.0}):
        moved = drawing.render(identity, world.Context(**{**context.__dict__, "expression": "neutral", **change}))
        assert (moved != still).any(), change


def test_look_alikes_share_the_words():
    (first, _), (second, _) = scene_of(2, 0, variants=12), scene_of(2, 12, variants=12)
    assert first != second and first.hair == second.hair and first.skin == second.skin
    assert scene_of(2, 1, variants=12)[0] == first


def test_a_bank_is_rendered_once_and_is_its_scenes(tmp_path):
    bank = RenderedBank(tmp_path, 6, seed=4)
    stamp = next(tmp_path.glob("*.npy")).stat().st_mtime_ns
    again = RenderedBank(tmp_path, 6, seed=4)
    assert next(tmp_path.glob("*.npy")).stat().st_mtime_ns == stamp
    assert np.array_equal(again.pixels[3], drawing.render(*bank.scene(3)))
