"""New tokens: what encoders make of them, the end of the text where old configs lose it, and files that diffusers reads."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.errors import LoraError
from charforgex.families.sdxl import Sdxl
from charforgex.families.text import token_ids
from charforgex.families.tokens import (
    NewTokens,
    Rewording,
    add_tokens,
    initial_rows,
    keeping_words,
    read_tokens,
    save_tokens,
    usual_length,
)
from tests.families.rows import PICTURES

ROWS_2 = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


def with_tokens(family=None, rows=ROWS_2, word="zkx"):
    family = family or Sdxl()
    parts = family.tiny()
    for name in family.clip_encoders:
        add_tokens(parts, name, word, rows)
    return parts


def test_known_ids_have_their_embedding_and_new_ones_a_row_no_longer_than_usual():
    table = torch.nn.Embedding(5, 2)
    new = NewTokens(table, 5, torch.tensor([[3.0, 4.0], [0.3, 0.4]]), limit=2.5)
    out = new(torch.tensor([[4, 5, 6]]))
    assert torch.equal(out[0, 0], table.weight[4])
    torch.testing.assert_close(out[0, 1:], torch.tensor([[1.5, 2.0], [0.3, 0.4]]))
    assert torch.equal(NewTokens(table, 5, ROWS_2[:, :2])(torch.tensor([6]))[0], ROWS_2[1, :2])


def test_a_word_is_read_as_its_tokens_and_parts_of_words_are_not():
    parts = with_tokens()
    tokenizer = parts["tokenizer"]
    first = tokenizer.convert_tokens_to_ids("<s0>")
    assert isinstance(tokenizer, Rewording) and len(tokenizer) == first + 2
    assert tokenizer("a zkx woman, zkxx").input_ids[1:5] == [*Sdxl().tiny()["tokenizer"]("a").input_ids[1:2], first, first + 1,
                                                             *Sdxl().tiny()["tokenizer"]("woman").input_ids[1:2]]  # fmt: skip
    assert tokenizer("zkxx").input_ids == Sdxl().tiny()["tokenizer"]("zkxx").input_ids
    assert token_ids(tokenizer, ["zkx", "a"]).shape == (2, 77)
    assert len(Sdxl().tiny()["tokenizer"]) == first  # others' tokenizers stay as they were


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_text_without_the_word_stays_and_text_with_it_changes(row):
    base, parts = row.family.tiny(), with_tokens(row.family)
    one, two = (row.family.encode_text(p, ["a woman", "a zkx woman"]) for p in (base, parts))
    assert torch.equal(one.tokens_BLD[0], two.tokens_BLD[0]) and torch.equal(one.pooled_BD[0], two.pooled_BD[0])
    assert not torch.equal(one.pooled_BD[1], two.pooled_BD[1])
    if row.family.name == "sd3":
        assert torch.equal(one.tokens_BLD[1, 77:], two.tokens_BLD[1, 77:])  # T5 reads the word


def test_the_end_of_the_text_is_found_where_the_config_says_2():
    """eos_token_id 2 makes transformers take the largest id for the end, which is the new token's."""
    family = Sdxl()
    right = with_tokens()
    parts = family.tiny()
    inner = parts["text_encoder_2"].text_model
    truth, inner.eos_token_id = inner.eos_token_id, 2
    plain = family.encode_text(parts, ["a woman"])
    for name in family.clip_encoders:
        add_tokens(parts, name, "zkx", ROWS_2)
    assert inner.eos_token_id == truth
    assert torch.equal(family.encode_text(parts, ["a woman"]).pooled_BD, plain.pooled_BD)
    expected = family.encode_text(right, ["a zkx woman"]).pooled_BD
    assert torch.equal(family.encode_text(parts, ["a zkx woman"]).pooled_BD, expected)
    inner.eos_token_id = 2  # the trap itself
    assert not torch.equal(family.encode_text(parts, ["a zkx woman"]).pooled_BD, expected)


def test_they_start_as_a_word_and_know_how_long_tokens_are():
    parts = Sdxl().tiny()
    table = parts["text_encoder"].embeddings.token_embedding.weight
    girl, dog = (parts["tokenizer"](word).input_ids[1] for word in ("girl", "dog"))
    assert torch.equal(initial_rows(parts, "text_encoder", 2, "girl"), table[girl].repeat(2, 1))
    torch.testing.assert_close(initial_rows(parts, "text_encoder", 1, "girl dog")[0], (table[girl] + table[dog]) / 2)
    assert usual_length(parts, "text_encoder") == pytest.approx(table.square().sum(1).sqrt().mean().item())


def test_two_loras_have_tokens_of_their_own_but_not_for_one_word():
    parts = with_tokens()
    add_tokens(parts, "text_encoder", "qqq", 2 * ROWS_2[:1])
    first = parts["tokenizer"].convert_tokens_to_ids("<s0>")
    assert parts["tokenizer"]("zkx qqq").input_ids[1:4] == [first, first + 1, first + 2]
    embedded = parts["text_encoder"].embeddings.token_embedding(torch.tensor([first, first + 1, first + 2]))
    assert torch.equal(embedded, torch.cat([ROWS_2, 2 * ROWS_2[:1]]))
    with pytest.raises(LoraError, match='Two LoRAs have new tokens for the word "zkx"'):
        add_tokens(parts, "text_encoder", "zkx", ROWS_2)


def test_diffusers_reads_the_file_and_says_the_same(tmp_path):
    family = Sdxl()
    path = save_tokens(tmp_path / "x_tokens.safetensors", family, {"text_encoder": ROWS_2, "text_encoder_2": -ROWS_2})
    parts, theirs = family.tiny(), family.tiny()
    for name, rows in read_tokens(path, family).items():
        add_tokens(parts, name, "zkx", rows)
    theirs.modules |= {name: copy.deepcopy(theirs[name]) for name in ("tokenizer", "tokenizer_2")}
    pipeline, tensors = family.pipeline(theirs), load_file(path)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            tensors[key], token=["<s0>", "<s1>"],
            text_encoder=theirs[f"text_encoder{number}"], tokenizer=theirs[f"tokenizer{number}"], mean_resizing=False,
        )  # fmt: skip
    ours = family.encode_text(parts, ["a zkx woman"])
    found = family.encode_text(theirs, ["a <s0><s1> woman"])
    assert torch.equal(ours.tokens_BLD, found.tokens_BLD) and torch.equal(ours.pooled_BD, found.pooled_BD)


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(LoraError, match="put it beside the LoRA"):
        read_tokens(tmp_path / "none.safetensors", Sdxl())
    save_file({"emb_params": ROWS_2}, tmp_path / "sd1.safetensors")
    with pytest.raises(LoraError, match="holds no tokens of sdxl: it has emb_params"):
        read_tokens(tmp_path / "sd1.safetensors", Sdxl())


def test_words_are_forgotten_again():
    family, parts = Sdxl(), Sdxl().tiny()
    inner = parts["text_encoder_2"].text_model
    inner.eos_token_id = 2
    before, tokenizer = family.encode_text(parts, ["a zkx woman"]), parts["tokenizer"]
    with keeping_words(parts):
        for name in family.clip_encoders:
            add_tokens(parts, name, "zkx", ROWS_2)
        assert not torch.equal(family.encode_text(parts, ["a zkx woman"]).tokens_BLD, before.tokens_BLD)
    after = family.encode_text(parts, ["a zkx woman"])
    assert torch.equal(after.tokens_BLD, before.tokens_BLD) and torch.equal(after.pooled_BD, before.pooled_BD)
    assert parts["tokenizer"] is tokenizer and inner.eos_token_id == 2
    assert not any(isinstance(module, NewTokens) for network in parts.networks().values() for module in network.modules())
