"""CLIP score."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.embedders import get_clip
from charforgex.errors import DataError
from charforgex.evaluation.calibration import deranged
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.prompt_following import PromptFollowing
from tests.evaluation.scenes import case, gallery, turned


def test_it_is_a_hundred_times_the_cosine_and_never_below_zero():
    pictures, clip = gallery(1, 8), get_clip("charworld")
    shuffled = Gallery("shuffled", [replace(s, prompt=p) for s, p in zip(pictures.shots, deranged(pictures.prompts), strict=True)])
    for one in (pictures, shuffled):
        inputs = clip.tokenizer(one.prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        pixels = torch.stack([torch.from_numpy(np.array(shot.open())).permute(2, 0, 1) for shot in one.shots]).float() / 127.5 - 1
        with torch.no_grad():
            seen = clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)
            read = clip.model.text_projection(clip.model.text_model(inputs.input_ids).pooler_output)
        expected = 100 * torch.nn.functional.cosine_similarity(seen, read).clamp(min=0)
        assert PromptFollowing()(one, case()).rows == pytest.approx(expected.tolist(), abs=1e-3)
    assert (PromptFollowing()(shuffled, case()).rows == 0).any()


def test_it_agrees_with_torchmetrics():
    """Whose CLIPScore takes transformers 5's outputs for tensors; its arithmetic is run here on ours."""
    clip_score = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    pictures, clip = gallery(1, 4), get_clip("charworld")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells the device

            class Config:
                class text_config:
                    max_position_embeddings = 77

            self.config = Config

        def get_image_features(self, pixels):
            return clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output)

        def get_text_features(self, ids, mask):
            return clip.model.text_projection(clip.model.text_model(ids).pooler_output)

    def processor(text=None, images=None, **_):
        found = {}
        if images is not None:
            found["pixel_values"] = torch.stack([image.float() for image in images]) / 127.5 - 1
        if text is not None:
            found |= dict(clip.tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt"))
        return found

    images = [torch.from_numpy(np.array(shot.open())).permute(2, 0, 1) for shot in pictures.shots]
    with torch.no_grad():
        theirs = clip_score.clip_score(images, pictures.prompts, model_name_or_path=lambda: (Model(), processor))
    assert PromptFollowing()(pictures, case()).estimate == pytest.approx(theirs.item(), abs=1e-3)


def test_it_falls_with_every_attribute_that_is_asked_for_otherwise():
    means = []
    for number in range(12):
        rng = random.Random(f"asked {number}")
        identity, context = held_out_character(number), world.draw_context(rng)
        drawn = Image.fromarray(drawing.render(identity, context))
        prompts = [world.caption(identity, context)[0]]
        for name in rng.sample(["scene", "garment", "garment_colour", "expression"], 4):
            others = [value for value in world.CONTEXT_ATTRIBUTES[name] if value not in (getattr(context, name), "plain", "neutral")]
            context = replace(context, **{name: rng.choice(others)})
            prompts.append(world.caption(identity, context)[0])
        means.append(PromptFollowing()(Gallery("drawn", [Shot(drawn, prompt) for prompt in prompts]), case()).rows)
    curve = np.mean(means, 0)
    assert (np.diff(curve) < -2).all(), curve


def test_order_changes_nothing():
    pictures = gallery(1, 8)
    other, order = turned(pictures)
    assert PromptFollowing()(other, case()).rows == pytest.approx(PromptFollowing()(pictures, case()).rows[order], abs=1e-3)


def test_pictures_without_prompts_are_not_asked():
    shots = gallery(1, 3).shots
    found = PromptFollowing()(Gallery("some", [replace(shots[0], prompt=" "), *shots[1:]]), case())
    assert np.isnan(found.rows).tolist() == [True, False, False] and found.count == 2
    with pytest.raises(DataError, match="no picture has a prompt"):
        PromptFollowing()(Gallery("none", [replace(shots[0], prompt="")]), case())


def test_prompts_that_are_too_long_are_told():
    long = replace(gallery(1, 1).shots[0], prompt="a portrait of a woman, " * 40)
    assert PromptFollowing()(Gallery("long", [long]), case()).notes == ("of 1 of 1 prompts this CLIP reads the first 77 tokens alone",)
