"""Prompt-following: charworld's attributes, and CLIP scores."""

import random

import pytest
import torch
from PIL import Image

from charforgex.charworld import drawing, models, world
from charforgex.errors import ModelError
from charforgex.evaluation.alignment import CharworldFollower, calls, clip_score, get_follower


@pytest.fixture(scope="module")
def follower():
    return CharworldFollower()


def scenes(count):
    rng = random.Random("alignment")
    found = []
    for _ in range(count):
        identity, context = world.draw_identity(rng, held_out=True), world.draw_context(rng)
        found.append((Image.fromarray(drawing.render(identity, context)), world.caption(identity, context)[0]))
    return [list(side) for side in zip(*found, strict=True)]


def test_real_pictures_follow_their_captions_and_not_others(follower):
    pictures, captions = scenes(32)
    own = follower.score(pictures, captions)
    others = follower.score(pictures, captions[5:] + captions[:5])
    assert sum(own) / 32 > 0.9
    assert sum(others) / 32 < 0.4
    assert all(0 <= score <= 1 for score in own + others)


def test_clip_score_prefers_the_own_caption(follower):
    pictures, captions = scenes(32)
    own, others = follower.clip_score(pictures, captions), follower.clip_score(pictures, captions[5:] + captions[:5])
    assert sum(a > b for a, b in zip(own, others, strict=True)) >= 30


def test_a_prompt_that_asks_for_nothing_is_followed(follower):
    pictures, _ = scenes(1)
    assert follower.score(pictures, ["hello"]) == [1.0]


def test_features_are_unit_vectors(follower):
    features = follower.features(scenes(3)[0])
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)


def test_clip_score_by_hand():
    seen, read = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
    assert clip_score(seen, read).tolist() == pytest.approx([60, 60, 0])
    assert clip_score(seen.numpy(), read.numpy()).tolist() == pytest.approx([60, 60, 0])


def test_a_name_is_a_word():
    assert calls("a portrait of Ann, smiling", "ann") and calls("ann lee", "Ann Lee")
    assert not calls("annoyed", "ann") and not calls("joann", "ann")


def test_any_clip_of_transformers_scores(tmp_path, follower):
    from transformers import CLIPImageProcessorPil

    tokens = models.tokenizer()
    torch.manual_seed(0)
    models.clip(tokens).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    clip = get_follower(str(tmp_path))
    pictures, captions = scenes(3)
    scores = clip.score(pictures, captions)
    text = clip.clip.model.text_model(clip.clip.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids)
    expected = torch.nn.functional.cosine_similarity(clip.features(pictures), clip.clip.model.text_projection(text.pooler_output))
    assert scores == pytest.approx((100 * expected.clamp(min=0)).tolist(), abs=1e-3)


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        get_follower(str(tmp_path / "nowhere"))
