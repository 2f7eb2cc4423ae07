"""The whole way through the entry points, as a user goes it, on a base of random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *overrides: str, folder: Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, ROOT / script, *overrides], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `train.py debug=tiny` ran, its run folder and its output."""
    folder = tmp_path_factory.mktemp("user")
    output = run("train.py", "debug=tiny", folder=folder)
    (run_dir,) = (folder / "runs").glob("debug-*")
    return folder, run_dir, output


def test_a_run_leaves_what_the_readme_says(trained):
    folder, run_dir, output = trained
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result["identity"]) == {"floor", "base", "lora", "ceiling", "gain"}
    assert set(result["prompt_following"]) == {"base", "lora", "ratio"}
    assert result["steps"] == 4 and result["seconds"] > 0 and result["peak_memory_bytes"] > 1 << 20
    for name in ("lora", "lora_diffusers", "sheet", "curves", "config"):
        assert (folder / result[name]).is_file(), name
    assert (run_dir / "provenance.json").is_file()
    assert len(list((run_dir / "samples").glob("*.png"))) == 2
    assert Image.open(run_dir / "sheet.png").width > 300
    assert "python generate.py lora=" in output


def test_before_the_first_step_it_says_what_will_be_trained(trained):
    *_, output = trained
    flat = " ".join(output.split())
    for words in ("DDPM epsilon", "min-SNR 5", "t = 0 clean", "scale alpha/rank 1", "layers", "prompt 5", "are cut off", "for 4 steps"):
        assert words in flat, words


def test_the_lora_says_what_it_is(trained):
    _, run_dir, _ = trained
    with safe_open(run_dir / "debug.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-xl")
    assert metadata["modelspec.trigger_phrase"].startswith("zatoki ")
    assert metadata["ss_network_dim"] == "4"
    assert len(metadata["charforgex.config_sha256"]) == len(metadata["charforgex.dataset_sha256"]) == 64
    assert all(key.startswith("lora_unet_") for key in keys)


def test_generate_draws_with_it(trained):
    folder, run_dir, _ = trained
    output = run(
        "generate.py", f"lora={run_dir / 'debug.safetensors'}", "prompt=a portrait of a {trigger}, smiling", "count=2", "steps=2",
        "width=32", "height=32", "out=pictures", folder=folder,
    )  # fmt: skip
    result = json.loads((folder / "pictures" / "result.json").read_text())
    assert len(result["pictures"]) == 2, output
    picture = Image.open(folder / result["pictures"][0]["file"])
    assert "zatoki" in picture.text["parameters"] and "Lora hashes" in picture.text["parameters"]


def test_evaluate_judges_its_checkpoints(trained):
    """By the adapters that training itself saved: the best checkpoint's is the run's LoRA, bit for bit."""
    folder, run_dir, _ = trained
    output = run(
        "evaluate.py", f"lora={run_dir}", "metric=[identity]", "pack=[]", "prompt=a portrait of a {trigger}", "count=1", "steps=1",
        "out=judged", folder=folder,
    )  # fmt: skip
    result = json.loads((folder / "judged" / "result.json").read_text())
    best = next(one for one in result["contestants"] if one["name"].endswith(", best"))
    assert result["recommended"]["contestant"] in output and result["metrics"]["identity"]["values"][best["name"]]["count"] == 1
    own, saved = (load_file(path) for path in (folder / best["loras"][0]["path"], run_dir / "debug.safetensors"))
    assert own.keys() == saved.keys() and all(torch.equal(own[key], saved[key]) for key in own)


def test_the_same_command_after_the_end_makes_a_new_run(trained):
    folder, run_dir, _ = trained
    run("train.py", "debug=tiny", "trainer.steps=4", folder=folder)
    assert (folder / "runs" / f"{run_dir.name}-2" / "result.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=nowhere", "data.trigger=x"], "nowhere"),
        (["data.source=charworld:x"], "charworld:"),
        (["data.trigger=bob"], "has no effect"),
        (["family.source=nowhere"], "nowhere"),
        (["loss.huber_delta=0.2"], "loss.kind=huber"),
        (["lora.targets=atention"], "attention"),
        (["lora.targets=[to_x]"], "to_x"),
        (["resume=nowhere"], "config.yaml"),
        (["data.resolution=30"], "resolution"),
        (["evaluation.others=nowhere"], "nowhere"),
        (["sampling.scheduler=eular"], "euler"),
    ],
)
def test_bad_settings_end_in_one_clear_line(tmp_path, overrides, words):
    output = run("train.py", "debug=tiny", *overrides, folder=tmp_path, code=2)
    assert "Traceback" not in output
    assert words in output


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    output = run("train.py", "debug=tiny", "logger=wandb", "logger.offline=true", folder=tmp_path)
    (run_dir,) = (tmp_path / "runs").glob("debug-*")
    files = list(run_dir.rglob("run-*.wandb"))
    if not files and "W&B wrote no run file" in " ".join(output.split()):
        pytest.skip(f"wandb itself wrote nothing on this machine, and the run said so:\n{output}")
    assert len(files) == 1 and files[0].stat().st_size > 1000, output
    assert list(files[0].parent.rglob("media/images/samples_*.png")), "the sheets of its evaluations"


SAID = {
    "sdxl": ["DDPM epsilon", "min-SNR 5", "t = 1 noise, uniform"],
    "flux": ["rectified flow, velocity, guidance vector 1", "weighting none", "logit_normal, shifted by 1.58 for the largest picture"],
    "sd3": ["rectified flow, velocity", "weighting none", "logit_normal, shifted by 1.878"],
}
ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base/lora", "flux": "flux-1-dev/lora", "sd3": "stable-diffusion-3"}


@pytest.mark.parametrize("family", SAID)
def test_five_lines_of_python(tmp_path, monkeypatch, capsys, family):
    """Each family goes the same way: trained, saved, and drawn with."""
    monkeypatch.chdir(tmp_path)
    import charforgex

    result = charforgex.train(family=family, debug="tiny", name="python", **{"trainer.steps": 2})
    drawn = charforgex.generate(
        lora=result["lora"], prompt="a portrait of a {trigger}", count=1, steps=2, width=32, height=32, out="pictures"
    )
    output = " ".join(capsys.readouterr().out.split())
    for words in (*SAID[family], "t = 0 clean", "scale alpha/rank 1", "are cut off", "for 2 steps"):
        assert words in output, words
    with safe_open(result["lora"], "pt") as file:
        assert file.metadata()["modelspec.architecture"].startswith(ARCHITECTURES[family])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if ".lora_up." in key), "nothing was learnt"
    assert Image.open(tmp_path / drawn["pictures"][0]["file"]).size == (32, 32)
