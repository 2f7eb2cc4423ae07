"""Loading: every form of a base gives the same networks, and whatever is wrong with one is said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.errors import ModelError
from charforgex.families.base import ALL
from charforgex.families.files import file_hash
from charforgex.families.loading import weights_hash
from charforgex.families.sdxl import Sdxl
from charforgex.types import Crop
from tests.families.conftest import cache_snapshot, same_networks

FAMILY = Sdxl()


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


def test_a_sharded_t5(benches, tmp_path):
    bench = benches("flux")
    folder = Path(shutil.copytree(bench.folder, tmp_path / "base"))
    next((folder / "text_encoder_2").glob("*.safetensors")).unlink()
    bench.parts["text_encoder_2"].save_pretrained(folder / "text_encoder_2", max_shard_size="20KB")
    assert len(list((folder / "text_encoder_2").glob("*-of-*.safetensors"))) > 1
    same_networks(bench.family.load(str(folder)), bench.parts)


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


def test_hub_offline(offline_hub, tiny_folder, tiny_parts):
    with pytest.raises(ModelError, match=r"source=some/base is no local path and not in the hub's local cache, and HF_HUB_OFFLINE is set"):
        FAMILY.load("some/base")
    snapshot = cache_snapshot(offline_hub, "some/base", tiny_folder, *(entry.name for entry in tiny_folder.iterdir()))
    same_networks(FAMILY.load("some/base"), tiny_parts)
    shutil.rmtree(snapshot / "text_encoder")
    assert "vae" in FAMILY.load("some/base", only=("vae",))
    with pytest.raises(ModelError, match=r"local cache without text_encoder, and HF_HUB_OFFLINE is set"):
        FAMILY.load("some/base")


def test_hub_offline_without_an_encoder_that_the_base_does_without(offline_hub, benches):
    bench = benches("sd3")
    names = [entry.name for entry in bench.folder.iterdir() if not entry.name.endswith("_3")]
    snapshot = cache_snapshot(offline_hub, "some/sd3", bench.folder, *names)
    with pytest.raises(ModelError, match=r"local cache without tokenizer_3, text_encoder_3"):
        bench.family.load("some/sd3")
    edit_json(snapshot / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert {"text_encoder", "text_encoder_2"} == {name for name in bench.family.load("some/sd3").networks() if "text" in name}


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


def test_nothing_is_read_twice(folder):
    weights_hash(FAMILY, str(folder), "vae")
    before = file_hash.cache_info().misses
    weights_hash(FAMILY, str(folder), "vae")
    assert file_hash.cache_info().misses == before
