"""kohya's TOMLs as an experiment of ours. See `importing`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charforgex.backends import kohya as tool
from charforgex.backends.importing import Imported, Theirs, choose_base, choose_optimizer, join_folders, number
from charforgex.errors import ConfigError

DEFAULTS = {  # of its parsers, for what is not said
    "output_name": "kohya", "seed": 0, "network_dim": 4, "network_alpha": 1, "max_train_steps": 1600, "gradient_accumulation_steps": 1,
    "save_every_n_steps": None, "sample_every_n_steps": None, "learning_rate": 2e-6, "max_grad_norm": 1.0, "lr_warmup_steps": 0,
}  # fmt: skip
OPTIONAL = ("save_every_n_steps", "sample_every_n_steps")  # ours stays the recipe's
# Places, logs, caches, precision while it runs, and what is so here anyway
OF_NO_CONCERN = (
    "output_dir", "logging_dir", "log_with", "log_prefix", "log_tracker_name", "wandb_run_name", "save_model_as", "save_precision",
    "save_state", "save_state_on_train_end", "save_last_n_steps_state", "sdpa", "xformers", "mem_eff_attn", "lowram", "highvram",
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "vae_batch_size",
    "max_data_loader_n_workers", "persistent_data_loader_workers", "no_half_vae", "dataset_config", "network_train_unet_only", "resume",
    "initial_step", "skip_until_initial_step", "training_comment", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
    "bucket_reso_steps",
    "prior_loss_weight", "ae", "clip_l", "clip_g", "t5xxl", "huber_schedule", "huber_scale", "huber_c", "console_log_level",
)  # fmt: skip
RUNS = "how it runs, not what is trained: backend=kohya has it, or what this program does by itself"
OF_RUNNING = ("fp8_base", "blocks_to_swap", "full_bf16", "full_fp16", "fp8_base_unet")


def from_kohya(run: Mapping[str, Any], datasets: Mapping[str, Any] | None, path: Path) -> Imported:
    """Raises ConfigError for a file that is no training of a LoRA of our families."""
    values: dict[str, Any] = {}
    for key, value in run.items():  # its sections have free names
        values |= value if isinstance(value, Mapping) else {key: value}
    theirs = Theirs(values)
    if "pretrained_model_name_or_path" not in values:
        raise ConfigError(f"files={path} is no configuration of sd-scripts: it has no pretrained_model_name_or_path.")
    imported = Imported(str(values.get("output_name", path.stem)), lost=theirs.lost)
    family = _family(theirs, path)
    files = [theirs.get(option) for option in tool.FILES.get(family, {"pretrained_model_name_or_path": ""})]
    choose_base(imported, family, "+".join(str(file) for file in files if file))
    imported.groups["curation"] = "none"
    imported.set("family.dtype", "float32" if theirs.get("mixed_precision", "no") == "no" else "bfloat16")
    for ours, their in tool.PLAIN.items():
        value = number(theirs.get(their, DEFAULTS[their]))
        if not (value is None and their in OPTIONAL):
            imported.set(ours, value)
    imported.set("trainer.ema", 0)
    imported.set("trainer.gradient_checkpointing", bool(theirs.get("gradient_checkpointing", False)))
    if (every := imported.values["trainer"].get("checkpoint_every")) and (last := theirs.get("save_last_n_steps")) is not None:
        imported.set("trainer.keep", int(last) // int(every) + 1)
    if (rate := theirs.get("unet_lr")) is not None:
        imported.set("optimizer.lr", number(rate))
    theirs.lose("max_train_epochs", "counted in steps here: pictures x repeats x epochs / batch size")
    theirs.lose("save_every_n_epochs", "counted in steps here: trainer.checkpoint_every")
    theirs.lose("sample_every_n_epochs", "counted in steps here: evaluation.every")
    _network(imported, theirs, family)
    _optimizer(imported, theirs)
    {"flux": _flux, "sd3": _sd3}.get(family, _sdxl)(imported, theirs)
    _loss(imported, theirs)
    if not theirs.get("network_train_unet_only", False):
        rate = theirs.get("text_encoder_lr", values.get("learning_rate", DEFAULTS["learning_rate"]))
        rates = [number(one) for one in (rate if isinstance(rate, list) else [rate]) if number(one)]
        if rates:
            imported.set("text_encoder.lr", rates[0])
        if len(set(rates)) > 1:
            theirs.lose("text_encoder_lr", "one rate for all of them: the first")
    theirs.pass_over("text_encoder_lr")
    _datasets(imported, theirs, datasets)
    _prompts(imported, theirs, path)
    for key in OF_RUNNING:
        if values.get(key):
            theirs.lose(key, RUNS)
    theirs.pass_over(*OF_NO_CONCERN, *OF_RUNNING)
    theirs.rest()
    return imported


def _family(theirs: Theirs, path: Path) -> str:
    module = theirs.get("network_module", "networks.lora")
    family = next((family for family, known in tool.MODULES.items() if known == module), None)
    if family is None and module != "lycoris.kohya":
        raise ConfigError(
            f"files={path} trains network_module={module}; there are {', '.join(tool.MODULES.values())} and lycoris.kohya here."
        )
    if family is None or (family == "sdxl" and "clip_l" in theirs.values):
        family = "sd3" if "clip_g" in theirs.values else "flux" if "ae" in theirs.values else "sdxl"
    if theirs.get("v2", False) or theirs.get("v_parameterization", False):
        theirs.lose("v2", "Stable Diffusion 2 is no family here")
        theirs.lose("v_parameterization", "the base's own config says what it predicts")
    return family


def _network(imported: Imported, theirs: Theirs, family: str) -> None:
    options = dict(text.split("=", 1) for text in theirs.get("network_args", []))
    if theirs.get("network_module") == "lycoris.kohya":
        kind = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}.get(options.pop("algo", "lora"))
        if kind is None:
            theirs.lose("network_args", "a kind of adapter that is not trained here; it is lora now")
        imported.set("lora.kind", "dora" if options.pop("dora_wd", "False") == "True" else kind or "lora")
        if kind == "lokr" and int(options.get("factor", -1)) > 1:
            imported.set("lora.factor", int(options.pop("factor")))
    if ratio := options.pop("loraplus_lr_ratio", None):
        imported.set("lora.up_ratio", float(ratio))
    presets = [(name, known) for (of, name), known in tool.TARGETS.items() if of == family]
    left = {key: value for key, value in options.items() if key not in set().union(*(known for _, known in presets))}
    dims = {key: int(value) for key, value in options.items() if key not in left}
    preset = next((name for name, known in presets if known == dims), None)
    if preset is None:
        theirs.lost.append(("network_args", dims, "ranks by kind of layer are lora.ranks; it is attention_mlp now"))
    imported.set("lora.targets", preset or "attention_mlp")
    for key, value in left.items():
        theirs.lost.append((f"network_args {key}", value, "no equal here is known"))


def _optimizer(imported: Imported, theirs: Theirs) -> None:
    options = {key: _literal(value) for key, value in (text.split("=", 1) for text in theirs.get("optimizer_args", []))}
    warmup = imported.values["optimizer"]["warmup"]
    if isinstance(warmup, float) and warmup < 1:  # a share of all steps
        imported.set("optimizer.warmup", round(warmup * imported.values["trainer"]["steps"]))
    if str(theirs.values.get("optimizer_type", "")).lower() == "adamwschedulefree":
        options.pop("warmup_steps", None)
    choose_optimizer(imported, theirs, "optimizer_type", tool.OPTIMIZERS, options)
    name = theirs.get("lr_scheduler", "constant")
    ours = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
    if name not in ours:
        theirs.lose("lr_scheduler", "it is cosine now; there are constant, cosine and linear")
    imported.set("optimizer.schedule", ours.get(name, "cosine"))
    if name == "constant" and imported.groups["optimizer"] != "schedule_free":
        imported.set("optimizer.warmup", 0)


def _literal(text: str) -> Any:
    return {"True": True, "False": False, "None": None}.get(text, number(text))


def _loss(imported: Imported, theirs: Theirs) -> None:
    kind = theirs.get("loss_type", "l2")
    imported.set("loss.kind", "huber" if kind == "huber" else "mse")
    if kind == "huber":
        imported.set("loss.huber_delta", number(theirs.get("huber_c", 0.1)) * number(theirs.get("huber_scale", 1.0)))
        if theirs.get("huber_schedule", "snr") != "constant":
            theirs.lose("huber_schedule", "the same delta at all noise levels here")
    elif kind != "l2":
        theirs.lose("loss_type", "it is mse now; there is huber")


def _sdxl(imported: Imported, theirs: Theirs) -> None:
    imported.set("loss.weighting", "none")
    if gamma := theirs.get("min_snr_gamma"):
        imported.set("loss.weighting", "min_snr")
        imported.set("loss.min_snr_gamma", number(gamma))
    elif theirs.get("debiased_estimation_loss", False):
        imported.set("loss.weighting", "debiased")
    imported.set("loss.noise_offset", number(theirs.get("noise_offset", 0.0)))


def _flux(imported: Imported, theirs: Theirs) -> None:
    imported.set("loss.weighting", "none")
    sampling = theirs.get("timestep_sampling", "sigma")
    ours = next((ours for ours, their in tool.TIMESTEPS.items() if their == sampling), None)
    if sampling == "shift":
        ours = ("logit_normal", number(theirs.get("discrete_flow_shift", 3.0)))
    if ours is None:
        theirs.lost.append(("timestep_sampling", sampling, "it is loss.timesteps=logit_normal loss.shift=resolution now, their flux_shift"))
        ours = ("logit_normal", "resolution")
    theirs.pass_over("discrete_flow_shift", "timestep_sampling")
    imported.set("loss.timesteps", ours[0])
    imported.set("loss.shift", ours[1])
    scale = number(theirs.get("sigmoid_scale", 1.0))
    if ours[0] == "logit_normal":
        imported.set("loss.logit_std", scale)
    for key, right, default in (("model_prediction_type", "raw", "sigma_scaled"), ("guidance_scale", 1.0, 3.5)):
        if (value := theirs.get(key, default)) != right:
            theirs.lost.append((key, value, f"it is {right} here, which is right for FLUX.1"))


def _sd3(imported: Imported, theirs: Theirs) -> None:
    imported.set("loss.weighting", "none")
    imported.set("loss.timesteps", "uniform")
    if (scheme := theirs.get("weighting_scheme", "uniform")) != "sigma_sqrt":
        theirs.lost.append(("weighting_scheme", scheme, "the flow's error weighs the same at all noise levels here, their sigma_sqrt"))
    imported.set("loss.shift", number(theirs.get("training_shift", 1.0)))


def _datasets(imported: Imported, theirs: Theirs, content: Mapping[str, Any] | None) -> None:
    if content is None:
        _folder_of_folders(imported, theirs)
        return
    general = dict(content.get("general", {}))
    folders, resolutions, first = [], [], True
    for dataset in content["datasets"]:
        resolution = dataset.get("resolution", general.get("resolution", 512))
        resolution = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
        resolutions.append(round((resolution[0] * resolution[-1]) ** 0.5))
        if resolution[0] != resolution[-1]:
            theirs.lost.append(("resolution", resolution, "data.resolution is the side of a square of that area"))
        for subset in dataset.get("subsets", []):
            merged = Theirs(general | {key: value for key, value in dataset.items() if key != "subsets"} | dict(subset), lost=theirs.lost)
            folder, count = str(merged.get("image_dir")), int(merged.get("num_repeats", 1))
            if merged.get("is_reg", False):
                imported.set("data.regularisation.source", folder)
                imported.set("data.regularisation.weight", number(theirs.get("prior_loss_weight", 1.0)))
            elif (folder, count) not in folders:
                folders.append((folder, count))
            if first and not merged.get("is_reg", False):
                _options(imported, merged)
                first = False
    sides = sorted(set(resolutions))
    imported.set("data.resolution", sides[0] if len(sides) == 1 else sides)
    for folder in join_folders(imported, folders):
        theirs.lost.append(("image_dir", folder, "data.source is one folder: put them side by side, and set data.repeats"))


def _options(imported: Imported, merged: Theirs) -> None:
    """Of the first subset, which ours are of."""
    imported.set("data.batch_size", int(merged.get("batch_size", 1)))
    imported.set("data.upscale", not merged.get("bucket_no_upscale", False))
    defaults = {"caption_dropout_rate": 0.0, "keep_tokens": 0, "caption_separator": ","}
    for ours, their in tool.OF_SUBSETS.items():
        imported.set(ours, number(merged.get(their, defaults.get(their, False))))
    if not imported.values["data"]["shuffle_tags"]:
        imported.set("data.keep_tokens", 0)
    if merged.get("caption_extension", ".caption").lstrip(".") not in ("txt", "caption"):
        merged.lose("caption_extension", "captions are .txt or .caption files beside the pictures")
    if words := merged.get("class_tokens"):
        imported.set("data.default_caption", words)
    if prefix := merged.get("caption_prefix"):
        imported.set("data.trigger", str(prefix).strip(" ,"))
        imported.set("data.add_trigger", True)
    merged.pass_over("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "cache_info")
    merged.lose("validation_split", "data.val_count pictures are held out; null: 15 %")
    merged.rest()


def _folder_of_folders(imported: Imported, theirs: Theirs) -> None:
    """train_data_dir with `10_name class` in it: repeats by the folders' names."""
    if source := theirs.get("train_data_dir"):
        imported.set("data.source", str(source))
        names = sorted(path.name for path in Path(source).iterdir() if path.is_dir()) if Path(source).is_dir() else []
        counts = {name: int(match[1]) for name in names if (match := re.match(r"(\d+)_", name))}
        imported.set("data.repeats", {name: count for name, count in counts.items() if count > 1})
    if regular := theirs.get("reg_data_dir"):
        imported.set("data.regularisation.source", str(regular))
    sides = [int(side) for side in str(theirs.get("resolution", "512")).split(",")]
    imported.set("data.resolution", round((sides[0] * sides[-1]) ** 0.5))
    theirs.taken.add("train_batch_size")
    merged = Theirs(
        {key: value for key, value in theirs.values.items() if key in {*tool.OF_SUBSETS.values(), "bucket_no_upscale", "caption_extension"}}
        | {"batch_size": theirs.values.get("train_batch_size", 1)},
        lost=theirs.lost,
    )
    theirs.taken |= merged.values.keys()
    _options(imported, merged)


def _prompts(imported: Imported, theirs: Theirs, path: Path) -> None:
    """The prompt file's lines without their options, where it is to be found."""
    if not (name := theirs.get("sample_prompts")):
        return
    file = next((place for place in (Path(name), path.parent / Path(name).name) if place.is_file()), None)
    if file is None or file.suffix != ".txt":
        theirs.lose("sample_prompts", "no .txt that can be read; say evaluation.prompts=[...]")
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    prompts = list(dict.fromkeys(line.split(" --")[0].strip() for line in lines))
    imported.set("evaluation.prompts", prompts)
    imported.set("evaluation.seeds", max(1, len(lines) // len(prompts)))
    options = dict(re.findall(r"--(\w+) ([^-\s][^\s]*)", lines[0]))
    guidance = options.get("g", options.get("l"))
    for key, value in (("sampling.guidance", guidance), ("sampling.steps", options.get("s"))):
        if value is not None:
            imported.set(key, number(value) if key.endswith("guidance") else int(value))
    if negative := re.search(r" --n (.*?)(?= --|$)", lines[0]):
        imported.set("sampling.negative", negative[1])
