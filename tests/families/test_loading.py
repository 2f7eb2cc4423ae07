"""Loading: every form of a base gives the same networks, and whatever is wrong with one is said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.errors import ModelError
from charforgex.families import layouts, sgm
from charforgex.families.base import ALL
from charforgex.families.loading import weights_hash
from charforgex.families.parts import build, read_config
from charforgex.families.sdxl import Sdxl
from charforgex.families.single_file import Checkpoint
from charforgex.types import Crop

FAMILY = Sdxl()
KEYS = json.loads((Path(__file__).parent / "keys" / "sdxl.json").read_text())


def same_networks(one, two) -> None:
    assert one.networks().keys() == two.networks().keys()
    for name, network in one.networks().items():
        ours, theirs = network.state_dict(), two[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def write_header(path: Path, shapes, metadata=None, dtype: str = "F16") -> Path:
    """A safetensors file of these shapes whose data is a hole: gigabytes that take no space."""
    table, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(torch.Size(shape).numel())
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.fixture
def folder(tmp_path, tiny_folder) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- folders ----


def test_folder_gives_back_what_was_saved(tiny_folder, tiny_parts):
    parts = FAMILY.load(str(tiny_folder))
    same_networks(parts, tiny_parts)
    assert parts.config == {"force_zeros_for_empty_prompt": True, "latent_stride": 8, "pixel_multiple": 16, "default_size": 64}
    assert parts.config == tiny_parts.config
    assert parts["scheduler"].config.beta_end == 0.012
    for caption in ("a red cat!", "\N{SNOWMAN} zzz", ""):
        one, two = FAMILY.encode_text(parts, [caption]), FAMILY.encode_text(tiny_parts, [caption])
        assert torch.equal(one.tokens_BLD, two.tokens_BLD)
        assert torch.equal(one.pooled_BD, two.pooled_BD)
    for network in parts.networks().values():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_only_what_is_asked_for_is_read(folder):
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
    parts = FAMILY.load(str(folder), only=("vae",))
    assert set(parts.modules) == {"vae", "scheduler"}
    assert (FAMILY.latent_stride(parts), FAMILY.pixel_multiple(parts), FAMILY.default_size(parts)) == (8, 16, 64)
    with pytest.raises(ModelError, match=r"unet holds no weights"):
        FAMILY.load(str(folder), only=("denoiser",))


@pytest.mark.parametrize("source", ["folder", "file"])
def test_dtypes(source, tiny_folder, checkpoint, small_family):
    path = str(tiny_folder if source == "folder" else checkpoint())
    for dtype in (torch.bfloat16, torch.float16):
        parts = small_family.load(path, dtype=dtype)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            assert {parameter.dtype for parameter in parts[name].parameters()} == {dtype}
        # this VAE says force_upcast, as the stock one: it overflows in float16 and does well in bfloat16
        assert parts["vae"].config.force_upcast
        assert parts["vae"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
        pixels = torch.zeros(1, 3, 16, 16)
        assert FAMILY.decode_latents(parts, FAMILY.encode_pixels(parts, pixels)[0].to(dtype)).shape == pixels.shape


def test_a_vae_that_bears_float16_is_loaded_so(folder):
    edit_json(folder / "vae" / "config.json", force_upcast=False)
    assert FAMILY.load(str(folder), only=("vae",), dtype=torch.float16)["vae"].dtype == torch.float16


def test_variants(folder, tiny_parts):
    for file in list(folder.glob("*/*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    same_networks(FAMILY.load(str(folder)), tiny_parts)


def test_the_plain_weights_of_a_folder_are_preferred_to_a_variant(folder, tiny_parts):
    for file in list(folder.glob("*/*.safetensors")):
        save_file(
            {key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, file.with_name(f"{file.stem}.fp16.safetensors")
        )
    same_networks(FAMILY.load(str(folder)), tiny_parts)


def test_shards(folder, tiny_parts):
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    tiny_parts["unet"].save_pretrained(folder / "unet", max_shard_size="60KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    same_networks(FAMILY.load(str(folder)), tiny_parts)
    before = weights_hash(FAMILY, str(folder), "denoiser")
    rewrite(shards[-1], lambda tensors: next(iter(tensors.values())).add_(1))
    assert weights_hash(FAMILY, str(folder), "denoiser") != before
    shards[0].unlink()
    with pytest.raises(ModelError, match=rf"lacks {shards[0].name}"):
        FAMILY.load(str(folder))


def test_v_prediction_and_zero_snr_of_a_folder(folder):
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    process = FAMILY.process(FAMILY.load(str(folder), only=("vae",)))
    assert (process.prediction, process.zero_snr) == ("v_prediction", True)


def break_pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def break_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


BROKEN = {
    "pickled": (break_pickled, r"only as diffusion_pytorch_model\.bin.*safe_serialization=True"),
    "no index": (break_index, r"has no model_index\.json"),
    "index is no JSON": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json cannot be read"),
    "other family": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        r"holds a FluxPipeline, not a base of family sdxl \(StableDiffusionXLPipeline",
    ),
    "no component": (lambda f: shutil.rmtree(f / "text_encoder_2"), r"has no folder text_encoder_2"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json cannot be read"),
    "no tokenizer files": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"base/tokenizer holds no vocabulary"),
    "cut off": (
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
            (f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:-100]
        ),
        r"diffusion_pytorch_model\.safetensors is not a whole \.safetensors file",
    ),
    "text instead of weights": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"is not a whole \.safetensors file",
    ),
    "key missing": (
        lambda f: rewrite(f / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("conv_in.bias")),
        r"unet of .* lacks the weights conv_in\.bias",
    ),
    "key left over": (
        lambda f: rewrite(f / "vae" / "diffusion_pytorch_model.safetensors", lambda t: t.update({"encoder.more": torch.ones(1)})),
        r"vae of .* has no place for the weights encoder\.more",
    ),
    "text key missing": (
        lambda f: rewrite(f / "text_encoder_2" / "model.safetensors", lambda t: t.pop("text_projection.weight")),
        r"text_encoder_2 of .* lacks the weights text_projection\.weight",
    ),
    "other shape": (
        lambda f: rewrite(f / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t.update({"conv_in.bias": torch.ones(5)})),
        r"unet of .*conv_in\.bias",
    ),
    "flow scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}'),
        r"has no prediction_type",
    ),
    "unknown scheduler": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="os"),
        r"scheduler 'os' .* is not one that diffusers has",
    ),
    "foreign tokenizer": (
        lambda f: (
            edit_json(f / "text_encoder" / "config.json", vocab_size=600)
            or rewrite(
                f / "text_encoder" / "model.safetensors",
                lambda t: t.update({key: tensor[:600].clone() for key, tensor in t.items() if "token_embedding" in key}),
            )
        ),
        r"667 tokens, text_encoder .* knows 600",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_folders(how, folder):
    breaking, message = BROKEN[how]
    breaking(folder)
    with pytest.raises(ModelError, match=message):
        FAMILY.load(str(folder))


# ---- addresses ----


def test_the_embedded_base():
    """It is an ordinary diffusers folder in float16, and its parts fit together."""
    parts = FAMILY.load("charworld")
    assert {name for name in parts.modules} == {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    size, stride = FAMILY.default_size(parts), FAMILY.latent_stride(parts)
    assert size % FAMILY.pixel_multiple(parts) == 0
    with torch.no_grad():
        latents = torch.zeros(1, 4, size // stride, size // stride)
        text = FAMILY.encode_text(parts, ["a man with red hair"])
        prediction = FAMILY.denoise(parts.denoiser, latents, torch.ones(1), text, Crop.whole(1, size, size))
    assert prediction.shape == latents.shape
    assert prediction.isfinite().all()
    assert FAMILY.decode_latents(parts, latents).shape == (1, 3, size, size)


def test_what_does_not_exist(tmp_path, tiny_folder):
    (tmp_path / "dreamy-sdxl").mkdir()
    with pytest.raises(ModelError, match=r"does not exist\. Near it: .*dreamy-sdxl\. A diffusers folder"):
        FAMILY.load(str(tmp_path / "dreamy-sdlx"))
    with pytest.raises(ModelError, match=r"There is no folder .*nowhere/at\."):
        FAMILY.load(str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(ModelError, match=r"dreamy-sdxl is not a diffusers folder"):
        FAMILY.load(str(tmp_path / "dreamy-sdxl"))
    shutil.copy(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "dreamy-sdxl" / "dreamy.safetensors")
    with pytest.raises(ModelError, match=r"Did you mean the checkpoint .*dreamy\.safetensors\?"):
        FAMILY.load(str(tmp_path / "dreamy-sdxl"))
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"old\.ckpt is a pickled checkpoint, which can run code"):
        FAMILY.load(str(tmp_path / "old.ckpt"))
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"notes\.txt is not a \.safetensors checkpoint"):
        FAMILY.load(str(tmp_path / "notes.txt"))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's cache in a folder of the test, and no network. Returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_snapshot(hub: Path, repo: str, source: Path, *names: str) -> Path:
    home = hub / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in names:
        target = snapshot / name
        shutil.copytree(source / name, target) if (source / name).is_dir() else shutil.copy(source / name, target)
    return snapshot


def test_hub_offline(offline_hub, tiny_folder, tiny_parts):
    with pytest.raises(ModelError, match=r"source=some/base is no local path and not in the hub's local cache, and HF_HUB_OFFLINE is set"):
        FAMILY.load("some/base")
    snapshot = cache_snapshot(offline_hub, "some/base", tiny_folder, *(entry.name for entry in tiny_folder.iterdir()))
    same_networks(FAMILY.load("some/base"), tiny_parts)
    shutil.rmtree(snapshot / "text_encoder")
    assert "vae" in FAMILY.load("some/base", only=("vae",))
    with pytest.raises(ModelError, match=r"local cache without text_encoder, and HF_HUB_OFFLINE is set"):
        FAMILY.load("some/base")


def test_hub_downloads_only_what_is_needed(tiny_folder):
    from charforgex.families.sources import _wanted

    names = [str(file.relative_to(tiny_folder)) for file in tiny_folder.rglob("*") if file.is_file()]
    names += ["sd_xl_base.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"]
    names += [f"vae/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names += ["vae/diffusion_pytorch_model.safetensors.index.fp16.json", "vae/model.onnx", "README.md"]
    wanted = set(_wanted("some/base", names, ["unet", "vae", "tokenizer", "scheduler"]))
    assert {name for name in wanted if not name.endswith(".json")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        *(f"vae/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
    }
    assert {"model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} <= wanted
    assert "vae/diffusion_pytorch_model.safetensors.index.fp16.json" in wanted
    with pytest.raises(ModelError, match=r"some/base has no model_index\.json"):
        _wanted("some/base", ["sd_xl_base.safetensors"], ["unet"])


def test_tiny_by_name():
    parts = FAMILY.load("tiny", only=("denoiser",), dtype=torch.bfloat16)
    assert set(parts.modules) == {"unet", "scheduler"}
    assert parts.denoiser.dtype == torch.bfloat16


# ---- single files ----


def test_single_file_gives_the_same_networks(checkpoint, small_family, tiny_parts, tmp_path):
    path = checkpoint(
        {"conditioner.embedders.1.model.logit_scale": torch.ones(()), "model_ema.decay": torch.ones(()), "betas": torch.ones(3)}
    )
    parts = small_family.load(str(path))
    same_networks(parts, tiny_parts)
    one, two = (small_family.encode_text(some, ["a red cat!", ""]) for some in (parts, tiny_parts))
    torch.testing.assert_close(one.tokens_BLD, two.tokens_BLD, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.pooled_BD, two.pooled_BD, rtol=0, atol=1e-6)
    sizes = {"noisy": torch.ones(2, 4, 4, 4), "t_B": torch.tensor([0.2, 0.9]), "text": two, "crop": Crop.whole(2, 32, 32)}
    torch.testing.assert_close(
        small_family.denoise(parts["unet"], **sizes), small_family.denoise(tiny_parts["unet"], **sizes), rtol=0, atol=1e-6
    )
    assert parts.config == tiny_parts.config
    assert (parts["tokenizer"].pad_token, parts["tokenizer_2"].pad_token) == ("<|endoftext|>", "!")
    assert set(small_family.load(str(path), only=("vae",)).modules) == {"vae", "scheduler"}
    small_family.pipeline(parts).save_pretrained(tmp_path / "folder")
    same_networks(FAMILY.load(str(tmp_path / "folder")), tiny_parts)


def test_single_file_is_read_as_diffusers_reads_it(checkpoint, tiny_parts):
    """The spelling is checked from the other side: diffusers' converters, on the same file, give the same weights."""
    from diffusers.loaders import single_file_utils as theirs

    tensors = load_file(checkpoint())
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), tiny_parts["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), tiny_parts["vae"].config),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": theirs.convert_open_clip_checkpoint(tiny_parts["text_encoder_2"], dict(tensors), sgm.CLIP_G),
    }
    for name, converted in found.items():
        ours = tiny_parts[name].state_dict()
        converted = {key if key in ours else key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
        assert converted.keys() == ours.keys()
        for key, tensor in converted.items():
            assert torch.equal(tensor, ours[key]), key


def test_full_size_keys_and_shapes(tmp_path):
    """Our configs and spelling against the listing of the published SDXL checkpoints: nothing missing, nothing left over."""
    path = write_header(tmp_path / "sdxl.safetensors", KEYS)
    checkpoint = Checkpoint(FAMILY, path)
    expected = {original.key: original.shape(shape) for table in checkpoint.originals.values() for original, shape in table.values()}
    assert expected == {key: tuple(shape) for key, shape in KEYS.items()}
    assert {name: len(table) for name, table in checkpoint.originals.items()} == {
        "unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517,
    }  # fmt: skip
    parameters = {name: sum(torch.Size(shape).numel() for _, shape in table.values()) for name, table in checkpoint.originals.items()}
    assert parameters == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


def test_full_size_converters_of_diffusers_agree():
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_utils as theirs

    tensors = {key: torch.empty(shape, device="meta") for key, shape in KEYS.items()}
    assert theirs.infer_diffusers_model_type(tensors) == "xl_base"
    with init_empty_weights():
        networks = {name: build(FAMILY, name, read_config(FAMILY.configs, name)) for name in ("unet", "vae")}
    for name, convert in (("unet", theirs.convert_ldm_unet_checkpoint), ("vae", theirs.convert_ldm_vae_checkpoint)):
        converted = convert(dict(tensors), networks[name].config)
        assert {key: tensor.shape for key, tensor in converted.items()} == {
            key: tensor.shape for key, tensor in networks[name].state_dict().items()
        }


def test_leftover_and_missing_keys_are_named(checkpoint, small_family):
    with pytest.raises(ModelError, match=r"no place for: model\.diffusion_model\.input_blocks\.0\.0\.scale_weight"):
        small_family.load(str(checkpoint({"model.diffusion_model.input_blocks.0.0.scale_weight": torch.ones(1)})))
    key = "first_stage_model.decoder.conv_in.bias"
    with pytest.raises(ModelError, match=rf"lacks weights of vae: {key}"):
        small_family.load(str(checkpoint({key: None})))
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    with pytest.raises(ModelError, match=rf"lacks weights of text_encoder_2: {key}\."):
        small_family.load(str(checkpoint({key: None})))
    with pytest.raises(ModelError, match=r"not a sdxl of the usual size: model\.diffusion_model\.out\.2\.bias \(5,\) instead of \(4,\)"):
        small_family.load(str(checkpoint({"model.diffusion_model.out.2.bias": torch.ones(5)})))


def test_a_missing_last_layer_that_has_no_effect(tmp_path):
    """Some published files leave out the last layer of the first encoder, whose penultimate states alone are used."""
    unused = [key for key in KEYS if key.startswith(sgm.CLIP_L + "encoder.layers.11.") or key.startswith(sgm.CLIP_L + "final_layer_norm.")]
    assert len(unused) == 18
    path = write_header(tmp_path / "sdxl.safetensors", {key: shape for key, shape in KEYS.items() if key not in unused})
    encoder = Checkpoint(FAMILY, path).load("text_encoder", torch.float16)
    assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_v_prediction_and_zero_snr_of_a_single_file(checkpoint, small_family):
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
FOREIGN = {
    "Stable Diffusion 1": SD_UNET | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)},
    "Stable Diffusion 2": SD_UNET | {"cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (1024,)},
    "SDXL inpainting": {UNET_IN: (320, 9, 3, 3), CLIP_G_IN: (49408, 1280)},
    "EDM's formulation": {UNET_IN: (320, 4, 3, 3), CLIP_G_IN: (49408, 1280), "edm_mean": (4,)},
    "xl_refiner": {UNET_IN: (384, 4, 3, 3), "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)},
    "flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (3072, 64), "guidance_in.in_layer.bias": (3072,)},
    "sd3": {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,), "pos_embed": (1, 36864, 1536)},
    "is not recognised": {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,)},
    "is a LoRA, not a base": {"lora_unet_down_blocks_0.lora_down.weight": (4, 8), "lora_unet_down_blocks_0.lora_up.weight": (8, 4)},
    "a UNet without its text encoders": SD_UNET,
    "a UNet in diffusers' spelling": {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.norm1.weight": (320,)},
    "not recognised .it holds a.weight, b.weight": {"a.weight": (3, 3), "b.weight": (3,)},
    "no tensors": {},
    "not recognised": {"model.diffusion_model.input_blocks.0.0.weight": (3,), "cond_stage_model.x": (3,)},
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_other_files_are_refused_by_name(what, tmp_path):
    path = write_header(tmp_path / "other.safetensors", FOREIGN[what])
    with pytest.raises(ModelError, match=what):
        FAMILY.load(str(path))
    assert layouts.identify(layouts.read_header(path)) != "sdxl"


def test_a_broken_file(tmp_path, checkpoint):
    path = checkpoint()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"base\.safetensors is not a whole \.safetensors file"):
        FAMILY.load(str(path))


def test_tokenizers_of_a_single_file(tmp_path, checkpoint, small_family, tiny_folder, offline_hub):
    path = checkpoint()
    (tmp_path / "tokenizer").unlink()
    with pytest.raises(
        ModelError, match=r"comes without its tokenizers\. Put a folder `tokenizer`.*hf download openai/clip-vit-large-patch14"
    ):
        small_family.load(str(path))
    assert "unet" in small_family.load(str(path), only=("denoiser", "vae"))

    for given in (tiny_folder, tiny_folder / "tokenizer"):  # a whole base, or one tokenizer for both
        parts = small_family.load(str(path), tokenizer=str(given))
        assert (parts["tokenizer"].pad_token, parts["tokenizer_2"].pad_token) == ("<|endoftext|>", "!")
        assert parts["tokenizer"].model_max_length == 77
    with pytest.raises(ModelError, match=r"tokenizer=.*vae holds no CLIP tokenizer"):
        small_family.load(str(path), tokenizer=str(tiny_folder / "vae"))
    with pytest.raises(ModelError, match=r"tokenizer=/no/where is not a folder"):
        small_family.load(str(path), tokenizer="/no/where")
    with pytest.raises(ModelError, match=r"tokenizer=.* has no effect: no text encoder is loaded"):
        small_family.load(str(path), only=("vae",), tokenizer=str(tiny_folder))
    with pytest.raises(ModelError, match=r"tokenizer=.* has no effect: .* has its own"):
        FAMILY.load(str(tiny_folder), tokenizer=str(tiny_folder))

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


# ---- hashes ----


@pytest.mark.parametrize("group", ALL)
def test_weights_hash_follows_its_own_group_alone(group, folder):
    before = {name: weights_hash(FAMILY, str(folder), name) for name in ALL}
    assert len(set(before.values())) == 3
    component = {"denoiser": "unet", "vae": "vae", "text": "text_encoder_2"}[group]
    edit_json(folder / component / "config.json", note="changed")
    after = {name: weights_hash(FAMILY, str(folder), name) for name in ALL}
    assert [name for name in ALL if after[name] != before[name]] == [group]
    rewrite(next((folder / component).glob("*.safetensors")), lambda tensors: next(iter(tensors.values())).add_(1))
    assert weights_hash(FAMILY, str(folder), group) != after[group]


def test_weights_hash_of_a_single_file(checkpoint, small_family):
    path = str(checkpoint())
    before = {name: weights_hash(small_family, path, name) for name in ALL}
    vae = "first_stage_model.decoder.conv_in.bias"
    other = str(checkpoint({vae: torch.ones(4)}, name="other.safetensors"))
    after = {name: weights_hash(small_family, other, name) for name in ALL}
    assert [name for name in ALL if after[name] != before[name]] == ["vae"]


def test_weights_hash_of_a_copy_is_the_same(folder, tiny_folder):
    for group in ALL:
        assert weights_hash(FAMILY, str(folder), group) == weights_hash(FAMILY, str(tiny_folder), group)


def test_weights_hash_sees_the_tokenizer_and_empty_prompts(folder):
    before = {group: weights_hash(FAMILY, str(folder), group) for group in ALL}
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", pad_token="<|endoftext|>")
    middle = weights_hash(FAMILY, str(folder), "text")
    assert middle != before["text"]
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert weights_hash(FAMILY, str(folder), "text") != middle


def test_weights_hash_of_tiny():
    assert weights_hash(FAMILY, "tiny", "vae") == weights_hash(FAMILY, "tiny", "vae") != weights_hash(FAMILY, "tiny", "text")


def test_nothing_is_read_twice(folder, monkeypatch):
    from charforgex.families import loading

    weights_hash(FAMILY, str(folder), "vae")
    before = loading._file_hash.cache_info().misses
    weights_hash(FAMILY, str(folder), "vae")
    assert loading._file_hash.cache_info().misses == before


def test_safe_open_agrees_with_our_header(checkpoint):
    path = checkpoint(metadata={"a": "b"})
    header = layouts.read_header(path)
    assert header.metadata == {"a": "b"}
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.shapes)
        key = "first_stage_model.decoder.conv_in.bias"
        start, end = header.offsets[key]
        assert file.get_tensor(key).numpy().tobytes() == path.read_bytes()[start:end]
