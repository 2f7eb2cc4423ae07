"""The family of LoRAs that say nothing about themselves: known from their keys and shapes, before anything is loaded."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from charforgex.config import bind, compose
from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families.settings import FamilySettings
from charforgex.generation import stack
from charforgex.generation.settings import Settings
from charforgex.generation.stack import read_stack
from tests.families.conftest import Bench
from tests.lora import published


def foreign(path, who):
    listing = (published.LISTINGS[who][3] if who in published.LISTINGS else published.OTHERS[who]).items()
    save_file({key: torch.ones(shape, dtype=torch.float16) for key, shape in listing if "te3" not in key}, path)
    return str(path)


@pytest.mark.parametrize("who", ["XLabs, Flux", "diffusers, SD3 attention", "sd-scripts, SDXL"])
def test_a_foreign_lora_finds_its_family(who, tmp_path):
    """The base is not there, so the error tells whose base was looked for."""
    empty = tmp_path / "base"
    empty.mkdir()
    (empty / "model_index.json").write_text('{"_class_name": "AnotherPipeline"}')
    with pytest.raises(ModelError, match=rf"(?i){published.LISTINGS[who][1]}"):
        read_stack(Settings(lora=foreign(tmp_path / "x.safetensors", who), base=str(empty), prompt="a cat"))


def test_loras_of_two_families_are_told_apart(tmp_path):
    one, two = foreign(tmp_path / "one.safetensors", "XLabs, Flux"), foreign(tmp_path / "two.safetensors", "sd-scripts, SDXL")
    with pytest.raises(LoraError, match=r"different families: .*one\.safetensors for flux, .*two\.safetensors for sdxl"):
        read_stack(Settings(lora=[one, two], base="tiny", prompt="a cat"))


def test_a_lora_of_no_family_of_ours_asks_for_one(tmp_path):
    with pytest.raises(ConfigError, match="does not say which family it is for"):
        read_stack(Settings(lora=foreign(tmp_path / "x.safetensors", "HunyuanVideo"), base="tiny", prompt="a cat"))


def test_a_base_without_tokenizers_of_its_own_takes_those_that_are_named(tmp_path, monkeypatch):
    """A single file of the tiny model's size, and the two settings that say where its tokenizers are."""
    bench = Bench("flux", tmp_path)
    monkeypatch.setattr(stack, "get", lambda name: bench.family)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "alone").mkdir()
    path = str(tmp_path / "alone" / "flux.safetensors")
    save_file(bench.whole(), path)
    plain = Settings(base=path, prompt="a cat")
    with pytest.raises(ModelError, match="comes without its tokenizers"):
        read_stack(plain)
    assert read_stack(replace(plain, tokenizer=str(bench.folder))).base == path
    cfg = compose("generate", ["family=flux_dev", f"family.source={path}", f"family.tokenizer={bench.folder}"])
    family = bind(FamilySettings, cfg.family, "family")
    assert read_stack(replace(plain, base=None, family=family)).base == path
