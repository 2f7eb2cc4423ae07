"""Files of Flux and SD3: saved with proof in each format, and beside the installed diffusers, which loses layers without a word."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft.tuners.lora import LoraLayer as PeftLayer

from charforgex.errors import LoraError
from charforgex.families.flux import Flux
from charforgex.families.sd3 import Sd3
from charforgex.families.sdxl import Sdxl
from charforgex.lora import formats, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter
from charforgex.lora.state import Lora, LoraLayer
from tests.lora import published
from tests.lora.test_formats import settle
from tests.lora.test_original import FAMILIES, every_layer, narrow, predict

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def trained(family, targets, rank=4, alpha=2.0):
    parts = family.tiny()
    inject(parts.denoiser, targets, rank, alpha, seed=3)
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(parts.denoiser).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)
    return parts, read_adapter(parts.denoiser, family.denoiser_name)


def adapted(network):
    return sum(isinstance(module, PeftLayer) for module in network.modules())


# ---- saving ----


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "ai-toolkit", "xlabs"])
def test_a_part_of_a_joined_weight_can_be_adapted_alone(format, tmp_path):
    """Attention without the MLP that stands in the same weight of a single block; and no alpha, where the format has none."""
    family = Flux()
    parts, lora = trained(family, [*ATTENTION, "add_k_proj"])
    path = writing.save_verified(lora, tmp_path / "x.safetensors", format, family, parts.denoiser)
    read = formats.read(path, family, parts.denoiser.config)
    assert read.layers.keys() == lora.layers.keys()
    has_alpha = format not in ("ai-toolkit", "xlabs")
    assert read.alphas() == [2.0 if has_alpha else 4.0]
    for name, layer in lora.layers.items():
        torch.testing.assert_close(read.layers[name].delta(), layer.delta(), rtol=0, atol=2e-3)
        assert not has_alpha or read.layers[name].equals(layer.map(lambda x: x.half().float()))
    again = writing.write(read, tmp_path / "y.safetensors", format, family, parts.denoiser.config)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_other_ranks_and_alphas_are_saved(name, format, tmp_path):
    """Joined layers have one rank and one alpha: the same change is written with zeros and scaled factors."""
    family = FAMILIES[name]
    parts = family.tiny()
    lora = every_layer(family, parts)
    for path, layer in lora.layers.items():
        if path.endswith("to_k"):
            lora.layers[path] = LoraLayer(layer.down[:1], layer.up[:, :1], 0.7)
    path = writing.write(lora, tmp_path / "x.safetensors", format, family, parts.denoiser.config, torch.float32)
    read = formats.read(path, family, parts.denoiser.config)
    for layer_name, layer in lora.layers.items():
        torch.testing.assert_close(read.layers[layer_name].delta(), layer.delta(), rtol=1e-6, atol=1e-6)
        assert (format == "diffusers") <= read.layers[layer_name].equals(layer)


def test_a_wrong_value_in_a_restated_layer_is_not_saved(tmp_path):
    family = Flux()
    parts, lora = trained(family, ATTENTION)
    wrong = Lora({name: LoraLayer(layer.down, layer.up, layer.alpha * 1.02) for name, layer in lora.layers.items()})
    with pytest.raises(LoraError, match="give other outputs when loaded"):
        writing.save_verified(wrong, tmp_path / "x.safetensors", "kohya", family, parts.denoiser)
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold_is_named():
    family = Flux()
    parts, lora = trained(family, [*ATTENTION, "proj_mlp", "norm1.linear"])
    with pytest.raises(
        LoraError, match=r"2 of \d+ layers have no place in the format xlabs, but in diffusers and kohya and comfyui: .*proj_mlp"
    ):
        writing.to_tensors(lora, "xlabs", family, parts.denoiser.config, torch.float32)
    with pytest.raises(LoraError, match="sd3 has no LoRA format xlabs; choose diffusers, kohya, comfyui, ai-toolkit"):
        writing.to_tensors(lora, "xlabs", Sd3(), Sd3().tiny().denoiser.config, torch.float32)


def test_alphas_that_float32_would_round_are_exact():
    family = Flux()
    parts = family.tiny()
    lora = every_layer(family, parts, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "x_embedder"], rank=3, alpha=0.1)
    tensors = writing.to_tensors(lora, "kohya", family, parts.denoiser.config, torch.float32)
    assert tensors["lora_unet_img_in.alpha"].item() == 0.1
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 0.2
    half = Lora({name: LoraLayer(layer.down, layer.up, 1.5) for name, layer in lora.layers.items()})
    kept = writing.to_tensors(half, "kohya", family, parts.denoiser.config, torch.float32)
    assert {tensor.dtype for key, tensor in kept.items() if key.endswith("alpha")} == {torch.float32}


def test_rank_stabilised_alphas_are_read():
    """alpha / sqrt(r) instead of alpha / r: at rank 4 and alpha 2 the scale is 1."""
    family = Sd3()
    parts = family.tiny()
    lora = every_layer(family, parts, ["transformer_blocks.0.attn.to_q"], rank=4)
    tensors = writing.to_tensors(lora, "diffusers", family, parts.denoiser.config, torch.float32)
    settings = {"transformer.lora_alpha": 2, "transformer.use_rslora": True}
    read = formats.from_tensors(tensors, {formats.ADAPTER_METADATA: json.dumps(settings)}, family, parts.denoiser.config)
    assert [layer.scale for layer in read.layers.values()] == [1.0]


def test_zero_differences_of_biases_and_norms_are_nothing_and_others_are_named():
    family = Flux()
    parts = family.tiny()
    tensors = writing.to_tensors(every_layer(family, parts), "kohya", family, parts.denoiser.config, torch.float32)
    stray = {"lora_unet_img_in.diff_b": torch.zeros(32), "diffusion_model.single_blocks.0.norm.key_norm.scale.diff": torch.zeros(16)}
    assert (
        len(formats.from_tensors(tensors | stray, {}, family, parts.denoiser.config)) == len(tensors) // 3 + 7
    )  # 3 weights of 3, one of 4
    with pytest.raises(LoraError, match=r"1 of \d+ keys .* lora_unet_img_in\.diff_b"):
        formats.from_tensors(tensors | {"lora_unet_img_in.diff_b": torch.ones(32)}, {}, family, parts.denoiser.config)


# ---- the installed diffusers loads ours ----


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_loads_our_diffusers_files_and_computes_the_same(name, tmp_path):
    """Ranks and alphas differ from layer to layer; Flux's last proj_out has the name of those in its blocks."""
    family = FAMILIES[name]
    ours, theirs = family.tiny(), family.tiny()
    lora = every_layer(family, ours)
    for i, (path, layer) in enumerate(list(lora.layers.items())):
        lora.layers[path] = LoraLayer(layer.down[: 1 + i % 2], layer.up[:, : 1 + i % 2], (0.5, 2.0, 6.0)[i % 3])
    path = writing.write(lora, tmp_path / "x.safetensors", "diffusers", family, ours.denoiser.config, torch.float32)
    load_adapter(ours, formats.read(path, family, ours.denoiser.config), "x")
    family.pipeline(theirs).load_lora_weights(str(path))
    assert adapted(theirs.denoiser) == len(lora)
    settle(theirs.denoiser)
    assert torch.equal(predict(family, theirs), predict(family, ours))


def test_diffusers_reads_our_flux_kohya_blocks_at_real_size_and_drops_the_rest():
    """Its converter knows one size alone, and gives what is outside of the blocks names under which nothing is loaded."""
    family, config = Flux(), published.FLUX_REAL | {"num_layers": 1, "num_single_layers": 1}
    lora = narrow(family, config)
    tensors = writing.to_tensors(lora, "kohya", family, config, torch.float32)
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    found = {key.removesuffix(".lora_A.weight") for key in converted if key.endswith(".lora_A.weight")}
    blocks = {name for name in lora.layers if "blocks" in name}
    assert {name for name in found if name.startswith("transformer.")} == blocks
    for name in blocks:
        change = converted[f"{name}.lora_B.weight"] @ converted[f"{name}.lora_A.weight"]
        torch.testing.assert_close(change, lora.layers[name].delta())
    # the loader takes what begins with "transformer."
    assert found - blocks == {name.removeprefix("transformer.") for name in lora.layers} - {n.removeprefix("transformer.") for n in blocks}
    assert len(found - blocks) == 10
    assert formats.from_tensors(tensors, {}, family, config).layers.keys() == lora.layers.keys()


# ---- what the installed diffusers loses, and ours does not ----


def test_sd3_kohya_files(tmp_path):
    family = Sd3()
    ours, theirs = family.tiny(), family.tiny()
    lora = every_layer(family, ours)
    path = writing.write(lora, tmp_path / "x.safetensors", "kohya", family, ours.denoiser.config)
    family.pipeline(theirs).load_lora_weights(str(path))
    assert adapted(theirs.denoiser) == 0, "loaded without an error, and nothing is adapted"
    assert load_adapter(ours, formats.read(path, family, ours.denoiser.config), "x") == len(lora) == adapted(ours.denoiser)


def test_one_stray_key_in_sdxl_kohya_files(tmp_path):
    family = Sdxl()
    ours, theirs = family.tiny(), family.tiny()
    inject(ours.denoiser, ["to_q"], 2, 2.0)
    with torch.no_grad():
        for parameter in adapter_parameters(ours.denoiser).values():
            parameter.add_(0.1)
    tensors = writing.to_tensors(read_adapter(ours.denoiser, "unet"), "kohya", family, ours.denoiser.config, torch.float32)
    tensors["lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"] = torch.ones(2, 8)
    family.pipeline(theirs).load_lora_weights(dict(tensors))
    assert adapted(theirs.denoiser) == 0, "nothing is adapted because of one key"
    with pytest.raises(LoraError, match=r"1 of \d+ keys .*lora_te3_encoder_block_0"):
        formats.from_tensors(tensors, {}, family, family.tiny().denoiser.config)


def test_dora_scales():
    family, config = Flux(), Flux().tiny().denoiser.config
    lora = every_layer(family, family.tiny(), ["transformer_blocks.0.attn.to_out.0"])
    tensors = writing.to_tensors(lora, "kohya", family, config, torch.float32)
    tensors["lora_unet_double_blocks_0_img_attn_proj.dora_scale"] = torch.ones(32, 1)
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    assert {key.rpartition(".lora_")[2] for key in converted} == {"A.weight", "B.weight"}, "used as if it were a plain LoRA"
    assert formats.from_tensors(tensors, {}, family, config).kinds() == ["dora"]
    joined = writing.to_tensors(
        every_layer(family, family.tiny(), ["transformer_blocks.0.attn.to_q"]), "kohya", family, config, torch.float32
    )
    joined["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = torch.arange(96.0)[:, None]
    parts = formats.from_tensors(joined, {}, family, config).of("transformer")
    assert list(parts) == [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert torch.cat([layer.magnitude for layer in parts.values()]).tolist() == list(range(96))


def test_onetrainers_flux_files():
    """diffusers gives the MLPs of a block one name, so that all but one are gone."""
    family, config = Flux(), Flux().tiny().denoiser.config
    lora = every_layer(family, family.tiny())
    tensors = {}
    for name, layer in lora.layers.items():
        flat = "lora_" + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": layer.down, f"{flat}.lora_up.weight": layer.up, f"{flat}.alpha": torch.tensor(layer.alpha)}
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    names = {key.rpartition(".lora_")[0] for key in converted}
    assert len(names) < len(lora)
    assert not {f"transformer.{path}" for path in ("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp")} & names
    read = formats.from_tensors(tensors, {}, family, config)
    assert read.layers.keys() == lora.layers.keys()
    assert all(read.layers[name].equals(layer) for name, layer in lora.layers.items())


def test_small_flux_files():
    """diffusers' converter has 3072 in it."""
    family = Flux()
    parts = family.tiny()
    tensors = writing.to_tensors(every_layer(family, parts), "kohya", family, parts.denoiser.config, torch.float32)
    with pytest.raises(AssertionError):
        FluxPipeline.lora_state_dict(dict(tensors))
    assert formats.from_tensors(tensors, {}, family, parts.denoiser.config)


@pytest.mark.parametrize(
    "module",
    ["lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"],
)
def test_t5_in_flux_files(module):
    tensors = {f"{module}.lora_down.weight": torch.ones(2, 32), f"{module}.lora_up.weight": torch.ones(32, 2)}
    assert FluxPipeline.lora_state_dict(dict(tensors)) == {}
    read = formats.from_tensors(tensors, {}, Flux(), Flux().tiny().denoiser.config)
    assert list(read.layers) == ["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"]


def test_diffusers_exports_kohya_files_of_another_strength():
    """`convert_state_dict_to_kohya` writes alpha = rank whatever it was, and names that no tool knows for a transformer."""
    family = Flux()
    parts = family.tiny()
    lora = every_layer(family, parts, ["transformer_blocks.0.attn.to_out.0"], rank=2, alpha=8.0)
    file = writing.to_tensors(lora, "diffusers", family, parts.denoiser.config, torch.float32)
    theirs = convert_state_dict_to_kohya(file)
    assert "transformer_transformer_blocks_0_attn_to_out_0.lora_down.weight" in theirs
    alphas = [tensor.item() for key, tensor in theirs.items() if key.endswith("alpha")]
    assert alphas == [2.0]
    ours = writing.to_tensors(lora, "kohya", family, parts.denoiser.config, torch.float32)
    assert ours["lora_unet_double_blocks_0_img_attn_proj.alpha"].item() == 8.0
