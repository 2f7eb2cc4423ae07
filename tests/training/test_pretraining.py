"""Every stage of pre-training runs, resumes and leaves weights that load by the code that loads any base."""

import json
from pathlib import Path

import pytest
import torch

import charforgex
from charforgex.charworld.assets import ROOT, load_captioner, load_clip, load_detector, load_judge
from charforgex.charworld.captioner import describe
from charforgex.errors import ConfigError
from charforgex.families import registry
from charforgex.families.parts import component_class
from charforgex.generation.ifnet import load
from charforgex.training.interpolating import LAYOUT


def train(tmp_path, stage, steps=2, **settings):
    options = {"stage": stage, "pictures": 600, "batch_size": 8, **settings}
    return charforgex.train(
        experiment="charworld_pretrain", pretrain=options, trainer={"steps": steps, "threads": 1}, runs_dir=str(tmp_path / "runs"),
        cache_dir=str(tmp_path / "cache"), run_dir=str(tmp_path / stage),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


def provenance(result, part):
    return json.loads((Path(result["weights"]) / part / "provenance.json").read_text())


def test_judge(folder):
    result = train(folder, "judge")
    assert 0 <= result["measures"]["rank_1"] <= 1 and len(result["measures"]) > 10
    judge = load_judge(folder / "judge" / "weights")
    assert judge.embed(torch.zeros(1, 3, 64, 64)).norm().item() == pytest.approx(1, abs=1e-5)
    assert provenance(result, "judge")["pictures_seen"] == 16


def test_text(folder):
    result = train(folder, "text")
    assert {"caption_finds_picture", "pooled_attributes", "image_attributes"} <= set(result["measures"])
    assert (folder / "text/weights/sdxl/text_encoder_2/model.safetensors").is_file()


def test_captioner_begins_with_clips_eye_and_loads_as_the_package_loads_it(folder):
    result = train(folder, "captioner")
    assert 0 <= result["measures"]["attributes"] <= 1 and len(result["measures"]) > 10
    model, tokens = load_captioner(folder / "captioner/weights")
    before, after = load_clip()[0].vision_model.state_dict(), model.encoder.state_dict()
    differences = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(differences) < 0.2
    assert len(describe(model, tokens, torch.zeros(2, 3, 64, 64))) == 2
    assert provenance(result, "captioner")["pictures_seen"] == 16


def test_faces_goes_on_from_the_embedded_one(folder):
    result = train(folder, "faces", start="embedded", pictures=20, batch_size=4)
    assert result["measures"]["recall"] > 0.6 and result["measures"]["precision"] > 0.6 and result["measures"]["landmark_error"] < 0.1
    told = provenance(result, "detector")
    assert told["pictures_seen"] == 8 and told["before"]["steps"] > 100
    trained, embedded = load_detector(folder / "faces" / "weights"), load_detector()
    differences = [(a - b).abs().max().item() for a, b in zip(trained.parameters(), embedded.parameters(), strict=True)]
    assert 0 < max(differences) < 0.2


def test_flow_is_no_worse_than_what_it_begins_with_and_loads_as_any_weights(folder):
    result = train(folder, "flow", pictures=8, batch_size=4)
    assert result["measures"]["psnr"] > result["measures"]["psnr_dis"] - 0.3
    net = load(folder / "flow/weights/interpolator/model.safetensors")
    assert net.layout == LAYOUT and net.block1.lastconv[0].weight.abs().max() > 0
    assert provenance(result, "interpolator")["pictures_seen"] == 8


def test_base_goes_on_from_the_embedded_one_and_loads_like_any(folder):
    result = train(folder, "base", start="embedded")
    unet = registry.get("sdxl").load(str(ROOT / "sdxl"), ["denoiser"]).denoiser
    from diffusers import UNet2DConditionModel

    trained = UNet2DConditionModel.from_pretrained(folder / "base/weights/sdxl/unet", use_safetensors=True, torch_dtype=torch.float32)
    differences = [(a - b).abs().max().item() for a, b in zip(unet.parameters(), trained.parameters(), strict=True)]
    assert 0 < max(differences) < 0.2
    assert provenance(result, "sdxl/unet")["started_from"] == "embedded"


def test_decoder_leaves_the_encoder_as_it_is(folder):
    train(folder, "decoder", start="embedded")
    from diffusers import AutoencoderKL

    before, after = (
        AutoencoderKL.from_pretrained(root / "sdxl/vae", use_safetensors=True).state_dict() for root in (ROOT, folder / "decoder/weights")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_vae(folder):
    result = train(folder, "vae")
    assert 5 < result["measures"]["psnr"] < 30


def test_the_transformers_text_encoders_and_vae(folder):
    result = train(folder / "flux", "text", family="flux")
    assert set(result["measures"]) == {"t5_attributes"}
    weights = Path(result["weights"])
    for name in ("flux/text_encoder", "flux/text_encoder_2", "sd3/text_encoder", "sd3/text_encoder_2", "sd3/text_encoder_3"):
        assert (weights / name / "model.safetensors").is_file(), name
    result = train(folder / "flux", "vae", family="flux")
    config = json.loads((Path(result["weights"]) / "sd3/vae/config.json").read_text())
    assert config["latent_channels"] == 16 and config["shift_factor"] != 0 and not config["use_quant_conv"]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_transformer_from_nothing(folder, family):
    result = train(folder / family, "base", family=family, batch_size=2)
    transformer = component_class(registry.get(family), "transformer")
    trained = transformer.from_pretrained(Path(result["weights"]) / family / "transformer", use_safetensors=True)
    assert all(p.isfinite().all() for p in trained.parameters()) and trained.proj_out.weight.abs().max() > 0, "it starts at zero"
    assert provenance(result, f"{family}/transformer")["started_from"] is None


def test_guidance_is_taken_in_by_the_base_it_goes_on_from(folder):
    result = train(folder / "guided", "guidance", family="flux", start="embedded", batch_size=2)
    told = provenance(result, "flux/transformer")
    assert told["steps"] == 2 and told["before"]["steps"] > 0


@pytest.mark.parametrize(
    ("stage", "start", "words"),
    [("guidance", None, "pretrain.family=flux"), ("decoder", None, "pretrain.start"), ("text", "embedded", "start=null")],
)
def test_a_start_that_makes_no_sense_is_refused(folder, stage, start, words):
    with pytest.raises(ConfigError, match=words):
        charforgex.train(
            experiment="charworld_pretrain", pretrain={"stage": stage, "start": start, "pictures": 600}, run_dir=str(folder / "refused"),
            cache_dir=str(folder / "cache"),
        )  # fmt: skip


def test_animatediff_starts_from_sdxl_and_loads_as_a_base(folder):
    result = train(folder / "motion", "base", family="animatediff", pictures=16, clips=2, clip_share=0.5)
    family, home = registry.get("animatediff"), Path(result["weights"]) / "animatediff"
    parts = family.load(str(home))
    assert parts.config["max_frames"] == 8 and family.process(parts).beta_schedule == "linear"
    further = train(
        folder / "motion/on", "base", steps=4, family="animatediff", pictures=16, clips=2, clip_share=1.0, start=str(home.parent)
    )
    after = family.load(str(Path(further["weights"]) / "animatediff"))
    for name in ("unet", "text_encoder"):  # both learn
        pairs = zip(parts[name].parameters(), after[name].parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs)
    told = provenance(further, "animatediff/unet")
    assert told["before"]["steps"] == 2 and told["before"]["started_from"] == "sdxl's embedded base" and told["started_from"] == "weights"
    assert provenance(further, "animatediff/vae") == json.loads((ROOT / "sdxl/vae/provenance.json").read_text())
    with pytest.raises(ConfigError, match="of animatediff only the base is trained"):
        train(folder / "other", "vae", family="animatediff")
