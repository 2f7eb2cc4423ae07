"""The stages of the main job that need no whole run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import ConfigError
from charforgex.families.sdxl import Sdxl
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.training.character import check_disk, choose_device, find_character, with_trigger
from charforgex.training.losses import Objective
from charforgex.training.run import check, choose_run_dir
from charforgex.types import Batch, Crop, Text


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    parameters = {"w": torch.zeros(1000, 1000)}
    check_disk(tmp_path / "new" / "run", parameters, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    with pytest.raises(ConfigError, match="10 MiB are free"):
        check_disk(tmp_path / "new" / "run", parameters, keep=2)


def test_a_demo_character_is_a_folder_like_any_other(tmp_path):
    character = find_character(compose("train", ["data.source=charworld:4"]), tmp_path)
    assert character.trigger.split()[0] == "zatoki" and character.others == "charworld:4"
    assert len(list(character.source.glob("*.png"))) == len(list(character.source.glob("*.txt"))) == 30
    captions = {path.read_text() for path in character.source.glob("*.txt")}
    assert all(character.trigger in caption for caption in captions)
    assert not any(word in caption for caption in captions for word in ("in outer space", "at sunset", "underwater", "hair", "skin"))


def test_prompts_that_need_a_trigger_need_one():
    settings = check(compose("train"))
    assert "zork man" in with_trigger(settings, "zork man").evaluation.prompts[0]
    with pytest.raises(ConfigError, match=r"data\.trigger"):
        with_trigger(settings, None)


def test_an_accelerator_that_is_not_there_is_refused():
    assert choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="accelerator=gpu"):
            choose_device("gpu")


def configured(tmp_path, *overrides):
    return compose("train", [f"runs_dir={tmp_path}", *overrides])


def test_the_same_settings_find_their_interrupted_run(tmp_path):
    path, going_on = choose_run_dir(configured(tmp_path))
    assert not going_on
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("")
    assert choose_run_dir(configured(tmp_path)) == (path, True)
    assert choose_run_dir(configured(tmp_path, "lora.rank=3"))[0] != path
    fresh, going_on = choose_run_dir(configured(tmp_path, "fresh=true"))
    assert fresh == Path(f"{path}-2") and not going_on
    (path / "result.json").write_text("{}")
    assert choose_run_dir(configured(tmp_path)) == (Path(f"{path}-2"), False)


def test_a_folder_with_other_files_is_not_taken_over(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        choose_run_dir(configured(tmp_path, f"run_dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def batch():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 4, 8, 8, generator=generator)
    parts = Sdxl().tiny()
    text = Sdxl().encode_text(parts, ["a man", "a woman"])
    return parts, Batch(mean, torch.zeros_like(mean), Text(text.tokens_BLD, text.pooled_BD), Crop.whole(2, 64, 64))


def losses_and_gradients(dtype=torch.float32, checkpointing=False):
    family = Sdxl()
    parts, drawn = batch()
    unet = parts.denoiser.to(dtype)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    inject(unet, family.lora_targets("attention", unet.config), 4, 4.0)
    parameters = adapter_parameters(unet)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.02 if name.endswith(".up") else 0.0)
    losses = Objective().losses(family, unet, family.process(parts), drawn, "key")
    losses.mean().backward()
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    return losses.detach(), torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = losses_and_gradients(), losses_and_gradients(checkpointing=True)
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.allclose(plain[1], checkpointed[1], rtol=1e-5, atol=1e-9)


def test_a_bfloat16_base_trains_a_float32_adapter():
    plain, half = losses_and_gradients(), losses_and_gradients(torch.bfloat16)
    assert torch.allclose(plain[0], half[0], rtol=0.02)
    assert torch.nn.functional.cosine_similarity(plain[1], half[1], dim=0) > 0.99
