"""Resized files against dense matrices in float64, and budgets against counting."""

import json
import math

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.lora.formats import open_lora, read_header
from charforgex.lora.state import LohaLayer, LoraLayer
from charforgex.lora.writing import write_layers
from charforgex.toolbox.resizing import resize
from tests.toolbox.bases_on_disk import lora_for


def run(path, out, *settings):
    return resize(compose("lora_resize", [f"lora={path}", f"out={out}", *settings]))


def layers_of(family, path):
    with open_lora(path, bases.get(f"charworld_{family}").names) as file:
        return file.load().layers


def dense(layer):
    return layer.scale * layer.up.double().flatten(1) @ layer.down.double().flatten(1)


def with_values(values):
    """Layers of these singular values, each layer's multiplied by its number."""

    def make(shape, rank, seed, strength=0.02):
        generator = torch.Generator().manual_seed(seed)
        left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(math.prod(shape[1:]), rank, generator=generator))[0].T
        up, many = left * torch.tensor(values) * (1 + seed % 3), len(shape) == 4
        return LoraLayer(right.reshape(rank, *shape[1:]), up[:, :, None, None] if many else up, float(rank))

    return make


def attention(name):
    return ".attn1." in name or ".conv1" in name


def test_each_layer_is_the_best_of_its_rank(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=6, pick=attention)
    told = run(path, tmp_path / "b.safetensors", "rank=2", "layers={to_q:4, conv1:1}")
    before, after = layers_of("sdxl", path), layers_of("sdxl", tmp_path / "b.safetensors")
    lost, whole = 0.0, 0.0
    assert before.keys() == after.keys()
    for name, layer in after.items():
        rank = 4 if name.endswith("to_q") else 1 if name.endswith("conv1") else 2
        assert layer.rank == rank
        values = torch.linalg.svdvals(dense(before[name]))
        error = float((dense(before[name]) - dense(layer)).norm())
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-4)
        lost, whole = math.hypot(lost, error), math.hypot(whole, float(values.norm()))
    assert told["error"] == pytest.approx(lost / whole, rel=1e-4) and told["ranks"] == [1, 2, 4] and told["ranks_before"] == [6]
    assert told["bytes"] == (tmp_path / "b.safetensors").stat().st_size < told["bytes_before"] == path.stat().st_size
    metadata, _ = read_header(tmp_path / "b.safetensors")
    lineage = json.loads(metadata["charforgex.lineage"])
    assert lineage["method"] == "resize" and lineage["settings"] == {"rank": 2, "layers": {"to_q": 4, "conv1": 1}}


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        (["rank=2"], 2),
        (["rank=9"], 4),
        (["ratio=4.1"], 3),
        (["ratio=4.1", "rank=2"], 2),
        (["energy=0.98"], 3),  # (64 + 16) / 85 = 0.94, 84 / 85 = 0.988
        (["error=0.12"], 3),  # sqrt(1 / 85) = 0.108
        (["error=0.10"], 4),
        (["error=0.12", "layers={to_k:0.3, to_v:0.0}"], {"to_q": 3, "to_k": 2, "to_v": 4, "to_out.0": 3}),
    ],
)
def test_how_much_stays(tmp_path, settings, rank):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=4, pick=lambda name: ".attn1.to_" in name, make=with_values([8.0, 4, 2, 1]))
    told = run(path, tmp_path / "b.safetensors", *settings)
    for name, layer in layers_of("sdxl", tmp_path / "b.safetensors").items():
        assert layer.rank == (rank if isinstance(rank, int) else rank[name.partition(".attn1.")[2]])
    if rank == 3:
        assert told["error"] == pytest.approx(math.sqrt(1 / 85), rel=1e-3)


def test_a_budget_of_the_file_spends_the_smallest_directions_first(tmp_path):
    names = [f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    make = with_values([8.0, 1.0])
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=names.__contains__, make=make)  # values 8 1, 16 2, 24 3
    whole = 65 + 4 * 65 + 9 * 65
    for spent, ranks in ((1, (1, 2, 2)), (5, (1, 1, 2)), (14, (1, 1, 1)), (14 + 64, (None, 1, 1))):
        told = run(path, tmp_path / "b.safetensors", f"total_error={math.sqrt((spent + 0.1) / whole)}", "overwrite=true")
        layers = layers_of("sdxl", tmp_path / "b.safetensors")
        assert tuple(layers[name].rank if name in layers else None for name in names) == ranks
        assert told["error"] == pytest.approx(math.sqrt(spent / whole), rel=1e-3)
    assert told["dropped"] == names[:1] and told["layers"] == 2
    told = run(path, tmp_path / "b.safetensors", f"total_error={math.sqrt(5.1 / whole)}", "rank=1", "overwrite=true")
    assert told["ranks"] == [1] and told["error"] == pytest.approx(math.sqrt(14 / whole), rel=1e-3)


def test_layers_that_share_a_factor_share_it_afterwards(tmp_path):
    """A kohya file of Flux has queries, keys and values as one weight: resized one by one they would need a rank of three."""
    base = bases.get("charworld_flux")
    joined = {tuple(name for name, _ in parts) for parts in base.names.table("kohya").values() if len(parts) == 3}
    generator, layers = torch.Generator().manual_seed(0), {}
    for names in joined:
        down = torch.randn(6, *base.shapes[names[0]][1:], generator=generator)
        layers |= {name: LoraLayer(down, torch.randn(base.shapes[name][0], 6, generator=generator), 6.0) for name in names}
    path = tmp_path / "a.safetensors"
    write_layers(layers.get, list(layers), path, "kohya", base.names, torch.float32, {"charforgex.family": "flux"})
    told = run(path, tmp_path / "b.safetensors", "rank=2")
    after = layers_of("flux", tmp_path / "b.safetensors")
    assert {shape[0] for key, shape in read_header(tmp_path / "b.safetensors")[1].items() if "down" in key} == {2}
    for names in joined:
        whole = torch.cat([dense(layers[name]) for name in names])
        mine = torch.cat([dense(after[name]) for name in names])
        assert float((whole - mine).norm()) == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-4)
        assert all(torch.equal(after[name].down, after[names[0]].down) for name in names)
    assert told["layers"] == len(layers)
    run(path, tmp_path / "c.safetensors", "rank=2", "layers={to_q:1, add_q_proj:1}")
    assert {layer.rank for name, layer in layers_of("flux", tmp_path / "c.safetensors").items()} == {2}, (
        "filled up with zeros in one weight"
    )
    apart = run(path, tmp_path / "d.safetensors", "rank=2", "format=diffusers")
    assert apart["ranks"] == [2] and apart["error"] < told["error"], "one by one they keep more, and cost more"


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path):
    path = lora_for("flux", tmp_path / "a.safetensors", pick=lambda name: ".attn." in name)
    dry = run(path, tmp_path / "b.safetensors", "rank=1", "dry_run=true")
    assert sorted(tmp_path.iterdir()) == [path] and dry["out"] is None
    told = run(path, tmp_path / "b.safetensors", "rank=1")
    assert {key for key in told if told[key] != dry[key]} == {"out", "dry_run"}


def test_patterns_may_be_regular_expressions(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=3, pick=lambda name: ".attn1.to_" in name)
    settings = {"lora": str(path), "out": str(tmp_path / "b.safetensors"), "rank": 2}
    with pytest.raises(ConfigError, match=r"re:\( is no regular expression"):
        resize(settings | {"layers": {"re:(": 1}})
    resize(settings | {"layers": {r"re:unet\.up_blocks\..*": 1}})
    assert {layer.rank for name, layer in layers_of("sdxl", tmp_path / "b.safetensors").items() if ".up_blocks." in name} == {1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "nothing says how much to keep"),
        (["energy=0.9", "ratio=3"], "energy and ratio both say"),
        (["total_error=0.1", "layers={to_q:2}"], "layers has no effect with total_error"),
        (["energy=0.9", "layers={to_q:2}"], "layers.to_q=2"),
        (["rank=2", "layers={to_q:1.5}"], "layers.to_q=1.5"),
        (["rank=2", "layers={nowhere:1}"], "nowhere matches no"),
        (["rank=0"], "rank=0"),
        (["rank=2", "functional=true"], "this LoRA is for sdxl_base"),
    ],
)
def test_what_is_refused(tmp_path, settings, said):
    base = bases.get("sdxl_base")
    name = next(name for name in base.shapes if name.endswith("attn2.to_k"))
    path = tmp_path / "a.safetensors"
    shape = base.shapes[name]
    write_layers({name: LoraLayer(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)}.get, [name], path, "kohya", base.names)
    with pytest.raises((ConfigError, LoraError), match=said):
        run(path, tmp_path / "b.safetensors", *settings)
    assert not (tmp_path / "b.safetensors").exists()


def test_other_kinds_are_refused_by_name(tmp_path):
    base = bases.get("charworld_sdxl")
    name = next(name for name in base.shapes if name.endswith("attn1.to_q"))
    out, inner = base.shapes[name]
    layer = LohaLayer(torch.ones(out, 2), torch.ones(2, inner), torch.ones(out, 2), torch.ones(2, inner), 2.0)
    path = tmp_path / "a.safetensors"
    write_layers({name: layer}.get, [name], path, "kohya", base.names, metadata={"charforgex.family": "sdxl"})
    with pytest.raises(LoraError, match=r"1 layers are DoRA, LoHa or LoKr, which resize cannot change: .*lora convert .* kind=lora"):
        run(path, tmp_path / "b.safetensors", "rank=1")
