"""Single files: every spelling gives the same networks, all keys of published ones have their place, and what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.errors import ModelError
from charforgex.families import layouts, registry
from charforgex.families.base import ALL
from charforgex.families.flux import Flux
from charforgex.families.loading import denoiser_config, weights_hash
from charforgex.families.sdxl import Sdxl
from charforgex.families.single_file import Checkpoint, empty, own_config, tables
from charforgex.types import Crop
from tests.families.conftest import cache_snapshot, listing, original_tensors, same_networks, write_header

FAMILIES = ("sdxl", "flux", "sd3")
T5 = "text_encoders.t5xxl."
EXTRA = {  # what published files hold besides
    "sdxl": ("conditioner.embedders.1.model.logit_scale", "model_ema.decay", "betas"),
    "flux": ("text_encoders.t5xxl.logit_scale", "text_encoders.clip_l.transformer.text_projection.weight"),
    "sd3": (
        "model.model_sampling.sigmas",
        "text_encoders.clip_l.logit_scale",
        f"{T5}transformer.encoder.embed_tokens.weight",
    ),
}


@pytest.fixture(params=FAMILIES)
def bench(request, benches, tmp_path):
    """The family's tiny model; its tokenizers lie beside the files of the test."""
    bench = benches(request.param)
    for folder in bench.folder.glob("tokenizer*"):
        (tmp_path / folder.name).symlink_to(folder)
    return bench


def with_tokenizers(bench, folder: Path):
    for home in bench.folder.glob("tokenizer*"):
        (folder / home.name).symlink_to(home)
    return bench


def check_same(bench, parts) -> None:
    """The networks, and that they do the same."""
    same_networks(parts, bench.parts)
    assert parts.config | {"default_size": 64} == bench.parts.config  # Flux's tiny() says that itself
    captions = ["a red cat!", ""]
    one, two = (bench.family.encode_text(some, captions) for some in (parts, bench.parts))
    torch.testing.assert_close(one.tokens_BLD, two.tokens_BLD, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.pooled_BD, two.pooled_BD, rtol=0, atol=1e-6)
    sizes = {"noisy": torch.ones(2, 4, 4, 4), "t_B": torch.tensor([0.2, 0.9]), "text": two, "crop": Crop.whole(2, 32, 32)}
    with torch.no_grad():
        ours, theirs = (bench.family.denoise(some.denoiser, **sizes) for some in (parts, bench.parts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# ---- what files hold ----


def test_one_file_gives_the_same_networks(bench, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(bench.whole() | {key: torch.ones(()) for key in EXTRA[bench.family.name]}, path)
    parts = bench.family.load(str(path))
    check_same(bench, parts)
    assert bench.parts["tokenizer"].pad_token == parts["tokenizer"].pad_token == "<|endoftext|>"
    assert set(bench.family.load(str(path), only=("vae",)).modules) == {"vae", "scheduler"}
    assert denoiser_config(bench.family, str(path)) == json.loads((bench.folder / bench.family.denoiser_name / "config.json").read_text())
    bench.family.pipeline(parts).save_pretrained(tmp_path / "folder")
    same_networks(registry.get(bench.family.name).load(str(tmp_path / "folder")), bench.parts)


def test_files_of_single_parts_complete_each_other(benches, tmp_path):
    """As ComfyUI's users have Flux: each part in a file of its own, without prefixes; the first that has a part gives it."""
    bench = with_tokenizers(benches("flux"), tmp_path)
    files = {}
    for component, name in (("transformer", "flux1-dev"), ("vae", "ae"), ("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl_fp16")):
        files[component] = str(tmp_path / f"{name}.safetensors")
        save_file(bench.tensors(component, number=-1), files[component])
    family = bench.family
    check_same(bench, family.load("+".join(files.values())))
    with pytest.raises(ModelError, match=r"flux1-dev\.safetensors holds no text_encoder, text_encoder_2, vae, which flux needs.*\+"):
        family.load(files["transformer"], only=())
    with pytest.raises(ModelError, match=r"holds no vae, which flux needs; .*\+ae\.safetensors"):
        family.load(f"{files['transformer']}+{files['text_encoder']}+{files['text_encoder_2']}", only=())
    assert set(family.load(files["transformer"], only=("denoiser",)).modules) == {"transformer", "scheduler"}
    with pytest.raises(ModelError, match=r"holds vae and no transformer of flux"):
        family.load(files["vae"], only=("vae",))
    with pytest.raises(ModelError, match=r"ae\.safetensors adds nothing"):
        family.load(f"{bench.folder}+{files['vae']}")
    # a VAE of one's own before a folder that has one too, in diffusers' spelling for a change
    brighter = {key: tensor + 1 for key, tensor in bench.parts["vae"].state_dict().items()}
    save_file(brighter, tmp_path / "a+b.safetensors")
    parts = family.load(f"{tmp_path / 'a+b.safetensors'} + {bench.folder}", only=("vae", "text"))
    assert torch.equal(parts["vae"].decoder.conv_in.bias, brighter["decoder.conv_in.bias"])
    assert torch.equal(parts["text_encoder_2"].shared.weight, bench.parts["text_encoder_2"].shared.weight)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_stored_in_fewer_bits(stored, benches, tmp_path):
    """Plain fp8 is read as the numbers that it stands for; every tensor keeps its place, also within joined ones."""
    bench = benches("flux")
    path = tmp_path / "fp8.safetensors"
    save_file({key: tensor.to(stored) for key, tensor in bench.whole("transformer").items()}, path)
    transformer = bench.family.load(str(path), only=("denoiser",), dtype=torch.bfloat16).denoiser
    for key, tensor in transformer.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, bench.parts.denoiser.state_dict()[key].to(stored).to(torch.bfloat16)), key


def test_float16_leaves_out_what_overflows_in_it(bench, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(bench.whole(), path)
    for source in (str(path), str(bench.folder), "tiny"):
        for name, network in bench.family.load(source, dtype=torch.float16).networks().items():
            expected = torch.bfloat16 if "T5" in type(network).__name__ else torch.float32 if name == "vae" else torch.float16
            assert {parameter.dtype for parameter in network.parameters()} == {expected}, (source, name)


def test_t5_overflows_in_float16_and_not_in_bfloat16(benches, tmp_path):
    """States of T5-XXL pass 65504 between its layers: here a feed-forward of that size does."""
    bench = benches("flux")
    folder = Path(shutil.copytree(bench.folder, tmp_path / "base"))
    weights = next((folder / "text_encoder_2").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({key: tensor * 400 if "DenseReluDense" in key else tensor for key, tensor in tensors.items()}, weights, {"format": "pt"})

    def states(parts):
        return registry.get("flux").encode_text(parts, ["a red cat"]).tokens_BLD.float()

    exact = states(bench.family.load(str(folder), only=("text",)))
    half = bench.family.load(str(folder), only=("text",), dtype=torch.float16)
    torch.testing.assert_close(states(half), exact, rtol=0, atol=0.15)
    half["text_encoder_2"].half()
    assert not torch.allclose(states(half), exact, rtol=0, atol=0.15), "why it is not loaded so"


# ---- SD3 without some of its text encoders ----

COMBINATIONS = ("l", "g", "t", "lg", "lt", "gt", "lgt")
ENCODERS = {"l": "text_encoder", "g": "text_encoder_2", "t": "text_encoder_3"}


@pytest.mark.parametrize("which", COMBINATIONS)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_sd3_with_some_of_its_text_encoders(which, form, benches, tmp_path):
    """An absent CLIP is one that gives zeros to the pipeline, an absent T5 is what the pipeline makes of None."""
    from diffusers import StableDiffusion3Pipeline

    bench = benches("sd3")
    here = [ENCODERS[letter] for letter in which]
    gone = [name for name in ENCODERS.values() if name not in here]
    if form == "folder":
        modules = {name: None if name.replace("tokenizer", "text_encoder") in gone else part for name, part in bench.parts.modules.items()}
        StableDiffusion3Pipeline(**modules).save_pretrained(tmp_path / "base")
        source = str(tmp_path / "base")
    else:
        with_tokenizers(bench, tmp_path)
        source = str(tmp_path / "base.safetensors")
        save_file(bench.whole("transformer", "vae", *here), source)
    parts = bench.family.load(source, only=("text",))
    assert set(parts.modules) == {*here, *(name.replace("text_encoder", "tokenizer") for name in here), "scheduler"}
    assert len(bench.family.seen_text(parts, "a red cat")) == len(here)
    assert set(bench.family.load(source).networks()) == {"transformer", "vae", *here}
    full = registry.get("sd3").tiny(seed=7)
    full["text_encoder"].text_projection.weight.data = torch.eye(32)
    for name in set(gone) - {"text_encoder_3"}:
        for parameter in full[name].parameters():
            parameter.data.zero_()
    if "text_encoder_3" in gone:
        full.modules["text_encoder_3"] = full.modules["tokenizer_3"] = None
    pipeline = bench.family.pipeline(full)
    length = 256 if "text_encoder_3" in gone else 24
    tokens, _, pooled, _ = pipeline.encode_prompt(
        "a red cat", None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )
    text = bench.family.encode_text(parts, ["a red cat"])
    torch.testing.assert_close(text.tokens_BLD, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.pooled_BD, pooled, rtol=0, atol=1e-6)


def test_sd3_without_any_text_encoder(benches, tmp_path):
    """As Stability AI published its larger ones: the transformer and the VAE."""
    bench = with_tokenizers(benches("sd3"), tmp_path)
    path = tmp_path / "sd3.5_large.safetensors"
    save_file(bench.whole("transformer", "vae"), path)
    message = r"holds no text_encoder, text_encoder_2, text_encoder_3, which sd3 needs"
    for only in ((), ("text",)):
        with pytest.raises(ModelError, match=message):
            bench.family.load(str(path), only=only)
    save_file(bench.tensors("text_encoder_3", number=-1), tmp_path / "t5.safetensors")
    assert "text_encoder_3" in bench.family.load(f"{path}+{tmp_path / 't5.safetensors'}", only=("text",))


def test_hashes_tell_which_text_encoders_are_there(benches, tmp_path):
    bench = with_tokenizers(benches("sd3"), tmp_path)
    found = set()
    for which in ("l", "lg", "lgt"):
        path = tmp_path / f"{which}.safetensors"
        save_file(bench.whole("transformer", "vae", *(ENCODERS[letter] for letter in which)), path)
        found.add(weights_hash(bench.family, str(path), "text"))
    assert len(found) == 3


# ---- at full size ----

SIZES = {
    ("sdxl", ""): {
        "unet": (1680, 2_567_463_684), "vae": (248, 83_653_863), "text_encoder": (196, 123_060_480), "text_encoder_2": (517, 694_659_840),
    },
    ("flux", "dev"): {"transformer": (1160, 11_901_408_320), "vae": (244, 83_819_683), "text_encoder_2": (219, 4_762_310_656)},
    ("flux", "schnell"): {"transformer": (1156, 11_891_178_560)},
    ("sd3", "medium"): {"transformer": (683, 2_084_951_104), "text_encoder_2": (517, 694_659_840), "text_encoder_3": (219, 4_762_310_656)},
    ("sd3", "35_medium"): {"transformer": (909, 2_469_663_936)},
    ("sd3", "35_large"): {"transformer": (1227, 8_146_280_768)},
}  # fmt: skip


@pytest.fixture(params=SIZES, ids=" ".join)
def published(request):
    """A family and one of the sizes in which it was published."""
    return registry.get(request.param[0]), request.param[1], SIZES[request.param]


def spelled(family, component: str, variant: str, number: int = 0) -> dict[str, tuple[int, ...]]:
    """Key -> shape, as a file has them."""
    _, _, table = tables(type(family), component, variant)[number]
    return {original.key: original.shape(shape) for original, shape in table.values()}


def test_every_published_size_is_told_from_its_keys(published, tmp_path):
    """Nothing missing, nothing left over: all modules built without memory, from a file whose gigabytes are a hole."""
    family, variant, sizes = published
    keys = {key: shape for component in sizes for key, shape in spelled(family, component, variant).items()}
    checkpoint = Checkpoint(family, write_header(tmp_path / "published.safetensors", keys))
    assert checkpoint.variant == variant
    assert checkpoint.held == set(sizes)
    for component, expected in sizes.items():
        table = checkpoint.tables[component]
        once = {original: shape for original, shape in table.values()}  # tied weights count once
        assert (len(once), sum(torch.Size(shape).numel() for shape in once.values())) == expected, component
    facts = family.facts({name: checkpoint.config(name) for name in (family.denoiser_name, "vae")})
    assert (facts["latent_stride"], facts["default_size"]) == (8, 1024)
    if family.name == "flux":
        assert facts["text_tokens"] == {"dev": 512, "schnell": 256}[variant]
        assert checkpoint.scheduler_config()["use_dynamic_shifting"] == (variant == "dev")
    last = list(spelled(family, family.denoiser_name, variant))[-1]
    with pytest.raises(ModelError, match=rf"lacks weights of {family.denoiser_name}: {re.escape(last)}\."):
        Checkpoint(family, write_header(tmp_path / "published.safetensors", {k: s for k, s in keys.items() if k != last}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_listing_of_a_published_file(name, tmp_path):
    """Keys and shapes of the all-in-one files that are about: ours are those, but for what is said to be without use."""
    keys = listing(name)
    checkpoint = Checkpoint(registry.get(name), write_header(tmp_path / "published.safetensors", keys))
    assert checkpoint.held == set(registry.get(name).original)
    expected = {original.key: original.shape(shape) for table in checkpoint.tables.values() for original, shape in table.values()}
    without_use = {key for key in keys if key not in expected}
    assert expected == {key: shape for key, shape in keys.items() if key not in without_use}
    assert without_use == {
        "sdxl": set(),
        "flux": set(),
        "sd3": {
            "model.model_sampling.sigmas", "text_encoders.clip_l.transformer.text_projection.weight",
            *(f"text_encoders.{encoder}.logit_scale" for encoder in ("clip_l", "clip_g", "t5xxl")),
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), [size for size in SIZES if size[0] != "sdxl"])
def test_every_row_goes_where_diffusers_puts_it(name, variant):
    """Each row of each weight, at full size, carries its own number through our spelling and back through diffusers' converter."""
    from diffusers.loaders import single_file_utils as theirs

    family = registry.get(name)
    config = own_config(family, "transformer", variant)
    shapes = {key: tensor.shape for key, tensor in empty(family, "transformer", config).state_dict().items()}
    rows, start = {}, 0
    for key, shape in shapes.items():  # the second dimension is one wide
        rows[key] = torch.arange(start, start + shape[0], dtype=torch.int32).view(-1, *[1] * (len(shape) - 1))
        start += shape[0]
    stored = original_tensors(family, "transformer", rows, config)
    theirs_of = {
        "flux": theirs.convert_flux_transformer_checkpoint_to_diffusers,
        "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    }
    converted = theirs_of[name](stored)
    assert converted.keys() == rows.keys()
    assert [key for key in rows if not torch.equal(converted[key], rows[key])] == []


def test_sdxl_is_read_as_diffusers_reads_it(checkpoint, tiny_parts):
    """The spelling is checked from the other side: diffusers' converters, on the same file, give the same weights."""
    from diffusers.loaders import single_file_utils as theirs

    tensors = load_file(checkpoint())
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), tiny_parts["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), tiny_parts["vae"].config),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": theirs.convert_open_clip_checkpoint(
            tiny_parts["text_encoder_2"], dict(tensors), "conditioner.embedders.1.model."
        ),
    }
    for name, converted in found.items():
        ours = tiny_parts[name].state_dict()
        converted = {key if key in ours else key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
        assert converted.keys() == ours.keys()
        for key, tensor in converted.items():
            assert torch.equal(tensor, ours[key]), key


def test_sdxl_at_full_size_fits_diffusers_converters():
    from diffusers.loaders import single_file_utils as theirs

    family, tensors = Sdxl(), {key: torch.empty(shape, device="meta") for key, shape in listing("sdxl").items()}
    for name, convert in (("unet", theirs.convert_ldm_unet_checkpoint), ("vae", theirs.convert_ldm_vae_checkpoint)):
        network = empty(family, name, own_config(family, name))
        assert {key: t.shape for key, t in convert(dict(tensors), network.config).items()} == {
            key: tensor.shape for key, tensor in network.state_dict().items()
        }


def test_memory_holds_a_transformer_once(benches, tmp_path):
    """The most that a process takes while it reads a file of 96 MiB, with joined weights, to 96 MiB of bfloat16."""
    status, limits = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not limits.exists():
        pytest.skip("needs Linux's /proc")

    def memory(kind: str) -> int:
        return int(re.search(rf"^{kind}:\s+(\d+) kB", status.read_text(), re.M)[1]) >> 10

    bench = benches("flux")
    folder = Path(shutil.copytree(bench.folder, tmp_path / "base"))
    config = folder / "transformer" / "config.json"
    wide = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 72, "attention_head_dim": 16}
    config.write_text(json.dumps(json.loads(config.read_text()) | wide))
    family = type("WideFlux", (Flux,), {"configs": folder, "variants": ("",)})()
    path = write_header(tmp_path / "wide.safetensors", spelled(family, "transformer", ""), dtype="BF16")
    size = path.stat().st_size >> 20
    assert 90 < size < 400
    limits.write_text("5")  # forgets the peak
    before = memory("VmRSS")
    transformer = family.load(str(path), only=("denoiser",), dtype=torch.bfloat16).denoiser
    peak = memory("VmHWM") - before
    assert sum(parameter.numel() for parameter in transformer.parameters()) > 45 << 20
    assert peak < 2.4 * size, f"{peak} MiB for {size} MiB: the file's own pages count once, and the system may drop them"


# ---- what is wrong with a file ----


def test_leftover_and_missing_keys_are_named(checkpoint, small_family):
    with pytest.raises(ModelError, match=r"no place for: model\.diffusion_model\.input_blocks\.0\.0\.more"):
        small_family.load(str(checkpoint({"model.diffusion_model.input_blocks.0.0.more": torch.ones(1)})))
    for component, key in (
        ("vae", "first_stage_model.decoder.conv_in.bias"),
        ("text_encoder_2", "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"),
    ):
        with pytest.raises(ModelError, match=rf"lacks weights of {component}: {key}\."):
            small_family.load(str(checkpoint({key: None})), only=("denoiser",))
    with pytest.raises(ModelError, match=r"not a sdxl of the usual size: model\.diffusion_model\.out\.2\.bias \(5,\) instead of \(4,\)"):
        small_family.load(str(checkpoint({"model.diffusion_model.out.2.bias": torch.ones(5)})))


@pytest.mark.parametrize("name", FAMILIES)
def test_another_size_is_named(name, benches, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(benches(name).whole(), path)
    with pytest.raises(ModelError, match=rf"is not a {name} of the usual size: .* instead of "):
        registry.get(name).load(str(path), only=())


def test_a_missing_last_layer_that_has_no_effect(tmp_path):
    """Some published files leave out the last layer of SDXL's first encoder, whose penultimate states alone are used."""
    clip_l = "conditioner.embedders.0.transformer.text_model."
    keys = listing("sdxl")
    unused = [key for key in keys if key.startswith((clip_l + "encoder.layers.11.", clip_l + "final_layer_norm."))]
    assert len(unused) == 18
    path = write_header(tmp_path / "sdxl.safetensors", {key: shape for key, shape in keys.items() if key not in unused})
    encoder = Checkpoint(Sdxl(), path).load("text_encoder", torch.float16)
    assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_v_prediction_and_zero_snr(checkpoint, small_family):
    empty = torch.empty(0)

    def process(changes=None, metadata=None):
        return small_family.process(small_family.load(str(checkpoint(changes, metadata)), only=("vae",)))

    assert (process().prediction, process().zero_snr) == ("epsilon", False)
    assert process({"v_pred": empty}).prediction == "v_prediction"
    assert not process({"v_pred": empty}).zero_snr
    both = process({"v_pred": empty, "ztsnr": empty})
    assert (both.prediction, both.zero_snr) == ("v_prediction", True)
    assert process(metadata={"modelspec.prediction_type": "v"}).prediction == "v_prediction"
    with pytest.raises(ModelError, match=r"marked `ztsnr` but not `v_pred`"):
        process({"ztsnr": empty})


UNET_IN, CLIP_G_IN = "model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.token_embedding.weight"
SD_UNET = {UNET_IN: (320, 4, 3, 3), "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1)}
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (3072, 64), "guidance_in.in_layer.bias": (3072,)}
SD3 = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,), "pos_embed": (1, 36864, 1536)}
BLOCK = "double_blocks.0.img_attn.qkv."
FOREIGN = {
    "Stable Diffusion 1": SD_UNET | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)},
    "Stable Diffusion 2": SD_UNET | {"cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (1024,)},
    "SDXL inpainting": {UNET_IN: (320, 9, 3, 3), CLIP_G_IN: (49408, 1280)},
    "EDM's formulation": {UNET_IN: (320, 4, 3, 3), CLIP_G_IN: (49408, 1280), "edm_mean": (4,)},
    "xl_refiner": {UNET_IN: (384, 4, 3, 3), "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)},
    "is FLUX.1 Fill": FLUX | {"img_in.weight": (3072, 384)},
    "is FLUX.1 Canny or Depth": FLUX | {"img_in.weight": (3072, 128)},
    "is FLUX.1 Redux": {"redux_up.weight": (12288, 1152), "redux_down.weight": (4096, 12288)},
    "calls chroma": FLUX | {"distilled_guidance_layer.in_proj.bias": (5120,)},
    "calls flux-2-dev": FLUX | {"single_stream_modulation.lin.weight": (18432, 6144)},
    "is a ControlNet": {"controlnet_blocks.0.weight": (3072, 3072), "transformer_blocks.0.attn.to_q.weight": (3072, 3072)},
    "is an IP-Adapter": {"ip_adapter_proj_model.proj.weight": (16384, 768)},
    "scaled fp8: the scales": FLUX | {BLOCK + "weight": (9216, 3072), BLOCK + "scale_weight": ()},
    "scaled fp8:": FLUX | {"scaled_fp8": (0,)},
    "bitsandbytes .NF4, as Forge has it.: take the bf16": FLUX | {BLOCK + "weight.quant_state.bitsandbytes__nf4": (80,)},
    "nunchaku .SVDQuant.: take": {"transformer_blocks.0.qkv_proj.qweight": (9216, 1536)},
    "T5 in llama.cpp's spelling: take t5xxl_fp16": {"enc.blk.0.attn_q.weight": (4096, 4096)},
    "a denoiser in diffusers' spelling": {"transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072), "proj_out.weight": (64, 3072)},
    "is not recognised": {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)},
    "is a LoRA: it is not a base model; give it as lora=": {"lora_unet_a.lora_down.weight": (4, 8), "lora_unet_a.lora_up.weight": (8, 4)},
    "a UNet without its text encoders": SD_UNET,
    "a denoiser in diffusers' spelling without": {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.norm1.weight": (320,)},
    "not recognised .it holds a.weight, b.weight": {"a.weight": (3, 3), "b.weight": (3,)},
    "no tensors": {},
    "not recognised": {UNET_IN: (3,), "cond_stage_model.x": (3,)},
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_other_files_are_refused_by_name(what, tmp_path):
    path = write_header(tmp_path / "other.safetensors", FOREIGN[what])
    for name in FAMILIES:
        with pytest.raises(ModelError, match=what):
            registry.get(name).load(str(path), only=("denoiser",))
    assert layouts.identify(layouts.read_header(path)) not in registry.FAMILIES


@pytest.mark.parametrize(("shapes", "what"), [(FLUX, "flux"), (SD3, "sd3"), ({UNET_IN: (320, 4, 3, 3), CLIP_G_IN: (49408, 1280)}, "sdxl")])
def test_another_family_is_named(shapes, what, tmp_path):
    path = write_header(tmp_path / "other.safetensors", shapes)
    for name in set(FAMILIES) - {what}:
        with pytest.raises(ModelError, match=rf"other\.safetensors is {what}, not {name}"):
            registry.get(name).load(str(path), only=("denoiser",))


def test_kontext_is_known_by_its_own_word_alone(tmp_path):
    said = {"modelspec.architecture": "flux-1-kontext-dev"}
    with pytest.raises(ModelError, match=r"is FLUX\.1 Kontext, not flux"):
        Flux().load(str(write_header(tmp_path / "kontext.safetensors", FLUX, said)), only=("denoiser",))


def test_a_broken_file(checkpoint, small_family):
    whole = checkpoint().read_bytes()
    for part in (
        b"",
        whole[:5],
        whole[:5000],
        whole[:-1],
        whole + b"x",
        (1 << 60).to_bytes(8, "little") + whole[8:],
        b"\2" + bytes(7) + b"[]",
    ):
        path = checkpoint()
        path.write_bytes(part)
        with pytest.raises(ModelError, match=r"base\.safetensors is not a whole \.safetensors file"):
            small_family.load(str(path))


# ---- tokenizers ----


def test_clip_tokenizers(tmp_path, checkpoint, small_family, tiny_folder, offline_hub):
    path = checkpoint()
    (tmp_path / "tokenizer").unlink()
    with pytest.raises(
        ModelError,
        match=r"comes without its tokenizers\. Put a CLIP .* beside.*hf download openai/clip-vit-large-patch14",
    ):
        small_family.load(str(path))
    assert "unet" in small_family.load(str(path), only=("denoiser", "vae"))

    for given in (tiny_folder, tiny_folder / "tokenizer"):  # a whole base, or one tokenizer for both
        parts = small_family.load(str(path), tokenizer=str(given))
        assert (parts["tokenizer"].pad_token, parts["tokenizer_2"].pad_token) == ("<|endoftext|>", "!")
        assert parts["tokenizer"].model_max_length == 77
    with pytest.raises(ModelError, match=r"tokenizer=.*vae holds no tokenizer that is wanted"):
        small_family.load(str(path), tokenizer=str(tiny_folder / "vae"))
    with pytest.raises(ModelError, match=r"tokenizer=/no/where is not a folder"):
        small_family.load(str(path), tokenizer="/no/where")
    with pytest.raises(ModelError, match=r"tokenizer=.* has no effect: no text encoder is loaded"):
        small_family.load(str(path), only=("vae",), tokenizer=str(tiny_folder))
    with pytest.raises(ModelError, match=r"tokenizer=.* has no effect: .* has its own"):
        Sdxl().load(str(tiny_folder), tokenizer=str(tiny_folder))

    old = tmp_path / "old-style"
    old.mkdir()
    model = json.loads((tiny_folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    cache_snapshot(offline_hub, "openai/clip-vit-large-patch14", old, "vocab.json", "merges.txt")
    cached = small_family.load(str(path))
    for caption in ("a photo of a man, smiling!", "xyzzy"):
        assert cached["tokenizer"](caption).input_ids == parts["tokenizer"](caption).input_ids


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_t5_tokenizers(name, benches, tmp_path, offline_hub):
    bench = benches(name)
    third = {"flux": "tokenizer_2", "sd3": "tokenizer_3"}[name]
    path = tmp_path / "base.safetensors"
    save_file(bench.whole(), path)
    shutil.copytree(bench.folder / "tokenizer", tmp_path / "tokenizer")
    for only in ((), ("text",)):
        with pytest.raises(ModelError, match=r"comes without its tokenizers\. Put a T5 .* or give tokenizer=.* network: hf"):
            bench.family.load(str(path), only=only)
    other = benches({"flux": "sd3", "sd3": "flux"}[name]).folder  # of another family's base: it is the same vocabulary
    for given in (bench.folder, bench.folder / third, other):
        parts = bench.family.load(str(path), only=("text",), tokenizer=str(given))
        for tokenizer in (given.name.startswith("tiny") and "tokenizer", third):
            if tokenizer:
                assert parts[tokenizer]("a red cat").input_ids == bench.parts[tokenizer]("a red cat").input_ids
        assert parts[third].model_max_length == 24
    before = weights_hash(bench.family, str(path), "text", tokenizer=str(bench.folder))
    cache_snapshot(offline_hub, "black-forest-labs/FLUX.1-schnell", benches("flux").folder, "tokenizer_2")
    assert bench.family.load(str(path), only=("text",))[third]("a red cat").input_ids == bench.parts[third]("a red cat").input_ids
    assert weights_hash(bench.family, str(path), "text") == before


# ---- hashes ----


def test_weights_hash_of_a_single_file(checkpoint, small_family):
    path = str(checkpoint())
    before = {name: weights_hash(small_family, path, name) for name in ALL}
    vae = "first_stage_model.decoder.conv_in.bias"
    other = str(checkpoint({vae: torch.ones(4)}, name="other.safetensors"))
    after = {name: weights_hash(small_family, other, name) for name in ALL}
    assert [name for name in ALL if after[name] != before[name]] == ["vae"]


def test_a_part_of_a_whole_file_has_the_hash_of_its_own_file(benches, tmp_path):
    bench = with_tokenizers(benches("flux"), tmp_path)
    save_file(bench.whole(), tmp_path / "whole.safetensors")
    save_file(bench.whole("transformer"), tmp_path / "transformer.safetensors")
    save_file(bench.tensors("vae", number=-1), tmp_path / "ae.safetensors")
    for component in ("text_encoder", "text_encoder_2"):
        save_file(bench.tensors(component, number=-1), tmp_path / f"{component}.safetensors")
    apart = "+".join(str(tmp_path / f"{name}.safetensors") for name in ("transformer", "ae", "text_encoder", "text_encoder_2"))
    for group in ALL:
        assert weights_hash(bench.family, apart, group) == weights_hash(bench.family, str(tmp_path / "whole.safetensors"), group)


def test_safe_open_agrees_with_our_header(checkpoint):
    path = checkpoint(metadata={"a": "b"})
    header = layouts.read_header(path)
    assert header.metadata == {"a": "b"}
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.shapes)
        key = "first_stage_model.decoder.conv_in.bias"
        start, end = header.offsets[key]
        assert file.get_tensor(key).numpy().tobytes() == path.read_bytes()[start:end]
