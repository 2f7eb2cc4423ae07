"""kohya's sd-scripts: our settings as its TOMLs, what it prints and writes, and what its versions know.

Facts are of its sources of February 2026 (github.com/kohya-ss/sd-scripts): train_network.py, library/train_util.py and their siblings.
It flattens its TOML and takes unknown keys without a word, so only keys of this file are written; some of its defaults train Flux and SD3
with a target that does not fit the prediction, so what matters is always written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charforgex.backends.common import FLOW, Given, Pictures, Said, Session, Step, calls, first, parsed, sides, strings
from charforgex.backends.settings import KohyaSettings
from charforgex.backends.wanted import Wanted

TITLE = "kohya"
ENTRY = "train_network.py"  # by which its folder is known
CONFIG, DATASET, PROMPTS = "run.toml", "dataset.toml", "prompts.txt"
SCRIPTS = {"sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py", "sd3": "sd3_train_network.py"}
MODULES = {"sdxl": "networks.lora", "flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
PRECISIONS = {"bfloat16": "bf16", "float32": "no"}
# Ours -> theirs, value for value
PLAIN = {
    "name": "output_name",
    "seed": "seed",
    "lora.rank": "network_dim",
    "lora.alpha": "network_alpha",
    "trainer.steps": "max_train_steps",
    "trainer.accumulate": "gradient_accumulation_steps",
    "trainer.checkpoint_every": "save_every_n_steps",
    "evaluation.every": "sample_every_n_steps",
    "optimizer.lr": "learning_rate",
    "optimizer.grad_clip": "max_grad_norm",
    "optimizer.warmup": "lr_warmup_steps",
}
OF_SUBSETS = {
    "data.caption_dropout": "caption_dropout_rate",
    "data.shuffle_tags": "shuffle_caption",
    "data.keep_tokens": "keep_tokens",
    "data.tag_separator": "caption_separator",
    "data.flip": "flip_aug",
}
OPTIMIZERS = {  # ours -> theirs, with what makes them alike
    "adamw": ("AdamW", {}),
    "adamw8bit": ("AdamW8bit", {}),
    "adafactor": ("AdaFactor", {"relative_step": False, "scale_parameter": False, "warmup_init": False}),
    "prodigy": ("Prodigy", {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
    "schedule_free": ("AdamWScheduleFree", {}),
}
TIMESTEPS = {("uniform", 1): "uniform", ("logit_normal", 1): "sigmoid", ("logit_normal", "resolution"): "flux_shift"}  # (timesteps, shift)
TARGETS = {  # by family and preset: the network's own arguments; 0 leaves layers out
    ("sdxl", "attention_mlp"): {},
    ("flux", "attention_mlp"): {"img_mod_dim": 0, "txt_mod_dim": 0, "single_mod_dim": 0},
    ("flux", "all"): {},
    ("sd3", "attention"): {"x_mlp_dim": 0, "context_mlp_dim": 0, "x_mod_dim": 0, "context_mod_dim": 0},
    ("sd3", "attention_mlp"): {"x_mod_dim": 0, "context_mod_dim": 0},
    ("sd3", "all"): {},
}
FILES = {  # by family: option -> component of the base whose single file it names
    "flux": {"pretrained_model_name_or_path": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"},
    "sd3": {
        "pretrained_model_name_or_path": "transformer",
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5xxl": "text_encoder_3",
    },
}


# ---- our settings as its own ----


def translate(wanted: Wanted, settings: KohyaSettings, given: Given) -> dict[str, Any]:
    """{file name: content} of what it is started with; `wanted` collects what cannot be said."""
    family, flow = wanted.family, wanted.family in FLOW
    run: dict[str, Any] = {**_base(wanted, given), **{theirs: wanted[ours] for ours, theirs in PLAIN.items()}}
    wanted.only("trainer.accelerator", "auto", "gpu", why="needs a GPU")
    if wanted["trainer.ema"]:
        wanted.differs("trainer.ema", "keeps no moving average", "set it to 0")
    if settings.blocks_to_swap:
        run["blocks_to_swap"] = settings.blocks_to_swap
        if not flow:
            wanted.refuse("backend.blocks_to_swap", "swaps blocks of Flux and SD3 alone", "set it to 0")
    fixed_texts = not (wanted["data.caption_dropout"] or wanted["data.shuffle_tags"] or wanted["text_encoder.lr"] is not None)
    run |= {
        "network_module": MODULES[family],
        "network_args": [f"{key}={value}" for key, value in _network(wanted).items()],
        **_optimizer(wanted),
        **_text_encoder(wanted),
        **_loss(wanted),
        **({"flux": _flux_objective, "sd3": _sd3_objective}.get(family, _objective)(wanted)),
        "gradient_checkpointing": wanted.only("trainer.gradient_checkpointing", True, False, why="knows all blocks or none"),
        "mixed_precision": PRECISIONS[wanted.base["dtype"]],
        "sdpa": True,
        "fp8_base": settings.fp8_base,
        "cache_latents": True,
        "cache_text_encoder_outputs": fixed_texts,  # it cannot drop or shuffle what it has encoded
        "max_data_loader_n_workers": 2,
        "persistent_data_loader_workers": True,
        "dataset_config": str((given.work / DATASET).absolute()),
        "output_dir": str(given.session.out),
        "save_model_as": "safetensors",
        "save_precision": "float",
        "save_last_n_steps": (wanted["trainer.keep"] - 1) * run["save_every_n_steps"],  # before the newest
        "save_state": True,
        "save_last_n_steps_state": run["save_every_n_steps"],  # so that one is whole while the next is written
        "sample_prompts": str((given.work / PROMPTS).absolute()),
        **_logging(wanted, given),
    }
    if family == "sdxl":
        run["no_half_vae"] = True  # its own overflows in float16
    if given.session.state is not None:
        run |= {"resume": str(given.session.state), "initial_step": given.session.offset}
    if any(pictures.regular for pictures in given.pictures):
        wanted.only("data.regularisation.share", 0.5, why="takes as many pictures of the class as of the character")
        run["prior_loss_weight"] = wanted["data.regularisation.weight"]
    return {CONFIG: run, DATASET: _datasets(wanted, given), PROMPTS: _prompts(wanted, given)}


def _base(wanted: Wanted, given: Given) -> dict[str, Any]:
    source, family = str(wanted.base["source"]), wanted.family
    if family not in FILES:
        if "+" in source or source.endswith(".gguf"):
            wanted.refuse("family.source", "reads one checkpoint, diffusers folder or repository", "name one of them")
        found = Path(source).expanduser()
        return {"pretrained_model_name_or_path": str(found.absolute()) if found.exists() else source}
    needed = FILES[family]
    if not source.partition("+")[0].strip().endswith(".safetensors"):
        example = "flux1-dev.safetensors+clip_l.safetensors+t5xxl_fp16.safetensors+ae.safetensors"
        example = example if family == "flux" else "sd3.5_large.safetensors+clip_l.safetensors+clip_g.safetensors+t5xxl_fp16.safetensors"
        wanted.refuse("family.source", "reads this family from single files in their original form", f"say family.source={example}")
    return {option: str(path.absolute()) for option, name in needed.items() if (path := given.base.get(name)) is not None}


def _network(wanted: Wanted) -> dict[str, Any]:
    targets = wanted["lora.targets"]
    known = {preset: words for (family, preset), words in TARGETS.items() if family == wanted.family}
    options = known.get(targets, {}) if isinstance(targets, str) else {}
    if not isinstance(targets, str) or targets not in known:
        wanted.differs("lora.targets", "adapts all linear layers of the transformer blocks", f"use {' or '.join(known)}")
    ratio = wanted["lora.up_ratio"]
    return options | ({"loraplus_lr_ratio": f"{ratio:g}"} if ratio != 1 else {})


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
    if name == "schedule_free":
        options["warmup_steps"] = warmup
    schedule = "constant_with_warmup" if schedule == "constant" and warmup and name != "schedule_free" else schedule
    return {"optimizer_type": theirs, "optimizer_args": [f"{key}={value}" for key, value in options.items()], "lr_scheduler": schedule}


def _text_encoder(wanted: Wanted) -> dict[str, Any]:
    rate = wanted["text_encoder.lr"]
    return {"network_train_unet_only": True} if rate is None else {"network_train_unet_only": False, "text_encoder_lr": [rate]}


def _loss(wanted: Wanted) -> dict[str, Any]:
    if wanted["loss.kind"] == "mse":
        return {"loss_type": "l2"}
    return {"loss_type": "huber", "huber_schedule": "constant", "huber_c": wanted["loss.huber_delta"], "huber_scale": 1.0}


def _objective(wanted: Wanted) -> dict[str, Any]:
    """Of families with betas."""
    wanted.only("loss.timesteps", "uniform", why="draws them uniformly for this family")
    weighting = wanted.only("loss.weighting", "none", "min_snr", "debiased", why="has no such weighting")
    gamma, offset = wanted["loss.min_snr_gamma"], wanted["loss.noise_offset"]
    weights = {"min_snr": {"min_snr_gamma": gamma}, "debiased": {"debiased_estimation_loss": True}}.get(weighting, {})
    return weights | ({"noise_offset": offset} if offset else {})


def _flux_objective(wanted: Wanted) -> dict[str, Any]:
    wanted.only("loss.weighting", "none", why="has no such weighting")
    drawn, shift = wanted["loss.timesteps"], wanted["loss.shift"]
    sampling = "shift" if drawn == "logit_normal" and isinstance(shift, (int, float)) and shift != 1 else TIMESTEPS.get((drawn, shift))
    if sampling is None:
        changed = [key for key in ("loss.timesteps", "loss.shift") if wanted.is_changed(key)]
        key = changed[0] if changed else "loss.timesteps"
        wanted.differs(key, "shifts normal times alone", "use loss.timesteps=logit_normal, or loss.shift=1")
    objective = {"timestep_sampling": sampling or "sigmoid", "model_prediction_type": "raw", "guidance_scale": 1.0}
    if drawn == "logit_normal":
        objective["sigmoid_scale"] = wanted["loss.logit_std"]
    return objective | ({"discrete_flow_shift": float(shift)} if sampling == "shift" else {})


def _sd3_objective(wanted: Wanted) -> dict[str, Any]:
    """It compares clean pictures, which is the flow's error times t^2; sigma_sqrt, 1 / t^2, undoes that, and is at uniform times alone."""
    wanted.only("loss.weighting", "none", why="has no such weighting")
    wanted.only("loss.timesteps", "uniform", why="draws them uniformly where it weighs them right")
    shift = wanted["loss.shift"]
    if not isinstance(shift, (int, float)):
        wanted.refuse("loss.shift", "knows no shift by resolution for SD3", "set it to 3")
    return {"weighting_scheme": "sigma_sqrt", "training_shift": shift}


def _logging(wanted: Wanted, given: Given) -> dict[str, Any]:
    if not wanted["logger.wandb"]:
        return {}
    return {"log_with": "wandb", "log_tracker_name": wanted["logger.project"], "wandb_run_name": wanted["name"],
            "logging_dir": str((given.work / "logs").absolute())}  # fmt: skip


def _datasets(wanted: Wanted, given: Given) -> dict[str, Any]:
    """One dataset a resolution, with all folders in each."""
    wanted["data.repeats"]
    upscale = wanted["data.upscale"]
    if wanted["data.subject_weight"] != 1:
        wanted.refuse("data.subject_weight", "takes the plain mean over a masked picture, so that small faces learn less", "set it to 1")
    common = {"caption_extension": ".txt"} | {theirs: wanted[ours] for ours, theirs in OF_SUBSETS.items()}

    def subset(pictures: Pictures) -> dict[str, Any]:
        regular = {"is_reg": True} if pictures.regular else {}
        return {"image_dir": str(pictures.folder), "num_repeats": pictures.repeats, **regular, **common}

    def dataset(side: int) -> dict[str, Any]:
        return {
            "resolution": [side, side], "batch_size": wanted["data.batch_size"], "enable_bucket": True, "bucket_no_upscale": not upscale,
            "min_bucket_reso": side // 2, "max_bucket_reso": 2 * side, "bucket_reso_steps": 64,
            "subsets": [subset(pictures) for pictures in given.pictures],
        }  # fmt: skip

    return {"datasets": [dataset(side) for side in sides(wanted["data.resolution"])]}


def _prompts(wanted: Wanted, given: Given) -> list[str]:
    """A line for each prompt and seed, with its options behind it."""
    side, seed, negative = max(sides(wanted["data.resolution"])), wanted["seed"], wanted["sampling.negative"]
    guidance = first(wanted["sampling.guidance"], wanted.base["recipe"]["guidance"])
    steps = first(wanted["sampling.steps"], wanted.base["recipe"]["sampling_steps"])
    wanted["evaluation.prompts"]
    for prompt in given.prompts:
        if " --" in prompt or "\n" in prompt:
            wanted.refuse(
                "evaluation.prompts", f'reads an option in " --" and a new prompt in a new line of "{prompt}"', "write it without"
            )
    options = f" --w {side} --h {side} --s {steps}"
    options += f" --l 1.0 --g {guidance}" if wanted.family == "flux" else f" --l {guidance}"
    options += f" --n {negative}" if negative else ""
    seeds = range(seed, seed + wanted["evaluation.seeds"])
    return [f"{prompt}{options} --d {number}" for prompt in given.prompts for number in seeds]


# ---- how it is started, and what it leaves ----


def texts(config: Mapping[str, Any]) -> dict[str, str]:
    """File name -> what to write."""
    run = "".join(f"{key} = {toml(value)}\n" for key, value in config[CONFIG].items())
    return {CONFIG: run, DATASET: _dataset_text(config[DATASET]), PROMPTS: "".join(f"{line}\n" for line in config[PROMPTS])}


def _dataset_text(content: Mapping[str, Any]) -> str:
    lines = []
    for dataset in content["datasets"]:
        lines += ["[[datasets]]", *(f"{key} = {toml(value)}" for key, value in dataset.items() if key != "subsets")]
        for subset in dataset["subsets"]:
            lines += ["  [[datasets.subsets]]", *(f"  {key} = {toml(value)}" for key, value in subset.items())]
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """A text, number, truth value or list of them; JSON's words are TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def command(settings: KohyaSettings, config: Mapping[str, Any], work: Path) -> list[str]:
    """With what accelerate would ask for otherwise."""
    module = config[CONFIG]["network_module"]
    script = next(SCRIPTS[family] for family, name in MODULES.items() if name == module)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no",
              "--num_cpu_threads_per_process", "1", "--mixed_precision", config[CONFIG]["mixed_precision"]]  # fmt: skip
    return [str(settings.interpreter()), *launch, script, "--config_file", str((work / CONFIG).absolute())]


LAST_OF_A_STATE = "random_states_0.pkl"  # what accelerate writes last; never opened here


def session(work: Path, name: str) -> Session:
    """Each start has a folder of its own, named by the steps done before it, because its own count starts again from 0."""
    states = {}
    for path in (work / "output").glob("from-*/*-state/train_state.json"):
        if (path.parent / LAST_OF_A_STATE).is_file():
            states[_offset(path.parents[1]) + int(json.loads(path.read_text(encoding="utf-8"))["current_step"])] = path.parent
    step = max(states, default=0)
    return Session((work / "output" / f"from-{step:08d}").absolute(), states[step].absolute() if step else None, step)


def done_before(work: Path, name: str) -> int:
    """The step that it goes on from."""
    return session(work, name).offset


def _offset(folder: Path) -> int:
    return int(folder.name.removeprefix("from-"))


def finals(work: Path, name: str) -> list[tuple[Path, int]]:
    """What it writes when it is through, the newest first, each with the steps done before its sitting."""
    folders = sorted((work / "output").glob("from-*"), reverse=True)
    return [(folder / f"{name}.safetensors", _offset(folder)) for folder in folders if (folder / f"{name}.safetensors").is_file()]


def saved(work: Path, name: str) -> dict[int, Path]:
    """Its LoRAs on the way, by step; where two sittings have the same step, the later one's."""
    found = {}
    for folder in sorted((work / "output").glob("from-*")):
        for path in folder.glob(f"{name}-step*.safetensors"):
            if match := re.fullmatch(re.escape(name) + r"-step(\d{8})\.safetensors", path.name):
                found[_offset(folder) + int(match[1])] = path
    return found


def samples(work: Path, name: str) -> dict[tuple[int, int], Path]:
    """Its pictures, by step and number of the line in the prompt file; those at the ends of epochs are left out."""
    found = {}
    for folder in sorted((work / "output").glob("from-*")):
        for path in sorted((folder / "sample").glob(f"{name}_*.png")):
            if match := re.fullmatch(re.escape(name) + r"_(\d{6})_(\d+)_\d{14}(_\d+)?\.png", path.name):
                found[_offset(folder) + int(match[1]), int(match[2])] = path
    return found


def steps_in(metadata: Mapping[str, str]) -> int | None:
    """How many steps a LoRA of its had in its own sitting, by its header."""
    steps = metadata.get("ss_steps", "")
    return int(steps) if steps.isdigit() else None


def recorded(work: Path, name: str, after: int) -> None:
    """It keeps no record besides what it prints."""
    return None


# ---- what it says ----

BAR = re.compile(
    r"steps:\s+\d+%\|.*?\|\s*(?P<step>\d+)/(?P<total>\d+) \[[\d:]+<[\d:?]+,\s*(?:[\d.]+|\?)\s*(?:s/it|it/s)"
    r"(?:,.*?avr_loss=(?P<loss>[-+\d.eE]+|nan|-?inf))?"
)
PHASES = ("prepare tokenizer", "caching latents", "caching Text Encoder", "running training", "generating sample images", "create LoRA")
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def event(line: str, name: str) -> Step | Said | None:
    """What a line of its output means."""
    line = COLOUR.sub("", line).strip()
    if bar := BAR.search(line):
        return Step(int(bar["step"]), int(bar["total"]), {} if bar["loss"] is None else {"loss": float(bar["loss"])})
    if "CUDA out of memory" in line or "OutOfMemoryError" in line:
        return Said("out of memory", line)
    if line.startswith("saving checkpoint:") or "saving state at step" in line:
        return Said("saving", line)
    if "model saved." in line:
        return Said("saved", line)
    if "No data found" in line:
        return Said("error", "it found no pictures in the dataset")
    if found := next((phase for phase in PHASES if phase in line), None):
        return Said("phase", line[line.index(found) :].split(" / ")[0])
    return None


# ---- what its version knows ----


def options(folder: Path) -> set[str]:
    """Its command line's options, by the `add_argument` calls of this checkout's own code, and, with a dot in front, those of datasets."""
    files = [*sorted((folder / "library").glob("*.py")), folder / ENTRY, *(folder / script for script in SCRIPTS.values())]
    trees = [parsed(path) for path in files]
    known = {option.removeprefix("--") for tree in trees for option in calls(tree, "add_argument") if option.startswith("--")}
    config_util = parsed(folder / "library" / "config_util.py")
    return known | {f".{key}" for key in strings(config_util)}


def written(config: Mapping[str, Any]) -> set[str]:
    """All that `options` knows about."""
    datasets = config[DATASET]["datasets"]
    return set(config[CONFIG]) | {f".{key}" for dataset in datasets for part in (dataset, *dataset["subsets"]) for key in part}
