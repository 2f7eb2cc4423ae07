"""Embedders and the numbers made from their vectors."""

import random

import pytest
import torch
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.embedders import CharworldEmbedder, get_embedder, to_pixels
from charforgex.errors import ConfigError, ModelError
from charforgex.evaluation.identity import similarity


def unit(*angles):
    angles = torch.tensor(angles)
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_similarity_is_the_mean_cosine_to_the_references():
    pictures, references = unit(0.0, torch.pi / 2), unit(0.0, torch.pi / 3)
    assert similarity(pictures, references).tolist() == pytest.approx([(1 + 0.5) / 2, (0 + 3**0.5 / 2) / 2], abs=1e-6)


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
