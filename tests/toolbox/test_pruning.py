"""What goes, and what stays as it was, against dense matrices in float64."""

import math

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.lora.state import LohaLayer, LoraLayer
from charforgex.lora.writing import write_layers
from charforgex.toolbox.pruning import prune
from tests.toolbox.bases_on_disk import lora_for
from tests.toolbox.test_resizing import dense, layers_of, with_values


def run(path, out, *settings):
    return prune(compose("lora_prune", [f"lora={path}", f"out={out}", *settings]))


def queries_and_keys(name):
    return name.endswith((".attn1.to_q", ".attn1.to_k"))


def test_layers_are_dropped_by_pattern_and_the_others_stay_bit_for_bit(tmp_path):
    base = bases.get("charworld_sdxl")
    path = lora_for("sdxl", tmp_path / "plain.safetensors", pick=queries_and_keys)
    layers = layers_of("sdxl", path)
    name = next(name for name in layers if name.endswith("to_q"))
    out, inner = base.shapes[name]
    layers[name] = LohaLayer(torch.ones(out, 2), torch.full((2, inner), 0.5), torch.ones(out, 2), torch.ones(2, inner), 2.0)
    write_layers(layers.get, list(layers), path, "kohya", base.names, torch.float32, {"charforgex.family": "sdxl"})
    told = run(path, tmp_path / "b.safetensors", "drop=to_k")
    after = layers_of("sdxl", tmp_path / "b.safetensors")
    assert set(after) == {name for name in layers if name.endswith("to_q")} and all(after[n].equals(layers[n]) for n in after)
    norms = {name: float(layer.delta().double().norm()) for name, layer in layers.items()}
    gone = math.hypot(*(norms[name] for name in layers if name not in after))
    assert told["error"] == pytest.approx(gone / math.hypot(*norms.values()), rel=1e-5)
    assert set(told["dropped"]) == set(layers) - set(after) and told["layers"] == len(after)
    with pytest.raises(LoraError, match="drops all"):
        run(path, tmp_path / "c.safetensors", "drop=[to_k,to_q]")


def test_layers_that_do_little_are_dropped(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=queries_and_keys, make=with_values([3.0, 4.0]))  # norms 5, 10, 15
    before = layers_of("sdxl", path)
    norms = {name: float(dense(layer).norm()) for name, layer in before.items()}
    whole = math.hypot(*norms.values())
    run(path, tmp_path / "b.safetensors", f"share={7 / whole}")
    after = layers_of("sdxl", tmp_path / "b.safetensors")
    assert set(after) == {name for name, norm in norms.items() if norm > 7} and 0 < len(after) < len(before)
    with pytest.raises(LoraError, match=r"share=0\.99 drops all"):
        run(path, tmp_path / "c.safetensors", "share=0.99")


def test_directions_are_measured_by_the_file_s_largest(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=3, pick=queries_and_keys, make=with_values([8.0, 2.5, 0.5]))
    before = layers_of("sdxl", path)  # 8 2.5 .5, 16 5 1, 24 7.5 1.5
    ranks = {8: 0, 16: 1, 24: 1}
    top = {name: round(float(torch.linalg.svdvals(dense(layer))[0])) for name, layer in before.items()}
    told = run(path, tmp_path / "b.safetensors", "directions=0.4")
    after = layers_of("sdxl", tmp_path / "b.safetensors")
    assert {name: after[name].rank if name in after else 0 for name in before} == {name: ranks[value] for name, value in top.items()}
    lost = math.hypot(*(float((dense(before[n]) - (dense(after[n]) if n in after else 0)).norm()) for n in before))
    assert told["error"] == pytest.approx(lost / math.hypot(*(float(dense(layer).norm()) for layer in before.values())), rel=1e-4)
    assert set(told["dropped"]) == {name for name, value in top.items() if value == 8}


def test_small_entries_go_and_what_is_stored_of_the_rest_is_told(tmp_path):
    names = {"unet.conv_in", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"}
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=3, pick=names.__contains__)
    told = run(path, tmp_path / "b.safetensors", "magnitude=0.5", "dtype=float32")
    whole = run(path, tmp_path / "c.safetensors", "magnitude=0.5", "rank=1000", "dtype=float32")
    before = layers_of("sdxl", path)
    lost, left, short, norm = 0.0, 0.0, 0.0, 0.0
    for name, layer in before.items():
        change = dense(layer)
        sparse = change.where(change.abs() > change.abs().flatten().median(), 0.0)
        mine, all_of_it = (dense(layers_of("sdxl", tmp_path / f"{file}.safetensors")[name]) for file in "bc")
        torch.testing.assert_close(all_of_it, sparse, rtol=0, atol=1e-5 * float(change.abs().max()))
        best = float(torch.linalg.svdvals(sparse)[3:].norm())
        assert float((mine - sparse).norm()) == pytest.approx(best, rel=1e-4)
        short, left = math.hypot(short, best), math.hypot(left, float(sparse.norm()))
        lost, norm = math.hypot(lost, float((mine - change).norm())), math.hypot(norm, float(change.norm()))
    assert told["refactored_error"] == pytest.approx(short / left, rel=1e-4) and told["error"] == pytest.approx(lost / norm, rel=1e-4)
    assert told["ranks"] == [3] and whole["refactored_error"] < 1e-5 and 0 < whole["error"] < 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "nothing says what goes"),
        (["share=0.1", "directions=0.1"], "share and directions are two ways"),
        (["drop=[]"], "names no layer"),
        (["drop=''"], "names no layer"),
        (["directions=0.1", "rank=4"], "rank has no effect without magnitude"),
        (["drop=nowhere"], "nowhere matches no"),
        (["share=1.5"], "share=1.5"),
    ],
)
def test_what_is_refused(tmp_path, settings, said):
    path = lora_for("sdxl", tmp_path / "a.safetensors", pick=queries_and_keys)
    with pytest.raises((ConfigError, LoraError), match=said):
        run(path, tmp_path / "b.safetensors", *settings)


def test_a_dora_s_norm_is_not_guessed(tmp_path):
    base = bases.get("charworld_sdxl")
    name = next(name for name in base.shapes if queries_and_keys(name))
    out, inner = base.shapes[name]
    layer = LoraLayer(torch.ones(2, inner), torch.ones(out, 2), 2.0, torch.ones(out))
    write_layers({name: layer}.get, [name], tmp_path / "a.safetensors", "kohya", base.names, metadata={"charforgex.family": "sdxl"})
    for settings, said in (("share=0.1", "norm depends on the base's weights"), ("directions=0.1", "prune directions=... cannot change")):
        with pytest.raises(LoraError, match=said):
            run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", settings)


def test_layers_are_dropped_beside_dora(tmp_path):
    base = bases.get("charworld_sdxl")
    one, other = [name for name in base.shapes if queries_and_keys(name)][:2]
    layers = {}
    for name, strength in ((one, 1.0), (other, 2.0)):
        out, inner = base.shapes[name]
        layers[name] = LoraLayer(torch.ones(2, inner), torch.full((out, 2), strength), 2.0, torch.ones(out))
    write_layers(layers.get, list(layers), tmp_path / "a.safetensors", "kohya", base.names, metadata={"charforgex.family": "sdxl"})
    told = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", f"drop=[{other}]")
    found = layers_of("sdxl", tmp_path / "b.safetensors")
    assert found.keys() == {one} and found[one].equals(layers[one])
    sizes = [math.prod(base.shapes[name]) for name in (one, other)]
    assert told["error"] == pytest.approx((4 * sizes[1] / (sizes[0] + 4 * sizes[1])) ** 0.5, rel=1e-5)
