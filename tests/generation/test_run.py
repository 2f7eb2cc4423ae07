"""run.py end to end on a tiny base in a diffusers folder: pictures, grids, LoRA strengths, and what is refused before weights load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import charforgex
from charforgex import cli
from charforgex.config import bind, compose, conf_folder
from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families.registry import get
from charforgex.families.sdxl import Sdxl
from charforgex.families.settings import FamilySettings
from charforgex.generation.metadata import read_recipe
from charforgex.generation.report import _layout
from charforgex.generation.settings import Settings
from charforgex.generation.stack import _recipe
from charforgex.lora import metadata, writing
from charforgex.lora.state import Lora, LoraLayer

FAMILY = Sdxl()
QUICK = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    FAMILY.pipeline(FAMILY.tiny()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weightless(base, tmp_path_factory):
    """The base with files that hold no weights: whoever tries to load them fails, so other errors came first."""
    return without_weights(base, tmp_path_factory.mktemp("weightless") / "tiny-base")


def without_weights(base, folder):
    shutil.copytree(base, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def flow_bases(tmp_path_factory):
    """Of Flux and SD3, whole and with files that hold no weights."""
    found = {}
    for name in ("flux", "sd3"):
        family, folder = get(name), tmp_path_factory.mktemp(name) / "tiny-base"
        family.pipeline(family.tiny()).save_pretrained(folder)
        found[name] = folder, without_weights(folder, folder.with_name("weightless"))
    return found


def lora_file(path, base, trigger="zqx", seed=0, family=FAMILY, **headers):
    denoiser = family.tiny().denoiser
    draw = torch.Generator().manual_seed(seed)
    layers = {
        f"{family.denoiser_name}.{name}": LoraLayer(
            torch.randn(2, module.in_features, generator=draw), torch.randn(module.out_features, 2, generator=draw), alpha=2.0
        )
        for name, module in denoiser.named_modules()
        if name.endswith(("to_q", "to_v"))
    }
    lora = Lora(layers)
    header = metadata.build(lora, family, title=path.stem, base=str(base), trigger=trigger) | headers
    header = {key: value for key, value in header.items() if value is not None}
    format = "kohya" if family is FAMILY else "diffusers"
    return writing.write(lora, path, format, family, denoiser.config, torch.float32, header)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return lora_file(tmp_path_factory.mktemp("lora") / "zqx.safetensors", base)


def pixels(path):
    return np.asarray(Image.open(path))


def test_prompts_by_seeds_by_strengths(base, lora, tmp_path):
    """Base and family come from the LoRA. At strength 0 the pictures are the base's own, bit for bit."""
    prompts = ["a portrait of {trigger}, {red|blue} hat", "a cat"]
    run = charforgex.generate(lora=lora, prompt=prompts, scales=[0, 1], seeds=[5, 9], batch_size=2, out=tmp_path / "grid", **QUICK)
    made = [(p["template"], p["seed"], p["scales"]["zqx"]) for p in run["pictures"]]
    assert made == [(prompt, seed, scale) for prompt in prompts for seed in (5, 9) for scale in (0.0, 1.0)]
    assert run["pictures"][0]["prompt"] in ("a portrait of zqx, red hat", "a portrait of zqx, blue hat")
    assert (run["family"], run["base"]) == ("sdxl", str(base))
    assert run == json.loads((tmp_path / "grid" / "result.json").read_text())
    assert {path.name for path in (tmp_path / "grid").glob("*")} >= {"sheet.png", "config.yaml", "provenance.json", "result.json"}

    said = [pictures["prompt"] for pictures in run["pictures"][::2]]
    plain = charforgex.generate(base=base, prompt=said[2], seeds=[5, 9], out=tmp_path / "plain", sheet=False, **QUICK)
    assert plain["sheets"] == [] and plain["loras"] == []
    off, on, own = (
        [p["file"] for p in run["pictures"][4::2]], [p["file"] for p in run["pictures"][5::2]], [p["file"] for p in plain["pictures"]],
    )  # fmt: skip
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(off, own, strict=True))
    assert all(np.abs(pixels(a).astype(int) - pixels(b)).max() > 1 for a, b in zip(on, own, strict=True))

    recipe = read_recipe(run["pictures"][1]["file"])
    assert (recipe.prompt, recipe.seed, recipe.scheduler_class) == (run["pictures"][1]["prompt"], 5, "EulerDiscreteScheduler")
    assert [(use.name, use.scale) for use in recipe.loras] == [("zqx", 1.0)]
    assert recipe.loras[0].autov3 == metadata.hashes(lora)["autov3"]
    assert recipe.base == "tiny-base" and len(recipe.base_sha256) == 64


@pytest.mark.parametrize(("name", "numbers"), [("flux", (28, 3.5, 1.0)), ("sd3", (40, 4.5, None))])
def test_loras_of_flux_and_sd3(flow_bases, tmp_path, name, numbers):
    """Base and family come from the LoRA, the numbers from the published base that is most like it, and both into the files."""
    base, _ = flow_bases[name]
    lora = lora_file(tmp_path / "zqx.safetensors", base, family=get(name))
    ask = {"prompt": "{trigger}, {red|blue} hat", "count": 1, "width": 48, "height": 32, "batch_size": 1}  # another batch, other rounding
    run = charforgex.generate(lora=lora, scales=[0, 1], out=tmp_path / "grid", **ask)
    published = {"flux": "flux_dev", "sd3": "sd35_medium"}[name]
    plain = charforgex.generate(family=published, base=base, trigger="zqx", out=tmp_path / "plain", **ask)
    assert plain["settings"] == run["settings"]
    assert (run["family"], run["base"]) == (name, str(base))
    assert tuple(run["settings"][key] for key in ("steps", "guidance", "true_guidance")) == numbers
    off, on, own = (pixels(picture["file"]) for picture in (*run["pictures"], *plain["pictures"]))
    assert np.array_equal(off, own) and np.abs(on.astype(int) - own).max() > 1 and own.shape == (32, 48, 3)

    recipe = read_recipe(run["pictures"][1]["file"])
    assert (recipe.family, recipe.steps, recipe.guidance, recipe.true_guidance) == (name, *numbers)
    assert recipe.scheduler_class == "FlowMatchEulerDiscreteScheduler" and recipe.prompt.startswith("zqx, ")
    said = Image.open(run["pictures"][1]["file"]).text["parameters"]
    assert ("CFG scale: 1, Distilled CFG Scale: 3.5" if name == "flux" else "CFG scale: 4.5, Seed") in said and "Sampler: Euler" in said


def test_flux_with_a_negative_prompt(flow_bases, tmp_path):
    ask = {"family": "flux_dev", "base": flow_bases["flux"][0], "prompt": "a cat", "count": 2, "sheet": False, **QUICK}
    runs = [
        charforgex.generate(**ask, out=tmp_path / str(number), **more)
        for number, more in enumerate([{}, {"true_guidance": 3}, {"true_guidance": 3, "negative": "a dog", "scheduler": "dpmpp_2m"}])
    ]
    made = [[pixels(picture["file"]) for picture in run["pictures"]] for run in runs]
    assert not any(np.array_equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(made[1], made[2], strict=True))
    assert [run["settings"]["true_guidance"] for run in runs] == [1, 3, 3] and runs[2]["settings"]["guidance"] == 3.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flux", {"negative": "dark"}, "negative=dark has no effect with true_guidance=1; true_guidance must be above 1"),
        ("flux", {"guidance_rescale": 0.7}, "guidance_rescale=0.7 has no meaning for flux"),
        ("flux", {"scheduler": "euler_a"}, "scheduler=euler_a is for diffusion models with betas.*use one of checkpoint, euler"),
        ("flux", {"width": 40}, "width=40: 40 is not a multiple of 16"),
        ("sd3", {"true_guidance": 2}, "true_guidance=2 has no meaning for sd3"),
        ("sd3", {"guidance": 1, "negative": "dark"}, "negative=dark has no effect with guidance=1"),
        ("sd3", {"family.recipe.true_guidance": 2}, "true_guidance=2 has no meaning for sd3"),
    ],
)
def test_refused_of_flux_and_sd3_before_weights_load(flow_bases, tmp_path, name, settings, message):
    published = {"flux": "flux_dev", "sd3": "sd3_medium"}
    ask = {"family": published[name], "base": flow_bases[name][1], "prompt": "a", "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match=message):
        charforgex.generate(**ask | settings)
    with pytest.raises(ModelError, match="is not a whole"):  # the check of the check
        charforgex.generate(**ask)


def test_numbers_are_the_familys():
    """Of the choice that was made; else of the one that names this base; else of the published base most like it."""
    choices = {path.stem: OmegaConf.load(path) for path in (conf_folder() / "family").glob("*.yaml")}

    def numbers(name, base, config, settings=None):
        found = _recipe(settings or Settings(), get(name), base, config)
        return found.sampling_steps, found.guidance, found.true_guidance

    def written(choice):
        return tuple(choices[choice].recipe[key] for key in ("sampling_steps", "guidance", "true_guidance"))

    for stem, choice in choices.items():
        assert numbers(choice.name, choice.source, {}) == written(stem)
    like = {
        "sdxl_base": ("sdxl", {}), "flux_dev": ("flux", {"guidance_embeds": True}), "flux_schnell": ("flux", {"guidance_embeds": False}),
        "sd3_medium": ("sd3", {"num_layers": 24}), "sd35_large": ("sd3", {"num_layers": 38, "dual_attention_layers": []}),
        "sd35_medium": ("sd3", {"num_layers": 24, "dual_attention_layers": [0, 1]}), "animatediff_v3": ("animatediff", {}),
    }  # fmt: skip
    for stem, (name, config) in like.items():
        assert get(name).published(config) == stem
        assert numbers(name, "my/own", config) == written(stem)
    chosen = Settings(family=bind(FamilySettings, choices["flux_schnell"], "family"))
    assert numbers("flux", "black-forest-labs/FLUX.1-dev", {}, chosen) == written("flux_schnell")


def test_the_guides_table_is_what_the_files_say():
    import re

    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text("utf-8").split("## Bases")[1].split("\n## ")[0]
    told = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|$", page, re.M)}
    found = {}
    for path in (conf_folder() / "family").glob("*.yaml"):
        choice = bind(FamilySettings, OmegaConf.load(path), path.stem)
        true = f"{choice.recipe.true_guidance:g}" if get(choice.name).has_true_guidance else ""
        found[path.stem] = (str(choice.recipe.sampling_steps), f"{choice.recipe.guidance:g}", true)
    assert told == found


def test_settings_of_training_are_refused_where_they_are_set():
    """They come with a family's choice, and only three of them have an effect here."""
    cfg = compose("generate", ["family=flux", "family.recipe.sampling_steps=7", "family.recipe.guidance=2", "family.tokenizer=here"])
    assert cfg.family.recipe.sampling_steps == 7
    compose("generate", ["family=flux_dev", "family.source=somewhere"])
    with pytest.raises(ConfigError) as refused:
        compose("generate", ["family=flux", "family.dtype=bfloat16", "family.recipe.lr=1", "family.recipe.steps=3"])
    assert str(refused.value).splitlines() == [
        "family.dtype=bfloat16 has no effect here: it is of training; say dtype=...",
        "family.recipe.steps=3 has no effect here: it is of training; leave it out",
        "family.recipe.lr=1 has no effect here: it is of training; leave it out",
    ]
    compose("train", ["family=flux", "family.dtype=bfloat16", "family.recipe.lr=1"])


def test_same_settings_same_bytes(base, tmp_path):
    settings = {"base": base, "prompt": "a cat", "seed": 3, "count": 3, "sheet": False, "scheduler": "euler_a", **QUICK}
    one, two = (charforgex.generate(**settings, out=tmp_path / name)["pictures"] for name in ("one", "two"))
    with_sizes = charforgex.generate(**settings | {"batch_size": 1}, out=tmp_path / "three")["pictures"]
    for a, b, c in zip(one, two, with_sizes, strict=True):
        assert Path(a["file"]).read_bytes() == Path(b["file"]).read_bytes()
        assert np.abs(pixels(a["file"]).astype(int) - pixels(c["file"])).max() <= 1  # rounding


def test_two_loras_add_up(base, lora, tmp_path):
    other = lora_file(tmp_path / "other" / "zqx.safetensors", base, trigger="abc", seed=1)
    run = charforgex.generate(lora=[lora, other], scale=[0.5, 0], prompt="{trigger}", count=1, out=tmp_path / "two", **QUICK)
    alone = charforgex.generate(lora=lora, scale=0.5, prompt="zqx, abc", count=1, out=tmp_path / "one", **QUICK)
    assert run["pictures"][0]["prompt"] == "zqx, abc"
    assert run["pictures"][0]["scales"] == {"zqx": 0.5, "zqx-2": 0.0}
    assert np.array_equal(pixels(run["pictures"][0]["file"]), pixels(alone["pictures"][0]["file"]))
    both = charforgex.generate(lora=[lora, other], scale=0.5, prompt="{trigger}", count=1, out=tmp_path / "both", **QUICK)
    assert not np.array_equal(pixels(both["pictures"][0]["file"]), pixels(alone["pictures"][0]["file"]))


def test_long_prompts_are_reported(base, tmp_path):
    run = charforgex.generate(base=base, prompt="a cat " * 60, count=1, out=tmp_path / "x", sheet=False, **QUICK)
    (cut,) = run["truncated"]
    assert cut["tokens_cut"] == max(n for _, n in FAMILY.seen_text(FAMILY.tiny(), "a cat " * 60)) > 40
    assert cut["seen"].startswith("a cat a cat") and len(cut["seen"]) < len(cut["prompt"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "no prompt is given"),
        ({"prompt": "a", "steps": 0}, ConfigError, "steps=0 is out of range"),
        ({"prompt": "a", "steps": 2000}, ConfigError, "steps=2000 is out of range; this checkpoint takes 1 to 1000"),
        ({"prompt": "a", "guidance": -1}, ConfigError, "guidance=-1"),
        ({"prompt": "a", "guidance": 1, "negative": "dark"}, ConfigError, "negative=dark has no effect with guidance=1"),
        ({"prompt": "a", "scheduler": "eular"}, ConfigError, "did you mean euler"),
        ({"prompt": "a", "width": 100}, ConfigError, "width=100: 100 is not a multiple of 16, which this base needs; try 96 or 112"),
        ({"prompt": "a {trigger}"}, ConfigError, "no LoRA here carries a trigger word"),
        ({"prompt": "a", "trigger": "zqx"}, ConfigError, "trigger=zqx has no effect"),
        ({"prompt": "a <lora:b:1>"}, ConfigError, "load it with lora="),
        ({"prompt": "a", "scale": 0.5}, ConfigError, "scale has no effect without a LoRA"),
        ({"prompt": "a", "seeds": []}, ConfigError, "seeds=\\[\\] is an empty list"),
        ({"prompt": "a", "device": "cuda:99"}, ConfigError, "device=cuda:99 is not on this machine"),
        ({"prompt": "a", "lora": "nowhere.safetensors"}, LoraError, "There is no LoRA file nowhere.safetensors"),
        ({"prompt": "a", "base": "no/such/base"}, ModelError, "does not exist"),
        ({"prompt": "a", "overwrite": True, "out": None}, ConfigError, "overwrite=true has no effect"),
        ({"prompt": "a", "promt": "b"}, ConfigError, "did you mean prompt"),
        ({"prompt": "a", "wildcard_dir": "nowhere"}, ConfigError, "wildcard_dir=nowhere is not a folder"),
    ],
)
def test_refused_before_weights_load(weightless, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        charforgex.generate(**{"base": weightless, "out": tmp_path / "out"} | settings)
    assert not (tmp_path / "out").exists()


def test_loras_are_checked_before_weights_load(weightless, tmp_path):
    ask = {"prompt": "a", "out": tmp_path / "out"}
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(LoraError, match=r"broken.safetensors is damaged"):
        charforgex.generate(lora=tmp_path / "broken.safetensors", base=weightless, **ask)

    good = lora_file(tmp_path / "good.safetensors", weightless)
    with pytest.raises(ConfigError, match=r"scale=\[1.0, 2.0\] has 2 strengths for 1 LoRAs"):
        charforgex.generate(lora=good, scale=[1, 2], **ask)
    with pytest.raises(LoraError, match="names a file twice"):
        charforgex.generate(lora=[good, good], **ask)

    moved = lora_file(tmp_path / "moved.safetensors", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"moved.safetensors was trained on .*elsewhere, which is not to be had here: .* Say base="):
        charforgex.generate(lora=moved, **ask)

    silent = lora_file(tmp_path / "silent.safetensors", weightless, **{"charforgex.base": None})
    with pytest.raises(ConfigError, match="does not say which base model it was trained on; say base="):
        charforgex.generate(lora=silent, **ask)

    other = lora_file(tmp_path / "other.safetensors", weightless, **{"charforgex.family": "kolors"})
    with pytest.raises(ConfigError, match=r"family\.name=kolors is unknown"):
        charforgex.generate(lora=other, **ask)
    with pytest.raises(LoraError, match=r"other.safetensors is for kolors and not for sdxl"):
        charforgex.generate(lora=other, family="sdxl", base=weightless, **ask)

    tensors = load_file(good)
    tensors["lora_unet_nowhere.lora_down.weight"] = torch.ones(2, 4)
    save_file(tensors, tmp_path / "stray.safetensors", {"charforgex.family": "sdxl"})
    with pytest.raises(LoraError, match=r"1 of \d+ keys belong to no module of this sdxl model: lora_unet_nowhere"):
        charforgex.generate(lora=tmp_path / "stray.safetensors", base=weightless, **ask)

    with pytest.raises(ModelError, match="is not a whole"):  # the check of the check: with all else right, weights are what is missing
        charforgex.generate(lora=good, **ask)


def test_foreign_loras_are_known_by_their_headers(base, tmp_path):
    ours = dict.fromkeys(("charforgex.family", "charforgex.base", "charforgex.trigger"))
    foreign = lora_file(tmp_path / "foreign.safetensors", base, trigger="abc", **ours)
    run = charforgex.generate(lora=foreign, base=base, prompt="{trigger}", count=1, out=tmp_path / "out", **QUICK)
    assert run["family"] == "sdxl" and run["pictures"][0]["prompt"] == "abc"


def test_a_base_of_another_family_says_so(flow_bases):
    with pytest.raises(ModelError, match=r"holds a FluxPipeline.*so sdxl was taken; say family=<one of sdxl, flux, sd3>"):
        charforgex.generate(base=flow_bases["flux"][1], prompt="a")


def test_a_base_of_another_prediction_is_warned_of(base, tmp_path):
    wrong = lora_file(tmp_path / "wrong.safetensors", base, **{"modelspec.prediction_type": "v"})
    run = charforgex.generate(lora=wrong, prompt="a", count=1, out=tmp_path / "out", **QUICK)
    assert run["warnings"][0].startswith("wrong.safetensors was trained on a base that predicts v_prediction")


def test_rectified_flows_have_one_prediction_whatever_a_file_says(flow_bases, tmp_path):
    lora = lora_file(tmp_path / "a.safetensors", flow_bases["sd3"][0], family=get("sd3"), **{"modelspec.prediction_type": "epsilon"})
    assert charforgex.generate(lora=lora, prompt="a", count=1, out=tmp_path / "out", **QUICK)["warnings"] == []


def test_earlier_pictures_are_not_overwritten(weightless, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds the pictures of an earlier run; choose another folder, or say overwrite=true"):
        charforgex.generate(base=weightless, prompt="a", out=tmp_path)


def test_combinations_of_strengths():
    assert Settings().combinations() == [()]
    assert Settings(lora=["a", "b"]).combinations() == [(1.0, 1.0)]
    assert Settings(lora=["a", "b"], scale=[0.5, 0.2]).combinations() == [(0.5, 0.2)]
    assert Settings(lora=["a", "b"], scales=[0, [1, 0.5], 0]).combinations() == [(0, 0), (1, 0.5)]
    with pytest.raises(ConfigError, match="scale and scales are both given"):
        Settings(lora="a", scale=1, scales=[1])


def test_sheets_hold_at_most_eight_columns():
    def pictures(seeds, scales):
        return [
            {"file": f"{prompt}{seed}{scale}", "prompt": prompt, "template": prompt, "seed": seed, "scales": {"x": scale}}
            for prompt in "ab"
            for seed in seeds
            for scale in scales
        ]

    columns, rows = _layout(pictures(range(3), [1.0]))
    assert columns == ["seed 0", "seed 1", "seed 2"]
    assert rows == [("a", ["a01.0", "a11.0", "a21.0"]), ("b", ["b01.0", "b11.0", "b21.0"])]
    columns, rows = _layout(pictures(range(11), [1.0]))
    assert columns == [] and [len(files) for _, files in rows] == [8] * 4
    assert rows[1][0] == "a\nseeds 8 to 10" and rows[1][1][2:] == ["a101.0", *[None] * 5]
    columns, rows = _layout(pictures([4, 5], [1.0])[:2] * 2)  # the same prompt twice, which wildcards may make differ
    assert columns == ["seed 4", "seed 5"] and [label for label, _ in rows] == ["a", "a"]
    columns, rows = _layout(pictures([4], [0.0, 0.5]))
    assert columns == ["x 0", "x 0.5"] and rows[0] == ("a\nseed 4", ["a40.0", "a40.5"])


def test_the_command_line_takes_prompts_as_they_are_typed(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [f"base={base}", "prompt=a cat, {red|blue} hat = fine (really)", "count=1", *(f"{k}={v}" for k, v in QUICK.items())]
    with pytest.raises(SystemExit) as done:
        cli.run("generate", arguments)
    assert done.value.code == 0
    (picture,) = tmp_path.glob("generated/*/001_*.png")
    assert read_recipe(picture).template == "a cat, {red|blue} hat = fine (really)"


def test_errors_end_in_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as done:
        cli.run("generate", ["prompt=a, b", "steps=0"])
    assert done.value.code == 2
    assert capsys.readouterr().err.strip() == "ConfigError: steps=0 is out of range; it must be at least 1"


def test_wandb_offline_and_tensorboard(base, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    logger = {"logger": "wandb", "logger.offline": True}
    charforgex.generate(base=base, prompt="a cat", count=1, out=out, **QUICK, **logger)
    assert list(out.glob("wandb/offline-run-*/*.wandb")) and list(out.glob("tensorboard/events.*"))


def test_pictures_carry_no_folders_of_the_bases_files(tmp_path):
    from charforgex.generation.run import public_name

    one, two = tmp_path / "flux1-dev.safetensors", tmp_path / "ae.safetensors"
    one.touch(), two.touch()
    assert public_name(str(one)) == "flux1-dev.safetensors"
    assert public_name(f"{one}+{two}+black-forest-labs/FLUX.1-dev") == "flux1-dev.safetensors+ae.safetensors+black-forest-labs/FLUX.1-dev"
