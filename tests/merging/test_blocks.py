"""Words, factors and depth become one number for each layer of a file."""

import pytest

from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.merging import blocks


def factors(base, choose=lambda name: True, words=None, table=None, gradient=None):
    found = bases.get(base)
    names = [name for name in found.shapes if choose(name)]
    return blocks.factors(
        names, list(found.shapes), words, table or {}, gradient, found.family, found.spelling.denoiser_name, "a.safetensors"
    )


def kept(found):
    return {blocks.block_of(name) for name, value in found.items() if value}


def test_blocks_come_in_the_order_in_which_they_are_computed():
    shown = [block.partition(".")[2] for block in blocks.depths(list(bases.get("charworld_sdxl").shapes)) if block.startswith("unet.")]
    assert shown[:5] == ["add_embedding", "conv_in", "time_embedding", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0"]
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.0", "up_blocks.0.attentions.0"]
    assert shown[shown.index(middle[0]) :][:5] == middle and shown[-1] == "conv_out"
    depth = blocks.depths(list(bases.get("flux_dev").shapes))
    assert depth["transformer.transformer_blocks.0"] == depth["transformer.x_embedder"] == 0
    assert depth["transformer.single_transformer_blocks.37"] == depth["transformer.proj_out"] == 1
    assert depth["transformer.single_transformer_blocks.0"] == pytest.approx(19 / 56)
    assert depth["text_encoder.encoder.layers.11"] == 1


def test_presets_of_sdxl_are_the_published_blocks():
    assert kept(factors("sdxl_base", words=["identity"])) == {"unet.up_blocks.0.attentions.0"}
    assert kept(factors("sdxl_base", words=["style"])) == {"unet.up_blocks.0.attentions.1"}
    assert kept(factors("sdxl_base", words=["composition"])) == {"unet.down_blocks.2.attentions.1"}
    assert sum(factors("sdxl_base", words=["identity"]).values()) == 102  # 10 transformer blocks of 10, proj_in and proj_out
    with pytest.raises(LoraError, match=r"composition \(unet.down_blocks.2.attentions.1.\*\) is no layer of a.safetensors"):
        factors("charworld_sdxl", words=["composition"])


@pytest.mark.parametrize("base, count", [("flux_dev", 57), ("sd35_medium", 24), ("charworld_sd3", 6)])
def test_presets_of_transformers_divide_the_depth(base, count):
    parts = [kept(factors(base, words=[word])) for word in ("composition", "identity", "style")]
    assert sum(map(len, parts)) == count == len(set().union(*parts)) and all(abs(3 * len(part) - count) <= 2 for part in parts)
    assert all(block.startswith("transformer.") and "transformer_blocks." in block for part in parts for block in part)
    said = blocks.sources(["identity", "style", "to_q"], bases.get(base).family)
    assert list(said) == ["identity", "style"] and all("tested by nobody" in source for source in said.values())


def test_components_patterns_and_the_last_factor_that_fits():
    found = factors("charworld_sdxl", table={"unet": 0.5, "up_blocks.0.*": 2.0, "re:.*attn2\\.to_[kv]": 0.0, "to_q": 3.0})
    at = "unet.{}.attentions.0.transformer_blocks.0.{}".format
    assert found[at("mid_block", "attn1.to_k")] == 0.5 and found[at("up_blocks.0", "attn1.to_k")] == 2
    assert found[at("up_blocks.0", "attn2.to_k")] == 0 and found[at("up_blocks.0", "attn2.to_q")] == 3
    assert found["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == 1
    assert kept(factors("charworld_sdxl", words=["text_encoder"])) == {f"text_encoder.encoder.layers.{i}" for i in range(3)}
    both = factors("charworld_sdxl", words=["identity", "text_encoder"], table={"text_encoder": 0.25})
    assert both["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == 0.25 and both["unet.conv_in"] == 0


def test_a_gradient_goes_from_the_first_block_to_the_last():
    found = factors("charworld_sd3", gradient=(1.0, 0.0), table={"to_q": 2.0})
    at = "transformer.transformer_blocks.{}.attn.{}".format
    assert [found[at(i, "to_k")] for i in range(6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert found[at(1, "to_q")] == pytest.approx(1.6)
    fewer = factors("charworld_sd3", choose=lambda name: ".1." in name, gradient=(1.0, 0.0))
    assert fewer[at(1, "to_k")] == pytest.approx(0.8), "depth is the base's, whatever the file has"
    assert found["transformer.pos_embed.proj"] == 1 and found["transformer.proj_out"] == 0


def test_a_word_that_chooses_nothing_is_an_error():
    with pytest.raises(LoraError, match=r"blocks: identty is no layer of a.safetensors, whose blocks are .*presets of sdxl are identity"):
        factors("charworld_sdxl", words=["unet", "identty"])
    with pytest.raises(LoraError, match=r"block_weights: text_encoder is no layer"):
        factors("charworld_sdxl", choose=lambda name: ".attn1" in name, table={"text_encoder": 0.5})
    with pytest.raises(ConfigError, match=r"blocks: re:\( is no regular expression"):
        factors("charworld_sdxl", words=["re:("])
