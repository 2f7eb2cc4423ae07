"""Adapters whose reaction to words is known, on the embedded bases: the words are found, noise is told from them, sliders are exact."""

import json
import random

import pytest
import torch

from charforgex.charworld import world
from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases, registry
from charforgex.lora.formats import open_lora
from charforgex.lora.lowrank import Product, Spectrum
from charforgex.lora.state import Lora, LoraLayer
from charforgex.lora.writing import write
from charforgex.toolbox import directions
from charforgex.toolbox.directions import WORDS, along, as_read, joint, known, read_words, word_states, words
from charforgex.types import Text

DRAW = torch.Generator().manual_seed(2)
VOCABULARY = read_words(WORDS)


@pytest.fixture(scope="module")
def encoders():
    """By family: it, its text encoders and its denoiser."""
    found = {name: registry.get(name) for name in ("sdxl", "flux", "sd3")}
    return {name: (family, family.load("charworld", only=("text", "denoiser"))) for name, family in found.items()}


FIRST = "transformer_blocks.0.attn.add_k_proj"


def states_of(encoders, name, module=None):
    family, parts = encoders[name]
    return word_states(family, parts, [word for word in VOCABULARY if known(family, parts, word)], module)


def saved(path, name, rows, metadata=None, first=False):
    """A LoRA of the embedded base: each layer that reads the text reacts to `rows` (r, k), most to the first, in a way of its own."""
    base = bases.get(f"charworld_{name}")
    strengths = torch.tensor([2.0**-i for i in range(len(rows))])
    layers = {
        n: LoraLayer(rows, torch.linalg.qr(torch.randn(shape[0], len(rows), generator=DRAW))[0] * strengths, float(len(rows)))
        for n, shape in base.shapes.items()
        if n.endswith(tuple(f".{end}" for end in (base.spelling.first_reads_text if first else base.spelling.reads_text)))
    }
    return write(Lora(layers), path, "kohya", base.spelling, base.config, torch.float32, {"charforgex.family": name} | (metadata or {}))


def run(path, *overrides):
    return words(compose("lora_words", [f"lora={path}", *overrides]))


def test_the_words_are_those_of_the_embedded_world(encoders):
    said = set()
    draw = random.Random(0)
    for number in range(600):
        caption, _ = world.caption(world.draw_identity(draw, held_out=number % 2 == 0), world.draw_context(draw))
        said |= set(caption.replace(",", "").split())
    assert len(said) > 70 and said <= set(VOCABULARY)
    for name, (family, parts) in encoders.items():
        heard = {word for word in VOCABULARY if known(family, parts, word)}
        assert said <= heard and not {"robot", "watercolor", "calm", "sky", "moonlight"} & heard, name


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_a_words_state_is_where_the_word_is(encoders, name):
    """Other words behind a word leave its own token's state as it is in CLIP, which looks back alone, and change all of them in T5."""
    family, parts = encoders[name]
    alone, followed = family.encode_text(parts, ["pink", "pink hair"]).tokens_BLD
    other = family.encode_text(parts, ["green"]).tokens_BLD[0]
    for tokenizer, start in family.word_starts(parts).items():
        ids = parts[tokenizer]("pink hair").input_ids
        assert parts[tokenizer].decode(ids[start % parts[tokenizer].model_max_length]).strip() == "pink"
        assert not torch.allclose(alone[start], other[start], atol=0.1)
        if "CLIP" in type(parts[tokenizer]).__name__:
            torch.testing.assert_close(alone[start], followed[start], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone[start - 1], other[start - 1], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(alone[start + 1], followed[start + 1], atol=0.1)


@pytest.mark.parametrize("name, word, module", [("sdxl", "pink", None), ("flux", "moustache", None), ("sd3", "crown (T5)", FIRST)])
def test_a_known_word_comes_first_and_noise_is_told(encoders, tmp_path, name, word, module):
    states = states_of(encoders, name, module)
    rows = torch.nn.functional.normalize(torch.stack([states[word], torch.randn(len(states[word]), generator=DRAW)]), dim=1)
    told = run(saved(tmp_path / "a.safetensors", name, rows, first=module is not None))
    first, second = told["directions"]
    assert next(iter(first["words"])) == word and first["words"][word] > 0.97 and first["means"] == "a word"
    assert second["means"] == "nothing" and second["chance"]["noise"] > 0.025
    assert first["share"] > 0.7 and first["share"] + second["share"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_first_block_reads_normed_tokens_each_for_itself(encoders, name):
    """Undone by hand: its norm has mean 0 and variance 1 before the modulation, which the same pooled vector makes the same for all."""
    family, parts = encoders[name]
    one, two = family.encode_text(parts, ["pink hair"]), family.encode_text(parts, ["a beach"])
    read = torch.cat([as_read(family, parts, FIRST, text) for text in (one, two)])
    both = as_read(family, parts, FIRST, Text.stack([one, two]))
    torch.testing.assert_close(both, read, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        tokens = torch.cat([one.tokens_BLD, two.tokens_BLD])
        normed = torch.nn.functional.layer_norm(parts.denoiser.context_embedder(tokens), (read.shape[-1],), eps=1e-6)
    flat, x = read.flatten(0, 1), normed.flatten(0, 1)
    gain = ((flat - flat.mean(0)) * (x - x.mean(0))).sum(0) / (x - x.mean(0)).square().sum(0)
    torch.testing.assert_close((flat - flat.mean(0)), (x - x.mean(0)) * gain, atol=1e-3, rtol=1e-3)


def test_chance_is_what_it_is_said_to_be(encoders):
    """Of directions drawn as noise, as mixtures of words, and of words themselves with a little of others."""
    states = states_of(encoders, "sdxl")
    matrix = torch.nn.functional.normalize(torch.stack(list(states.values())), dim=1)
    drawn = {
        "noise": torch.randn(200, matrix.shape[1], generator=DRAW),
        "mixtures": torch.randn(200, len(matrix), generator=DRAW) @ matrix,
        "words": matrix + 0.05 * torch.randn(len(matrix), len(matrix), generator=DRAW) @ matrix,
    }
    told = {}
    for kind, rows in drawn.items():
        found = Spectrum(torch.zeros(1, len(rows)), torch.ones(len(rows)), torch.nn.functional.normalize(rows, dim=1), (1, rows.shape[1]))
        told[kind] = directions.told_by_words(found, states, 200)["directions"]
    for kind in ("noise", "mixtures"):
        chances = torch.tensor([row["chance"][kind] for row in told[kind]])
        assert abs(float(chances.mean()) - 0.5) < 0.08 and int((chances < 0.05).sum()) <= 22  # of evenly spread ones: 4 sigma
    meanings = {kind: [row["means"] for row in rows] for kind, rows in told.items()}
    assert meanings["noise"].count("nothing") >= 199 and meanings["mixtures"].count("a word") <= 1
    assert meanings["mixtures"].count("words") > 100 and meanings["words"].count("a word") > 0.9 * len(matrix)


def test_joint_directions_are_those_of_the_dense_changes():
    products = {
        n: Product(torch.randn(out, 3, generator=DRAW), torch.randn(3, 20, generator=DRAW), (out, 20)) for n, out in enumerate((8, 30))
    }
    dense = torch.cat([found.dense() for found in products.values()])
    found = joint(products)
    assert found.values.tolist() == pytest.approx(torch.linalg.svdvals(dense)[:6].tolist(), rel=1e-5)
    axes = found.right[[0, 3]]
    for product in products.values():
        torch.testing.assert_close(along(product, axes).delta(), product.dense() @ axes.T @ axes, atol=1e-5, rtol=1e-5)
    whole = sum(along(products[1], found.right[[index]]).delta() for index in range(6))
    torch.testing.assert_close(whole, products[1].dense(), atol=1e-5, rtol=1e-5)


def test_a_slider_moves_one_word_alone(encoders, tmp_path):
    states = states_of(encoders, "sdxl")
    pink, night = states["pink"], states["night"]
    night = night - pink * (night @ pink) / (pink @ pink)  # apart from each other, so that each is a direction
    rows = torch.nn.functional.normalize(torch.stack([pink, night]), dim=1)
    path = saved(tmp_path / "a.safetensors", "sdxl", rows, {"charforgex.trigger": "mivozu"})
    out = tmp_path / "slider.safetensors"
    assert "out" not in run(path, "slider=1", f"out={out}", "dry_run=true") and not out.exists()
    told = run(path, "slider=1", f"out={out}", "words=null")
    assert told["vocabulary"] == len(states) + 1  # the trigger is a word, too
    base = bases.get("charworld_sdxl")
    with open_lora(path, base.names) as whole, open_lora(out, base.names) as slider:
        assert set(slider.names) == set(whole.names) == set(told["text_layers"])
        for name in slider.names:
            layer = slider.layer(name)
            moved = layer.delta()
            assert layer.rank == 1
            assert float((moved @ rows[0]).norm()) < 1e-4
            torch.testing.assert_close(moved @ rows[1], whole.layer(name).delta() @ rows[1], atol=1e-4, rtol=1e-4)
        assert json.loads(slider.metadata["charforgex.lineage"])["settings"]["slider"] == [1]
    assert json.loads(out.with_name("slider.safetensors.json").read_text())["directions"][0]["means"] == "a word"


def test_what_has_no_words_is_refused(tmp_path):
    base = bases.get("charworld_flux")
    name = "transformer.transformer_blocks.1.attn.add_k_proj"
    path = write(
        Lora({name: LoraLayer(torch.ones(1, 128), torch.ones(128, 1), 1.0)}),
        tmp_path / "a.safetensors",
        "kohya",
        base.spelling,
        base.config,
    )
    with pytest.raises(LoraError, match=r"none of its layers reads the text token by token, as context_embedder, transformer_blocks\.0\."):
        run(path)
    path = saved(tmp_path / "b.safetensors", "flux", torch.eye(192)[:2])
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    both = {
        f"transformer.{end}": LoraLayer(torch.ones(1, k), torch.ones(128, 1), 1.0) for end, k in (("context_embedder", 192), (FIRST, 128))
    }
    mixed = write(Lora(both), tmp_path / "both.safetensors", "kohya", base.spelling, base.config)
    with pytest.raises(ConfigError, match="read different things"):
        run(mixed, "layers=[context_embedder,add_k_proj]")
    for overrides, error, said in (
        (["slider=0"], ConfigError, "go together"),
        (["format=kohya"], ConfigError, "format without a file would have no effect"),
        (["device=gpu"], ConfigError, "device=gpu is not among the choices: auto, cpu, cuda"),
        ([f"out={tmp_path}/x.safetensors"], ConfigError, "go together"),
        (["slider=2", f"out={tmp_path}/x.safetensors"], ConfigError, "directions 0 to 1"),
        ([f"words={tmp_path}/few.txt"], ConfigError, "has 2 words"),
        ([f"words={tmp_path}/none.txt"], ConfigError, "cannot be read"),
        (["base=charworld_flux", "layers=[to_k]"], LoraError, "layers: to_k matches no"),
    ):
        with pytest.raises(error, match=said):
            run(path, *overrides)
    real = bases.get("flux_schnell")
    layer = LoraLayer(torch.ones(1, 4096), torch.ones(3072, 1), 1.0)
    path = write(Lora({"transformer.context_embedder": layer}), tmp_path / "c.safetensors", "kohya", real.spelling, real.config)
    with pytest.raises(ConfigError, match="say base=<diffusers folder, checkpoint or hub id of flux_dev>"):
        run(path)
