"""Files as others publish them: their real keys and shapes (keys/), read whole, or refused by the name of what they are."""

import functools
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, UNetMotionModel

from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases, registry
from charforgex.families.motion_base import SdxlMotion
from charforgex.families.spelled import AnimateDiff
from charforgex.lora import formats, lycoris, names, writing
from charforgex.lora.formats import LoraFile
from charforgex.lora.identify import family_of, half_of, identify
from charforgex.lora.state import Lora, LoraLayer
from tests.families.conftest import motion_listing


def listing(rows) -> dict[str, tuple[int, ...]]:
    """Key -> shape. A row is a key and a shape, and for each {} of the key the first and the last number that stands there."""
    found = {}
    for key, shape, *span in rows:
        for numbers in itertools.product(*(range(first, last + 1) for first, last in zip(span[::2], span[1::2], strict=True))):
            found[key.format(*numbers)] = tuple(shape)
    return found


def listings(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """By who writes them."""
    return {who: listing(rows) for who, rows in json.loads((Path(__file__).parent / "keys" / f"{name}.json").read_text()).items()}


REAL = listings("flux")
CONTROL = "Black Forest Labs, control"
LAYERS = {  # format, layers, kind
    "ai-toolkit": ("comfyui", 418, "lora"), "diffusers": ("diffusers", 494, "lora"), "peft": ("diffusers", 381, "lora"),
    "sd-scripts": ("kohya", 494, "lora"), "sd-scripts with CLIP": ("kohya", 566, "lora"), "OneTrainer, DoRA": ("kohya", 506, "dora"),
}  # fmt: skip


@pytest.mark.parametrize("who", LAYERS)
def test_real_flux_files_are_understood_whole(who):
    format, count, kind = LAYERS[who]
    found = bases.base_of(REAL[who], {})
    file = LoraFile(REAL[who], {}, found.names, None)
    assert (found.name, identify(REAL[who])) == ("flux_dev", format)
    assert len(file.names) == count and set(file.kinds().values()) == {kind}


def test_what_is_no_adapter_is_named():
    assert family_of(REAL[CONTROL]) == "flux"
    with pytest.raises(LoraError, match=r"466 of 1094 keys .*They are a control LoRA of Black Forest Labs \(FLUX\.1 Canny or Depth\)"):
        bases.base_of(REAL[CONTROL], {})
    few = {"lora_unet_double_blocks_0_img_attn_proj" + end: (2, 2) for end in (".lora_down.weight", ".lora_up.weight")}
    ends = {"oft_blocks": "OFT or BOFT", "a1.weight": "GLoRA", "on_input": "IA3", "lora_B.bias": "biases beside the factors"}
    for end, said in ends.items():
        with pytest.raises(LoraError, match=f"They are {said}"):
            LoraFile(few | {f"lora_unet_double_blocks_0_img_attn_qkv.{end}": (2, 2)}, {}, bases.get("flux_dev").names, None)
    with pytest.raises(LoraError, match="bundled by OneTrainer"):
        LoraFile(few | {"bundle_emb.ohwx.clip_l": (2, 768)}, {}, bases.get("flux_dev").names, None)
    with pytest.raises(ConfigError, match=r"family\.name=sd15: its LoRA files are understood, and no base of it is run"):
        registry.get("sd15")


# ---- DoRA by inputs ----


def test_dora_by_inputs_is_onetrainers_and_not_pefts():
    """The norm of all weights that read one input (its `dora_scale` is (1, in)); a file holds it, and what it changes is computed."""
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(*shape, generator=generator) for shape in ((6, 4), (2, 4), (6, 2)))
    scale = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layer = lycoris.layer_of({"down": down, "up": up, "dora_scale": scale}, 1.0)
    moved = weight + 0.5 * up @ down
    torch.testing.assert_close(layer.change(weight), moved * scale / moved.norm(dim=0, keepdim=True) - weight)
    kernel = torch.randn(6, 4, 3, 3, generator=generator)
    convolved = LoraLayer(torch.randn(2, 4, 3, 3, generator=generator), up[:, :, None, None], 1.0, scale)
    moved = kernel + convolved.delta()
    expected = moved * (scale[0] / moved.transpose(0, 1).flatten(1).norm(dim=1))[None, :, None, None] - kernel
    torch.testing.assert_close(convolved.change(kernel), expected)
    stored = lycoris.tensors_of({"unet.x": layer}, "kohya", {"unet.x": "lora_unet_x"}, torch.float32)
    assert torch.equal(stored["lora_unet_x.dora_scale"], scale)
    with pytest.raises(LoraError, match="DoRA by inputs, as OneTrainer has it, which the format diffusers cannot hold"):
        lycoris.tensors_of({"unet.x": layer}, "diffusers", {"unet.x": "unet.x"}, torch.float32)


# ---- LyCORIS ----


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lycoris_of_a_joined_weight_is_divided_by_rows():
    """Each part changes as its rows of the whole do; of a Kronecker product only blocks can be told apart."""
    base = bases.get("charworld_flux")
    (joined, parts) = next((n, p) for n, p in base.names.table("kohya").items() if n.endswith("double_blocks_0_img_attn_qkv"))
    rows = parts[-1][1].rows[1]
    wide = base.shapes[parts[0][0]][1]
    loha = {
        "hada_w1_a": drawn(rows, 2),
        "hada_w1_b": drawn(2, wide),
        "hada_w2_a": drawn(rows, 2, seed=1),
        "hada_w2_b": drawn(2, wide, seed=2),
    }
    lokr = {"lokr_w1": drawn(6, 4), "lokr_w2": drawn(rows // 6, wide // 4, seed=3)}
    for sides in (loha, lokr):
        file = {f"{joined}.{side}": tensor for side, tensor in sides.items()}
        layers = formats.from_tensors(file, {}, base.spelling, base.config).layers
        whole = lycoris.layer_of(sides, None).delta()
        assert list(layers) == [name for name, _ in parts]
        for name, place in parts:
            torch.testing.assert_close(layers[name].delta(), whole[slice(*place.rows)])
    odd = {f"{joined}.lokr_w1": drawn(4, 4), f"{joined}.lokr_w2": drawn(rows // 4, wide // 4)}
    with pytest.raises(LoraError, match=rf"a LoKr of blocks of {rows // 4} rows cannot be divided"):
        formats.from_tensors(odd, {}, base.spelling, base.config)


def test_convolutions_in_three_factors_become_two():
    """Tucker's decomposition: sum over a, b of core[a, b] times the outer product of _a[a] and _b[b], as LyCORIS rebuilds it."""
    core, a, b = drawn(2, 3, 3, 3), drawn(2, 6, seed=1), drawn(3, 4, seed=2)
    whole = torch.einsum("abhw,ao,bi->oihw", core, a, b)
    layer = lycoris.layer_of({"mid": core, "down": b[:, :, None, None], "up": a.T[:, :, None, None]}, 2.0)
    torch.testing.assert_close(layer.delta(), whole)
    assert layer.weight_shape == (6, 4, 3, 3) and layer.rank == 2
    core = core[:, :2]
    whole = torch.einsum("abhw,ao,bi->oihw", core, a, b[:2])
    sides = {"hada_t1": core, "hada_w1_a": a, "hada_w1_b": b[:2], "hada_w2_a": drawn(6, 2, seed=4), "hada_w2_b": drawn(2, 36, seed=5)}
    layer = lycoris.layer_of(sides, None)
    torch.testing.assert_close(layer.delta(), whole.flatten(1) * (sides["hada_w2_a"] @ sides["hada_w2_b"]))
    assert lycoris.weight_shape({side: tuple(tensor.shape) for side, tensor in sides.items()}) == (6, 36)
    one = drawn(2, 2, seed=6)
    layer = lycoris.layer_of({"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b[:2]}, None)
    torch.testing.assert_close(layer.delta(), torch.kron(one, whole.flatten(1)))


# ---- AnimateDiff ----


@pytest.fixture(scope="module")
def tiny():
    return UNetMotionModel(
        block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=2, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=2, motion_max_seq_length=4,
    )  # fmt: skip


def motion_lora(network) -> Lora:
    """On the attention of each motion module."""
    layers = {}
    for number, (path, module) in enumerate(network.named_modules()):
        if ".motion_modules." in path and ".attn" in path and isinstance(module, torch.nn.Linear):
            out, wide = module.weight.shape
            layers[f"unet.{path}"] = LoraLayer(drawn(2, wide, seed=number), drawn(out, 2, seed=1000 + number), 2.0)
    return Lora(layers)


def test_motion_loras_have_animatediffs_names_and_diffusers_reads_what_is_made_of_them(tiny, tmp_path):
    lora, spelling = motion_lora(tiny), AnimateDiff()
    tensors = writing.to_tensors(lora, "animatediff", spelling, tiny.config, torch.float32)
    stem = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor"
    assert {f"{stem}.to_q_lora.down.weight", f"{stem}.to_out_lora.up.weight"} <= tensors.keys() and len(tensors) == 2 * len(lora)
    assert identify(tensors) == "animatediff" and family_of({key: tuple(t.shape) for key, t in tensors.items()}) == "animatediff"
    again = formats.from_tensors(tensors, {}, spelling, tiny.config)
    assert again.layers.keys() == lora.layers.keys() and all(layer.equals(again.layers[name]) for name, layer in lora.layers.items())
    path = writing.write(again, tmp_path / "x.safetensors", "diffusers", spelling, tiny.config, torch.float32)
    state, _, metadata = AnimateDiffPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    AnimateDiffPipeline.load_lora_into_unet(state, None, tiny, adapter_name="motion", metadata=metadata)
    held = {name: module for name, module in tiny.named_modules() if "motion" in getattr(module, "lora_A", {})}
    assert {f"unet.{name}" for name in held} == lora.layers.keys()
    for name, module in held.items():
        layer = lora.layers[f"unet.{name}"]
        assert torch.equal(module.lora_A["motion"].weight, layer.down) and torch.equal(module.lora_B["motion"].weight, layer.up)
        assert module.scaling["motion"] == 1.0


def test_the_spellings_of_motion_directors_and_of_old_diffusers():
    readable = bases.get("animatediff_v2").names.readable()
    spatial, motion = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "mid_block.motion_modules.0.transformer_blocks.0"
    theirs = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0"
    known = {
        f"{spatial}.processor.to_q_lora": f"{spatial}.to_q", f"unet.{spatial}.processor.to_out_lora": f"{spatial}.to_out.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj_lora":
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        f"{theirs}.attention_blocks.0.processor.to_k_lora": f"{motion}.attn1.to_k",
        f"{theirs}.attention_blocks.1.to_out.processor.0_lora": f"{motion}.attn2.to_out.0",
        f"{theirs}.ff.net.processor.2_lora": f"{motion}.ff.net.2",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": f"{spatial}.to_q",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": f"{spatial}.to_q",
    }  # fmt: skip
    assert {spelled: readable[spelled][0][0] for spelled in known} == {spelled: f"unet.{ours}" for spelled, ours in known.items()}
    assert readable["lora_te_text_model_encoder_layers_3_mlp_fc1"][0][0] == "text_encoder.text_model.encoder.layers.3.mlp.fc1"


def test_stable_diffusion_15_is_written_as_sd_scripts_names_it():
    """`lora_te` and diffusers' blocks, 192 modules of the UNet and 72 of the encoder."""
    names_of = bases.get("sd15").names
    kohya = {parts[0][0]: name for name, parts in names_of.table("kohya").items()}
    attention = [path for path in kohya if path.startswith("unet.") and ".attentions." in path]
    assert len(attention) == 192
    assert kohya["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert kohya["unet.mid_block.attentions.0.proj_in"] == "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {name: bases.get("sd15").shapes[ours] for ours, name in kohya.items() if ours in attention}
    file = {f"{name}.lora_down.weight": (1, *shape[1:]) for name, shape in shapes.items()}
    file |= {f"{name}.lora_up.weight": (shape[0], 1, *[1] * len(shape[2:])) for name, shape in shapes.items()}
    assert family_of(file) == "sd15" and bases.base_of(file, {}).name == "sd15"
    assert isinstance(names_of, names.Names)


MOTION = listings("animatediff")
IN_DIFFUSERS = {".temporal_transformer": "", ".attention_blocks.0": ".attn1", ".attention_blocks.1": ".attn2"}  # as its hub has them
MOTION["AnimateDiff, on diffusers' hub"] = {
    "unet." + functools.reduce(lambda key, pair: key.replace(*pair), IN_DIFFUSERS.items(), key): shape
    for key, shape in MOTION["AnimateDiff"].items()
}
MOTION_LAYERS = {  # format, base, layers of each half
    "AnimateDiff": ("animatediff", "animatediff_v2", {"temporal": 21 * 8}),
    "AnimateDiff, on diffusers' hub": ("diffusers", "animatediff_v2", {"temporal": 21 * 8}),
    "AnimateDiff-MotionDirector, temporal": ("animatediff", "animatediff_v3", {"temporal": 20 * 10}),
    "AnimateDiff-MotionDirector, temporal, its own names": ("diffusers", "animatediff_v3", {"temporal": 20 * 10}),
    "AnimateDiff-MotionDirector, spatial": ("diffusers", "sd15", {"spatial": 16 * 10}),
    "diffusers, both": ("diffusers", "animatediff_v3", {"spatial": 16 * 8, "temporal": 20 * 8}),
}


@pytest.mark.parametrize("who", MOTION_LAYERS)
def test_motion_loras_are_understood_whole(who):
    format, name, halves = MOTION_LAYERS[who]
    found = bases.base_of(MOTION[who], {})
    assert (identify(MOTION[who]), found.name) == (format, name)
    layers = LoraFile(MOTION[who], {}, found.names, None).names
    assert Counter(map(half_of, layers)) == halves and 2 * len(layers) == len(MOTION[who])


def test_a_lora_of_how_clips_look_is_known_where_its_base_of_pictures_is_not_listed(monkeypatch):
    spatial = MOTION["AnimateDiff-MotionDirector, spatial"]
    monkeypatch.setattr(bases, "names", lambda: ["sdxl_base", "animatediff_v3"])
    assert bases.base_of(spatial, {}).name == "animatediff_v3"


@pytest.mark.parametrize(("name", "modules", "weights"), [("animatediff_v2", 21, ("v2",)), ("animatediff_sdxl", 15, ("", SdxlMotion))])
def test_what_is_written_finds_its_weights_where_motion_loras_are_read(name, modules, weights):
    """AnimateDiff's own loader, and ComfyUI-AnimateDiff-Evolved's, make a weight's name of a key by leaving out parts of it, whatever the
    layer is. Of every motion module's every layer that must be a key of the published motion modules, of the factors' size."""
    base, weights = bases.get(name), motion_listing(*weights)
    motion = [name for name in base.shapes if half_of(name) == "temporal"]
    assert len(motion) == modules * 12  # 8 of attention, 2 of the MLP, proj_in and proj_out
    layers = {n: LoraLayer(torch.zeros(1, base.shapes[n][1]), torch.zeros(base.shapes[n][0], 1), 1.0) for n in motion}
    names_in_file = {parts[0][0]: name for name, parts in base.names.table("animatediff").items()}
    for name, layer in layers.items():
        key = f"{names_in_file[name]}.down.weight"
        assert "temporal" in key and "up." not in key  # without the one it is passed over, and with the other taken for the second factor
        for left_out in ("processor.", "_lora", "down.", "up."):
            key = key.replace(left_out, "")
        key = key if "to_out.0." in key else key.replace("to_out.", "to_out.0.")
        assert weights[key] == (layer.up.shape[0], layer.down.shape[1])


def test_motion_modules_are_written_in_names_that_somebody_reads():
    """AnimateDiff's own and diffusers'; ComfyUI's and kohya's files cannot hold them."""
    names_of = bases.get("animatediff_v2").names
    motion = "unet.mid_block.motion_modules.0.transformer_blocks.0"
    for format in ("comfyui", "kohya"):
        with pytest.raises(LoraError, match=rf"1 of 1 layers have no place in the format {format}, but in animatediff and diffusers"):
            writing.check_places([f"{motion}.attn1.to_k"], format, names_of)
        writing.check_places(["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"], format, names_of)
    with pytest.raises(LoraError, match="no place in the format animatediff, but in diffusers"):
        writing.check_places(["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"], "animatediff", names_of)
    writing.check_places([f"{motion}.ff.net.2", "unet.mid_block.motion_modules.0.proj_in"], "animatediff", names_of)
