"""A baked base does what the base with its LoRAs loaded does, and differs from the base in the weights that they change alone."""

import json
import shutil
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families import bases, registry
from charforgex.lora.formats import read
from charforgex.lora.inject import load_adapter
from charforgex.lora.state import LohaLayer, LoraLayer
from charforgex.toolbox import checkpoints
from charforgex.toolbox.baking import bake
from charforgex.types import Crop
from tests.toolbox.bases_on_disk import home_of, layer_for, lora_for, single_of

DENOISER = {"sdxl": "unet", "flux": "transformer", "sd3": "transformer"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """home(family): a folder with `base/`, `base.safetensors` and `lora.safetensors`."""
    return cache(lambda family: home_of(family, tmp_path_factory.mktemp(family)))


def said(family, parts):
    """What the denoiser makes of a prompt."""
    text = family.encode_text(parts, ["a red cat"])
    noisy = torch.randn(1, *{"sdxl": (4, 8, 8)}.get(family.name, (16, 8, 8)), generator=torch.Generator().manual_seed(3))
    noisy = noisy[:, : parts.denoiser.config.in_channels // family.channels_per_latent]
    with torch.no_grad():
        return family.denoise(parts.denoiser, noisy, torch.tensor([0.6]), text, Crop.whole(1, 64, 64))


def tensors_of(weights):
    return {name: part.read(place) for name, (part, place) in {**weights.modules, **weights.rest}.items()}


@pytest.mark.parametrize("name", DENOISER)
def test_a_baked_folder_is_the_base_with_its_lora(name, home, tmp_path):
    family, here = registry.get(name), home(name)
    baked = bake({"lora": str(here / "lora.safetensors"), "base": str(here / "base"), "weights": 0.5, "out": str(tmp_path / "baked")})
    assert baked["components"][DENOISER[name]]["change"] > 0.05
    assert baked["components"][DENOISER[name]]["rounding"] < 1e-5
    parts = family.load(str(here / "base"), only=("denoiser", "text"))
    before = said(family, parts)
    lora = read(here / "lora.safetensors", family, parts.denoiser.config)
    load_adapter(parts, lora, "one", 0.5)
    after, found = said(family, parts), said(family, family.load(str(tmp_path / "baked"), only=("denoiser", "text")))
    assert (after - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(found, after, rtol=0, atol=2e-4 * float(after.abs().max()))

    assert baked["layers"] == len(lora)
    files = {p.relative_to(here / "base") for p in (here / "base").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "baked") for p in (tmp_path / "baked").rglob("*") if p.is_file()}
    for path in files:
        same = (tmp_path / "baked" / path).read_bytes() == (here / "base" / path).read_bytes()
        assert same == (path.suffix != ".safetensors" or path.parts[0] == "vae"), path


@pytest.mark.parametrize("name", DENOISER)
def test_a_baked_file_holds_the_same_weights_as_a_baked_folder_and_minus_one_restores_it(name, home, tmp_path):
    here, out = home(name), tmp_path / "baked.safetensors"
    lora = str(here / "lora.safetensors")
    bake({"lora": lora, "base": str(here / "base.safetensors"), "out": str(out)})
    bake({"lora": lora, "base": str(here / "base"), "out": str(tmp_path / "baked")})
    file, folder = checkpoints.find(str(out)), checkpoints.find(str(tmp_path / "baked"))
    assert file.modules and file.modules.keys() <= folder.modules.keys()
    for module, (part, place) in file.modules.items():
        other, there = folder.modules[module]
        assert torch.equal(part.read(place), other.read(there)), module

    before, after = load_file(here / "base.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {place.key for _, place in file.modules.values()}
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "a base"
    lineage = json.loads(metadata["charforgex.lineage"])
    assert [parent["name"] for parent in lineage["parents"]] == ["base.safetensors", "lora.safetensors"]
    assert lineage["parents"][0]["sha256"] == checkpoints.find(str(here / "base.safetensors")).sha256()
    bake({"lora": lora, "base": str(out), "weights": -1, "out": str(tmp_path / "back.safetensors")})
    back = load_file(tmp_path / "back.safetensors")
    for key, tensor in before.items():
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=1e-5 * max(1.0, float(tensor.abs().max())))


def test_several_loras_of_several_kinds_add_up(home, tmp_path):
    here = home("sdxl")
    chosen = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = bases.get("charworld_sdxl").shapes[chosen]

    def dora(shape, rank, seed):
        plain = layer_for(shape, rank, seed)
        return LoraLayer(plain.down, plain.up, plain.alpha, torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.5)

    def loha(shape, rank, seed):
        factors = [torch.randn(size, generator=torch.Generator().manual_seed(seed + i)) * 0.3 for i, size in enumerate(
            [(shape[0], rank), (rank, shape[1])] * 2)]  # fmt: skip
        return LohaLayer(*factors, alpha=1.0)

    paths = []
    for number, make in enumerate((layer_for, dora, loha)):
        paths.append(str(lora_for("sdxl", tmp_path / f"{number}.safetensors", pick=lambda name: name == chosen, make=make, seed=number)))
    weights = [1.0, 0.5, -2.0]
    told = bake({"lora": paths, "base": str(here / "base"), "weights": weights, "out": str(tmp_path / "baked")})
    assert told["layers"] == 1
    (part, place), (old, there) = (checkpoints.find(str(folder)).modules[chosen] for folder in (tmp_path / "baked", here / "base"))
    weight = old.read(there)
    one, two, three = layer_for(shape, 3, 0), dora(shape, 3, 1), loha(shape, 3, 2)
    moved = weight + two.scale * two.up @ two.down
    expected = weight + one.scale * one.up @ one.down + 0.5 * (two.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight)
    expected -= 2 * (three.w1_a @ three.w1_b) * (three.w2_a @ three.w2_b) / 3
    torch.testing.assert_close(part.read(place), expected, rtol=0, atol=1e-5)
    with pytest.raises(LoraError, match=r"is DoRA.*cannot take it out"):
        bake({"lora": paths[1], "base": str(here / "base"), "weights": -1, "out": str(tmp_path / "back")})


def test_variants_and_shards_keep_their_layout(home, tmp_path):
    """The UNet once in two shards and once in float16; a pickle of the old weights is left out."""
    here, base = home("sdxl"), tmp_path / "base"
    shutil.copytree(here / "base", base)
    whole = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(whole)
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {key: names[place > 100] for place, key in enumerate(keys)}
    for name in names:
        save_file({key: whole[key] for key in keys if index[key] == name}, base / "unet" / name, {"format": "pt"})
    index_file = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    save_file({key: tensor.half() for key, tensor in whole.items()}, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (base / "sd_xl_base.safetensors").write_bytes(b"old")
    lora, out = here / "lora.safetensors", tmp_path / "baked"
    told = bake({"lora": str(lora), "base": str(base), "out": str(out)})
    assert told["left_out"] == ["sd_xl_base.safetensors", "unet/diffusion_pytorch_model.bin"]
    assert (out / "unet" / index_file.name).read_bytes() == index_file.read_bytes()
    bake({"lora": str(lora), "base": str(here / "base"), "out": str(tmp_path / "plain")})
    expected = load_file(tmp_path / "plain" / "unet" / "diffusion_pytorch_model.safetensors")
    found = {key: tensor for name in names for key, tensor in load_file(out / "unet" / name).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    halves = load_file(out / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for key, tensor in halves.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), expected[key], rtol=2e-3, atol=2e-3)
    (base / "unet" / names[1]).unlink()
    with pytest.raises(ModelError, match=f"lacks {names[1]}"):
        bake({"lora": str(lora), "base": str(base), "out": str(tmp_path / "more")})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_dtypes_stay_and_what_rounding_loses_is_told(dtype, home, tmp_path):
    here = home("flux")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(here / "base.safetensors").items() if key.startswith("model.")}
    save_file(tensors, tmp_path / "base.safetensors")
    out = tmp_path / "baked.safetensors"
    told = bake(
        {"lora": str(here / "lora.safetensors"), "base": str(tmp_path / "base.safetensors"), "components": ["transformer"], "out": str(out)}
    )
    after = load_file(out)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    lora = read(here / "lora.safetensors", registry.get("flux"), bases.get("charworld_flux").config)
    name = "transformer.single_transformer_blocks.0.attn.to_k"  # rows of a joined weight
    part, place = checkpoints.find(str(tmp_path / "base.safetensors")).modules[name]
    exact = part.read(place).float() + lora.layers[name].delta()
    baked, there = checkpoints.find(str(out)).modules[name]
    assert torch.equal(baked.read(there).float(), exact.to(dtype).float())
    assert {torch.bfloat16: 0.001, torch.float8_e4m3fn: 0.02}[dtype] < told["components"]["transformer"]["rounding"] < 0.3


def test_a_dry_run_tells_and_writes_nothing(home, tmp_path):
    here = home("flux")
    config = {"lora": str(here / "lora.safetensors"), "base": str(here / "base")}
    told = bake(config | {"dry_run": True})
    embedded = bake(config | {"base": "charworld", "dry_run": True})  # of the LoRA's family, in float16
    assert embedded["components"]["transformer"]["change"] == pytest.approx(told["components"]["transformer"]["change"], rel=1e-3)
    assert told == bake(config | {"out": str(tmp_path / "baked")}) | {"out": None}


def test_what_cannot_be_is_refused_before_anything_is_written(home, tmp_path):
    here, out = home("flux"), tmp_path / "out.safetensors"
    lora, file, full = here / "lora.safetensors", here / "base.safetensors", tmp_path / "full"
    config = {"lora": str(lora), "base": str(file), "out": str(out)}
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"weights=\[1.0, 2.0\] are 2 and the LoRAs 1"):
        bake(config | {"weights": [1.0, 2.0]})
    with pytest.raises(ConfigError, match="out is not set"):
        bake(config | {"out": None})
    with pytest.raises(ConfigError, match=r"is one of the inputs, which stay as they are"):
        bake(config | {"out": str(file)})
    with pytest.raises(ConfigError, match=r"is one of the inputs, which stay as they are"):
        bake(config | {"out": str(lora), "overwrite": True})
    with pytest.raises(ConfigError, match=r"no LoRA changes unet, only text_encoder, text_encoder_2, transformer"):
        bake(config | {"components": ["unet"]})
    with pytest.raises(ConfigError, match="is no diffusers folder"):
        bake(config | {"base": str(here / "base"), "out": str(full)})
    with pytest.raises(ConfigError, match="holds the base"):
        bake(config | {"base": str(here / "base"), "out": str(here)})
    alone = single_of("flux", here / "base", tmp_path / "alone.safetensors", "transformer")
    with pytest.raises(LoraError, match=r"32 layers of .* does not hold: text_encoder\..*; say components=\[transformer\]"):
        bake(config | {"base": str(alone)})
    with pytest.raises(LoraError, match=r"belong to no module of this sdxl model"):
        bake(config | {"base": str(home("sdxl") / "base"), "out": str(tmp_path / "folder")})
    with pytest.raises(ModelError, match=r"scaled\.safetensors is in ComfyUI's scaled fp8"):
        scaled = load_file(file) | {"model.diffusion_model.img_in.scale_weight": torch.ones(1)}
        save_file(scaled, tmp_path / "scaled.safetensors")
        bake(config | {"base": str(tmp_path / "scaled.safetensors")})
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"base\.gguf is a GGUF"):
        bake(config | {"base": str(tmp_path / "base.gguf")})
    with pytest.raises(ModelError, match=r"as I8, which is quantised"):
        save_file({key: tensor.to(torch.int8) for key, tensor in load_file(alone).items()}, tmp_path / "int8.safetensors")
        bake(config | {"base": str(tmp_path / "int8.safetensors"), "components": ["transformer"]})
    with pytest.raises(ModelError, match=r"most like charworld_flux, and lacks weights of its size: transformer\.x_embedder"):
        tensors = load_file(file)
        save_file(tensors | {"model.diffusion_model.img_in.weight": torch.zeros(128, 1)}, tmp_path / "fill.safetensors")
        bake(config | {"base": str(tmp_path / "fill.safetensors")})
    with pytest.raises(LoraError, match=r"does not fit into torch\.float16"):
        halves = {key: tensor.half() for key, tensor in load_file(file).items()}
        save_file(halves, tmp_path / "half.safetensors")
        strong = lora_for("flux", tmp_path / "s.safetensors", pick=lambda n: n.endswith("img_in") or "x_embedder" in n,
                          make=lambda shape, rank, seed: layer_for(shape, rank, seed, 1e6))  # fmt: skip
        bake(config | {"lora": str(strong), "base": str(tmp_path / "half.safetensors")})
    with pytest.raises(ModelError, match=r"lies\.safetensors is damaged"):
        header = json.dumps({"a.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
        (tmp_path / "lies.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        bake(config | {"base": str(tmp_path / "lies.safetensors")})
    assert not out.exists()
    assert not [path for path in tmp_path.rglob(".tmp-*")]


def test_another_folder_is_replaced_only_when_that_is_said(home, tmp_path):
    here = home("flux")
    config = {"lora": str(here / "lora.safetensors"), "base": str(here / "base"), "out": str(tmp_path / "baked")}
    bake(config)
    (tmp_path / "baked" / "old.txt").write_text("old")
    with pytest.raises(ConfigError, match="overwrite=true"):
        bake(config)
    bake(config | {"overwrite": True, "weights": 0.5})
    assert not (tmp_path / "baked" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["baked"]
