"""Quantised files: what they weigh, what their errors are, and that every reader takes them for what they were."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.generation.settings import Settings
from charforgex.generation.stack import read_stack
from charforgex.lora.formats import read_header
from charforgex.lora.state import LohaLayer, LoraLayer
from charforgex.lora.writing import write_layers
from charforgex.toolbox.quantizing import quantize
from charforgex.toolbox.resizing import resize
from tests.toolbox.bases_on_disk import lora_for
from tests.toolbox.test_resizing import dense, layers_of

KINDS = {"fp8": (0.045, 8), "int8": (0.015, 8), "nf4": (0.15, 4.5)}  # error, bits a value


def run(path, out, *settings):
    return quantize(compose("lora_quantize", [f"lora={path}", f"out={out}", *settings]))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_errors(tmp_path, kind):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=16, pick=lambda name: ".attn1.to_" in name)
    told = run(path, tmp_path / "b.safetensors", f"kind={kind}")
    before, after = layers_of("sdxl", path), layers_of("sdxl", tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and [layer.alpha for layer in before.values()] == [layer.alpha for layer in after.values()]
    most, bits = KINDS[kind]
    whole = torch.cat([dense(layer).flatten() for layer in before.values()])
    read = torch.cat([dense(layer).flatten() for layer in after.values()])
    assert told["error"] == pytest.approx(float((whole - read).norm() / whole.norm()), rel=1e-3) and 0.001 < told["error"] < most
    values = sum(layer.down.numel() + layer.up.numel() for layer in before.values())
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys() if not key.endswith(".alpha"))  # noqa: SIM118
    assert bits <= 8 * stored / values < bits * 1.15
    assert told["bytes"] == (tmp_path / "b.safetensors").stat().st_size < told["bytes_before"]
    dry = run(path, tmp_path / "c.safetensors", f"kind={kind}", "dry_run=true")
    assert dry["error"] == told["error"] and dry["bytes"] == told["bytes"] and not (tmp_path / "c.safetensors").exists()


def test_who_reads_lora_files_reads_these(tmp_path):
    path = lora_for("flux", tmp_path / "a.safetensors", format="diffusers", pick=lambda name: ".attn." in name)
    run(path, tmp_path / "b.safetensors", "kind=int8")
    base = bases.get("charworld_flux")
    assert bases.base_of_file(tmp_path / "b.safetensors").name == base.name
    assert read_header(path)[1] == read_header(tmp_path / "b.safetensors")[1], "shapes are those of the factors"
    quantised = layers_of("flux", tmp_path / "b.safetensors")
    (adapter,) = read_stack(Settings(lora=str(tmp_path / "b.safetensors"), prompt="x", base="charworld")).adapters
    assert all(adapter.lora.layers[name].equals(layer) for name, layer in quantised.items()) and len(adapter.lora) == len(quantised)
    told = resize({"lora": str(tmp_path / "b.safetensors"), "out": str(tmp_path / "c.safetensors"), "rank": 3})
    assert told["error"] < 1e-6 and "charforgex.quantized" not in read_header(tmp_path / "c.safetensors")[0]
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}, "what they were before"  # noqa: SIM118
    again = run(tmp_path / "b.safetensors", tmp_path / "d.safetensors", "kind=int8")
    assert again["error"] < 1e-3, "what has been rounded is rounded to itself"


def test_other_kinds_keep_what_is_not_a_factor(tmp_path):
    base = bases.get("charworld_sdxl")
    one, other = [name for name in base.shapes if name.endswith("attn1.to_q")][:2]
    draw = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    (out, inner), (out_2, inner_2) = base.shapes[one], base.shapes[other]
    layers = {
        one: LoraLayer(randn(4, inner), randn(out, 4), 3.0, randn(out)),
        other: LohaLayer(randn(out_2, 4), randn(4, inner_2), randn(out_2, 4), randn(4, inner_2), 5.0),
    }
    path = tmp_path / "a.safetensors"
    write_layers(layers.get, list(layers), path, "kohya", base.names, torch.float32, {"charforgex.family": "sdxl"})
    told = run(path, tmp_path / "b.safetensors", "kind=fp8")
    after = layers_of("sdxl", tmp_path / "b.safetensors")
    assert torch.equal(after[one].magnitude, layers[one].magnitude) and after[one].alpha == 3 and after[other].alpha == 5
    errors = [(after[n].delta() - layers[n].delta()).norm() if n == other else dense(after[n]) - dense(layers[n]) for n in (one, other)]
    norms = [torch.linalg.norm(dense(layers[one])), layers[other].delta().norm()]
    expected = float(torch.hypot(errors[0].norm().float(), errors[1]) / torch.hypot(norms[0].float(), norms[1]))
    assert told["error"] == pytest.approx(expected, rel=1e-3)


def test_factors_in_float8_can_be_quantised(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", pick=lambda name: name.endswith("attn1.to_q"))
    narrow = {key: t if key.endswith(".alpha") else t.to(torch.float8_e4m3fn) for key, t in load_file(path).items()}
    save_file(narrow, tmp_path / "b.safetensors")
    told = run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kind=int8")
    before, after = layers_of("sdxl", tmp_path / "b.safetensors"), layers_of("sdxl", tmp_path / "c.safetensors")
    whole, lost = (torch.cat([dense(layer).flatten() for layer in found.values()]) for found in (before, after))
    assert told["error"] == pytest.approx(float((whole - lost).norm() / whole.norm()), rel=1e-2) and told["error"] < 0.015


def test_what_is_refused(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", pick=lambda name: name.endswith("attn1.to_q"))
    with pytest.raises(ConfigError, match="format has no effect"):
        quantize({"lora": str(path), "out": str(tmp_path / "b.safetensors"), "format": "diffusers"})
    with pytest.raises(ConfigError, match="kind=nf5"):
        run(path, tmp_path / "b.safetensors", "kind=nf5")
    with pytest.raises(ConfigError, match="is one of the inputs"):
        run(path, path)
    with pytest.raises(LoraError, match="There is no LoRA file"):
        run(tmp_path / "none.safetensors", tmp_path / "b.safetensors")
