"""ai-toolkit's YAML as an experiment of ours. See `importing`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charforgex.backends import ai_toolkit as tool
from charforgex.backends.common import FLOW
from charforgex.backends.importing import Imported, Theirs, choose_base, choose_optimizer, join_folders, number
from charforgex.errors import ConfigError

DEFAULTS = {  # of toolkit/config_modules.py, for what is not said
    "network.linear": 4, "train.batch_size": 1, "train.steps": 1000, "train.gradient_accumulation": 1, "train.lr": 1e-6,
    "save.save_every": 1000, "save.max_step_saves_to_keep": 5, "sample.sample_every": 100, "sample.neg": "", "training_seed": 0,
}  # fmt: skip
RUNS = "how it runs, not what is trained: backend=ai_toolkit has it, or what this program does by itself"
# Places, logs, caches, and what is so here anyway
OF_NO_CONCERN = (
    "type", "training_folder", "device", "performance_log_every", "sqlite_db_path", "logging.*", "train.cache_text_embeddings",
    "train.disable_sampling", "train.skip_first_sample", "train.force_first_sample", "train.train_unet", "save.dtype", "save.push_to_hub",
    "save.save_format", "sample.sampler", "sample.sample_start_step", "sample.walk_seed", "sample.seed", "network.transformer_only",
    "network.conv", "network.conv_alpha",
)  # fmt: skip
OF_RUNNING = ("model.quantize", "model.quantize_te", "model.qtype", "model.qtype_te", "model.low_vram", "model.layer_offloading",
              "train.unload_text_encoder")  # fmt: skip


def from_ai_toolkit(content: Any, path: Path) -> Imported:
    """Raises ConfigError for a file that is no training of a LoRA of our families."""
    config = content.get("config") if isinstance(content, Mapping) else None
    processes = config.get("process") if isinstance(config, Mapping) else None
    if not isinstance(processes, list) or not processes or not all(isinstance(one, Mapping) for one in processes):
        raise ConfigError(f"files={path} is no configuration of ai-toolkit: it has no config.process.")
    theirs = Theirs(_flat({key: value for key, value in processes[0].items() if key != "datasets"}))
    imported = Imported(str(config.get("name", path.stem)), lost=theirs.lost)
    if len(processes) > 1:
        theirs.lost.append(("process", f"{len(processes)} of them", "an experiment is one training; the first is here"))
    family = _family(theirs, path)
    flow = family in FLOW
    choose_base(imported, family, str(theirs.get("model.name_or_path")))
    imported.groups["curation"] = "none"
    imported.set("family.dtype", "float32" if theirs.get("train.dtype", "fp32") in ("fp32", "float32") else "bfloat16")

    for key in ("rank", "alpha"):  # their older names
        if f"network.{key}" in theirs.values:
            theirs.values.setdefault({"rank": "network.linear", "alpha": "network.linear_alpha"}[key], theirs.values.pop(f"network.{key}"))
    micro = int(theirs.get("train.gradient_accumulation_steps", 1))
    for ours, their in tool.PLAIN.items():
        imported.set(ours, number(theirs.get(their, DEFAULTS[their])))
    if micro > 1:  # counted in micro-batches
        imported.set("trainer.accumulate", micro)
        imported.set("trainer.steps", int(imported.values["trainer"]["steps"]) // micro)
    imported.set("sampling.negative", imported.values["sampling"]["negative"] or "")
    if theirs.get("train.unet_lr") is not None:
        imported.set("optimizer.lr", number(theirs.get("train.unet_lr")))
    _network(imported, theirs, family)
    _optimizer(imported, theirs)
    imported.set("trainer.gradient_checkpointing", bool(theirs.get("train.gradient_checkpointing", True)))
    imported.set("trainer.ema", number(theirs.get("train.ema_config.ema_decay", 0.999)) if theirs.get("train.ema_config.use_ema") else 0)
    _objective(imported, theirs, flow)
    if theirs.get("train.train_text_encoder", False):
        imported.set("text_encoder.lr", number(theirs.get("train.text_encoder_lr", imported.values["optimizer"]["lr"])))
    theirs.pass_over("train.text_encoder_lr")
    if trigger := theirs.get("trigger_word"):
        imported.set("data.trigger", trigger)
        imported.set("data.add_trigger", True)
    if theirs.get("train.diff_output_preservation", False):
        imported.set("loss.prior_weight", number(theirs.get("train.diff_output_preservation_multiplier", 1.0)))
        imported.set("data.class_word", theirs.get("train.diff_output_preservation_class"))
    theirs.pass_over("train.diff_output_preservation_multiplier", "train.diff_output_preservation_class")
    _datasets(imported, theirs, processes[0].get("datasets") or [])
    _samples(imported, theirs)
    for key in OF_RUNNING:
        if theirs.values.get(key):
            theirs.lose(key, RUNS)
    theirs.pass_over(*OF_NO_CONCERN, *OF_RUNNING)
    theirs.rest()
    return imported


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    whole = ("network.network_kwargs", "train.optimizer_params", "train.lr_scheduler_params")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) and name not in whole else {name: value}
    return found


def _family(theirs: Theirs, path: Path) -> str:
    arch = theirs.get("model.arch")
    flags = {"model.is_flux": "flux", "model.is_v3": "sd3", "model.is_xl": "sdxl"}
    flagged = [family for key, family in flags.items() if theirs.get(key, False)]
    family = arch or (flagged[0] if flagged else None)
    if family not in ("sdxl", "flux", "sd3"):
        raise ConfigError(f"files={path} trains {family or 'Stable Diffusion 1'}; there are sdxl, flux and sd3 here.")
    kind = theirs.get("network.type", "lora")
    if kind != "lora":
        theirs.lose("network.type", "it is lora now; dora, loha and lokr are lora.kind")
    return family


def _network(imported: Imported, theirs: Theirs, family: str) -> None:
    rank = imported.values["lora"]["rank"]
    alpha = number(theirs.get("network.linear_alpha", 1.0))
    imported.set("lora.alpha", rank if family in FLOW else alpha)  # it makes alpha the rank for them, whatever is said
    words = theirs.get("network.network_kwargs", {})
    preset = next((name for (of, name), known in tool.TARGETS.items() if of == family and known == words), None)
    if preset is None:
        preset = "attention_mlp"
        if words:
            theirs.lose("network.network_kwargs", "parts of layers' names; say lora.targets=[...]")
        else:
            theirs.lost.append(("network", "all linear layers of the UNet", "it is attention_mlp now, without the time's layers"))
    imported.set("lora.targets", preset)


def _optimizer(imported: Imported, theirs: Theirs) -> None:
    choose_optimizer(imported, theirs, "train.optimizer", tool.OPTIMIZERS, dict(theirs.get("train.optimizer_params", {})))
    name, options = theirs.get("train.lr_scheduler", "constant"), dict(theirs.get("train.lr_scheduler_params", {}))
    warmup = int(options.pop("num_warmup_steps", 0)) if name == "constant_with_warmup" else 0
    ours = {"constant_with_warmup": "constant"} | {their: ours for ours, (their, _) in tool.SCHEDULES.items()}
    known = tool.SCHEDULES.get(ours.get(name, ""), ("", {}))[1]
    if name not in ours or any(options.get(key) != value for key, value in known.items() if name == "linear"):
        theirs.lose("train.lr_scheduler", "it is constant now; there are constant, cosine and linear (to zero)")
    imported.set("optimizer.schedule", ours.get(name, "constant"))
    imported.set("optimizer.warmup", warmup)
    clip = number(theirs.get("train.max_grad_norm", 1.0))
    imported.set("optimizer.grad_clip", 0 if clip >= tool.UNCLIPPED else clip)


def _objective(imported: Imported, theirs: Theirs, flow: bool) -> None:
    scheduler = theirs.get("train.noise_scheduler", "ddpm")
    if scheduler != ("flowmatch" if flow else "ddpm"):
        theirs.lose("train.noise_scheduler", "the family's own is used, as it must be")
    if theirs.get("train.loss_type", "mse") != "mse":
        theirs.lose("train.loss_type", "it is mse now; loss.kind=huber is a Huber loss")
    if theirs.get("train.content_or_style", "balanced") != "balanced":
        theirs.lose("train.content_or_style", "loss.timesteps and loss.shift choose noise levels")
    imported.set("loss.weighting", "none")
    if flow:
        kind = theirs.get("train.timestep_type", "sigmoid")
        ours = next((ours for ours, their in tool.TIMESTEPS.items() if their == kind), None)
        if ours is None:
            theirs.lose("train.timestep_type", "it is loss.timesteps=logit_normal now, their sigmoid")
        imported.set("loss.timesteps", ours[0] if ours else "logit_normal")
        imported.set("loss.shift", ours[1] if ours else 1)
        return
    theirs.pass_over("train.timestep_type")  # without effect there
    imported.set("loss.noise_offset", number(theirs.get("train.noise_offset", 0.0)))
    if gamma := theirs.get("train.min_snr_gamma"):
        imported.set("loss.weighting", "min_snr")
        imported.set("loss.min_snr_gamma", number(gamma))
    if theirs.values.get("train.snr_gamma"):
        theirs.lose("train.snr_gamma", "gamma / SNR without a bound; min_snr is loss.weighting=min_snr")


def _datasets(imported: Imported, theirs: Theirs, datasets: list[Mapping[str, Any]]) -> None:
    folders = []
    for number_, content in enumerate(datasets):
        dataset = Theirs(dict(content), lost=theirs.lost)
        folder, count = dataset.get("folder_path") or dataset.get("dataset_path"), int(dataset.get("num_repeats", 1))
        if dataset.get("is_reg", False):
            imported.set("data.regularisation.source", str(folder))
            imported.set("data.regularisation.weight", number(theirs.get("train.reg_weight", 1.0)))
            dataset.pass_over("*")
            continue
        folders.append((str(folder), count))
        if number_ and len(folders) > 1:
            dataset.pass_over("*")  # its options are the first one's here
            continue
        resolution = dataset.get("resolution", 512)
        imported.set("data.resolution", resolution)
        for ours, their in tool.OF_DATASETS.items():
            imported.set(ours, number(dataset.get(their, {"caption_dropout_rate": 0.0, "keep_tokens": 0}.get(their, False))))
        if not imported.values["data"]["shuffle_tags"]:
            imported.set("data.keep_tokens", 0)
        if (caption := dataset.get("default_caption")) is not None and caption != "":
            imported.set("data.default_caption", caption)
        if dataset.get("caption_ext", "txt").lstrip(".") not in ("txt", "caption"):
            dataset.lose("caption_ext", "captions are .txt or .caption files beside the pictures")
        dataset.lose("mask_path", "masks lie beside the pictures as name.mask.png; data.subject_weight is 1 / mask_min_value")
        dataset.lose("mask_min_value", "see mask_path")
        dataset.pass_over("cache_latents", "cache_latents_to_disk", "num_workers", "type", "buckets", "cache_text_embeddings")
        dataset.rest()
    theirs.pass_over("train.reg_weight")
    for folder in join_folders(imported, folders):
        theirs.lost.append(("datasets.folder_path", folder, "data.source is one folder: put them side by side, and set data.repeats"))


def _samples(imported: Imported, theirs: Theirs) -> None:
    samples = theirs.get("sample.samples") or [{"prompt": prompt} for prompt in theirs.get("sample.prompts", [])]
    prompts = list(dict.fromkeys(str(sample.get("prompt", "")).replace("[trigger]", "{trigger}") for sample in samples))
    if prompts:
        imported.set("evaluation.prompts", prompts)
        imported.set("evaluation.seeds", max(1, len(samples) // len(prompts)))
    theirs.pass_over("sample.prompts")
    imported.set("sampling.guidance", number(theirs.get("sample.guidance_scale", 7)))
    imported.set("sampling.steps", int(theirs.get("sample.sample_steps", 20)))
    sides = imported.values.get("data", {}).get("resolution", 512)
    side = max(sides) if isinstance(sides, list) else sides
    for key in ("sample.width", "sample.height"):
        if theirs.get(key, side) != side:
            theirs.lose(key, f"previews are as large as data.resolution, {side}")
