"""AnimateDiff's base from a picture base and motion modules, in each form that the two come in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.errors import ModelError
from charforgex.families import bases, layouts, motion_base, sources
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.loading import Base, denoiser_config, weights_hash
from charforgex.families.motion_base import Motion, Pictures
from charforgex.families.single_file import Checkpoint, tables
from charforgex.types import Components, Crop
from tests.families.conftest import cache_snapshot, motion_listing, original_tensors, same_networks, write_header

FAMILY = AnimateDiff()


class Halves:
    """The tiny model, taken apart: a diffusers folder and a single file of each half."""

    def __init__(self, home: Path):
        from diffusers import DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel

        self.parts: Components = FAMILY.tiny(seed=7)
        state = self.parts.denoiser.state_dict()
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=32, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        motion = MotionAdapter(
            block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )  # fmt: skip
        unet.load_state_dict({key: tensor for key, tensor in state.items() if ".motion_modules." not in key})
        motion.load_state_dict({key: tensor for key, tensor in state.items() if ".motion_modules." in key})
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        self.pictures, self.motion = home / "pictures", home / "motion"
        modules = {name: self.parts[name] for name in ("vae", "text_encoder", "tokenizer")}
        StableDiffusionPipeline(
            unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **modules
        ).save_pretrained(self.pictures)
        motion.save_pretrained(self.motion)
        shutil.copytree(self.motion, home / "adapter" / "motion_adapter")
        self.small = (
            type("SmallPictures", (Pictures,), {"configs": self.pictures}),
            type("SmallMotion", (Motion,), {"configs": home / "adapter", "variants": ("",)}),
        )
        self.picture_tensors = {
            key: tensor
            for name, network in (("unet", unet), ("vae", modules["vae"]), ("text_encoder", modules["text_encoder"]))
            for key, tensor in original_tensors(
                Pictures(), name, network.state_dict(), network.config if name != "text_encoder" else {}
            ).items()
        }
        self.motion_tensors = original_tensors(Motion(), "motion_adapter", motion.state_dict(), motion.config)
        second = {
            key.replace("attention_blocks.0.pos", "attention_blocks.1.pos"): t.clone()
            for key, t in self.motion_tensors.items()
            if "pos_encoder" in key
        }
        self.motion_tensors |= second


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Halves:
    return Halves(tmp_path_factory.mktemp("halves"))


@pytest.fixture
def files(halves, tmp_path, monkeypatch):
    """Single files of both halves, of the tiny size, beside a tokenizer."""
    monkeypatch.setattr(AnimateDiff, "halves", halves.small)
    (tmp_path / "tokenizer").symlink_to(halves.pictures / "tokenizer")
    save_file(halves.picture_tensors, tmp_path / "pictures.safetensors")
    save_file(halves.motion_tensors, tmp_path / "motion.safetensors")
    return tmp_path / "pictures.safetensors", tmp_path / "motion.safetensors"


def test_two_folders_are_the_whole_base(halves):
    """The very weights, also those that diffusers makes of the two; the schedule is the motion modules', not the pictures'."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    for source in (f"{halves.pictures}+{halves.motion}", f"{halves.motion}+{halves.pictures}"):
        parts = FAMILY.load(source)
        same_networks(parts, halves.parts)
    assert parts.config.items() >= halves.parts.config.items()
    assert parts["scheduler"].config.beta_schedule == "linear"
    assert parts["scheduler"].config.timestep_spacing == "linspace"
    theirs = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(halves.pictures / "unet"), MotionAdapter.from_pretrained(halves.motion)
    )
    different = {key for key, value in theirs.config.items() if not key.startswith("_") and parts.denoiser.config[key] != value}
    assert different <= {"down_block_types", "up_block_types", "block_out_channels"}, "lists for tuples"
    text, noisy = FAMILY.encode_text(parts, ["a cat"]), torch.ones(1, 4, 3, 4, 4)
    with torch.no_grad():
        ours = FAMILY.denoise(parts.denoiser, noisy, torch.tensor([0.5]), text, Crop.whole(1, 32, 32))
        expected = FAMILY.denoise(theirs.eval(), noisy, torch.tensor([0.5]), text, Crop.whole(1, 32, 32))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in parts.denoiser.parameters())


def test_two_files_are_the_whole_base(halves, files):
    pictures, motion = files
    parts = FAMILY.load(f"{pictures}+{motion}")
    same_networks(parts, halves.parts)
    assert set(FAMILY.load(f"{pictures}+{motion}", only=("vae",)).modules) == {"vae", "scheduler"}
    mixed = FAMILY.load(f"{halves.pictures}+{motion}", only=("denoiser",), dtype=torch.bfloat16)
    assert mixed.denoiser.dtype == torch.bfloat16
    as_diffusers = halves.motion / "diffusion_pytorch_model.safetensors"
    same_networks(FAMILY.load(f"{pictures}+{as_diffusers}"), halves.parts)


def test_pictures_as_they_were_first_motion_listing(halves, tmp_path):
    """Stable Diffusion 1.5's folder: the encoder with its old level and a buffer, the VAE's attention by diffusers' first names."""
    folder = shutil.copytree(halves.pictures, tmp_path / "pictures")
    encoder, vae = folder / "text_encoder" / "model.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(encoder).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, encoder, {"format": "pt"})
    first = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(vae)
    for new, old in first.items():
        assert any(new in key for key in state)
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    save_file(state, vae, {"format": "pt"})
    same_networks(FAMILY.load(f"{folder}+{halves.motion}"), halves.parts)


def test_a_vae_of_its_own_comes_first(halves, files):
    pictures, motion = files
    tensors = {key.removeprefix("first_stage_model."): t + 1 for key, t in halves.picture_tensors.items() if key.startswith("first_stage")}
    alone = pictures.with_name("vae-ft-mse.safetensors")
    save_file(tensors, alone)
    parts = FAMILY.load(f"{alone}+{pictures}+{motion}", only=("vae",))
    for key, tensor in parts["vae"].state_dict().items():
        torch.testing.assert_close(tensor, halves.parts["vae"].state_dict()[key] + 1)


def test_a_whole_folder_is_one_too(halves, tmp_path):
    FAMILY.pipeline(halves.parts).save_pretrained(tmp_path / "whole")
    same_networks(FAMILY.load(str(tmp_path / "whole")), halves.parts)
    with pytest.raises(ModelError, match="motion adds nothing"):
        FAMILY.load(f"{tmp_path / 'whole'}+{halves.motion}")


def test_caches_know_which_motion_modules_a_network_has(halves, tmp_path):
    other = shutil.copytree(halves.motion, tmp_path / "other")
    state = {key: tensor + 1 for key, tensor in FAMILY.load(f"{halves.pictures}+{halves.motion}").denoiser.state_dict().items()}
    save_file({key: tensor for key, tensor in state.items() if "motion_modules" in key}, other / "diffusion_pytorch_model.safetensors")
    sources = (f"{halves.pictures}+{halves.motion}", f"{halves.pictures}+{other}")
    hashes = {group: [weights_hash(FAMILY, source, group) for source in sources] for group in FAMILY.components}
    assert hashes["vae"][0] == hashes["vae"][1] and hashes["text"][0] == hashes["text"][1]
    assert hashes["denoiser"][0] != hashes["denoiser"][1]


def test_halves_alone_and_of_others_are_refused(halves, tmp_path):
    with pytest.raises(ModelError, match=r"holds no motion modules.*pictures\+v3_sd15_mm"):
        FAMILY.load(str(halves.pictures))
    with pytest.raises(ModelError, match="no unet of animatediff"):
        FAMILY.load(str(halves.motion))
    with pytest.raises(ModelError, match="adds nothing"):
        FAMILY.load(f"{halves.pictures}+{halves.motion}+{halves.motion}")

    def changed(half: str, **settings) -> str:
        copies = {name: shutil.copytree(getattr(halves, name), tmp_path / name, dirs_exist_ok=True) for name in ("pictures", "motion")}
        path = copies[half] / ("unet/config.json" if half == "pictures" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return f"{copies['pictures']}+{copies['motion']}"

    for message, half, settings in (
        (r"9 channels \(PIA\)", "motion", {"conv_in_channels": 9}),
        ("motion_norm_num_groups is 4", "motion", {"motion_norm_num_groups": 4}),
        ("resnet_time_scale_shift=scale_shift", "pictures", {"resnet_time_scale_shift": "scale_shift"}),
        ("2 modules a block", "motion", {"motion_layers_per_block": 2}),
        (r"block_out_channels is \[4, 16\]", "motion", {"block_out_channels": [4, 16]}),
    ):
        with pytest.raises(ModelError, match=f"does not go with.*{message}"):
            FAMILY.load(changed(half, **settings))


def test_motion_modules_from_the_hub(halves, offline_hub):
    """They are published as a repository that has nothing else, and no model_index.json."""
    snapshot = cache_snapshot(offline_hub, "some/motion", halves.motion, *(entry.name for entry in halves.motion.iterdir()))
    same_networks(FAMILY.load(f"{halves.pictures}+some/motion"), halves.parts)
    names = ["README.md", "config.json", *(f"diffusion_pytorch_model{end}" for end in (".bin", ".fp16.safetensors", ".safetensors"))]
    assert sources._wanted("some/motion", names, ["unet"], True) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        sources._wanted("some/motion", names, ["unet"])
    (snapshot / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(ModelError, match="holds a ControlNetModel, not the motion modules"):
        FAMILY.load(f"{halves.pictures}+some/motion")


def test_a_config_that_leaves_out_what_is_usual():
    """As diffusers reads it: two layers a block and the blocks of Stable Diffusion."""
    config = motion_base.joined_config({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}, {"use_motion_mid_block": False})
    assert config["layers_per_block"] == 2 and config["num_attention_heads"] == 8 and config["use_motion_mid_block"] is False
    assert config["down_block_types"] == [*["CrossAttnDownBlockMotion"] * 3, "DownBlockMotion"]
    assert config["up_block_types"] == ["UpBlockMotion", *["CrossAttnUpBlockMotion"] * 3]


# ---- published files, by their keys ----

# A module of width c has 22 c^2 + 21 c weights; five are 320 wide, five 640 and ten 1280, with the one in the middle eleven
SIZES = {"v1": (20, 417_137_600), "v2": (21, 453_209_280), "v3": (20, 417_137_600)}


@pytest.mark.parametrize("variant", SIZES)
def test_each_version_of_the_motion_modules_is_told_from_its_keys(variant, tmp_path):
    """Every key has its place, diffusers' own converter says the same of it, and what is missing, left over or of another size is named."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    modules, weights = SIZES[variant]
    keys = motion_listing(variant)
    path = tmp_path / "motion.safetensors"
    checkpoint = Checkpoint(Motion(), write_header(path, keys))
    assert checkpoint.variant == variant
    assert layouts.identify(checkpoint.header) == layouts.MOTION
    frames = {"v1": 24}.get(variant, 32)
    positions = {key: shape for key, shape in keys.items() if key.endswith("pos_encoder.pe")}
    assert len(positions) == 2 * modules and {shape[1] for shape in positions.values()} == {frames}
    assert sum(torch.Size(shape).numel() for key, shape in keys.items() if key not in positions) == weights
    table = {ours: original.key for ours, (original, _) in checkpoint.tables["motion_adapter"].items()}
    converted = convert_animatediff_checkpoint_to_diffusers({key: key for key in keys})
    assert converted == {ours: theirs for ours, theirs in table.items() if "pos_embed" not in ours}
    gone = "up_blocks.3.motion_modules.2.temporal_transformer.transformer_blocks.0.ff_norm.bias"
    for change, message in (
        ({gone: None}, f"lacks weights of motion_adapter: {re.escape(gone)}"),
        ({"down_blocks.0.motion_modules.2.norm": (1,)}, r"no place for: down_blocks\.0\.motion_modules\.2\.norm"),
        ({gone: (5,)}, r"of the usual size: .*ff_norm\.bias \(5,\) instead of \(320,\)"),
    ):
        shapes = {key: shape for key, shape in (keys | change).items() if shape is not None}
        with pytest.raises(ModelError, match=message):
            Checkpoint(Motion(), write_header(path, shapes))


def test_a_published_picture_base_with_published_motion(tmp_path):
    """Stable Diffusion 1.5 in its 1131 tensors. The network of both is the one that LoRA files are known for."""
    keys = {
        original.key: original.shape(shape) for name in Pictures.original for original, shape in tables(Pictures, name, "")[0][2].values()
    }
    counted = {
        name: (len(table), sum(torch.Size(shape).numel() for _, shape in table.values()))
        for name in Pictures.original
        for table in [tables(Pictures, name, "")[0][2]]
    }
    assert counted == {"unet": (686, 859_520_964), "vae": (248, 83_653_863), "text_encoder": (196, 123_060_480)}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    path = write_header(tmp_path / "v1-5-pruned-emaonly.safetensors", keys | {positions: (1, 77)})
    for version in ("v2", "v3"):
        motion = write_header(tmp_path / f"{version}.safetensors", motion_listing(version))
        assert denoiser_config(FAMILY, f"{path}+{motion}") == bases.get(f"animatediff_{version}").config
    base = Base(FAMILY, f"{path}+{motion}", [])
    assert base.facts().items() >= {"latent_stride": 8, "pixel_multiple": 64, "default_size": 512, "max_frames": 32}.items()
    with pytest.raises(ModelError, match="an AnimateDiff motion module, not sdxl"):
        layouts.require(layouts.read_header(motion), "sdxl")
