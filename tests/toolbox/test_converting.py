"""Conversions against dense changes in float64, and files of every format into every other."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import CharForgeError, ConfigError, LoraError, ModelError
from charforgex.families import bases
from charforgex.lora.formats import open_lora, read_header
from charforgex.lora.identify import identify
from charforgex.lora.state import LohaLayer, LokrLayer, LoraLayer
from charforgex.lora.writing import write_layers
from charforgex.toolbox.converting import convert
from charforgex.toolbox.inspecting import inspected
from tests.toolbox.bases_on_disk import folder_of, lora_for


def run(path, out, *settings):
    return convert(compose("lora_convert", [f"lora={path}", f"out={out}", *settings]))


def layers_of(name, path):
    with open_lora(path, bases.get(name).names) as file:
        return file.load().layers


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def loha(shape, rank, seed):
    out, wide = shape[0], math.prod(shape[1:])
    return LohaLayer(drawn(out, rank), drawn(rank, wide, seed=1), drawn(out, rank, seed=2), drawn(rank, wide, seed=seed + 9), 1.5)


def lokr(shape, rank, seed):
    """One side whole, of a convolution with its kernel, the other a product."""
    out, inner, *kernel = shape
    return LokrLayer(-3.0, w1_a=drawn(2, rank), w1_b=drawn(rank, 2, seed=1), w2=drawn(out // 2, inner // 2, *kernel, seed=seed))


def dora(shape, rank, seed):
    down, up = drawn(rank, *shape[1:], seed=seed), drawn(shape[0], rank, *([1, 1] if len(shape) == 4 else []))
    return LoraLayer(down, up, 1.0, drawn(shape[0]).abs() + 1)


def dora_by_inputs(shape, rank, seed):
    """OneTrainer's."""
    return replace(dora(shape, rank, seed), magnitude=drawn(1, shape[1], seed=seed).abs() + 1)


def near(one, other, error):
    assert float(torch.linalg.norm(one - other) / torch.linalg.norm(other)) < error


FEW = ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.downsamplers.0.conv")


@pytest.mark.parametrize("make", [loha, lokr], ids=["loha", "lokr"])
def test_what_is_a_sum_of_few_products_becomes_lora_exactly(make, tmp_path):
    """Also of convolutions; LoKr's directions are those of both sides multiplied."""
    pick = FEW if make is loha else FEW[:1]
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name in pick, make=make)
    if make is lokr:
        shape = bases.get("charworld_sdxl").shapes[FEW[0]]
        layer = LokrLayer(-3.0, w1_a=drawn(2, 1), w1_b=drawn(1, 2), w2_a=drawn(shape[0] // 2, 3), w2_b=drawn(3, shape[1] // 2))
        names = bases.get("charworld_sdxl").names
        write_layers({FEW[0]: layer}.get, FEW[:1], path, "kohya", names, torch.float32, {"charforgex.family": "sdxl"})
    told = run(path, tmp_path / "b.safetensors", "kind=lora")
    assert told["ranks"] == ([4] if make is loha else [3]) and told["converted"] == len(pick) and told["error"] < 1e-6
    before, after = layers_of("charworld_sdxl", path), layers_of("charworld_sdxl", tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and {layer.kind for layer in after.values()} == {"lora"}
    for name, layer in before.items():
        near(after[name].delta().flatten(1), layer.delta(), 1e-5)
        assert after[name].fits(bases.get("charworld_sdxl").shapes[name])


def test_what_is_left_out_is_the_least_there_can_be_and_is_told(tmp_path):
    """A whole LoKr has all directions: said so, and cut to the best of some rank or error, as a dense decomposition cuts it."""
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name in FEW, make=lokr)
    with pytest.raises(LoraError, match=r"has \d+ directions, so that as LoRA .* larger than the weight .*say rank=64 or error=0\.1"):
        run(path, tmp_path / "b.safetensors", "kind=lora")
    assert not (tmp_path / "b.safetensors").exists()
    told = run(path, tmp_path / "b.safetensors", "kind=lora", "rank=5")
    before, after = layers_of("charworld_sdxl", path), layers_of("charworld_sdxl", tmp_path / "b.safetensors")
    lost, whole = 0.0, 0.0
    for name, layer in before.items():
        delta = layer.delta().double()
        values = torch.linalg.svdvals(delta)
        assert after[name].rank == 5
        near(torch.linalg.norm(after[name].delta().flatten(1).double() - delta), values[5:].norm(), 1e-5)
        lost, whole = lost + float(values[5:].square().sum()), whole + float(values.square().sum())
    assert told["error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    told = run(path, tmp_path / "c.safetensors", "kind=lora", "error=0.2")
    assert 0.05 < told["worst_error"] <= 0.2
    assert max(told["ranks"]) > 5


@pytest.mark.parametrize("make", [dora, dora_by_inputs])
def test_dora_becomes_what_it_changes_of_its_base(make, tmp_path):
    folder, base = folder_of("sdxl", tmp_path / "base"), bases.get("charworld_sdxl")
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name == FEW[0], make=make)
    out = tmp_path / "b.safetensors"
    with pytest.raises(LoraError, match=r"1 layers are DoRA, .*Say base_weights="):
        run(path, out, "kind=lora", "rank=4")
    with pytest.raises(LoraError, match=r"what DoRA changes has as many directions as the weight; say rank=64 or error=0\.1"):
        run(path, out, "kind=lora", f"base_weights={folder}")
    told = run(path, out, "kind=lora", f"base_weights={folder}", "error=0.01")
    assert 0 < told["error"] <= 0.01
    from safetensors.torch import load_file

    (weights,) = (folder / "unet").glob("*.safetensors")
    weight = load_file(weights)[FEW[0].removeprefix("unet.") + ".weight"]
    (before,), (after,) = layers_of(base.name, path).values(), layers_of(base.name, out).values()
    near(after.delta(), before.change(weight), 0.0101)


def test_a_file_goes_through_all_formats_and_comes_back_the_same(tmp_path):
    """Of Flux, where queries, keys, values and an MLP are one weight in some formats, and xlabs has no place for the MLP."""
    base = bases.get("charworld_flux")
    xlabs = {name for parts in base.names.table("xlabs").values() for name, _ in parts}

    def make(shape, rank, seed):
        return LoraLayer(drawn(rank, *shape[1:], seed=seed), drawn(shape[0], rank), float(rank))

    path = first = lora_for("flux", tmp_path / "first.safetensors", "diffusers", rank=2, pick=lambda name: name in xlabs, make=make)
    for format in ("kohya", "xlabs", "comfyui", "ai-toolkit", "diffusers"):
        run(path, tmp_path / f"{format}.safetensors", f"format={format}")
        path = tmp_path / f"{format}.safetensors"
        found = identify(read_header(path)[1])
        assert found == ("diffusers" if format == "ai-toolkit" else format)  # which only a header tells apart
    expected, found = layers_of(base.name, first), layers_of(base.name, path)
    assert found.keys() == expected.keys() and all(layer.equals(found[name]) for name, layer in expected.items())


def test_the_file_says_what_it_is_now(tmp_path):
    path = lora_for("flux", tmp_path / "a.safetensors", rank=2, pick=lambda name: ".attn" in name and "transformer." in name, make=loha)
    told = run(path, tmp_path / "b.safetensors", "kind=lora", "rank=3", "format=comfyui", "dtype=bfloat16")
    metadata, shapes = read_header(tmp_path / "b.safetensors")
    assert metadata["ss_network_module"] == "networks.lora" and metadata["charforgex.family"] == "flux"
    lineage = json.loads(metadata["charforgex.lineage"])
    assert lineage["method"] == "convert" and lineage["parents"][0]["name"] == "a.safetensors"
    assert lineage["settings"] == {"format": "comfyui", "dtype": "bfloat16", "kind": "lora", "rank": 3}
    assert told["kinds_before"] == ["loha"] and told["ranks"] == [3]
    assert all(key.startswith("diffusion_model.") for key in shapes)


def test_a_dry_run_writes_nothing_and_tells_the_same(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name in FEW, make=loha)
    dry = run(path, tmp_path / "b.safetensors", "kind=lora", "dry_run=true")
    assert list(tmp_path.iterdir()) == [path] and dry["out"] is None
    told = run(path, tmp_path / "b.safetensors", "kind=lora")
    assert {**told, "out": None, "dry_run": True, "sha256": 0} == {**dry, "sha256": 0}


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (None, ["rank=4"], "rank have an effect with kind=lora alone"),
        (None, ["kind=lora", "rank=4"], "is plain LoRA already, so rank=4 would have no effect; say charforgex lora resize"),
        (loha, ["kind=lora", "base_weights=charworld"], "holds no DoRA, so base_weights=charworld has no effect"),
        (loha, ["format=comfyui"], "comfyui cannot hold loha; write kohya. Or say kind=lora"),
        (loha, ["format=xlabs"], "sdxl has no LoRA format xlabs; choose diffusers, kohya, comfyui, ai-toolkit"),
        (None, ["kind=loha"], "kind=loha is not among the choices: lora"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(make, settings, said, tmp_path):
    chosen = {} if make is None else {"make": make}
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name in FEW, **chosen)
    with pytest.raises((ConfigError, LoraError, CharForgeError), match=said):
        run(path, tmp_path / "b.safetensors", *settings)
    assert list(tmp_path.iterdir()) == [path]


def test_a_dora_s_base_must_be_of_its_size(tmp_path):
    base = bases.get("sdxl_base")
    name = "unet.conv_in"
    path = tmp_path / "a.safetensors"
    write_layers({name: dora(base.shapes[name], 2, 0)}.get, [name], path, "kohya", base.names, torch.float32, {})
    with pytest.raises(ModelError, match=r"base_weights=charworld is no sdxl_base, .*conv_in is \(64, 4, 3, 3\) and not \(320, 4, 3, 3\)"):
        run(path, tmp_path / "b.safetensors", "kind=lora", "rank=2", "base_weights=charworld", "base=sdxl_base")


def test_no_network_is_needed(tmp_path):
    path = lora_for("sdxl", tmp_path / "a.safetensors", rank=2, pick=lambda name: name in FEW, make=loha)
    code = (
        "import sys; from charforgex.toolbox import converting, inspecting; from charforgex.config import compose;"
        "assert 'torch' not in sys.modules;"
        f"converting.convert(compose('lora_convert', ['lora={path}', 'kind=lora', 'out={tmp_path}/b.safetensors']));"
        f"inspecting.inspect(compose('lora_inspect', ['lora={tmp_path}/b.safetensors']));"
        "assert not {'diffusers', 'transformers', 'peft', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_motion_lora_of_two_parts_becomes_two_files(tmp_path):
    """The temporal part as ComfyUI-AnimateDiff-Evolved reads it, the spatial one as any LoRA of Stable Diffusion 1.5."""
    base = bases.get("animatediff_v3")
    spatial = [f"unet.{block}.attentions.0.transformer_blocks.0.attn2.to_k" for block in ("down_blocks.1", "mid_block")]
    temporal = ["unet.up_blocks.3.motion_modules.2.transformer_blocks.0.attn1.to_out.0", "unet.down_blocks.0.motion_modules.1.proj_in"]
    layers = {name: LoraLayer(drawn(1, base.shapes[name][1]), drawn(base.shapes[name][0], 1, seed=1), 0.5) for name in spatial + temporal}
    both = tmp_path / "both.safetensors"
    metadata = {**base.spelling.lora_labels, "charforgex.family": "animatediff", "ss_output_name": "nod"}
    write_layers(layers.get, layers, both, "diffusers", base.names, torch.float32, metadata)
    for format, part in (("animatediff", "temporal"), ("kohya", "spatial")):
        with pytest.raises(LoraError, match=rf"format {format} holds the {part} ones alone; say part={part}, and convert part="):
            run(both, tmp_path / "x.safetensors", f"format={format}")
    assert run(both, tmp_path / "motion.safetensors", "format=animatediff", "part=temporal")["layers"] == 2
    assert run(both, tmp_path / "look.safetensors", "format=kohya", "part=spatial")["base"] == "animatediff_v3"
    for file, wanted, family, label in (
        ("motion", temporal, "animatediff", "animatediff/lora"), ("look", spatial, "sd15", "stable-diffusion-v1/lora"),
    ):  # fmt: skip
        path = tmp_path / f"{file}.safetensors"
        said, shapes = read_header(path)
        found = bases.base_of_file(path)
        assert found.family == family == said["charforgex.family"] and said["modelspec.architecture"] == label
        assert said["ss_output_name"] == "nod" and ("ss_base_model_version" in said) == (family == "sd15")
        again = layers_of(found.name, path)
        assert again.keys() == set(wanted)
        for name in wanted:
            torch.testing.assert_close(again[name].delta(), layers[name].delta())
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight" in shapes
    with pytest.raises(LoraError, match=r"look.safetensors has spatial layers alone, so part=spatial would have no effect"):
        run(tmp_path / "look.safetensors", tmp_path / "x.safetensors", "part=spatial")
    with pytest.raises(LoraError, match=r"look.safetensors has no temporal layers, so nothing would be left"):
        run(tmp_path / "look.safetensors", tmp_path / "x.safetensors", "part=temporal")
    assert inspected(both)["parts"] == {"spatial": 2, "temporal": 2} and inspected(tmp_path / "look.safetensors")["parts"] == {}
