"""A training of motion from its settings to its files, on the tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.charworld.demo import motion_prompts
from charforgex.config import compose
from charforgex.data.clips import ClipData
from charforgex.errors import ConfigError
from charforgex.evaluation import levels
from charforgex.evaluation.trainings import training_in, trainings_below
from charforgex.families import registry
from charforgex.lora.formats import read
from charforgex.training.motion import motion_losses
from charforgex.training.motion_run import find_clips, targets_of
from charforgex.training.run import check, run
from charforgex.videos import frames

EXPERIMENT = "experiment=animatediff_motion"
TINY = [
    EXPERIMENT, "debug=tiny", "trainer.steps=2", "evaluation.every=2", "evaluation.times=1", "sampling.steps=1", "data.val_count=1",
    "evaluation.prompts=['a man']", "logger.tensorboard=false",
]  # fmt: skip


def checked(*overrides: str):
    return check(compose("train", [EXPERIMENT, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family=sdxl"], r"family=sdxl makes pictures.*family=animatediff"),
        (["data=default"], r"this data is pictures; set data=clips"),
        (["evaluation=default"], r"measured by evaluation=motion"),
        (["evaluation.prompts=[]"], r"evaluation\.prompts is empty"),
        (["pretrain=charworld", "pretrain.stage=base"], r"two trainings"),
        (["lora.kind=dora"], r"lora\.kind=dora.*set lora\.kind=lora"),
        (["lora.init=pissa"], r"motion\.dropout=0\.1 drops nothing"),
        (["text_encoder.lr=1e-5"], r"text_encoder\.lr=1e-05 has no effect with motion"),
        (["optimizer=prodigy", "motion.spatial_lr=1"], r"optimizer=prodigy finds that rate"),
        (["motion.temporal=false", "motion.spatial=false"], r"leave nothing to learn"),
        (["motion.temporal=false", "motion.train=module"], r"motion\.train=module trains what"),
        (["motion.temporal=false", "motion.debias=0"], r"motion\.debias=0.* has no effect with motion\.temporal=false"),
        (["motion.spatial=false", "motion.spatial_lr=1e-4"], r"motion\.spatial_lr=0\.0001 has no effect with motion\.spatial=false"),
    ],
)
def test_what_motion_has_no_use_for_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        checked(*overrides)


def test_a_characters_training_has_no_use_for_families_of_clips():
    with pytest.raises(ConfigError, match=r"family=animatediff makes clips.*experiment=animatediff_motion"):
        check(compose("train", ["family=animatediff"]))


def test_each_path_gets_its_own_modules():
    family = registry.get("animatediff")
    config = dict(family.tiny().denoiser.config)

    def places(*overrides):
        found = targets_of(family, checked(*overrides), config)
        return {".motion_modules." in path for path in found}, len(found)

    (both, many), (temporal, some), (spatial, rest) = (places(*o) for o in ([], ["motion.spatial=false"], ["motion.temporal=false"]))
    assert (both, temporal, spatial) == ({True, False}, {True}, {False}) and many == some + rest
    assert places("motion.train=module") == (spatial, rest)
    assert places("motion.train=module", "motion.spatial=false") == (set(), 0)
    assert places("lora.targets=[attn1.to_q]")[0] == {True, False}
    with pytest.raises(ConfigError, match=r"has no module for motion\.spatial; choose others"):
        targets_of(family, checked("lora.targets=temporal"), config)


def test_a_demos_motion_is_a_folder_and_asked_of_others(tmp_path):
    cfg = compose("train", [EXPERIMENT, "data.source=charworld:jump"])
    folder, prompts = find_clips(cfg, check(cfg), tmp_path)
    assert len(list(folder.glob("*.mkv"))) == len(list(folder.glob("*.txt"))) == 16
    captions = {path.read_text().strip() for path in folder.glob("*.txt")}
    assert all(", jumping" in caption for caption in [*captions, *prompts]) and not captions & set(prompts)
    who = {caption.partition(",")[0] for caption in captions}
    assert len(who) == 4 and not who & {prompt.partition(",")[0] for prompt in prompts} and prompts == motion_prompts("jump", 4)
    clip = np.stack([frame.pixels for frame in frames(folder / "000.mkv")])
    assert clip.shape == (8, 64, 64, 3) and np.abs(clip[0].astype(int) - clip[4]).mean() > 2
    with pytest.raises(ConfigError, match=r"data\.source=charworld:hop must be charworld: and a motion: shake, jump, sway"):
        find_clips(compose("train", [EXPERIMENT, "data.source=charworld:hop"]), checked(), tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of motion modules and of a LoRA of the look, with its cache. Runs of two LoRAs are in test_resume."""
    home = tmp_path_factory.mktemp("motion")
    return home, run(compose("train", [*TINY, f"run_dir={home / 'run'}", f"cache_dir={home / 'cache'}", "motion.train=module"]))


def test_a_run_leaves_what_it_learnt_and_says_what_that_does(done):
    home, result = done
    folder, family = home / "run", registry.get("animatediff")
    look = read(folder / "debug_look.safetensors", family, family.tiny().denoiser.config)
    assert not any(".motion_modules." in name for name in look.layers) and look.ranks() == [4]
    assert look.metadata["charforgex.family"] == "sd15" and look.metadata["charforgex.frames"] == "8"
    assert look.metadata["modelspec.title"] == "debug_look"
    config = json.loads((folder / "debug_modules" / "config.json").read_text())
    assert config["_class_name"] == "MotionAdapter" and config["motion_max_seq_length"] == 8
    places = {name: result[name] for name in ("lora", "look", "motion_modules")}
    assert places == {"lora": None, "look": str(folder / "debug_look.safetensors"), "motion_modules": str(folder / "debug_modules")}
    assert result["prompts"] == ["a man"] and result["best_step"] == 2
    assert result["value"] == pytest.approx(1 - result["validation"]["lora"] / result["validation"]["base"]) and result["value"] != 0
    assert set(result["motion"]["lora"]) == set(result["motion"]["base"]) == {"strength", "flicker", "drift", "alike"}
    assert set(result["motion"]["held_out"]) == {"strength", "flicker", "drift"}, "one clip is held out: there are no others to be like"
    assert Image.open(folder / "clips.gif").n_frames == 8
    for name in ("sheet.png", "curves.png", "metrics.csv", "scores.json", "samples/step-00000002.png", "samples/step-00000002.gif"):
        assert (folder / name).stat().st_size > 100, name


@pytest.mark.slow
def test_motion_is_learnt_on_sdxl_too(tmp_path):
    """Both halves into files of their own: the motion's for AnimateDiff on SDXL, the look's for SDXL."""
    more = ["family=animatediff_sdxl", "family.dtype=float32", "data.frames=8", f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path}"]
    result = run(compose("train", [*TINY, *more]))
    family = registry.get("animatediff_sdxl")
    for half, name in (("lora", "animatediff_sdxl"), ("look", "sdxl")):
        lora = read(Path(result[half]), family, family.tiny().denoiser.config)
        assert {".motion_modules." in layer for layer in lora.layers} == {half == "lora"}
        assert lora.metadata["charforgex.family"] == name
    assert result["family"] == "animatediff_sdxl" and result["value"] != 0


def test_the_validation_of_the_base_by_hand(done):
    """The held-out clip at one noise level, its own noise, anchored in the middle."""
    home, result = done
    family = registry.get("animatediff")
    parts = family.tiny()
    data = ClipData(home / "run" / "clips", home / "cache", resolution=32, frames=8, fps=8, batch_size=2, val_count=1)
    data.prepare(family, lambda groups: parts, weights={"vae": "v", "text": "t"}, pixel_multiple=16, latent_stride=8, progress=False)
    (batch,) = data.validation()
    ((prediction, target),) = levels.predictions(family, parts.denoiser, family.process(parts), batch, 1)
    expected = motion_losses(prediction, target, torch.ones(1), torch.tensor([4])).item()
    assert result["validation"]["base"] == pytest.approx(expected, rel=1e-5)


def test_the_guide_has_every_key_of_its_result(done):
    home, _ = done
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8").split("| key of a motion")[1].split("\n\n")[0]
    told = {key for row in page.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == set(json.loads((home / "run" / "result.json").read_text()))


def test_evaluate_refuses_its_folder_by_name(done):
    with pytest.raises(ConfigError, match=r"run is a training of motion, and pictures are evaluated"):
        training_in(done[0] / "run")
    assert trainings_below(done[0]) == []
