"""What is lost without a part: from paired comparisons, and one ablation through the evaluator."""

import json

import pytest
import torch

import charforgex
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.lora import writing
from charforgex.lora.state import LoraLayer
from charforgex.toolbox.ablating import importance, parts_of

NAMES = [
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
]  # fmt: skip


def test_parts_in_the_order_of_the_networks():
    blocks = {part: len(names) for part, names in parts_of(NAMES[::-1], "block").items()}
    assert blocks == {"unet.down_blocks.1.attentions.0": 1, "unet.mid_block.attentions.0": 2, "text_encoder.encoder.layers.0": 1}
    assert list(blocks)[-1].startswith("text_encoder")
    kinds = {part: len(names) for part, names in parts_of(NAMES, "kind").items()}
    assert kinds == {"attn1.to_q": 1, "attn2.to_k": 2, "self_attn.q_proj": 1}


def test_what_is_lost_whichever_side_the_comparison_has():
    apart = {"estimate": 0.2, "low": 0.1, "high": 0.3}
    row = {"metric": "identity", "difference": apart, "verdict": "a better"}
    result = {
        "comparison": {"rows": [row | {"a": "whole", "b": "without-x"}, row | {"a": "without-y", "b": "whole"}]},
        "metrics": {"identity": {"values": {"whole": {"estimate": 0.7}, "without-x": {"estimate": 0.5}, "without-y": {"estimate": 0.9}}}},
        "page": "report.html",
    }  # fmt: skip
    told = importance(result, "whole", {"x": ["a"], "y": ["b", "c"]})
    assert told["parts"]["x"] == {"layers": 1, "identity": {"lost": 0.2, "low": 0.1, "high": 0.3, "verdict": "a better"}}
    assert told["parts"]["y"]["identity"]["lost"] == -0.2 and told["parts"]["y"]["identity"]["low"] == -0.3
    assert told["whole"] == {"identity": 0.7}


@pytest.fixture
def lora(tmp_path):
    """A LoRA of charworld's SDXL: something on the way down and in the middle, nothing on the way up."""
    base = bases.get("charworld_sdxl")
    names = [name for name in base.shapes if name.endswith(("attn2.to_k", "attn2.to_v"))]
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in names:
        rows, columns = base.shapes[name][:2]
        size = 0.0 if "up_blocks" in name else 0.3
        layers[name] = LoraLayer(torch.randn(4, columns, generator=generator), size * torch.randn(rows, 4, generator=generator), 4.0)
    path = tmp_path / "made.safetensors"
    metadata = {"charforgex.trigger": "zatoki woman", "charforgex.family": "sdxl", "charforgex.base": "charworld"}
    writing.write_layers(layers.get, names, path, "diffusers", base.names, torch.float32, metadata)
    return path


def test_leaving_out_what_does_nothing_loses_nothing(lora, tmp_path):
    how = {"metrics": ["identity"], "packs": ["character"], "count": 1, "cache_dir": str(tmp_path / "cache")}
    told = charforgex.lora_tool("ablate", lora=str(lora), references="charworld:0", **how)
    found = json.loads((tmp_path / "made.ablation/importance.json").read_text())
    assert found == told
    lost = {part: row["identity"]["lost"] for part, row in told["parts"].items()}
    assert {part.split(".")[1] for part in lost} == {"down_blocks", "mid_block", "up_blocks"}
    assert {part.split(".")[1] for part, value in lost.items() if value == 0} == {"up_blocks"}
    with pytest.raises(ConfigError, match="earlier ablation"):
        charforgex.lora_tool("ablate", lora=str(lora), references="charworld:0")


def test_one_part_is_no_part(lora):
    with pytest.raises(LoraError, match="unet; say by="):
        charforgex.lora_tool("ablate", lora=str(lora), by="component", references="charworld:0")
