"""AnimateDiff for SDXL against diffusers' UNetMotionModel and AnimateDiffSDXLPipeline, on the tiny model; its base from its two halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.draws import torch_generator
from charforgex.errors import LoraError, ModelError
from charforgex.families import bases, layouts
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.animatediff_sdxl import AnimateDiffSdxl
from charforgex.families.loading import denoiser_config, weights_hash
from charforgex.families.motion_base import SdxlMotion
from charforgex.families.parts import read_config
from charforgex.families.sdxl import Sdxl
from charforgex.families.single_file import Checkpoint, tables
from charforgex.generation.clips import clip_noise, sample_clip, travel
from charforgex.generation.schedulers import build_scheduler
from charforgex.lora import formats, writing
from charforgex.lora.identify import family_of
from charforgex.lora.inject import load_adapter
from charforgex.lora.state import Lora, LoraLayer
from charforgex.types import Components, Crop
from tests.families.conftest import listing, motion_listing, original_tensors, same_networks, write_header

FAMILY = AnimateDiffSdxl()
CAPTIONS = ["a photo of a man with short black hair", "a dog at the beach, " * 40]


@pytest.fixture(scope="module")
def parts() -> Components:
    return FAMILY.tiny(seed=7)


@pytest.fixture(scope="module")
def pipeline(parts):
    pipeline = FAMILY.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- parity ----


def test_the_schedule_is_that_of_animatediffs_own_code_for_sdxl(parts):
    """Scaled linear betas to 0.020: signal to noise at three indices, from the definition in float64, here to four digits."""
    found = FAMILY.process(parts).snr(torch.tensor([147, 499, 999]) / 999)
    torch.testing.assert_close(found, torch.tensor([4.2625, 0.20503, 2.3007e-4]), rtol=2e-3, atol=0)


def test_encode_text_is_the_pipelines(parts, pipeline):
    text = FAMILY.encode_text(parts, [*CAPTIONS, ""])
    for i, caption in enumerate(CAPTIONS):
        tokens, unsaid, pooled, pooled_unsaid = pipeline.encode_prompt(caption, device="cpu")
        torch.testing.assert_close(text.tokens_BLD[i : i + 1], tokens, rtol=0, atol=1e-6)
        torch.testing.assert_close(text.pooled_BD[i : i + 1], pooled, rtol=0, atol=1e-6)
    assert not unsaid.any() and not pooled_unsaid.any() and not text[2:].tokens_BLD.any() and not text[2:].pooled_BD.any()
    assert [count > 0 for _, count in FAMILY.seen_text(parts, CAPTIONS[1])] == [True, True]


@torch.no_grad()
def test_denoise_is_the_network_called_directly(parts):
    """Two clips of three frames, each with its text, its pooled text and its sizes."""
    text, noisy, index = FAMILY.encode_text(parts, CAPTIONS), draw(2, 4, 3, 4, 8), torch.tensor([300, 812])
    crop = Crop(torch.tensor([[96.0, 64], [32, 64]]), torch.tensor([[4.0, 0], [0, 0]]), torch.tensor([[32.0, 64], [32, 64]]))
    ours = FAMILY.denoise(parts.denoiser, noisy, index / 999, text, crop)
    for i, sizes in enumerate([[96.0, 64, 4, 0, 32, 64], [32.0, 64, 0, 0, 32, 64]]):
        told = {"text_embeds": text.pooled_BD[i : i + 1], "time_ids": torch.tensor([sizes])}
        tokens = text.tokens_BLD[i].expand(3, -1, -1)
        alone = parts.denoiser(noisy[i : i + 1], index[i], encoder_hidden_states=tokens, added_cond_kwargs=told).sample
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_where_frames_have_their_own_texts_the_pooled_one_is_their_mean(parts):
    text, noisy, t = FAMILY.encode_text(parts, CAPTIONS), draw(2, 4, 3, 4, 8), torch.tensor([0.3, 0.8])
    crop = Crop.whole(2, 32, 64)
    whole = FAMILY.denoise(parts.denoiser, noisy, t, text, crop)
    assert torch.equal(FAMILY.denoise(parts.denoiser, noisy, t, text[[0, 0, 0, 1, 1, 1]], crop), whole), "one text, that one"
    told = FAMILY.conditions(text[[0, 0, 1, 1, 1, 1]], crop, noisy)["text_embeds"]
    torch.testing.assert_close(told, torch.stack([(2 * text.pooled_BD[0] + text.pooled_BD[1]) / 3, text.pooled_BD[1]]))


@pytest.mark.parametrize("scheduler", ["checkpoint", "dpmpp_2m"])
def test_a_clip_is_the_pipelines_bit_for_bit(parts, pipeline, scheduler):
    texts, nothing = FAMILY.encode_text(parts, ["a dog", "a cat"]), FAMILY.encode_text(parts, [""])
    pipeline.scheduler = build_scheduler(parts["scheduler"], scheduler, 4)
    theirs = pipeline(
        num_frames=5, height=32, width=64, num_inference_steps=4, guidance_scale=5.0, latents=clip_noise(3, (4, 4, 8), range(5))[None],
        output_type="latent", prompt_embeds=texts.tokens_BLD[:1], pooled_prompt_embeds=texts.pooled_BD[:1],
        negative_prompt_embeds=nothing.tokens_BLD, negative_pooled_prompt_embeds=nothing.pooled_BD,
        generator=torch_generator("sampling", 3),
    ).frames[0]  # fmt: skip
    ask = {"frames": 5, "size": (32, 64), "steps": 4, "guidance": 5.0, "negative_text": nothing, "scheduler": scheduler}
    assert torch.equal(sample_clip(FAMILY, parts, texts[[0]], 3, **ask), theirs)
    if scheduler == "checkpoint":  # two texts, which the clip goes through
        moved = sample_clip(FAMILY, parts, texts, 3, **ask, shares_TK=travel([0, 4], 5))
        assert moved.shape == theirs.shape and (moved - theirs).abs().max() > 1e-4


# ---- the base from its halves ----


class Halves:
    """The tiny model, taken apart: a diffusers folder of each half, and what single files of them hold."""

    def __init__(self, home: Path, parts: Components):
        from diffusers import MotionAdapter, StableDiffusionXLPipeline, UNet2DConditionModel

        self.pictures, self.motion = home / "pictures", FAMILY.save_motion(parts.denoiser, home / "adapter" / "motion_adapter")
        state = parts.denoiser.state_dict()
        self.unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2, 4),
            transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, upcast_attention=None,
        )  # fmt: skip
        self.unet.load_state_dict({key: tensor for key, tensor in state.items() if ".motion_modules." not in key})
        modules = {name: parts[name] for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
        StableDiffusionXLPipeline(unet=self.unet, scheduler=Sdxl().tiny()["scheduler"], **modules).save_pretrained(self.pictures)
        adapter = MotionAdapter.from_pretrained(self.motion)
        self.motion_tensors = original_tensors(SdxlMotion(), "motion_adapter", adapter.state_dict(), adapter.config)
        self.picture_tensors = {
            key: tensor
            for name in ("unet", "vae", "text_encoder", "text_encoder_2")
            for network in [self.unet if name == "unet" else parts[name]]
            for key, tensor in original_tensors(
                Sdxl(), name, network.state_dict(), network.config if name in ("unet", "vae") else {}
            ).items()
        }  # fmt: skip
        self.small = (
            type("SmallSdxl", (Sdxl,), {"configs": self.pictures}),
            type("SmallMotion", (SdxlMotion,), {"configs": home / "adapter"}),
        )


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Halves:
    """Of weights that float16 holds, in which motion modules are saved."""
    parts = FAMILY.tiny(seed=7)
    for tensor in parts.denoiser.state_dict().values():
        tensor.copy_(tensor.half())
    halves = Halves(tmp_path_factory.mktemp("halves"), parts)
    halves.parts = parts
    return halves


def test_two_folders_are_the_whole_base(halves, tmp_path):
    """The very weights, also those that diffusers makes of the two. What was saved of the motion modules is what diffusers reads.

    diffusers 0.42.1 leaves what reads sizes and pooled texts at random weights when it joins the halves: there is nothing to compare.
    """
    from diffusers import MotionAdapter, UNetMotionModel

    parts = FAMILY.load(f"{halves.motion}+{halves.pictures}")
    same_networks(parts, halves.parts)
    assert parts.config.items() >= halves.parts.config.items() and parts.config["force_zeros_for_empty_prompt"]
    assert type(parts["scheduler"]).__name__ == "EulerDiscreteScheduler" and parts["scheduler"].config.beta_end == 0.02
    theirs = UNetMotionModel.from_unet2d(halves.unet, MotionAdapter.from_pretrained(halves.motion)).eval()
    ours, other = parts.denoiser.state_dict(), theirs.state_dict()
    different = {key for key in ours.keys() | other.keys() if not torch.equal(ours[key], other[key])}
    assert different == {f"add_embedding.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
    FAMILY.pipeline(parts).save_pretrained(tmp_path / "whole")
    same_networks(FAMILY.load(str(tmp_path / "whole")), halves.parts)
    with pytest.raises(ModelError, match="motion_adapter adds nothing"):
        FAMILY.load(f"{tmp_path / 'whole'}+{halves.motion}")


def test_two_files_are_the_whole_base(halves, tmp_path, monkeypatch):
    """In the original's and AnimateDiff's own names, with the positions of both attentions, and in diffusers'."""
    monkeypatch.setattr(AnimateDiffSdxl, "halves", halves.small)
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).symlink_to(halves.pictures / name)
    again = {k.replace("attention_blocks.0.pos", "attention_blocks.1.pos"): t for k, t in halves.motion_tensors.items() if "pos_" in k}
    assert len(again) == 3 * 1 + 3 * 2
    save_file(halves.picture_tensors, tmp_path / "pictures.safetensors")
    save_file(halves.motion_tensors | {key: tensor.clone() for key, tensor in again.items()}, tmp_path / "mm.safetensors")
    source = f"{tmp_path / 'pictures.safetensors'}+{tmp_path / 'mm.safetensors'}"
    same_networks(FAMILY.load(source), halves.parts)
    assert denoiser_config(FAMILY, source) == denoiser_config(FAMILY, f"{halves.pictures}+{halves.motion}")
    mixed = FAMILY.load(f"{halves.pictures}+{halves.motion / 'diffusion_pytorch_model.safetensors'}", only=("denoiser",))
    assert torch.equal(mixed.denoiser.conv_in.weight, halves.parts.denoiser.conv_in.weight)
    hashes = {group: weights_hash(FAMILY, source, group) for group in FAMILY.components}
    changed = {key: tensor + ("ff_norm.bias" in key) for key, tensor in load_file(tmp_path / "mm.safetensors").items()}
    save_file(changed, tmp_path / "mm.safetensors")
    assert [group for group in hashes if weights_hash(FAMILY, source, group) != hashes[group]] == ["denoiser"]


def test_halves_of_the_other_family_are_refused_by_name(halves, tmp_path):
    """Motion modules of Stable Diffusion 1.5 with SDXL, and the reverse, as folders, files and whole bases."""
    with pytest.raises(ModelError, match=r"holds no motion modules, which animatediff_sdxl needs.*pictures\+mm_sdxl_v10_beta"):
        FAMILY.load(str(halves.pictures))
    with pytest.raises(ModelError, match="no unet of animatediff_sdxl"):
        FAMILY.load(str(halves.motion))
    other = "makes clips with family=animatediff and not with animatediff_sdxl"
    folders = {"pictures": '{"_class_name": "StableDiffusionPipeline"}', "whole": '{"_class_name": "AnimateDiffPipeline"}'}
    for name, index in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(index)
        with pytest.raises(ModelError, match=rf"{name}: \w+ {other}"):
            FAMILY.load(f"{tmp_path / name}+{halves.motion}")
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "config.json").write_text('{"_class_name": "MotionAdapter", "block_out_channels": [320, 640, 1280, 1280]}')
    v3 = write_header(tmp_path / "v3_sd15_mm.safetensors", motion_listing("v3"))
    for source in (tmp_path / "motion", v3):
        with pytest.raises(ModelError, match=rf"{source.name}: an AnimateDiff motion module {other}"):
            FAMILY.load(f"{halves.pictures}+{source}")
    beta = write_header(tmp_path / "mm_sdxl_v10_beta.safetensors", motion_listing("", SdxlMotion))
    this = "makes clips with family=animatediff_sdxl and not with animatediff"
    for source, what in ((halves.motion, "an AnimateDiff motion module for SDXL"), (beta, "an AnimateDiff motion module for SDXL"),
                         (halves.pictures, "StableDiffusionXLPipeline")):  # fmt: skip
        with pytest.raises(ModelError, match=rf"{source.name}: {what} {this}"):
            AnimateDiff().load(str(source))


# ---- the published files ----


def test_the_published_motion_modules_are_told_from_their_keys(tmp_path):
    """Of SDXL's three blocks: 2 modules each on the way down, 3 on the way up, none in the middle; 5 of each width.

    The file on diffusers' hub has 474,328,896 bytes: these weights and one copy of the positions in float16, and the header.
    """
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    keys = motion_listing("", SdxlMotion)
    checkpoint = Checkpoint(SdxlMotion(), write_header(tmp_path / "mm.safetensors", keys))
    assert layouts.identify(checkpoint.header) == layouts.MOTION_SDXL
    positions = {key: shape for key, shape in keys.items() if key.endswith("pos_encoder.pe")}
    assert len(positions) == 2 * 15 and {shape[1] for shape in positions.values()} == {32}
    weights = sum(torch.Size(shape).numel() for key, shape in keys.items() if key not in positions)
    assert weights == sum(5 * (22 * c**2 + 21 * c) for c in (320, 640, 1280)) == 236_779_200
    assert 0 < 474_328_896 - 2 * (weights + 5 * 32 * (320 + 640 + 1280)) < 100_000
    table = {ours: original.key for ours, (original, _) in checkpoint.tables["motion_adapter"].items()}
    converted = convert_animatediff_checkpoint_to_diffusers({key: key for key in keys})
    assert converted == {ours: theirs for ours, theirs in table.items() if "pos_embed" not in ours}
    for family, motion in (("sdxl", layouts.MOTION_SDXL), ("animatediff_sdxl", layouts.MOTION_SDXL)):
        with pytest.raises(ModelError, match=f"{motion}, not {family}"):
            layouts.require(checkpoint.header, family)


def test_the_published_base_in_full_size(tmp_path):
    """SDXL's checkpoint and the published modules: every name and shape of diffusers' network, and the one that LoRAs are known for."""
    from diffusers import UNetMotionModel

    pictures = write_header(tmp_path / "sd_xl_base_1.0.safetensors", listing("sdxl"))
    motion = write_header(tmp_path / "mm_sdxl_v10_beta.safetensors", motion_listing("", SdxlMotion))
    config = denoiser_config(FAMILY, f"{pictures}+{motion}")
    assert config == bases.get("animatediff_sdxl").config
    with torch.device("meta"):
        network = UNetMotionModel.from_config(config)
    halves = {
        key: shape
        for half, name in ((Sdxl, "unet"), (SdxlMotion, "motion_adapter"))
        for key, (_, shape) in tables(half, name, "")[0][2].items()
    }
    assert halves == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    sizes = FAMILY.facts({"unet": config, "vae": read_config(Sdxl().configs, "vae")})
    assert sizes == {"latent_stride": 8, "pixel_multiple": 32, "default_size": 1024, "max_frames": 32}
    counts = {preset: len(FAMILY.lora_targets(preset, config)) for preset in ("spatial", "temporal", "attention")}
    assert counts == {"spatial": 70 * 8, "temporal": 15 * 8, "attention": 70 * 8 + 15 * 8}


# ---- LoRAs ----


def lora_on(network, paths) -> Lora:
    def layer(shape) -> LoraLayer:
        return LoraLayer(draw(2, shape[1]), draw(shape[0], 2) * 0.3, 2.0)

    return Lora({f"unet.{path}": layer(network.get_submodule(path).weight.shape) for path in paths})


@torch.no_grad()
def test_a_characters_lora_of_sdxl_goes_into_clips(parts, halves, tmp_path):
    """Written as sd-scripts and others do, for SDXL's own network; it changes clips as its weights do, and is no motion LoRA."""
    lora = lora_on(halves.unet, FAMILY.lora_targets("spatial", parts.denoiser.config))
    text, noisy, t, crop = FAMILY.encode_text(parts, CAPTIONS[:1]), draw(1, 4, 3, 4, 8), torch.tensor([0.4]), Crop.whole(1, 32, 64)
    for format in ("kohya", "diffusers"):
        path = writing.write(lora, tmp_path / f"{format}.safetensors", format, Sdxl(), halves.unet.config, torch.float32)
        read = formats.read(path, FAMILY, parts.denoiser.config)
        assert read.layers.keys() == lora.layers.keys()
        assert all(layer.equals(read.layers[name]) for name, layer in lora.layers.items()), format
    changed, merged = FAMILY.tiny(seed=7), FAMILY.tiny(seed=7)
    load_adapter(changed, read, "anna")
    for name, layer in lora.layers.items():
        merged.denoiser.get_submodule(name.removeprefix("unet.")).weight.data += layer.delta()
    ours, expected, before = (FAMILY.denoise(some.denoiser, noisy, t, text, crop) for some in (changed, merged, parts))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 0.01
    with pytest.raises(LoraError, match="no place in the format animatediff"):
        writing.to_tensors(lora, "animatediff", FAMILY, parts.denoiser.config, torch.float32)


def test_each_half_of_a_lora_has_its_files(parts, halves, tmp_path):
    """Motion in AnimateDiff's own names, the look as any LoRA of SDXL; and files of published size are told from Stable Diffusion 1.5's."""
    config = parts.denoiser.config
    both = {half: lora_on(parts.denoiser, FAMILY.lora_targets(half, config)) for half in ("temporal", "spatial")}
    path = writing.write(both["temporal"], tmp_path / "motion.safetensors", "animatediff", FAMILY, config, torch.float32)
    assert "up_blocks.2.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor.to_out_lora.up.weight" in (
        load_file(path)
    )
    again = formats.read(path, FAMILY, config)
    assert all(layer.equals(again.layers[name]) for name, layer in both["temporal"].layers.items())
    with pytest.raises(LoraError, match="no place in the format kohya, but in animatediff and diffusers"):
        writing.to_tensors(both["temporal"], "kohya", FAMILY, config, torch.float32)
    look = writing.to_tensors(both["spatial"], "kohya", FAMILY, config, torch.float32)
    as_sdxl = writing.to_tensors(both["spatial"], "kohya", Sdxl(), halves.unet.config, torch.float32)
    assert look.keys() == as_sdxl.keys() and all(torch.equal(look[key], as_sdxl[key]) for key in look)
    for name in ("animatediff_sdxl", "animatediff_v3", "animatediff_v2"):
        base = bases.get(name)
        motion = [n for n in base.shapes if ".motion_modules." in n and ".attn" in n]
        parts_of = {parts[0][0]: key for key, parts in base.names.table("animatediff").items()}
        shapes = {f"{parts_of[n]}.down.weight": (4, base.shapes[n][1]) for n in motion}
        shapes |= {f"{parts_of[n]}.up.weight": (base.shapes[n][0], 4) for n in motion}
        assert (family_of(shapes), bases.base_of(shapes, {}).name) == (base.family, name)
        first = {key: shape for key, shape in shapes.items() if key.startswith("down_blocks.0.")}  # of which both have the same
        assert family_of(first) is None and bases.base_of(first, {"charforgex.family": base.family}).family == base.family
