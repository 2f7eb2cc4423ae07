import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.errors import LoraError
from charforgex.families.sdxl import Sdxl
from charforgex.lora import formats, names, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter
from charforgex.lora.state import Lora, LoraLayer

REAL = json.loads((Sdxl().configs / "unet" / "config.json").read_text())
CHECKPOINT = Path(__file__).parents[1] / "families" / "keys" / "sdxl.json"  # key -> shape of the real single file
KOHYA_DEFAULT = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def text_layers(alpha=3.0):
    """Layers for both text encoders of the tiny base."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for component in ("text_encoder", "text_encoder_2"):
        for module in names.CLIP_MODULES:
            wide, narrow = (37, 32) if module == "mlp.fc1" else (32, 37) if module == "mlp.fc2" else (32, 32)
            down, up = torch.randn(2, narrow, generator=generator), torch.randn(wide, 2, generator=generator) * 0.1
            layers[f"{component}.text_model.encoder.layers.0.{module}"] = LoraLayer(down, up, alpha)
    return layers


@pytest.fixture
def lora(parts, trained):
    trained(parts)
    return read_adapter(parts.denoiser, "unet")


def same(one: Lora, other: Lora) -> bool:
    return one.layers.keys() == other.layers.keys() and all(one.layers[n].equals(other.layers[n]) for n in one.layers)


# ---- names ----


def kohya_names(family):
    """Our name -> kohya's, for the real SDXL."""
    return {ours: theirs for theirs, ((ours, _),) in names.Names(family, REAL).table("kohya").items()}


def test_kohya_names_of_the_real_sdxl(family):
    kohya = kohya_names(family)
    default = {
        ours: theirs for ours, theirs in kohya.items() if ours.startswith("unet.") and ours.endswith(tuple(f".{t}" for t in KOHYA_DEFAULT))
    }
    assert len(default) == 722  # "create LoRA for U-Net: 722 modules", as sd-scripts logs it
    shape = r"lora_unet_(input_blocks_[4578]_1|middle_block_1|output_blocks_[0-5]_1)_(proj_in|proj_out|transformer_blocks_\d_\w+)"
    assert all(re.fullmatch(shape, theirs) for theirs in default.values())
    known = {  # as sd-scripts writes them
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.proj_in": "lora_unet_input_blocks_4_1_proj_in",
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v": "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v",
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "unet.up_blocks.0.attentions.0.transformer_blocks.9.attn1.to_k": "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_k",
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k": "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_k",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
        "unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2",
        "unet.conv_in": "lora_unet_input_blocks_0_0",
        "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "unet.up_blocks.2.resnets.2.conv_shortcut": "lora_unet_output_blocks_8_0_skip_connection",
        "unet.down_blocks.1.resnets.0.time_emb_proj": "lora_unet_input_blocks_4_0_emb_layers_1",
        "text_encoder.text_model.encoder.layers.11.self_attn.q_proj": "lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1": "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    }
    assert {ours: kohya[ours] for ours in known} == known


def test_every_name_stands_in_the_real_checkpoint(family):
    """kohya's trainer names its layers after the modules of the single-file checkpoint, with underscores."""
    keys = json.loads(CHECKPOINT.read_text())
    places = family.lora_names(REAL)
    assert {f"model.diffusion_model.{place.path}.weight" for place in places.values()} <= keys.keys()
    weights = [key for key, shape in keys.items() if key.startswith("model.diffusion_model.") and key.endswith("weight") and len(shape) > 1]
    assert len(places) == len(weights) == 794


def test_real_size_files_load_in_diffusers_without_a_key_left(family):
    """diffusers' own conversion of our kohya keys at SDXL's real size gives back exactly our module paths."""
    paths = [ours for ours in kohya_names(family) if ours.startswith("unet.") and ours.endswith(tuple(KOHYA_DEFAULT))]
    lora = Lora({path: LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0) for path in paths})
    tensors = writing.to_tensors(lora, "kohya", family, REAL, torch.float16)
    assert len(tensors) == 3 * 722
    config = type("Config", (), REAL)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=config)
    spelled = {key.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora") for key in converted if key.endswith("down.weight")}
    assert {re.sub(r"[._]lora\.down\.weight$", "", key) for key in spelled} == set(paths)
    assert len(alphas) == len(paths)


# ---- round trips ----


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_is_identical(family, parts, lora, tmp_path, format, dtype):
    lora = Lora(lora.layers | text_layers(), {"charforgex.trigger": "ohwx"})
    odd = next(iter(lora.layers))
    lora.layers[odd] = LoraLayer(lora.layers[odd].down[:3], lora.layers[odd].up[:, :3], 0.1)  # another rank, an alpha no half can hold
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    writing.write(lora, first, format, family, parts.denoiser.config, dtype)
    again = formats.read(first, family, parts.denoiser.config)
    assert same(again, lora.rounded(dtype))
    assert again.metadata["charforgex.trigger"] == "ohwx"
    writing.write(again, second, format, family, parts.denoiser.config, dtype)
    assert first.read_bytes() == second.read_bytes()
    assert {t.dtype for key, t in load_file(first).items() if "alpha" not in key} == {dtype}


def test_formats_convert_into_each_other(family, parts, lora, tmp_path):
    lora = Lora(lora.layers | text_layers())
    config = parts.denoiser.config
    for i, format in enumerate(["diffusers", "kohya", "comfyui", "diffusers"]):
        path = tmp_path / f"{i}.safetensors"
        writing.write(lora, path, format, family, config)
        lora = formats.read(path, family, config)
        with safe_open(path, "pt") as file:
            assert (formats.ADAPTER_METADATA in file.metadata()) == (format == "diffusers")  # diffusers refuses it beside alphas
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_kohya_files_with_diffusers_block_names_are_read(family, parts, lora, tmp_path):
    lora = Lora(lora.layers | text_layers())
    tensors = {}
    for name, layer in lora.layers.items():
        prefix, path = (
            {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[name.split(".")[0]],
            name.split(".", 1)[1],
        )
        if prefix == "lora_te1":
            path = path.removeprefix("text_model.")  # what diffusers' own converter writes with transformers 5
        tensors[f"{prefix}_{path.replace('.', '_')}.lora_down.weight"] = layer.down
        tensors[f"{prefix}_{path.replace('.', '_')}.lora_up.weight"] = layer.up
    save_file(tensors, tmp_path / "x.safetensors")
    again = formats.read(tmp_path / "x.safetensors", family, parts.denoiser.config)
    assert again.layers.keys() == lora.layers.keys()
    assert {layer.alpha for layer in again.layers.values()} == {4.0, 2.0}  # none in the file, so each layer's rank
    assert torch.equal(again.layers["unet.mid_block.attentions.0.proj_in"].up, lora.layers["unet.mid_block.attentions.0.proj_in"].up)


# ---- the installed diffusers ----


class Warnings(diffusers_logging.logging.Handler):
    def __init__(self):
        super().__init__(diffusers_logging.logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["alpha is not rank", "mixed", "convolutions", "with text encoders"])
def test_diffusers_loads_our_files_and_computes_the_same(family, parts, trained, predict, tmp_path, format, kind):
    if kind == "convolutions":
        trained(parts, family.lora_targets("all", parts.denoiser.config))
    else:
        trained(parts)
    lora = read_adapter(parts.denoiser, "unet")
    if kind == "mixed":
        for i, (name, layer) in enumerate(list(lora.layers.items())):
            # for kohya files diffusers 0.42.1 ignores alphas that differ from layer to layer: its alpha_pattern misses the attention
            alpha = (0.5, 2.0, 6.0)[i % 3] if format == "diffusers" else 2.0
            lora.layers[name] = LoraLayer(layer.down[: 1 + i % 3], layer.up[:, : 1 + i % 3], alpha)
    if kind == "with text encoders":
        lora = Lora(lora.layers | text_layers())
    path = tmp_path / "hero.safetensors"
    writing.write(lora, path, format, family, parts.denoiser.config, torch.float32)

    ours, theirs = family.tiny(), family.tiny()
    assert load_adapter(ours, formats.read(path, family, ours.denoiser.config), "hero") == len(lora)
    heard = Warnings()
    diffusers_logging.get_logger("diffusers").addHandler(heard)
    try:
        pipeline = family.pipeline(theirs)
        pipeline.load_lora_weights(str(path), adapter_name="hero")
    finally:
        diffusers_logging.get_logger("diffusers").removeHandler(heard)
    if kind == "with text encoders":
        assert heard.messages == []
    for component in lora.components():
        assert len(layers_of(theirs[component])) == len(lora.of(component))
        settle(theirs[component])
    prediction = predict(ours)
    assert torch.equal(predict(theirs), prediction)
    assert not torch.allclose(prediction, predict(family.tiny()), atol=0.01)
    texts = [family.encode_text(p, ["a red cat"]) for p in (ours, theirs, family.tiny())]
    assert torch.equal(texts[0].tokens_BLD, texts[1].tokens_BLD) and torch.equal(texts[0].pooled_BD, texts[1].pooled_BD)
    assert torch.equal(texts[0].tokens_BLD, texts[2].tokens_BLD) == (kind != "with text encoders")


def settle(network):
    """torch.matmul gives another last bit for a weight that needs gradients or that lies in memory as the mapped file has it."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone()


def layers_of(network):
    return [module for module in network.modules() if isinstance(module, PeftLayer) and "hero" in module.lora_A]


def test_whole_pictures_are_equal(family, parts, lora, tmp_path):
    """The pipeline with diffusers' loader and the pipeline with ours, from prompt to latents."""
    path = tmp_path / "hero.safetensors"
    writing.save_verified(lora, path, "kohya", family, parts.denoiser)
    ours, theirs = family.tiny(), family.tiny()
    load_adapter(ours, formats.read(path, family, ours.denoiser.config), "hero")
    pipelines = [family.pipeline(p) for p in (ours, theirs, family.tiny())]
    pipelines[1].load_lora_weights(str(path))
    settle(theirs.denoiser)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    pictures = [p("a cat", generator=torch.Generator().manual_seed(0), **call).images for p in pipelines]
    assert torch.equal(pictures[0], pictures[1]) and not torch.allclose(pictures[0], pictures[2], atol=1e-2)


# ---- what is refused ----


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_leftover_keys_are_counted_and_named(family, parts, lora, tmp_path, format):
    tensors = writing.to_tensors(lora, format, family, parts.denoiser.config, torch.float16)
    stray = {"diffusers": "unet.down_blocks.9.x.lora_A.weight", "kohya": "lora_te4_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"}[
        format
    ]
    tensors[stray] = torch.ones(1, 2)
    tensors["bundle_emb.a.string_to_param"] = torch.ones(1)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoraError, match=rf"x\.safetensors: 2 of {len(tensors)} keys .*{re.escape(stray)}"):
        formats.read(path, family, parts.denoiser.config)


def test_half_a_layer_two_spellings_and_dora_are_refused(family, parts, lora):
    config = parts.denoiser.config
    tensors = writing.to_tensors(lora, "kohya", family, config, torch.float16)
    key = "lora_unet_middle_block_1_proj_in.lora_up.weight"
    with pytest.raises(LoraError, match=r"1 layers lack one of their two factors: unet\.mid_block\.attentions\.0\.proj_in"):
        formats.from_tensors({k: v for k, v in tensors.items() if k != key}, {}, family, config)
    with pytest.raises(LoraError, match="twice under two spellings"):
        formats.from_tensors(tensors | {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": tensors[key]}, {}, family, config)
    with pytest.raises(LoraError, match=r"proj_in: DoRA's magnitude must have a value for each of the 8 outputs, .* the shape \(7,\)"):
        formats.from_tensors(tensors | {key.replace("lora_up.weight", "dora_scale"): torch.ones(1, 7)}, {}, family, config)
    settings = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    with pytest.raises(LoraError, match=r"unet\.use_dora"):
        formats.from_tensors(writing.to_tensors(lora, "diffusers", family, config, torch.float16), settings, family, config)


def test_alphas_of_a_diffusers_header(family, parts, lora):
    """One value, exceptions by path and by pattern, as peft reads them; without a header alpha is the rank."""
    config = parts.denoiser.config
    tensors = writing.to_tensors(lora, "diffusers", family, config, torch.float32)
    one, two = "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {one: 0.5, r"attn2\.to_q": 3, "^" + two: 5}}
    read = formats.from_tensors(tensors, {formats.ADAPTER_METADATA: json.dumps(settings)}, family, config).of("unet")
    assert (read[one].alpha, read[two].alpha, read["down_blocks.1.attentions.0.proj_in"].alpha) == (0.5, 5.0, 8.0)
    assert {layer.alpha for path, layer in read.items() if path.endswith("attn2.to_q")} == {3.0}
    assert {layer.alpha for layer in formats.from_tensors(tensors, {}, family, config).layers.values()} == {4.0}


@pytest.mark.parametrize("header", ["{", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "3"])
def test_headers_that_make_no_sense(family, parts, lora, header):
    tensors = writing.to_tensors(lora, "diffusers", family, parts.denoiser.config, torch.float32)
    with pytest.raises(LoraError, match="lora_adapter_metadata cannot be understood"):
        formats.from_tensors(tensors, {formats.ADAPTER_METADATA: header}, family, parts.denoiser.config)


@pytest.mark.parametrize("alpha", ["NaN", "-Infinity", '"nan"', "1e999"])
def test_a_header_with_an_alpha_that_is_no_number(family, parts, lora, alpha):
    tensors = writing.to_tensors(lora, "diffusers", family, parts.denoiser.config, torch.float32)
    with pytest.raises(LoraError, match=r"lora_adapter_metadata gives unet\.\S+ an alpha of (nan|-?inf)"):
        formats.from_tensors(tensors, {formats.ADAPTER_METADATA: f'{{"unet.lora_alpha": {alpha}}}'}, family, parts.denoiser.config)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({".alpha": torch.ones(2)}, "an alpha of 2 values"),
        ({".lora_down.weight": torch.tensor(1.0)}, "no factors of one layer"),
        ({".lora_down.weight": torch.ones(3, 8)}, "no factors of one layer"),
    ],
)
def test_layers_that_make_no_sense_are_named(family, parts, lora, change, reason):
    tensors = writing.to_tensors(lora, "kohya", family, parts.denoiser.config, torch.float32)
    tensors |= {f"lora_unet_middle_block_1_proj_in{end}": value for end, value in change.items()}
    with pytest.raises(LoraError, match=rf"unet\.mid_block\.attentions\.0\.proj_in.*{reason}"):
        formats.from_tensors(tensors, {}, family, parts.denoiser.config)


def test_identify():
    assert formats.identify(["unet.x.lora_A.weight", "unet.x.lora_B.weight"]) == "diffusers"
    assert formats.identify(["lora_unet_x.alpha", "lora_unet_x.lora_down.weight"]) == "kohya"
    for keys, hint in [
        (["model.diffusion_model.out.2.weight"], "whole checkpoint"),
        (["x.alpha"], "x.alpha"),
        ([], "0 keys"),
    ]:
        with pytest.raises(LoraError, match=hint):
            formats.identify(keys)


def test_files_that_are_no_adapters(family, parts, tmp_path):
    config = parts.denoiser.config
    for name, content, reason in [
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "damaged"),
        ("x.pt", b"\x80\x04", "can run code"),
        ("y.safetensors", b"", "damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoraError, match=reason):
            formats.read(tmp_path / name, family, config)
    with pytest.raises(LoraError, match="There is no LoRA file"):
        formats.read(tmp_path / "missing.safetensors", family, config)
    save_file(
        {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 3), "lora_unet_conv_in.lora_up.weight": torch.ones(3, 4)},
        tmp_path / "z.safetensors",
    )
    with pytest.raises(LoraError, match=r"belong to no module|no factors of one layer"):
        formats.read(tmp_path / "z.safetensors", family, config)


# ---- saving ----


def test_useless_adapters_are_never_saved(family, parts, trained, tmp_path):
    path = tmp_path / "hero.safetensors"
    path.write_bytes(b"the last good one")
    inject(parts.denoiser, ["to_q"], rank=2, alpha=1.0)
    with pytest.raises(LoraError, match=r"All \d+ layers are zero"):
        writing.save_verified(read_adapter(parts.denoiser, "unet"), path, "kohya", family, parts.denoiser)
    parameters = adapter_parameters(parts.denoiser)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1e6)
    with pytest.raises(LoraError, match=r"does not fit into torch.float16"):
        writing.save_verified(read_adapter(parts.denoiser, "unet"), path, "kohya", family, parts.denoiser)
    with torch.no_grad():
        next(iter(parameters.values()))[0, 0] = float("nan")
    with pytest.raises(LoraError, match=r"1 of \d+ layers hold values that are not finite: unet\."):
        writing.save_verified(read_adapter(parts.denoiser, "unet"), path, "diffusers", family, parts.denoiser, torch.float32)
    with pytest.raises(LoraError, match="choose diffusers, kohya, comfyui, ai-toolkit"):
        writing.save_verified(read_adapter(parts.denoiser, "unet"), path, "pickle", family, parts.denoiser)
    assert path.read_bytes() == b"the last good one" and [p.name for p in tmp_path.iterdir()] == ["hero.safetensors"]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_save_verified_in_bfloat16_models(family, parts, trained, tmp_path, format):
    parts.denoiser.to(torch.bfloat16)
    trained(parts)
    lora = read_adapter(parts.denoiser, "unet")
    path = writing.save_verified(lora, tmp_path / "x.safetensors", format, family, parts.denoiser, torch.bfloat16)
    assert same(formats.read(path, family, parts.denoiser.config), lora.rounded(torch.bfloat16))


class Forgetful:
    """A family whose names lose a layer between writing and reading, or change places."""

    kohya_has_our_names, lora_unread = False, {}

    def __init__(self, family, change):
        self.family, self.change, self.calls = family, change, 0
        self.name, self.denoiser_name, self.components = family.name, family.denoiser_name, family.components

    def lora_names(self, config):
        self.calls += 1
        places = self.family.lora_names(config)
        return self.change(places) if self.calls > 1 else places

    def lora_dialects(self, config):
        return {}


def swap(places):
    one, two = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    return places | {one: places[two], two: places[one]}


def test_a_file_that_comes_back_differently_is_not_kept(family, parts, lora, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(LoraError, match=r"2 of \d+ layers come back changed: unet\.mid_block.*attn1\.to_q"):
        writing.save_verified(lora, path, "kohya", Forgetful(family, swap), parts.denoiser)
    assert not list(tmp_path.iterdir())


def test_the_average_of_the_weights_is_saved_as_given(family, parts, lora, tmp_path):
    """`lora` may be a moving average: its values are saved, not those that the denoiser holds."""
    average = Lora({name: layer.map(lambda x: x * 0.5) for name, layer in lora.layers.items()})
    path = writing.save_verified(average, tmp_path / "x.safetensors", "diffusers", family, parts.denoiser, torch.float32)
    assert same(formats.read(path, family, parts.denoiser.config), average)
    assert same(read_adapter(parts.denoiser, "unet"), lora)


def test_an_alpha_that_differs_from_the_trained_one_is_not_saved(family, parts, lora, tmp_path):
    wrong = Lora({name: LoraLayer(layer.down, layer.up, layer.alpha * 2) for name, layer in lora.layers.items()})
    with pytest.raises(LoraError, match="give other outputs when loaded"):
        writing.save_verified(wrong, tmp_path / "x.safetensors", "kohya", family, parts.denoiser)
    with pytest.raises(LoraError, match="differ in their layers"):
        writing.save_verified(Lora(dict(list(lora.layers.items())[1:])), tmp_path / "x.safetensors", "kohya", family, parts.denoiser)
    assert not list(tmp_path.iterdir())
