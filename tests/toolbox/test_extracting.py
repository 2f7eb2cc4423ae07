"""What was baked in comes out again, whatever the layouts; of anything else the best approximation, and what it lacks is told."""

import json
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families import bases
from charforgex.lora import lowrank
from charforgex.lora.formats import open_lora
from charforgex.lora.lowrank import dense_spectrum, leading_spectrum
from charforgex.toolbox.baking import bake
from charforgex.toolbox.checkpoints import find
from charforgex.toolbox.extracting import extract
from tests.toolbox.bases_on_disk import home_of, single_of

QUERY = "transformer.transformer_blocks.0.attn.to_q"  # with keys and values one weight in single files
EXTENSION = {"folder": "", "file": ".safetensors"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """home(family): a folder with `base/` and `base.safetensors`, `tuned/` and `tuned.safetensors` with `lora.safetensors` baked in."""

    @cache
    def make(family):
        home = home_of(family, tmp_path_factory.mktemp(family), lambda name: "ff.net.2" not in name)
        for end in EXTENSION.values():
            bake({"lora": str(home / "lora.safetensors"), "base": str(home / f"base{end}"), "out": str(home / f"tuned{end}")})
        return home

    return make


def layers_of(path, family):
    with open_lora(path, bases.get(f"charworld_{family}").names) as file:
        return dict(file), file.metadata


@pytest.mark.parametrize(
    ("family", "base", "tuned", "format"),
    [
        ("sdxl", "folder", "folder", "diffusers"),
        ("sdxl", "file", "file", "kohya"),
        ("flux", "folder", "folder", "comfyui"),
        ("flux", "file", "file", "kohya"),
        ("sd3", "file", "folder", "diffusers"),
        ("sd3", "file", "file", "diffusers"),
    ],
)
def test_what_was_baked_comes_out(family, base, tuned, format, home, tmp_path):
    here, out = home(family), tmp_path / "out.safetensors"
    paths = [here / f"base{EXTENSION[base]}", here / f"tuned{EXTENSION[tuned]}"]
    config = {"base": str(paths[0]), "tuned": str(paths[1]), "rank": 3, "format": format, "dtype": "float32", "out": str(out)}
    told = extract(config)
    (wanted, _), (found, metadata) = layers_of(here / "lora.safetensors", family), layers_of(out, family)
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        assert found[name].rank == 3, name
        change = layer.delta()
        assert (found[name].delta() - change).norm() < 1e-3 * change.norm(), name
    assert told["error"] < 1e-5
    assert told["beside"]["differing"] == []
    assert bases.base_of_file(out).name == f"charworld_{family}"
    lineage = json.loads(metadata["charforgex.lineage"])
    assert [parent["sha256"] for parent in lineage["parents"]] == [find(str(path)).sha256() for path in paths]
    assert (lineage["method"], lineage["settings"]) == ("extract", {"rank": 3})


@pytest.fixture
def tuned_by(tmp_path, home):
    """tuned_by(change): Flux's single file with `change(key, tensor)` applied to each tensor."""
    base = home("flux") / "base.safetensors"

    def make(change, name="fine.safetensors"):
        tensors = {key: change(key, tensor.clone()) for key, tensor in load_file(base).items()}
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    return make


def moved(key, tensor):
    """A change of full rank with singular values that fall off slowly, of one joined weight alone."""
    if key != "model.diffusion_model.double_blocks.0.img_attn.qkv.weight":
        return tensor
    left, _, right = torch.linalg.svd(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    return tensor + 0.01 * (left * torch.arange(1, left.shape[1] + 1) ** -0.5) @ right


@pytest.mark.parametrize("setting", [{"rank": 5}, {"energy": 0.7}, {"error": 0.3}, {"error": 0.3, "rank": 6}, {}])
def test_as_much_is_kept_as_was_asked_for(setting, home, tuned_by, tmp_path):
    base, out = home("flux") / "base.safetensors", tmp_path / "out.safetensors"
    tuned = tuned_by(moved)
    told = extract({"base": str(base), "tuned": tuned, "dtype": "float32", "out": str(out), **setting})
    found, _ = layers_of(out, "flux")
    assert set(found) == {QUERY, QUERY.replace("to_q", "to_k"), QUERY.replace("to_q", "to_v")}
    lost, whole = 0.0, 0.0
    for name, layer in found.items():
        (one, place), (other, there) = find(str(base)).modules[name], find(tuned).modules[name]
        change = other.read(there) - one.read(place)
        values = torch.linalg.svdvals(change.double())
        shares = [float((values[rank:].square().sum() / values.square().sum()).sqrt()) for rank in range(len(values) + 1)]
        budget = setting.get("error", (1 - setting["energy"]) ** 0.5 if "energy" in setting else 0.0)
        least = next((rank for rank, share in enumerate(shares) if share <= budget), len(values)) if budget else setting.get("rank", 32)
        rank = min(least, setting.get("rank", len(values)))
        if "rank" in setting or not budget:  # formats that join weights give their parts one rank: zeros fill it up
            assert layer.rank == rank
        error = float((layer.delta() - change).norm() / change.norm())
        assert error == pytest.approx(shares[rank], rel=1e-3)
        lost, whole = lost + (error * float(change.norm())) ** 2, whole + float(change.norm()) ** 2
    assert told["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert told["worst_layer"] in found


def test_what_no_lora_can_hold_is_told(home, tuned_by, tmp_path):
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    shifted = {
        "model.diffusion_model.img_in.bias": "transformer:img_in.bias",
        f"model.diffusion_model.{norm}": f"transformer:{norm}",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight":
            "text_encoder:text_model.embeddings.token_embedding.weight",
        "vae.decoder.conv_in.weight": "vae:decoder.conv_in.weight",
    }  # fmt: skip
    tuned = tuned_by(lambda key, tensor: tensor * 1.1 if key in shifted else moved(key, tensor))
    config = {"tuned": tuned, "out": str(tmp_path / "out.safetensors"), "rank": 4}
    told = extract(config | {"base": str(home("flux") / "base.safetensors")})
    assert set(told["beside"]["differing"]) == set(shifted.values())
    assert told["beside"]["change"] == pytest.approx(0.1, rel=1e-4)
    told = extract(config | {"base": str(home("flux") / "base"), "overwrite": True})
    assert set(told["beside"]["differing"]) == {
        "transformer.x_embedder.bias",
        "transformer.transformer_blocks.0.attn.norm_q.weight",
        "text_encoder.embeddings.token_embedding.weight",
        "vae.decoder.conv_in.weight",
    }
    assert told["beside"]["only_in_tuned"] == told["beside"]["only_in_base"] == []
    assert told["layers"] == 3
    alone = single_of("flux", home("flux") / "base", tmp_path / "alone.safetensors", "transformer")
    told = extract(config | {"base": str(alone), "overwrite": True})
    assert any(name.startswith("vae:") for name in told["beside"]["only_in_tuned"])
    assert any(name.startswith("text_encoder.") for name in told["beside"]["only_in_tuned"])


def test_a_format_of_few_modules_holds_a_change_of_those_alone(home, tuned_by, tmp_path):
    config = {"base": str(home("flux") / "base.safetensors"), "out": str(tmp_path / "out.safetensors"), "rank": 4, "format": "xlabs"}
    assert extract(config | {"tuned": tuned_by(moved)})["layers"] == 3
    tuned = tuned_by(lambda key, tensor: tensor * 1.1 if key.endswith("img_in.weight") else moved(key, tensor))
    with pytest.raises(LoraError, match=r"1 of \d+ layers have no place in the format xlabs, but in .*: transformer\.x_embedder"):
        extract(config | {"tuned": tuned, "overwrite": True})


def test_rounding_alone_is_no_change(home, tuned_by, tmp_path):
    """A checkpoint that was only saved in fewer bits; and one that was also trained, in the layers that were."""
    base = str(home("flux") / "base.safetensors")
    config = {"base": base, "out": str(tmp_path / "out.safetensors")}
    with pytest.raises(LoraError, match="hold the same weights in every module"):
        extract(config | {"tuned": tuned_by(lambda key, tensor: tensor.bfloat16())})
    with pytest.raises(LoraError, match="hold the same weights in every module"):
        extract(config | {"tuned": str(home("flux") / "base"), "dry_run": True})
    assert not (tmp_path / "out.safetensors").exists()
    told = extract(
        config | {"tuned": tuned_by(lambda key, tensor: (moved(key, tensor) if key.startswith("model.") else tensor).bfloat16())}
    )
    assert told["layers"] == 3


def spectra():
    """Name -> 700 x 900 of singular values that do and do not fall off."""
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(700, 900, generator=generator)
    left, _, right = torch.linalg.svd(flat, full_matrices=False)
    low = torch.randn(700, 20, generator=generator) @ torch.randn(20, 900, generator=generator)
    many = torch.randn(700, 45, generator=generator) @ torch.randn(45, 900, generator=generator)
    slow = (left * torch.arange(1, 701) ** -0.5) @ right
    few = low[:, :1] @ torch.randn(1, 900, generator=generator)
    return {
        "flat": flat,
        "slow": slow,
        "low": low + 1e-3 * flat,
        "few": few / 10 + flat,
        "fewer": 10 * few + flat,
        "more than wanted": many,
        "tall": slow.T.contiguous(),
    }


def test_leading_directions_are_within_a_thousandth_of_the_best():
    for name, change in spectra().items():
        found = leading_spectrum(change, 32, torch.Generator().manual_seed(0))
        best = dense_spectrum(change)
        error = float((change - found.truncated(32).dense()).norm() / change.norm())
        assert error <= best.error(32) * (1 + lowrank.SETTLED) + 1e-5, name
        assert found.error(32) == pytest.approx(error, rel=1e-3, abs=1e-3), name
        assert torch.allclose(found.left.T @ found.left, torch.eye(32), atol=1e-4), name
        budget = found.error(20)
        assert lowrank.keep_error(budget * 1.0001)(found) == 20, name


def test_a_change_of_few_directions_is_found_quickly_and_whole():
    """After its last direction only rounding is left, in which there is nothing to be found."""
    generator = torch.Generator().manual_seed(4)
    for shape in ((700, 900), (2600, 700)):
        change = torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)
        found = leading_spectrum(change, 32, torch.Generator().manual_seed(0))
        assert float((change - found.truncated(8).dense()).norm() / change.norm()) < 1e-5


def test_directions_that_do_not_settle_are_found_exactly(home, tmp_path, monkeypatch):
    """SDXL has layers large enough for the quick way."""
    here = home("sdxl")
    config = {"base": str(here / "base"), "tuned": str(here / "tuned"), "rank": 2, "dtype": "float32"}
    quick = extract(config | {"out": str(tmp_path / "quick.safetensors")})
    assert quick["exact"] < quick["layers"]
    monkeypatch.setattr(lowrank, "BLOCKS", 1)
    exact = extract(config | {"out": str(tmp_path / "exact.safetensors")})
    assert exact["exact"] == exact["layers"]
    assert exact["error"] * (1 - 1e-6) < quick["error"] < exact["error"] * (1 + lowrank.SETTLED)


def test_a_budget_that_the_quick_way_does_not_meet_is_met_exactly(home, tmp_path):
    here = home("sdxl")
    told = extract({"base": str(here / "base"), "tuned": str(here / "tuned"), "error": 0.2, "out": str(tmp_path / "out.safetensors")})
    assert max(told["ranks"]) <= 3
    assert 0 < told["error"] <= told["worst_error"] <= 0.2 + 1e-3


def test_equal_calls_write_equal_bytes_and_a_dry_run_none(home, tmp_path):
    here = home("sdxl")
    config = {"base": str(here / "base.safetensors"), "tuned": str(here / "tuned"), "rank": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    told = [extract(config | {"out": str(folder / "lora.safetensors")}) for folder in (one, two)]
    assert (one / "lora.safetensors").read_bytes() == (two / "lora.safetensors").read_bytes()
    dry = extract(config | {"dry_run": True})
    assert {name: value for name, value in told[0].items() if name in dry} == dry | {"out": told[0]["out"], "dry_run": False}


def test_what_cannot_be_is_refused(home, tuned_by, tmp_path):
    here, out = home("flux"), tmp_path / "out.safetensors"
    config = {"base": str(here / "base"), "tuned": str(here / "tuned"), "out": str(out)}
    with pytest.raises(ConfigError, match="energy and error both say"):
        extract(config | {"energy": 0.5, "error": 0.5})
    with pytest.raises(ConfigError, match="base and tuned are both"):
        extract(config | {"tuned": config["base"]})
    with pytest.raises(ConfigError, match="out is not set"):
        extract(config | {"out": None})
    with pytest.raises(ConfigError, match="one of the inputs"):
        extract(config | {"tuned": str(here / "tuned.safetensors"), "out": str(here / "tuned.safetensors"), "overwrite": True})
    weights = here / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ConfigError, match="one of the inputs"):
        extract(config | {"out": str(weights), "overwrite": True})
    with pytest.raises(LoraError, match="no LoRA format nonsense"):
        extract(config | {"format": "nonsense"})
    with pytest.raises(ModelError, match=r"is a LoRA: it is not a base model"):
        extract(config | {"tuned": str(here / "lora.safetensors")})
    with pytest.raises(ModelError, match=r"is of flux and .* of sdxl"):
        extract(config | {"tuned": str(home("sdxl") / "tuned")})
    with pytest.raises(ModelError, match="not finite"):
        extract(config | {"tuned": tuned_by(lambda key, tensor: tensor * float("nan") if key.endswith("img_in.weight") else tensor)})
    smaller = tmp_path / "smaller"
    shutil.copytree(here / "base", smaller)
    path = smaller / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: t[:, :16].contiguous() if key == "x_embedder.weight" else t for key, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"have weights of different sizes: transformer\.x_embedder"):
        extract(config | {"tuned": str(smaller)})
    assert not out.exists()


def test_both_ways_from_the_command_line_without_the_big_libraries(home, tmp_path):
    here, baked, out = home("sdxl"), tmp_path / "baked.safetensors", tmp_path / "lora.safetensors"
    code = (
        "import json, sys; from charforgex.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "print({'diffusers', 'transformers', 'peft', 'lightning', 'accelerate'} & set(sys.modules))"
    )
    bake = ["lora", "bake", str(here / "lora.safetensors"), f"base={here / 'base.safetensors'}", f"out={baked}"]
    extract = ["lora", "extract", f"base={here / 'base'}", f"tuned={baked}", f"out={out}", "rank=2"]
    done = subprocess.run([sys.executable, "-c", code, json.dumps([bake, extract])], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
    assert "change of the weights" in done.stderr
    assert "relative error, all layers" in done.stderr
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
