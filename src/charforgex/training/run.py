"""`python train.py`: from a folder of pictures, or of videos, to a LoRA. `train(cfg)` is what every entry point and sweep calls.

Nothing heavy is imported before the settings are known to be right.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex import runs
from charforgex.config import arguments, bind
from charforgex.errors import ConfigError
from charforgex.families import registry
from charforgex.families.settings import FamilySettings
from charforgex.generation.settings import LoggerSettings, SamplingSettings
from charforgex.training.processes import Processes, find_place, joined
from charforgex.training.settings import (
    EvaluationSettings,
    LoraSettings,
    MotionEvaluationSettings,
    MotionSettings,
    OptimizerSettings,
    RunSettings,
    TextEncoderSettings,
    TrainerSettings,
)
from charforgex.training.trial import TrialSettings, as_trial

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Settings:
    """Everything in `train.yaml` that can be judged without torch."""

    lora: LoraSettings
    text_encoder: TextEncoderSettings
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    evaluation: EvaluationSettings | MotionEvaluationSettings
    sampling: SamplingSettings
    motion: MotionSettings | None = None  # None: a character is trained
    trial: TrialSettings | None = None  # None: no sweep asks


def check(cfg: DictConfig) -> Settings:
    """The settings, each in its type and range, or a ConfigError that names what is wrong. No model is loaded, no file read."""
    bind(RunSettings, {field.name: cfg[field.name] for field in fields(RunSettings)}, "")
    family = bind(FamilySettings, cfg.family, "family")
    registry.check(family.name)
    of_motion = "motion" in cfg
    if of_motion:
        check_groups_of_motion(cfg)
    settings = Settings(
        lora=bind(LoraSettings, cfg.lora, "lora"),
        text_encoder=bind(TextEncoderSettings, cfg.text_encoder, "text_encoder"),
        optimizer=bind(OptimizerSettings, cfg.optimizer, "optimizer"),
        trainer=bind(TrainerSettings, cfg.trainer, "trainer"),
        evaluation=bind(MotionEvaluationSettings if of_motion else EvaluationSettings, cfg.evaluation, "evaluation"),
        sampling=bind(SamplingSettings, cfg.sampling, "sampling").filled(family.recipe),
        motion=bind(MotionSettings, cfg.motion, "motion") if of_motion else None,
        trial=bind(TrialSettings, cfg.trial, "trial") if cfg.get("trial") is not None else None,
    )
    if not of_motion and not settings.evaluation.prompts:
        raise ConfigError("evaluation.prompts is empty; the identity curve needs at least one prompt.")
    bind(LoggerSettings, cfg.logger, "logger")
    if "backend" in cfg:
        from charforgex.backends.run import check as check_backend

        check_backend(cfg)
    # These two have their schema where torch is, which a good config needs next anyway.
    from charforgex.training.losses import Objective

    objective = bind(Objective, cfg.loss, "loss")
    if of_motion:
        from charforgex.data.clips import ClipData

        refuse_for_motion(cfg, settings)
        arguments(ClipData, data_options(cfg), "data", given=("source", "trigger", "cache", "seed"))
        refuse_together(settings, pretraining=False)
        return settings
    from charforgex.data.datamodule import CharacterData

    if "pretrain" not in cfg:
        way_out = "say experiment=animatediff_motion to train motion, or choose another family."
        registry.refuse_clips(registry.get(family.name), "a character's training", way_out)
    arguments(CharacterData, data_options(cfg), "data", given=("source", "trigger", "class_word", "cache", "seed"))
    if cfg.data.class_word is not None and not objective.prior_weight:
        raise ConfigError(f"data.class_word={cfg.data.class_word} has no effect with loss.prior_weight=0; set loss.prior_weight=1.")
    if cfg.get("curation"):
        from charforgex.curation.settings import CurationSettings

        bind(CurationSettings, cfg.curation, "curation")
    if "pretrain" in cfg:
        refuse_for_pretraining(cfg)
        if settings.trainer.count > 1:
            raise ConfigError(f"trainer.devices={settings.trainer.count}: the embedded models are trained on one device; leave it out.")
    refuse_together(settings, pretraining="pretrain" in cfg)
    return settings


def refuse_together(settings: Settings, pretraining: bool) -> None:
    """Raises ConfigError for settings of two groups that exclude each other."""
    name = settings.optimizer.name
    if name == "muon" and not pretraining:
        raise ConfigError("optimizer=muon turns whole weights, not a LoRA's thin factors; it is for pretrain. Use adamw or prodigy.")
    if name == "schedule_free" and settings.trainer.ema:
        raise ConfigError(f"trainer.ema={settings.trainer.ema:g} would average what schedule_free averages already; set trainer.ema=0.")
    if settings.trainer.splits_base and settings.lora.init == "pissa" and not pretraining:
        raise ConfigError("lora.init=pissa keeps what it began with beside the base, and trainer.strategy=fsdp would split that; set zero.")
    rates = {
        "lora.up_ratio": settings.lora.up_ratio * settings.optimizer.lr,
        "text_encoder.lr": settings.text_encoder.lr,
        "text_encoder.tokens_lr": settings.text_encoder.tokens_lr if settings.text_encoder.tokens else None,
    }
    for setting, rate in rates.items():
        if name == "prodigy" and not pretraining and rate not in (None, settings.optimizer.lr):
            way_out = "1" if setting == "lora.up_ratio" else f"{settings.optimizer.lr:g}"
            raise ConfigError(f"optimizer=prodigy finds one rate for all that learns; set {setting}={way_out}, or choose optimizer=adamw.")


def check_groups_of_motion(cfg: DictConfig) -> None:
    """Raises ConfigError unless the groups are those that go with motion."""
    if "pretrain" in cfg:
        raise ConfigError("motion and pretrain are two trainings; leave one of them out.")
    if "frames" not in cfg.data:
        raise ConfigError("motion is learnt from clips, and this data is pictures; set data=clips, as experiment=animatediff_motion does.")
    if "embedder" in cfg.evaluation and "follower" in cfg.evaluation:
        raise ConfigError("motion is measured by evaluation=motion, as experiment=animatediff_motion sets it.")
    if cfg.get("curation"):
        raise ConfigError("curation is of pictures in a training; make clips with charforgex curate first, and set curation=none.")


def refuse_for_motion(cfg: DictConfig, settings: Settings) -> None:
    """Raises ConfigError for what a training of motion has no use for."""
    motion, lora, recipe = settings.motion, settings.lora, cfg.family.recipe
    if not registry.get(cfg.family.name).is_video:
        raise ConfigError(f"family={cfg.family.name} makes pictures, and motion is learnt by families of clips; set family=animatediff.")
    asked = {
        "loss.prior_weight": cfg.loss.prior_weight,
        "text_encoder.lr": settings.text_encoder.lr,
        "text_encoder.tokens": settings.text_encoder.tokens,
        "trainer.compile": settings.trainer.compile,
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(f"{name}={value} has no effect with motion; leave it out.")
    if motion.train == "module" and (kind := settings.trainer.quantize):
        raise ConfigError(
            f"trainer.quantize={kind} holds weights as they are, and motion.train=module changes them; leave one of them out."
        )
    if lora.kind != "lora":
        raise ConfigError(f"lora.kind={lora.kind}: files of motion LoRAs hold products of two factors alone; set lora.kind=lora.")
    if lora.init == "pissa" and motion.spatial and motion.dropout:
        raise ConfigError(
            f"lora.init=pissa subtracts what it began with, of which motion.dropout={motion.dropout:g} drops nothing; set that to 0."
        )
    if motion.spatial and motion.spatial_lr is None and recipe.get("spatial_lr") is None:
        raise ConfigError("motion.spatial_lr is null and family.recipe has no spatial_lr; set it to 1e-4, say.")
    if settings.sampling.batch_size != SamplingSettings.batch_size:
        raise ConfigError(f"sampling.batch_size={settings.sampling.batch_size} has no effect with motion: clips are drawn one by one.")
    if settings.optimizer.name == "prodigy" and motion.spatial_lr is not None:
        raise ConfigError(f"motion.spatial_lr={motion.spatial_lr:g}: optimizer=prodigy finds that rate by itself; leave it null.")


def refuse_for_pretraining(cfg: DictConfig) -> None:
    """Raises ConfigError for what only the training of an adapter on a character's pictures has a use for."""
    asked = {
        "loss.prior_weight": cfg.loss.prior_weight,
        "data.regularisation.source": cfg.data.regularisation.source,
        "text_encoder.lr": cfg.text_encoder.lr,
        "text_encoder.tokens": cfg.text_encoder.tokens,
        "trainer.quantize": cfg.trainer.get("quantize"),
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(f"{name}={value} has no effect with pretrain, which trains the base models themselves; leave it out.")


def data_options(cfg: DictConfig) -> dict[str, Any]:
    """The `data` group without its source and trigger, which a demo brings itself, and the class that is said with it."""
    return {key: value for key, value in cfg.data.items() if key not in ("source", "trigger", "class_word")}


def train(cfg: DictConfig) -> float | dict[str, Any]:
    """Runs the training that `cfg` describes. Returns the value of the best checkpoint, which is what a sweep maximises; a trial of a study
    returns its outcome."""
    return run(cfg)["value"] if cfg.get("trial") is None else as_trial(cfg, run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """`train`, returning all of result.json. Raises CharForgeError; exits with 130 or 143 when stopped, with all saved."""
    if cfg.resume is not None:
        cfg = resumed(Path(cfg.resume), cfg.trainer)
    settings = check(cfg)
    if settings.trainer.plan == "auto":
        from charforgex.training.plan_run import planned

        cfg = planned(cfg, settings)
        settings = check(cfg)
    elif settings.trainer.memory is not None:
        memory = settings.trainer.memory
        raise ConfigError(f"trainer.memory={memory:g} changes nothing without trainer.plan=auto; set that, or leave it out.")
    place = find_place(settings.trainer, os.environ)
    if place is None:
        from charforgex.training.launching import launch

        return launch(cfg, settings.trainer)
    with joined(place, settings.trainer) as processes:
        return run_here(cfg, settings, processes)


def run_here(cfg: DictConfig, settings: Settings, processes: Processes) -> dict[str, Any]:
    """What one of the processes does."""
    path, going_on = processes.tell(lambda: runs.plain(choose_run_dir(cfg)))
    run_dir = Path(path)
    if "pretrain" in cfg:
        from charforgex.training.pretraining import run_pretraining

        return run_pretraining(cfg, settings, run_dir, going_on)
    if "backend" in cfg:
        from charforgex.training.external import train_external

        return train_external(cfg, settings, run_dir, going_on)
    if settings.motion is not None:
        from charforgex.training.motion_run import train_motion

        return train_motion(cfg, settings, run_dir, going_on, processes)
    from charforgex.training.character import train_character

    return train_character(cfg, settings, run_dir, going_on, processes)


def resumed(run_dir: Path, trainer: DictConfig) -> DictConfig:
    """The config that a run folder was made with, to be run where `trainer` says if that names devices. A trial that is resumed by hand
    trains to its end, whatever its sweep thinks of it."""
    from omegaconf import OmegaConf

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume={run_dir} is not a run folder: it has no config.yaml.")
    cfg = OmegaConf.load(path)
    cfg.run_dir, cfg.fresh, cfg.trial = str(run_dir), False, None
    if trainer.devices is not None:
        for name in runs.PLACES["trainer"]:
            cfg.trainer[name] = trainer[name]
    return cfg


def choose_run_dir(cfg: DictConfig) -> tuple[Path, bool]:
    """The run's folder, and whether an interrupted run of the same settings lies there to be gone on with.

    A run without a `run_dir` of its own is named by its settings: the same command finds its interrupted run again.
    """
    if cfg.run_dir is not None:
        path = Path(cfg.run_dir)
        state = state_of(path)
        if state in ("finished", "foreign") or (state == "interrupted" and cfg.fresh):
            way_out = " drop fresh=true to go on with it, or" if state == "interrupted" else ""
            what = {"finished": "a finished run", "interrupted": "an interrupted run", "foreign": "other files"}[state]
            raise ConfigError(f"run_dir={path} holds {what};{way_out} name another folder.")
        return path, state == "interrupted"
    name = f"{cfg.name}-{runs.config_hash(cfg)[:8]}"
    for number in range(1, 1000):
        path = Path(cfg.runs_dir) / (name if number == 1 else f"{name}-{number}")
        state = state_of(path)
        if state == "interrupted" and not cfg.fresh:
            return path, True
        if state == "new":
            return path, False
    raise ConfigError(f"runs_dir={cfg.runs_dir} holds 999 runs of these settings; remove some, or set runs_dir.")


def state_of(run_dir: Path) -> str:
    """new (nothing to lose), interrupted, finished, or foreign."""
    if (run_dir / "result.json").exists():
        return "finished"
    if (run_dir / "config.yaml").exists():
        return "interrupted"
    made_before_config = {"pictures", "dataset", "clips"}  # a run killed in its first second
    strangers = {path.name for path in run_dir.iterdir()} - made_before_config if run_dir.exists() else set()
    return "foreign" if strangers else "new"


def elapsed_before(run_dir: Path) -> float:
    """Seconds that earlier sittings of this run took."""
    path = run_dir / "seconds.json"
    if not path.exists():
        return 0.0
    import json

    return float(json.loads(path.read_text())["seconds"])


class Clock:
    """Time of all sittings of a run."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.before, self.started = run_dir, elapsed_before(run_dir), time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def save(self) -> None:
        runs.write_json(self.run_dir / "seconds.json", {"seconds": self.seconds()})
