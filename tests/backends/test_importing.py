"""ai-toolkit's and kohya's settings as ours: what is said, what is their default, and what has no equal."""

import os
from pathlib import Path

import pytest
import yaml

from charforgex.backends import ai_toolkit, kohya, run
from charforgex.backends.common import Given, Pictures
from charforgex.backends.importing import import_config, read
from charforgex.backends.wanted import Wanted
from charforgex.config import compose
from charforgex.errors import ConfigError

MODULES = {"ai_toolkit": ai_toolkit, "kohya": kohya}
FLUX_FILES = "flux1-dev.safetensors+clip_l.safetensors+t5xxl.safetensors+ae.safetensors"

FLUX_YAML = """
job: extension
config:
  name: my_flux
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 32}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - {folder_path: /pictures, caption_ext: txt, caption_dropout_rate: 0.05, cache_latents_to_disk: true, resolution: [512, 768, 1024]}
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        linear_timesteps: true
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign", "[trigger] at the beach"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: '1.0'}
"""


def test_an_ai_toolkit_example(tmp_path):
    path = tmp_path / "flux.yaml"
    path.write_text(FLUX_YAML)
    imported = read([path])
    assert imported.groups == {"family": "flux_dev", "curation": "none", "optimizer": "adamw8bit"}
    values = imported.values
    assert values["lora"] == {"rank": 16, "alpha": 16, "targets": "all"}  # alpha is the rank there, whatever is said
    assert values["optimizer"] == {"lr": 1e-4, "weight_decay": 0.01, "schedule": "constant", "warmup": 0, "grad_clip": 1.0}
    assert values["trainer"] == {
        "steps": 2000, "accumulate": 1, "checkpoint_every": 250, "keep": 4, "gradient_checkpointing": True, "ema": 0.99
    }  # fmt: skip
    assert values["loss"] == {"weighting": "none", "timesteps": "logit_normal", "shift": 1}
    assert values["data"]["trigger"] == "p3r5on" and values["data"]["resolution"] == [512, 768, 1024]
    assert values["evaluation"]["prompts"] == ["{trigger} holding a sign", "{trigger} at the beach"]
    assert values["sampling"]["guidance"] == 4
    assert {name: why for name, _, why in imported.lost} == {
        "model.quantize": "how it runs, not what is trained: backend=ai_toolkit has it, or what this program does by itself",
        "train.linear_timesteps": "no equal here is known",
    }


KOHYA_TOML = """
[model]
pretrained_model_name_or_path = "/m/flux1-dev.safetensors"
clip_l = "/m/clip_l.safetensors"
t5xxl = "/m/t5xxl_fp16.safetensors"
ae = "/m/ae.safetensors"
[network]
network_module = "networks.lora_flux"
network_dim = 16
network_alpha = 8
network_train_unet_only = true
network_args = ["loraplus_lr_ratio=4", "train_blocks=single"]
[train]
learning_rate = 1e-4
optimizer_type = "Prodigy"
optimizer_args = ["weight_decay=0.02", "d_coef=2", "use_bias_correction=True", "decouple=True", "safeguard_warmup=True", "slice_p=11"]
max_train_steps = 1200
timestep_sampling = "shift"
discrete_flow_shift = 3.1582
model_prediction_type = "raw"
guidance_scale = 3.5
mixed_precision = "bf16"
fp8_base = true
save_every_n_steps = 200
save_last_n_steps = 400
lr_scheduler = "cosine"
lr_warmup_steps = 0.1
seed = 42
output_name = "bob"
"""
KOHYA_DATASET = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 768
batch_size = 2
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "/d/faces"
  num_repeats = 3
  caption_prefix = "b0b, "
  [[datasets.subsets]]
  image_dir = "/d/bodies"
  num_repeats = 1
"""


def test_a_kohya_example(tmp_path):
    (tmp_path / "run.toml").write_text(KOHYA_TOML)
    (tmp_path / "data.toml").write_text(KOHYA_DATASET)
    imported = read([tmp_path / "run.toml", tmp_path / "data.toml"])
    assert imported.name == "bob" and imported.groups == {"family": "flux_dev", "curation": "none", "optimizer": "prodigy"}
    values = imported.values
    assert values["family"]["source"] == "/m/flux1-dev.safetensors+/m/clip_l.safetensors+/m/t5xxl_fp16.safetensors+/m/ae.safetensors"
    assert values["lora"] == {"rank": 16, "alpha": 8, "up_ratio": 4.0, "targets": "all"}
    assert values["optimizer"] == {
        "lr": 1e-4, "grad_clip": 1.0, "warmup": 120, "weight_decay": 0.02, "d_coef": 2.0, "schedule": "cosine"
    }  # fmt: skip
    assert values["loss"] == {"weighting": "none", "timesteps": "logit_normal", "shift": 3.1582, "logit_std": 1.0, "kind": "mse"}
    data = values["data"]
    assert (data["source"], data["repeats"], data["trigger"], data["add_trigger"]) == ("/d", {"faces": 3}, "b0b", True)
    assert (data["resolution"], data["batch_size"], data["shuffle_tags"], data["keep_tokens"], data["upscale"]) == (768, 2, True, 1, True)
    assert values["trainer"]["keep"] == 3 and values["trainer"]["ema"] == 0
    assert {name for name, _, _ in imported.lost} == {"network_args train_blocks", "optimizer slice_p", "guidance_scale", "fp8_base"}


WAYS = {
    ("ai_toolkit", "sdxl"): ["lora.alpha=8", "loss.min_snr_gamma=3", "optimizer=adamw8bit", "+data.repeats.faces=3", "trainer.ema=0.99",
                             "optimizer.schedule=constant", "text_encoder.lr=1e-5", "data.resolution=[768,1024]"],
    ("ai_toolkit", "flux"): ["loss.timesteps=uniform", "optimizer=prodigy", "optimizer.schedule=linear", "optimizer.warmup=0",
                             "optimizer.grad_clip=0", "lora.targets=attention", "loss.prior_weight=1", "evaluation.seeds=2"],
    ("ai_toolkit", "sd3"): ["loss.shift=1", "data.flip=true", "data.shuffle_tags=true", "data.keep_tokens=2", "sampling.negative=blurry"],
    ("kohya", "sdxl"): ["loss.kind=huber", "loss.huber_delta=0.2", "lora.up_ratio=4", "data.batch_size=3", "trainer.keep=4",
                        "lora.targets=attention_mlp", "+data.repeats.faces=3", "text_encoder.lr=1e-5", "loss.noise_offset=0.03"],
    ("kohya", "flux"): [f"family.source={FLUX_FILES}", "loss.logit_std=0.8", "optimizer=adafactor", "data.caption_dropout=0"],
    ("kohya", "sd3"): [f"family.source={FLUX_FILES}", "loss.timesteps=uniform", "lora.targets=attention", "optimizer=schedule_free",
                       "data.tag_separator=';'", "data.upscale=true", "sampling.negative=blurry"],
}  # fmt: skip


QUICK = (("ai_toolkit", "sdxl"), ("kohya", "flux"))


@pytest.mark.parametrize(("tool", "family"), [way if way in QUICK else pytest.param(*way, marks=pytest.mark.slow) for way in WAYS])
def test_there_and_back_again(tool, family, tmp_path):
    """Our settings in their words, imported, and said in their words again: the same."""
    module = MODULES[tool]
    given = [f"backend={tool}", "backend.folder=x", f"experiment={family}_character", "data.source=x", "data.trigger=zkx", "trainer.ema=0"]
    ways = WAYS[tool, family]
    cfg = compose("train", [*[g for g in given if g != "trainer.ema=0" or not any(w.startswith("trainer.ema") for w in ways)], *ways])
    first = said(module, cfg, tmp_path, "+data.repeats.faces=3" in ways)
    for name, text in module.texts(first).items():
        (tmp_path / name).write_text(text)
    imported = read([tmp_path / name for name in first if name != kohya.PROMPTS])
    imported.set("name", imported.name)
    assert imported.lost == [] or {name for name, _, _ in imported.lost} == {"model.quantize", "model.quantize_te"}
    again = recomposed(imported, tool)
    assert said(module, again, tmp_path, "+data.repeats.faces=3" in ways) == first


def said(module, cfg, tmp_path, several):
    """The tool's files for these settings."""
    settings = run.read(cfg.backend)
    wanted = Wanted(cfg, module.TITLE)
    parent = tmp_path / "pictures"
    pictures = (Pictures(parent / "x1"), Pictures(parent / "x3", 3)) if several else (Pictures(parent / "x1"),)
    parts = dict(zip(("transformer", "text_encoder", "text_encoder_2", "vae" if cfg.family.name == "flux" else "text_encoder_3"),
                     [Path("/m") / name for name in FLUX_FILES.split("+")], strict=True))  # fmt: skip
    prompts = tuple(prompt.replace("{trigger}", "zkx") for prompt in cfg.evaluation.prompts)
    class_word = cfg.data.class_word or "woman" if cfg.loss.prior_weight else None
    given = Given(tmp_path, module.session(tmp_path, "x"), pictures, prompts, "zkx", class_word, parts)
    config = module.translate(wanted, settings, given)
    wanted.check()
    return config


def recomposed(imported, tool):
    """The imported experiment, as a command composes it."""
    overrides = [f"{group}={choice}" for group, choice in imported.groups.items()]
    flat = [f"{'+' if key.startswith('data.repeats.') else ''}{key}={quoted(value)}" for key, value in leaves(imported.values)]
    return compose("train", [f"backend={tool}", "backend.folder=x", *overrides, *flat])


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def quoted(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(quoted(one) for one in value) + "]"
    if isinstance(value, (bool, dict)) or value is None:
        return {"True": "true", "False": "false", "None": "null"}.get(str(value), "{}")
    return str(value)


def test_the_command_writes_an_experiment_that_train_takes(tmp_path, monkeypatch, capsys):
    from charforgex.cli import main

    monkeypatch.chdir(tmp_path)
    Path("flux.yaml").write_text(FLUX_YAML)
    with pytest.raises(SystemExit) as left:
        main(["import-config", "flux.yaml"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "train.linear_timesteps=True has no equal: no equal here is known" in told
    assert "experiment/my_flux.yaml: python train.py --config-dir . experiment=my_flux" in told
    with pytest.raises(SystemExit) as left:
        main(["train", "--config-dir", ".", "experiment=my_flux", "--cfg", "job"])
    assert left.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["resolution"] == [512, 768, 1024] and shown["optimizer"]["name"] == "adamw8bit" and not shown.get("curation")
    with pytest.raises(ConfigError, match="is there already; say overwrite=true"):
        import_config(compose("import-config", ["files=flux.yaml"]))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "job: x", "is no configuration of ai-toolkit"),
        ("a.yaml", "config: {process: [{model: {name_or_path: x, arch: wan21}}]}", "trains wan21; there are sdxl, flux and sd3 here"),
        ("a.toml", "x = 1", "is no configuration of sd-scripts"),
        ("a.toml", "x = ", "is no TOML"),
        ("a.toml", "[[datasets]]\nresolution = 512", "holds datasets alone"),
        ("a.txt", "x", "one .yaml of ai-toolkit, or one .toml of kohya"),
    ],
)
def test_what_is_no_training_is_said(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        read([tmp_path / name])


@pytest.mark.parametrize("tool", MODULES)
def test_real_checkouts_know_all_that_is_written(tool, tmp_path):
    """CHARFORGEX_KOHYA and CHARFORGEX_AI_TOOLKIT name checkouts of the tools."""
    name = f"CHARFORGEX_{tool.upper()}"
    if name not in os.environ:
        pytest.skip(f"{name} names no checkout")
    known = MODULES[tool].options(Path(os.environ[name]))
    assert len(known) > 150
    for (of, family), ways in WAYS.items():
        if of == tool:
            given = [f"backend={tool}", "backend.folder=x", f"experiment={family}_character", "data.source=x", "data.trigger=zkx"]
            cfg = compose("train", [*given, *([] if any("trainer.ema" in way for way in ways) else ["trainer.ema=0"]), *ways])
            assert MODULES[tool].written(said(MODULES[tool], cfg, tmp_path, False)) <= known
