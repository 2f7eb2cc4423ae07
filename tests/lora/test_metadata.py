import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from charforgex.lora import formats, metadata, writing
from charforgex.lora.inject import read_adapter
from charforgex.lora.state import Lora, LoraLayer


@pytest.fixture
def lora(parts, trained):
    trained(parts, ["to_q"], rank=4, alpha=2.0)
    return read_adapter(parts.denoiser, "unet")


def described(lora, family, **more):
    return metadata.build(
        lora, family, title="hero", base="charworld", trigger="ohwx", tags={"smiling": 3}, resolution=(832, 1216), steps=400,
        learning_rate=1e-4, pictures=12, seed=0, config_sha256="c" * 64, dataset_sha256="d" * 64, **more,
    )  # fmt: skip


def test_what_other_tools_read(lora, family):
    said = described(lora, family)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in said.items())
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "hero",
        "modelspec.trigger_phrase": "ohwx",
        "modelspec.resolution": "832x1216",
        "modelspec.prediction_type": "epsilon",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",  # A1111 and Forge show the LoRA for SDXL models by its beginning
        "ss_sd_model_name": "charworld",
        "ss_output_name": "hero",
        "ss_resolution": "(832, 1216)",
        "ss_steps": "400",
        "ss_learning_rate": "0.0001",
        "ss_num_train_images": "12",
        "ss_seed": "0",
        "ss_v2": "False",
        "charforgex.config_sha256": "c" * 64,
        "charforgex.dataset_sha256": "d" * 64,
        "charforgex.trigger": "ohwx",
        "charforgex.adapter_sha256": lora.sha256(),
    }
    assert {key: said.get(key) for key in expected} == expected
    assert json.loads(said["ss_tag_frequency"]) == {"hero": {"smiling": 3, "ohwx": 12}}
    assert "modelspec.date" not in said and "modelspec.author" not in said
    assert described(lora, family, date="2026-01-02", prediction="v_prediction")["modelspec.date"] == "2026-01-02"
    assert described(lora, family, prediction="v_prediction")["modelspec.prediction_type"] == "v"


def test_several_ranks_are_dynamic(lora, family):
    name, layer = next(iter(lora.layers.items()))
    mixed = Lora(lora.layers | {name: LoraLayer(layer.down[:1], layer.up[:, :1], layer.alpha)})
    assert described(mixed, family)["ss_network_dim"] == "Dynamic" and described(mixed, family)["ss_network_alpha"] == "2"


def test_hashes_are_those_of_a1111_and_civitai(lora, family, parts, tmp_path):
    path = tmp_path / "hero.safetensors"
    writing.save_verified(lora, path, "kohya", family, parts.denoiser, metadata=described(lora, family))
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata.hashes(path) == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "autov2": hashlib.sha256(content).hexdigest()[:10],
        "autov3": hashlib.sha256(tensors).hexdigest()[:12],
    }
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert (
        said["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest() and said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]
    )
    assert said["ss_output_name"] == "hero"
    plain = save(load_file(path))  # the hash does not depend on the header
    assert hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest() == said["sshs_model_hash"]


def test_equal_exports_are_equal_bytes(lora, family, parts, tmp_path):
    """safetensors itself writes metadata in an order that changes from call to call; 30 keys would hardly agree by chance."""
    config = parts.denoiser.config
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    writing.write(lora, paths[0], "kohya", family, config, torch.float32, described(lora, family))
    writing.write(lora, paths[1], "kohya", family, config, torch.float32, dict(reversed(described(lora, family).items())))
    writing.write(formats.read(paths[0], family, config), paths[2], "kohya", family, config, torch.float32)
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()
