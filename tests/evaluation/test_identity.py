"""Embedders and the numbers made from their vectors."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.embedders import CharworldEmbedder, get_embedder, to_pixels
from charforgex.errors import ConfigError, ModelError
from charforgex.evaluation.identity import mix_up, ranks, similarity, threshold_at


def unit(*angles):
    angles = torch.tensor(angles)
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_similarity_is_the_mean_cosine_to_the_references():
    pictures, references = unit(0.0, torch.pi / 2), unit(0.0, torch.pi / 3)
    assert similarity(pictures, references).tolist() == pytest.approx([(1 + 0.5) / 2, (0 + 3**0.5 / 2) / 2], abs=1e-6)


def test_pairs_of_a_picture_and_itself_do_not_count():
    pictures = unit(0.0, torch.pi / 2, torch.pi / 3)
    same = torch.eye(3, dtype=torch.bool)
    expected = [(0 + 0.5) / 2, (0 + 3**0.5 / 2) / 2, (0.5 + 3**0.5 / 2) / 2]
    assert similarity(pictures, pictures, same).tolist() == pytest.approx(expected, abs=1e-6)
    assert similarity(pictures.numpy(), pictures.numpy(), same.numpy()) == pytest.approx(expected, abs=1e-6)


def test_thresholds_let_in_as_many_as_they_may():
    scores = np.array([0.3, 0.9, 0.1, 0.5, 0.7])
    assert [threshold_at(scores, rate) for rate in (0.0, 0.2, 0.39, 0.4, 0.8)] == [0.9, 0.7, 0.7, 0.5, 0.1]
    assert [(scores > threshold_at(scores, rate)).sum() for rate in (0.0, 0.2, 0.4)] == [0, 1, 2]
    assert threshold_at(np.arange(100.0), 0.29) == 70  # 0.29 * 100 is a little less than 29 in floats
    assert threshold_at(np.array([0.5, 0.5, 0.1]), 0.34) == 0.5  # equal ones are not let in by halves


def test_ranks_by_hand():
    rivals = np.array([[0.1, 0.2, 0.3], [0.1, 0.5, 0.9], [0.4, np.nan, 0.1]])
    assert ranks(np.array([0.5, 0.5, 0.5]), rivals).tolist() == [1, 3, 1]


def test_mixed_up_faces_by_hand():
    first, second, third = np.eye(3)
    assert mix_up(np.stack([first, second]), [0, 1]) == (0, 0)
    assert mix_up(np.stack([first, first]), [0, 1]) == (1, 1)
    assert mix_up(np.stack([third, second, second]), [0, 1]) == (2, 1)
    assert mix_up(np.zeros((0, 3)), [0, 1]) == (0, 2)


def test_pixels_are_in_range_and_of_size():
    pixels = to_pixels([Image.new("RGB", (10, 20), (255, 0, 127)), Image.new("L", (64, 64), 0)], 64)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([1, -1, 127 / 127.5 - 1], abs=1e-6)
    assert pixels[1].unique().tolist() == [-1.0]


def pictures_of(number, count=4, size=64):
    rng = random.Random(f"test {number}")
    return [Image.fromarray(drawing.render(held_out_character(number), world.draw_context(rng), size)) for _ in range(count)]


def test_charworlds_embedder_knows_characters_it_has_never_seen():
    embed = CharworldEmbedder()
    vectors = [embed(pictures_of(number)) for number in range(6)]
    assert torch.allclose(vectors[0].norm(dim=1), torch.ones(4), atol=1e-5)
    same = [similarity(v[:2], v[2:]).mean().item() for v in vectors]
    other = [similarity(vectors[a], vectors[b]).mean().item() for a in range(6) for b in range(a)]
    assert min(same) > 0.7
    assert max(other) < 0.6
    assert sum(same) / len(same) - sum(other) / len(other) > 0.7


def test_the_size_of_a_picture_hardly_matters_to_it():
    embed = CharworldEmbedder()
    assert similarity(embed(pictures_of(1, size=192)), embed(pictures_of(1))).mean() > 0.8


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny random Dinov2 in a folder, as from the hub."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)).save_pretrained(
        folder
    )
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def test_any_image_model_of_transformers_embeds(dinov2):
    embed = get_embedder(str(dinov2))
    vectors = embed(pictures_of(0))
    assert vectors.shape == (4, 32)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.equal(vectors, embed(pictures_of(0)))


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        get_embedder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="embedder"):
        get_embedder("")
