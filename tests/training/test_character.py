"""The stages of the main job that need no whole run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from charforgex.config import compose
from charforgex.data import mess
from charforgex.errors import ConfigError
from charforgex.families import registry
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.training.character import Character, CharacterJob, curated, find_character
from charforgex.training.job import check_disk, check_resolution, choose_device, with_trigger
from charforgex.training.losses import Objective
from charforgex.training.run import Clock, check, choose_run_dir, run
from charforgex.types import Batch, Crop
from tests.families.rows import PICTURES


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    parameters = {"w": torch.zeros(1000, 1000)}
    check_disk(tmp_path / "new" / "run", parameters, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    with pytest.raises(ConfigError, match="10 MiB are free"):
        check_disk(tmp_path / "new" / "run", parameters, keep=2)


def test_a_demo_character_is_a_folder_like_any_other(tmp_path):
    character = find_character(compose("train", ["data.source=charworld:4", "curation=none"]), tmp_path)
    assert character.trigger.split()[0] == "zatoki" and character.others == "charworld:4"
    assert len(list(character.source.glob("*.png"))) == len(list(character.source.glob("*.txt"))) == 30
    captions = {path.read_text() for path in character.source.glob("*.txt")}
    assert all(character.trigger in caption for caption in captions)
    assert not any(word in caption for caption in captions for word in ("in outer space", "at sunset", "underwater", "hair", "skin"))


def test_with_curation_the_demos_folder_is_a_mess(tmp_path):
    character = find_character(compose("train"), tmp_path)
    names = [path.name for path in character.source.iterdir()]
    assert len(names) == sum(mess.DEMO.values()) > 40 and not any(name.endswith(".txt") for name in names)
    assert find_character(compose("train"), tmp_path) == character


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.val_count=-1"], r"data\.val_count=-1"),
        (["data.val_count=0"], r"data\.val_count=0 holds no picture out"),
        (["curation.split.val=0"], r"curation\.split\.val=0 holds no picture out"),
        (["data.val_count=3", "curation.split.val=0.2"], r"data\.val_count=3 and curation\.split\.val=0\.2 say it twice"),
    ],
)
def test_how_many_are_held_out_is_settled_before_pictures_are_looked_at(tmp_path, overrides, said):
    (tmp_path / "raw").mkdir()
    cfg = compose("train", [f"data.source={tmp_path / 'raw'}", f"runs_dir={tmp_path / 'runs'}", *overrides])
    with pytest.raises(ConfigError, match=said):
        curated(
            CharacterJob(
                cfg, check(cfg), tmp_path / "run", Console(), Clock(tmp_path), character=Character(tmp_path / "raw", "zork man", None)
            )
        )
    assert not (tmp_path / "run").exists()


def test_prompts_that_need_a_trigger_need_one():
    settings = check(compose("train"))
    assert "zork man" in with_trigger(settings.evaluation.prompts, "zork man")[0]
    with pytest.raises(ConfigError, match=r"data\.trigger"):
        with_trigger(settings.evaluation.prompts, None)


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


@pytest.fixture(params=PICTURES, ids=str)
def family(request):
    return request.param.family


def losses_and_gradients(family, dtype=torch.float32, checkpointing=False):
    parts = family.tiny()
    mean, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), family.encode_text(parts, ["a man", "a woman"])
    drawn = Batch(mean, torch.zeros_like(mean), text, Crop.whole(2, 64, 64))
    denoiser = parts.denoiser.to(dtype)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
        denoiser.train()
    inject(denoiser, family.lora_targets("attention", denoiser.config), 4, 4.0)
    parameters = adapter_parameters(denoiser)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.02 if name.endswith(".up") else 0.0)
    losses = Objective().losses(family, denoiser, family.process(parts), drawn, "key")
    losses.mean().backward()
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    return losses.detach(), torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


def test_gradient_checkpointing_changes_nothing(family):
    plain, checkpointed = losses_and_gradients(family), losses_and_gradients(family, checkpointing=True)
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.allclose(plain[1], checkpointed[1], rtol=1e-5, atol=1e-9)


def test_a_bfloat16_base_trains_a_float32_adapter(family):
    plain, half = losses_and_gradients(family), losses_and_gradients(family, torch.bfloat16)
    assert torch.allclose(plain[0], half[0], rtol=0.02)
    assert torch.nn.functional.cosine_similarity(plain[1], half[1], dim=0) > 0.99


@pytest.mark.parametrize(
    ("name", "trained_at", "resolution", "presets"),
    [
        ("flux", 1024, 64, "family=flux_dev or family=flux_schnell"),
        ("sd3", 1024, 128, "family=sd35_large or family=sd35_medium or family=sd3_medium"),
        ("sdxl", 1024, 64, "family=sdxl_base"),
    ],
)
def test_an_embedded_bases_size_is_refused_for_a_published_one(name, trained_at, resolution, presets):
    family = registry.get(name)
    with pytest.raises(
        ConfigError, match=rf"data.resolution={resolution} is far below the 1024 px of mine.*Use {presets} or data.resolution="
    ):
        check_resolution(family, "mine", trained_at, [32, resolution])
    check_resolution(family, "mine", trained_at, [64, 256])
    check_resolution(family, "charworld", 64, [64])


def test_which_is_told_before_the_denoiser_is_read(tmp_path):
    """A published base: of Flux, one whose latents are an eighth of the pixels."""
    family, parts = registry.get("flux"), registry.get("flux").tiny()
    family.pipeline(parts).save_pretrained(tmp_path / "flux-dev")
    (tmp_path / "flux-dev" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    cfg = configured(tmp_path, "family=flux", f"family.source={tmp_path / 'flux-dev'}")
    with pytest.raises(ConfigError, match=r"data.resolution=64 .*family=flux_dev.*with family.source=.*flux-dev\."):
        run(cfg)
