"""ostris' ai-toolkit: our settings as its YAML, what it prints and writes, and what its versions know.

Facts are of its sources of August 2026 (github.com/ostris/ai-toolkit): toolkit/config_modules.py, jobs/process/BaseSDTrainProcess.py.
It takes unknown keys without a word, so only keys of this file are written, and all that matter: many of its defaults are surprising.
"""

from __future__ import annotations

import ast
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charforgex.backends.common import FLOW, Given, Pictures, Said, Session, Step, calls, first, parsed, put, sides
from charforgex.backends.settings import AiToolkitSettings
from charforgex.backends.wanted import Wanted

TITLE = "ai-toolkit"
ENTRY = "run.py"  # by which its folder is known
CONFIG = "config.yaml"
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
# Ours -> theirs, value for value
PLAIN = {
    "seed": "training_seed",
    "lora.rank": "network.linear",
    "data.batch_size": "train.batch_size",
    "trainer.steps": "train.steps",
    "trainer.accumulate": "train.gradient_accumulation",
    "optimizer.lr": "train.lr",
    "trainer.checkpoint_every": "save.save_every",
    "trainer.keep": "save.max_step_saves_to_keep",
    "evaluation.every": "sample.sample_every",
    "sampling.negative": "sample.neg",
}
OF_DATASETS = {
    "data.caption_dropout": "caption_dropout_rate",
    "data.shuffle_tags": "shuffle_tokens",
    "data.keep_tokens": "keep_tokens",
    "data.flip": "flip_x",
}
OPTIMIZERS = {  # ours -> theirs, with what makes them alike
    "adamw": ("adamw", {}),
    "adamw8bit": ("adamw8bit", {}),
    "adafactor": ("adafactor", {"relative_step": False, "scale_parameter": False, "warmup_init": False}),
    "prodigy": ("prodigy", {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
}
SCHEDULES = {  # theirs by ours, without a warm-up
    "constant": ("constant", {}),
    "cosine": ("cosine", {}),
    "linear": ("linear", {"start_factor": 1.0, "end_factor": 0.0}),
}
TIMESTEPS = {("uniform", 1): "linear", ("logit_normal", 1): "sigmoid", ("uniform", "resolution"): "flux_shift"}  # (timesteps, shift)
TARGETS = {  # by family and preset: which layers of the denoiser, by parts of their names
    ("sdxl", "attention"): {"only_if_contains": [".attn1.", ".attn2."]},
    ("sdxl", "attention_mlp"): {"only_if_contains": [".attn1.", ".attn2.", ".ff.", ".proj_in", ".proj_out"]},
    ("flux", "attention"): {"only_if_contains": [".attn."]},
    ("flux", "attention_mlp"): {"ignore_if_contains": ["norm"]},
    ("flux", "all"): {},
    ("sd3", "attention"): {"only_if_contains": [".attn."]},
    ("sd3", "attention_dual"): {"only_if_contains": [".attn.", ".attn2."]},
    ("sd3", "all"): {},
}
UNCLIPPED = 1.0e9  # it clips always; this is never reached


# ---- our settings as its own ----


def translate(wanted: Wanted, settings: AiToolkitSettings, given: Given) -> dict[str, Any]:
    """{file name: content} of what it is started with; `wanted` collects what cannot be said."""
    family, flow = wanted.family, wanted.family in FLOW
    process: dict[str, Any] = {"type": "sd_trainer", "training_folder": str(given.session.out), "device": "cuda:0"}
    for ours, theirs in PLAIN.items():
        put(process, theirs, wanted[ours])
    wanted.only("trainer.accelerator", "auto", "gpu", why="needs a GPU")
    wanted.only("data.upscale", False, why="never enlarges pictures")
    wanted.only("data.tag_separator", ",", why="shuffles what stands between commas")
    wanted.only("loss.kind", "mse", why="has no such Huber loss")
    dtype = DTYPES[wanted.base["dtype"]]
    process["network"] |= {
        "type": "lora",
        "linear_alpha": _alpha(wanted, flow),
        "transformer_only": True,
        "network_kwargs": _targets(wanted),
    }
    # float32, because it goes on from these files
    process["save"] |= {"dtype": "float32", "push_to_hub": False}
    process["datasets"] = [_dataset(wanted, pictures) for pictures in given.pictures]
    train = process["train"]
    train |= {
        "train_unet": True,
        "noise_scheduler": "flowmatch" if flow else "ddpm",
        "content_or_style": "balanced",
        "gradient_checkpointing": wanted.only("trainer.gradient_checkpointing", True, False, why="knows all blocks or none"),
        "max_grad_norm": wanted["optimizer.grad_clip"] or UNCLIPPED,
        "dtype": dtype,
        "cache_text_embeddings": False,  # which would forbid captions to be dropped or shuffled
        "disable_sampling": False,
        "skip_first_sample": False,
        "ema_config": _ema(wanted["trainer.ema"]),
        **_text_encoder(wanted, flow),
        **_optimizer(wanted),
        **(_flow_objective(wanted) if flow else _objective(wanted)),
        **_preservation(wanted, given, process),
    }
    if any(pictures.regular for pictures in given.pictures):
        wanted.only("data.regularisation.share", 0.5, why="takes turns with pictures of the class")
        train["reg_weight"] = wanted["data.regularisation.weight"]
    quantize = flow if settings.quantize is None else settings.quantize
    process["model"] = {"name_or_path": _base(wanted), "arch": family, "quantize": quantize, "quantize_te": quantize and flow,
                        "low_vram": settings.low_vram}  # fmt: skip
    process["sample"] |= _samples(wanted, given, flow)
    process["logging"] = _logging(wanted)
    return {
        CONFIG: {"job": "extension", "config": {"name": wanted["name"], "process": [process]}, "meta": {"name": "[name]", "version": "1.0"}}
    }


def _alpha(wanted: Wanted, flow: bool) -> float:
    rank, alpha = wanted["lora.rank"], wanted["lora.alpha"]
    if flow and alpha != rank:
        wanted.differs("lora.alpha", "makes it the rank for this family", f"set lora.alpha={rank}, or lora.rank={alpha:g}")
        return rank
    return alpha


def _targets(wanted: Wanted) -> dict[str, list[str]]:
    targets = wanted["lora.targets"]
    known = {preset: words for (family, preset), words in TARGETS.items() if family == wanted.family}
    if isinstance(targets, str) and targets in known:
        return known[targets]
    wanted.refuse("lora.targets", "chooses layers by parts of their names, which cannot say this", f"use {' or '.join(known)}")
    return {}


def _dataset(wanted: Wanted, pictures: Pictures) -> dict[str, Any]:
    wanted["data.repeats"]
    dataset = {"folder_path": str(pictures.folder), "caption_ext": "txt", "num_repeats": pictures.repeats, "is_reg": pictures.regular,
               "resolution": sides(wanted["data.resolution"]), "cache_latents": True}  # fmt: skip
    dataset |= {theirs: wanted[ours] for ours, theirs in OF_DATASETS.items()}
    weight = wanted["data.subject_weight"]
    if weight < 1:
        wanted.refuse("data.subject_weight", "looks harder at a mask's white, never less", "set it to 1 or more")
    elif pictures.masks is not None:
        dataset |= {"mask_path": str(pictures.masks), "mask_min_value": 1 / weight}
    return dataset


def _ema(decay: float) -> dict[str, Any]:
    return {"use_ema": True, "ema_decay": decay} if decay else {"use_ema": False}


def _text_encoder(wanted: Wanted, flow: bool) -> dict[str, Any]:
    rate = wanted["text_encoder.lr"]
    if flow and rate is not None:
        wanted.refuse("text_encoder.lr", "trains no text encoders of this family", "leave it null")
    return {"train_text_encoder": rate is not None} | ({} if rate is None else {"text_encoder_lr": rate})


def _optimizer(wanted: Wanted) -> dict[str, Any]:
    name = wanted["optimizer.name"]
    if name not in OPTIMIZERS:
        wanted.refuse("optimizer.name", "does not have it", f"use {', '.join(OPTIMIZERS)}")
        name = "adamw"
    theirs, options = OPTIMIZERS[name]
    options = {**options, "weight_decay": wanted["optimizer.weight_decay"]}
    if name == "prodigy":
        options["d_coef"] = wanted["optimizer.d_coef"]
    schedule, warmup = wanted["optimizer.schedule"], wanted["optimizer.warmup"]
    if schedule == "constant" and warmup:
        scheduler, with_what = "constant_with_warmup", {"num_warmup_steps": warmup}
    else:
        scheduler, with_what = SCHEDULES[schedule]
        if warmup:
            wanted.differs(
                "optimizer.warmup", f"has no warm-up with the schedule {schedule}", "set it to 0, or optimizer.schedule=constant"
            )
    return {"optimizer": theirs, "optimizer_params": options, "lr_scheduler": scheduler, "lr_scheduler_params": dict(with_what)}


def _objective(wanted: Wanted) -> dict[str, Any]:
    """Of families with betas."""
    wanted.only("loss.timesteps", "uniform", why="draws them uniformly for this family")
    weighting = wanted.only("loss.weighting", "none", "min_snr", why="has no such weighting")
    gamma = wanted["loss.min_snr_gamma"]
    return {"loss_type": "mse", "noise_offset": wanted["loss.noise_offset"]} | ({"min_snr_gamma": gamma} if weighting == "min_snr" else {})


def _flow_objective(wanted: Wanted) -> dict[str, Any]:
    wanted.only("loss.weighting", "none", why="has no such weighting")
    drawn = wanted["loss.timesteps"], wanted["loss.shift"]
    if drawn not in TIMESTEPS:
        theirs = "draws the sigmoid of a normal without a shift"
        known = ", ".join(f"loss.timesteps={t} loss.shift={s}" for t, s in TIMESTEPS)
        changed = [key for key in ("loss.timesteps", "loss.shift") if wanted.is_changed(key)]
        wanted.differs(changed[0] if changed else "loss.shift", theirs, f"it has {known}")
    return {"loss_type": "mse", "timestep_type": TIMESTEPS.get(drawn, "sigmoid")}


def _preservation(wanted: Wanted, given: Given, process: dict[str, Any]) -> dict[str, Any]:
    weight = wanted["loss.prior_weight"]
    if not weight:
        return {}
    wanted["data.class_word"]
    process["trigger_word"] = given.trigger
    return {"diff_output_preservation": True, "diff_output_preservation_multiplier": weight,
            "diff_output_preservation_class": given.class_word}  # fmt: skip


def _base(wanted: Wanted) -> str:
    source = str(wanted.base["source"])
    if "+" in source or (source.endswith((".safetensors", ".gguf")) and wanted.family in FLOW) or source.endswith(".gguf"):
        wanted.refuse("family.source", "reads a hub's repository or a diffusers folder here", "name one of them")
    return str(Path(source).expanduser().absolute()) if Path(source).expanduser().exists() else source


def _samples(wanted: Wanted, given: Given, flow: bool) -> dict[str, Any]:
    side, seed = max(sides(wanted["data.resolution"])), wanted["seed"]
    wanted["evaluation.prompts"]
    seeds = range(seed, seed + wanted["evaluation.seeds"])
    return {
        "sampler": "flowmatch" if flow else "ddpm",
        "width": side,
        "height": side,
        "walk_seed": False,
        "guidance_scale": first(wanted["sampling.guidance"], wanted.base["recipe"]["guidance"]),
        "sample_steps": first(wanted["sampling.steps"], wanted.base["recipe"]["sampling_steps"]),
        "samples": [{"prompt": prompt, "seed": number} for prompt in given.prompts for number in seeds],
    }


def _logging(wanted: Wanted) -> dict[str, Any]:
    if not wanted["logger.wandb"]:
        return {"log_every": 1, "use_wandb": False, "use_ui_logger": True}
    return {"log_every": 1, "use_wandb": True, "project_name": wanted["logger.project"], "run_name": wanted["name"]}


# ---- how it is started, and what it leaves ----


def texts(config: Mapping[str, Any]) -> dict[str, str]:
    """File name -> what to write."""
    import yaml

    return {name: yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=140) for name, content in config.items()}


def command(settings: AiToolkitSettings, config: Mapping[str, Any], work: Path) -> list[str]:
    return [str(settings.interpreter()), ENTRY, str((work / CONFIG).absolute())]


def session(work: Path, name: str) -> Session:
    """It goes on by itself from the newest file in its folder."""
    return Session((work / "output").absolute())


def done_before(work: Path, name: str) -> int:
    """The step that it goes on from."""
    return max(saved(work, name), default=0)


def finals(work: Path, name: str) -> list[tuple[Path, int]]:
    """What it writes when it is through, with the steps that its own count lacks."""
    path = work / "output" / name / f"{name}.safetensors"
    return [(path, 0)] if path.is_file() else []


def saved(work: Path, name: str) -> dict[int, Path]:
    """Its LoRAs on the way, by step."""
    return {
        int(match[1]): path
        for path in (work / "output" / name).glob(f"{name}_*.safetensors")
        if (match := re.fullmatch(re.escape(name) + r"_(\d{9})\.safetensors", path.name))
    }


def samples(work: Path, name: str) -> dict[tuple[int, int], Path]:
    """Its pictures, by step and number of the prompt and seed."""
    found = ((re.fullmatch(r"\d+__(\d+)_(\d+)", path.stem), path) for path in sorted((work / "output" / name / "samples").glob("*.jpg")))
    return {(int(match[1]), int(match[2])): path for match, path in found if match}


def steps_in(metadata: Mapping[str, str]) -> int | None:
    """How many steps a LoRA of its had, by its header."""
    match = re.search(r'"step":\s*(\d+)', metadata.get("training_info", ""))
    return int(match[1]) if match else None


def recorded(work: Path, name: str, after: int) -> list[tuple[int, str, float]] | None:
    """(step, name, value) of its own record after a step; None if it keeps none. It writes while we read (WAL)."""
    path = work / "output" / name / "loss_log.db"
    if not path.exists():
        return None
    names = {"learning_rate": "lr", "loss/loss": "loss"}
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5) as database:
            query = "SELECT step, key, value_real FROM metrics WHERE step > ? AND value_real IS NOT NULL ORDER BY step, key"
            return [(step, names.get(key, key), value) for step, key, value in database.execute(query, (after,))]
    except sqlite3.OperationalError:  # locked, or its tables are not made yet: next time
        return []


# ---- what it says ----

BAR = re.compile(
    r"^(?P<name>.+?):\s+\d+%\|.*?\|\s*(?P<step>\d+)/(?P<total>\d+) \[[\d:]+<[\d:?]+,\s*(?:[\d.]+|\?)\s*(?:s/it|it/s)"
    r"(?:,\s*(?P<rest>lr: .*))?\]"
)
NUMBER = re.compile(r"([\w/]+): ([-+]?[\d.]+e[-+]\d+|[-+]?\d[\d.]*|nan|-?inf)")
PHASES = ("Loading ", "Quantizing ", "create LoRA ", "Caching latents", "Generating baseline", "#### IMPORTANT RESUMING")


def event(line: str, name: str) -> Step | Said | None:
    """What a line of its output means. `name` is the job's, by which its bar is known among others."""
    if (bar := BAR.match(line)) and bar["name"] == name:
        numbers = {key: float(value) for key, value in NUMBER.findall(bar["rest"] or "")}
        return Step(int(bar["step"]), int(bar["total"]), numbers)
    if "OOM during training step, skipping batch" in line:
        return Said("warning", f"out of memory, a step is lost: {line.strip('# ')}")
    if "OOM during training step 3 times" in line or "CUDA out of memory" in line or "OutOfMemoryError" in line:
        return Said("out of memory", line)
    if line.startswith("Saving at step"):
        return Said("saving", line)
    if line.startswith("Saved optimizer to"):
        return Said("saved", line)
    if line.startswith("Error running job:"):
        return Said("error", line.partition(":")[2].strip())
    if line.startswith(PHASES):
        return Said("phase", line)
    return None


# ---- what its version knows ----

CLASSES = {"train": "TrainConfig", "network": "NetworkConfig", "save": "SaveConfig", "model": "ModelConfig", "sample": "SampleConfig",
           "datasets": "DatasetConfig", "logging": "LoggingConfig"}  # fmt: skip
OF_PROCESS = {"type", "training_folder", "device", "training_seed", "trigger_word", *CLASSES}  # read one by one, all over its code


def options(folder: Path) -> set[str]:
    """What may be written into `process`, "train.steps", by this checkout's own code."""
    tree = parsed(folder / "toolkit" / "config_modules.py")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {f"{section}.{key}" for section, name in CLASSES.items() if name in classes for key in calls(classes[name], "get")}
    return OF_PROCESS | found


def written(config: Mapping[str, Any]) -> set[str]:
    """Of what is written into `process`, all that `options` knows about."""
    (process,) = config[CONFIG]["config"]["process"]
    found = set()
    for key, value in process.items():
        found.add(key)
        for part in value if isinstance(value, list) else [value]:
            found |= {f"{key}.{name}" for name in part} if isinstance(part, Mapping) else set()
    return found
