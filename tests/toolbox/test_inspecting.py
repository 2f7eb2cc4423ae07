"""What a file is and says, and what is wrong with it."""

import json

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import LoraError
from charforgex.families import bases
from charforgex.lora.state import LoraLayer
from charforgex.lora.writing import write_layers
from charforgex.toolbox.inspecting import inspect, runs
from tests.toolbox.bases_on_disk import lora_for


def run(*settings):
    return inspect(compose("lora_inspect", list(settings)))["files"]


def test_a_file_tells_what_it_is(tmp_path, capsys):
    base, names = bases.get("charworld_flux"), []
    for i in (0, 1):
        names += [f"transformer.transformer_blocks.{i}.attn.{path}" for path in ("to_q", "to_k")]
    layers = {name: LoraLayer(torch.ones(2, base.shapes[name][1]), torch.ones(base.shapes[name][0], 2), 1.0) for name in names}
    said = {
        "charforgex.family": "flux", "charforgex.trigger": "ohwx", "modelspec.title": "hero", "ss_steps": "700", "ss_unet_lr": "None",
        "ss_tag_frequency": json.dumps({"hero": {"ohwx": 9, "hat": 4}}), "charforgex.lineage": json.dumps({"method": "resize"}),
    }  # fmt: skip
    write_layers(layers.get, names, tmp_path / "a.safetensors", "kohya", base.names, torch.bfloat16, said)
    (told,) = run(f"lora={tmp_path / 'a.safetensors'}")
    assert (told["base"], told["family"], told["format"], told["layers"]) == ("charworld_flux", "flux", "kohya", 4)
    assert told["ranks"] == {2: 4} and told["alphas"] == {1.0: 4} and told["kinds"] == {"lora": 4} and set(told["dtypes"]) == {"bfloat16"}
    assert told["blocks"] == {"transformer.transformer_blocks.0": 2, "transformer.transformer_blocks.1": 2}
    assert told["parameters"] == sum(layer.down.numel() + layer.up.numel() for layer in layers.values())
    assert (told["title"], told["trigger"], told["training"], told["tags"]) == ("hero", "ohwx", {"steps": "700"}, {"ohwx": 9, "hat": 4})
    assert told["lineage"] == {"method": "resize"} and told["sha256"].startswith(told["autov2"]) and told["problems"] == []
    shown = capsys.readouterr().out
    assert "transformer.transformer_blocks.0-1: 2 each" in shown and "ohwx" in shown
    run(f"lora={tmp_path / 'a.safetensors'}", "json=true")
    assert json.loads(capsys.readouterr().out)["files"][0]["autov3"] == told["autov3"]


def test_problems_are_told_and_end_nothing(tmp_path):
    zero = lora_for("sdxl", tmp_path / "a.safetensors", pick=lambda name: name.endswith(("attn1.to_q", "attn1.to_k")), make=_partly_zero)
    (told,) = run(f"lora={zero}")
    assert [problem.partition(":")[0] for problem in told["problems"]] == [
        f"{told['layers'] // 2} of {told['layers']} layers change nothing"
    ]
    other = lora_for("sdxl", tmp_path / "b.safetensors", "ai-toolkit", pick=lambda name: name.endswith("attn1.to_q"))
    assert run(f"lora={other}")[0]["problems"] == ["It has no alphas: its ranks are taken for them, as all tools do."]
    (tmp_path / "c.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(LoraError, match=r"None of the 0 keys is a LoRA's"):
        run(f"lora={tmp_path / 'c.safetensors'}")


def _partly_zero(shape, rank, seed):
    return LoraLayer(torch.ones(rank, shape[1]), torch.full((shape[0], rank), float(seed % 2)), 1.0)


def test_equal_blocks_in_a_row_are_one_line():
    blocks = {"t.blocks.0": 14, "t.blocks.1": 14, "t.blocks.2": 3, "t.blocks.4": 3, "t.mid": 5}
    assert runs(blocks) == {"t.blocks.0-1": "14 each", "t.blocks.2": "3", "t.blocks.4": "3", "t.mid": "5"}
