"""DoRA, LoHa and LoKr come back from files as they were trained, and other tools' libraries make the same of them."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from safetensors import safe_open

from charforgex.errors import LoraError
from charforgex.lora import formats, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter
from charforgex.lora.metadata import build
from charforgex.lora.state import Lora
from tests.families.rows import PICTURES
from tests.families.test_contract import batch_of, predict

KINDS = {"dora": {}, "loha": {}, "lokr": {"factor": 4}}


def trained(row, kind, targets="attention"):
    parts = row.family.tiny()
    paths = row.family.lora_targets(targets, parts.denoiser.config)
    inject(parts.denoiser, paths, rank=2, alpha=1.0, kind=kind, **KINDS[kind])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(parts.denoiser).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return parts


@pytest.mark.parametrize("row", PICTURES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_was_trained_and_are_read_back_bit_for_bit(row, kind, tmp_path):
    parts = trained(row, kind, "attention" if row.family.name == "sdxl" else "all")
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    path = writing.save_verified(lora, tmp_path / "a.safetensors", "kohya", row.family, parts.denoiser, metadata={"a": "b"})
    again = formats.read(path, row.family, parts.denoiser.config)
    assert again.kinds() == [kind] and again.layers.keys() == lora.layers.keys()
    assert all(layer.equals(again.layers[name]) for name, layer in lora.rounded(torch.float16).layers.items())
    writing.write(again, tmp_path / "b.safetensors", "kohya", row.family, parts.denoiser.config)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        scales = {file.get_tensor(key).dtype for key in keys if key.endswith("dora_scale")}
    assert formats.identify(keys) == "kohya" and scales <= {torch.float32} and bool(scales) == (kind == "dora")
    joined = {key for key in keys if key.startswith("lycoris_")}
    assert bool(joined) == (row.family.name != "sdxl") and all(key.startswith(("lora_unet_", "lycoris_")) for key in keys)
    with pytest.raises(LoraError, match=f"comfyui cannot hold {kind}; write kohya"):
        writing.to_tensors(lora, "comfyui", row.family, parts.denoiser.config, torch.float16)


@pytest.mark.parametrize("row", PICTURES, ids=str)
@torch.no_grad()
def test_diffusers_loads_a_dora_file_and_computes_the_same(row, tmp_path):
    parts = trained(row, "dora", "all")
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    path = writing.save_verified(lora, tmp_path / "a.safetensors", "diffusers", row.family, parts.denoiser, torch.float32)
    theirs, ours = row.family.tiny(), row.family.tiny()
    batch = batch_of(row, theirs)
    load_adapter(ours, formats.read(path, row.family, ours.denoiser.config), "mine")
    assert isinstance(theirs.denoiser, PeftAdapterMixin)
    row.family.pipeline(theirs).load_lora_weights(str(path))
    names = [name for name, module in theirs.denoiser.named_modules() if "default_0" in getattr(module, "lora_magnitude_vector", {})]
    assert len(names) == len(lora)
    torch.testing.assert_close(predict(row, theirs, batch), predict(row, ours, batch), rtol=1e-3, atol=1e-4)
    stripped = {name.partition(".")[2] for name in lora.layers}
    assert stripped == set(names)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_dtype_of_a_dora_file_is_that_of_its_factors(format):
    row = PICTURES[0]
    parts = trained(row, "dora")
    config = parts.denoiser.config
    tensors = writing.to_tensors(read_adapter(parts.denoiser, "unet"), format, row.family, config, torch.bfloat16)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    file = formats.LoraFile(shapes, {}, formats.Names(row.family, config), tensors.__getitem__)
    assert {file.dtype(sides) for sides in file.sides.values()} == {torch.bfloat16}


def test_diffusers_cannot_hold_loha_and_lokr(tmp_path):
    row = PICTURES[1]
    for kind in ("loha", "lokr"):
        parts = trained(row, kind)
        lora = read_adapter(parts.denoiser, "transformer")
        with pytest.raises(LoraError, match=f"diffusers cannot hold {kind}; write kohya"):
            writing.save_verified(lora, tmp_path / "a.safetensors", "diffusers", row.family, parts.denoiser)
    assert not list(tmp_path.iterdir())
    parts = trained(row, "dora")
    dora = read_adapter(parts.denoiser, "transformer")
    name, layer = next(iter(dora.layers.items()))
    mixed = Lora(dora.layers | {name: replace(layer, magnitude=None)})
    with pytest.raises(LoraError, match="transformer is partly DoRA"):
        writing.to_tensors(mixed, "diffusers", row.family, parts.denoiser.config, torch.float16)


def test_lycoris_files_of_others(tmp_path):
    """Both sides as products, no alpha; and a whole one with an alpha, which nobody reads then."""
    row = PICTURES[0]
    parts = row.family.tiny()
    config, module = parts.denoiser.config, "lora_unet_middle_block_1_proj_in"
    out, inner = parts.denoiser.mid_block.attentions[0].proj_in.weight.shape[:2]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    products = {"lokr_w1_a": draw(2, 3), "lokr_w1_b": draw(3, 2), "lokr_w2_a": draw(out // 2, 3), "lokr_w2_b": draw(3, inner // 2)}
    (layer,) = formats.from_tensors({f"{module}.{key}": value for key, value in products.items()}, {}, row.family, config).layers.values()
    a, b, c, d = products.values()
    torch.testing.assert_close(layer.delta(), torch.kron(a @ b, c @ d))
    whole = {"lokr_w1": a @ b, "lokr_w2": c @ d, "alpha": torch.tensor(0.0)}
    lora = formats.from_tensors({f"{module}.{key}": value for key, value in whole.items()}, {}, row.family, config)
    torch.testing.assert_close(lora.layers["unet.mid_block.attentions.0.proj_in"].delta(), layer.delta())
    assert not lora.zero_layers() and load_adapter(parts, lora, "theirs") == 1
    with pytest.raises(LoraError, match="no layer can be made"):
        formats.from_tensors({f"{module}.hada_w1_b": a}, {}, row.family, config)


def test_metadata_says_the_kind():
    row = PICTURES[1]
    lora = read_adapter(trained(row, "loha").denoiser, "transformer")
    said = build(lora, row.family, title="x", base="y")
    assert said["ss_network_module"] == "lycoris.kohya" and json.loads(said["ss_network_args"]) == {"algo": "loha"}
