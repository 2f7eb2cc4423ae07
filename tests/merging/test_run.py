"""The command from end to end: files of different formats in, one file with its lineage out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import charforgex
from charforgex import cli
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.lora.formats import open_lora
from charforgex.lora.state import LoraLayer
from charforgex.lora.writing import write_layers


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments):
    """Runs `charforgex merge ...`; returns its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", *map(str, arguments)])
    return stopped.value.code


def read(path, base="charworld_sdxl"):
    with open_lora(path, bases.get(base).names) as file:
        return file.load()


def same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) <= tolerance * float(change.norm()), name


def deltas(lora):
    return {name: layer.delta() for name, layer in lora.layers.items()}


def test_two_formats_two_ranks_and_layers_that_only_one_has(make, capsys):
    first, a = make("a", choose=lambda name: ".attn1" in name or name == "unet.conv_in", rank=3, alpha=6)
    second, b = make("b", choose=lambda name: ".attn" in name, rank=5, alpha=1, format="kohya", seed=1)
    assert command(first, second, "weights=[0.7,0.3]", "out=c.safetensors") == 0
    shown = capsys.readouterr().out
    assert "linear of a, b, unet" in shown and "c.safetensors: 57 layers" in shown
    row = next(line for line in shown.splitlines() if "up_blocks.0.attentions.1" in line)
    assert row.split()[:-2] == ["up_blocks.0.attentions.1", "8", "0.7", "0.3", "3", "+", "5", "->", "5-8"] and row.split()[-1] == "0"
    made, a, b = read("c.safetensors"), deltas(a), deltas(b)
    zero = torch.zeros(())
    same(deltas(made), {name: 0.7 * a.get(name, zero) + 0.3 * b.get(name, zero) for name in a.keys() | b.keys()})
    assert made.ranks() == [3, 5, 8]
    told = json.loads(made.metadata["charforgex.lineage"])
    assert told["method"] == "merge linear" and told["settings"]["weights"] == [0.7, 0.3]
    assert [parent["name"] for parent in told["parents"]] == ["a.safetensors", "b.safetensors"]
    assert command(second, first, "weights=[0.3,0.7]", "out=d.safetensors", "format=comfyui", "dtype=bfloat16") == 0
    same(deltas(read("d.safetensors")), deltas(made), tolerance=0.01)


def test_the_result_tells_all(make):
    first, a = make("a", rank=4)
    second, b = make("b", rank=4, seed=1)
    told = charforgex.merge(lora=[first, second], method="svd", rank=2, out="small.safetensors")
    made = read("small.safetensors")
    wanted = {name: (one + deltas(b)[name]) / 2 for name, one in deltas(a).items()}
    lost = sum(float((change - made.layers[name].delta()).square().sum()) for name, change in wanted.items())
    whole = sum(float(change.square().sum()) for change in wanted.values())
    assert told["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and 0.1 < told["error"] < 0.9
    assert told["ranks"] == [2] == made.ranks() and told["layers"] == len(made) and told["weights"] == [0.5, 0.5]
    assert told["bytes"] == Path("small.safetensors").stat().st_size < told["bytes_before"]
    assert sum(row["layers"] for row in told["blocks"]) == len(made)
    row = next(row for row in told["blocks"] if row["block"] == "unet.up_blocks.0.attentions.0")
    assert row["weights"] == [[0.5], [0.5]] and row["ranks_before"] == [[4], [4]] and row["ranks"] == [2] and row["layers"] == 8


def test_a_dry_run_shows_the_same_and_writes_nothing(make, capsys):
    first, _ = make("a")
    second, _ = make("b", seed=1)
    before = sorted(Path().iterdir())
    told = charforgex.merge(lora=[first, second], method="ties", dry_run=True)
    assert sorted(Path().iterdir()) == before and "nothing is written" in capsys.readouterr().out
    made = charforgex.merge(lora=[first, second], method="ties", out="c.safetensors")
    for key in ("layers", "ranks", "error", "blocks", "weights", "bytes_before", "format", "base"):
        assert told[key] == made[key], key
    assert told["bytes"] == pytest.approx(made["bytes"], rel=0.1)


def test_identity_of_one_and_style_of_the_other(make):
    first, a = make("a")
    second, b = make("b", seed=1)
    told = charforgex.merge(lora=[first, second], method="stack", blocks=["identity", "style"], out="c.safetensors")
    wanted = {name: change for name, change in deltas(a).items() if "up_blocks.0.attentions.0." in name}
    wanted |= {name: change for name, change in deltas(b).items() if "up_blocks.0.attentions.1." in name}
    same(deltas(read("c.safetensors")), wanted)
    assert list(told["presets"]) == ["identity", "style"] and "B-LoRA" in told["presets"]["style"]


def test_components_and_gradients_by_file(make):
    chosen = {"base": "charworld_sd3", "choose": lambda name: ".attn.to_" in name or "q_proj" in name}
    (first, a), (second, b) = make("a", **chosen), make("b", **chosen, seed=1)
    charforgex.merge(
        lora=[first, second], weights=[1.0, 1.0], gradient=[[1, 0], [0, 1]], block_weights=[{"text_encoder": 0}, None], out="c.safetensors"
    )
    made, a, b = deltas(read("c.safetensors", "charworld_sd3")), deltas(a), deltas(b)
    name = "transformer.transformer_blocks.1.attn.to_q"
    torch.testing.assert_close(made[name], 0.8 * a[name] + 0.2 * b[name])
    name = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    torch.testing.assert_close(made[name], 0.5 * b[name])
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" not in made


def test_rslora_is_as_strong_as_it_was_trained(make):
    path, lora = make("a", rank=4, alpha=4)
    made = charforgex.merge(lora=[path], weights=[1.0], out="same.safetensors")
    assert made["error"] == 0
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    header = json.loads(metadata["lora_adapter_metadata"]) | {"unet.use_rslora": True}
    save_file(tensors, "rs.safetensors", metadata | {"lora_adapter_metadata": json.dumps(header)})
    charforgex.merge(lora=["rs.safetensors", "same.safetensors"], weights=[1.0, 1.0], out="both.safetensors")
    same(deltas(read("both.safetensors")), {name: 3 * change for name, change in deltas(lora).items()})  # sqrt(4) + 1


def test_no_library_of_base_models_is_needed(make):
    first, _ = make("a", choose=lambda name: name.endswith("to_q"))
    code = (
        f"import sys, charforgex; charforgex.merge(lora=['{first}', '{first}'], method='ties', out='c.safetensors');"
        "assert not {'diffusers', 'transformers', 'peft', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sweeps_make_files_of_their_own(make, capsys):
    first, _ = make("a")
    second, _ = make("b", seed=1)
    assert command(first, second, "-m", "weights=[1,0],[0.5,0.5]", "method=linear,slerp") == 0
    found = sorted(Path("merged").iterdir())
    assert [path.name.rpartition("_")[0] for path in found] == ["a+b_linear"] * 2 + ["a+b_slerp"] * 2
    assert sum(read(path).ranks() == [4] for path in found) == 2
    assert command("-m", f"lora=[{first},{second}]", "weights=[1,0],[0.5,0.5]", "out=swept/c.safetensors") == 0
    assert len(list(Path("swept").glob("c_*.safetensors"))) == 2
    assert command(first, second, "weights=[1,0]") == 2, "the file of the same settings is there"
    assert "exists; say overwrite=true" in capsys.readouterr().err


def test_what_is_no_plain_lora_is_refused_with_the_way_out(make):
    first, a = make("a")
    base = bases.get("charworld_sdxl")
    dora = {n: LoraLayer(one.down, one.up, one.alpha, torch.ones(one.up.shape[0])) for n, one in a.layers.items()}
    write_layers(dora.get, list(dora), "dora.safetensors", "kohya", base.names, torch.float32, {"charforgex.family": "sdxl"})
    with pytest.raises(LoraError, match=r"dora.safetensors has layers of DoRA.*charforgex lora convert dora.safetensors .*kind=lora"):
        charforgex.merge(lora=[first, "dora.safetensors"], out="c.safetensors")
    assert not Path("c.safetensors").exists()


def test_a_file_of_a_text_encoder_alone_is_for_the_base_that_is_named(make):
    text = make("text", base="sdxl_base", choose=lambda name: name.startswith("text_encoder.") and "layers.0.self_attn.q" in name)[0]
    flux = make("flux", base="flux_dev", choose=lambda name: name == "transformer.transformer_blocks.0.attn.to_q")[0]
    with pytest.raises(LoraError, match=r"different families: text.safetensors for sdxl, flux.safetensors for flux.*say base="):
        charforgex.merge(lora=[text, flux], out="c.safetensors")
    made = charforgex.merge(lora=[text, flux], base="flux_dev", out="c.safetensors")
    assert made["base"] == "flux_dev" and sorted(read("c.safetensors", "flux_dev").components()) == ["text_encoder", "transformer"]


def test_what_cannot_be_is_told_before_anything_is_written(make):
    first, _ = make("a")
    second, _ = make("b", base="charworld_sd3")
    with pytest.raises(LoraError, match=r"different families: a.safetensors for sdxl, b.safetensors for sd3"):
        charforgex.merge(lora=[first, second], out="c.safetensors")
    with pytest.raises(LoraError, match="cancel each other"):
        charforgex.merge(lora=[first, first], method="subtract", out="c.safetensors", dry_run=True)
    with pytest.raises(LoraError, match=r"cancel each other"):
        charforgex.merge(lora=[first, first], method="subtract", out="c.safetensors")
    with pytest.raises(ConfigError, match="is one of the inputs"):
        charforgex.merge(lora=[first, first], out=first)
    with pytest.raises(ConfigError, match="every weight is 0"):
        charforgex.merge(lora=[first, first], block_weights={"unet": 0}, out="c.safetensors")
    with pytest.raises(LoraError, match="has no LoRA format kohyo"):
        charforgex.merge(lora=[first, first], format="kohyo", out="c.safetensors")
    with pytest.raises(ConfigError, match=r"weights=\[1.0\] are 1 for 2 files"):
        charforgex.merge(lora=["nowhere.safetensors", first], weights=[1], out="c.safetensors")
    assert not Path("c.safetensors").exists()
