"""What trainings on characters and on motion have in common: where they run, what they load, their folder, loggers and ends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from charforgex import runs
from charforgex.config import bind, conf_folder
from charforgex.data.prepared import LoadParts, PreparedData
from charforgex.errors import CheckpointError, ConfigError
from charforgex.families.base import Family
from charforgex.families.loading import weights_hash
from charforgex.families.quantized import Packing, check_packing
from charforgex.generation.sampling import check_sampling
from charforgex.training import report
from charforgex.training.checkpoints import load_last_good
from charforgex.training.events import Events
from charforgex.training.losses import Objective
from charforgex.training.module import StepModule
from charforgex.training.processes import ALONE, Processes
from charforgex.training.run import Clock, Settings
from charforgex.types import Components

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARE_BYTES = 64 << 20  # besides the checkpoints: samples, logs, curves


@dataclass
class Job:
    """What the stages share."""

    cfg: DictConfig
    settings: Settings
    run_dir: Path
    console: Console
    clock: Clock
    processes: Processes = ALONE

    def __post_init__(self):
        self.events = Events(self.run_dir, self.processes.is_first)

    def show(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        """A part of the plan, to whoever sits there and whoever follows the events."""
        report.show(self.console, title, lines)
        self.events.tell("plan", title=title, lines=[list(line) for line in lines])

    @property
    def measures(self) -> bool:
        """Whether this process draws and measures: the first, and every one where each has but a part of the base."""
        return self.processes.is_first or self.processes.in_step


# ---- before the first step ----


def speaker(processes: Processes) -> Console:
    """Of several processes the first speaks."""
    return Console(quiet=not processes.is_first)


def set_threads(number: int) -> None:
    """Of the CPU; 0 leaves it to torch."""
    if number:
        torch.set_num_threads(number)


def with_trigger(prompts: Sequence[str], trigger: str | None) -> tuple[str, ...]:
    """The evaluation's prompts with their {trigger} replaced."""
    if trigger is None and any("{trigger}" in prompt for prompt in prompts):
        raise ConfigError(
            'data.trigger is not set, and evaluation.prompts use it; give the word that calls the character, data.trigger="ohwx woman".'
        )
    return tuple(prompt.replace("{trigger}", trigger or "") for prompt in prompts)


def choose_device(accelerator: str) -> str:
    """The device that Lightning takes for `accelerator`; everything is loaded there, also for measuring before the first step."""
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    chosen = next(name for name in available if available[name]) if accelerator == "auto" else accelerator
    if not available[chosen]:
        raise ConfigError(f"trainer.accelerator={accelerator} is not there; use trainer.accelerator=auto.")
    return {"gpu": "cuda"}.get(chosen, chosen)


def loader(cfg: DictConfig, family: Family, device: str) -> LoadParts:
    """A function that loads groups of the base ("denoiser", "vae", "text") when they are needed, and always the scheduler."""

    kind = cfg.trainer.get("quantize")  # not among the settings of older runs
    packing = Packing(kind, Path(cfg.cache_dir)) if kind else None
    splits = cfg.trainer.get("strategy") == "fsdp"

    def load_parts(groups: Sequence[str]) -> Components:
        where = "cpu" if splits and "denoiser" in groups else device  # one that is split may be too large for a device
        return family.load(cfg.family.source, groups, DTYPES[cfg.family.dtype], where, tokenizer=cfg.family.tokenizer, packing=packing)

    return load_parts


def open_base(job: Job, family: Family, device: str) -> tuple[LoadParts, Components, Objective]:
    """What loads the base, what its configs and its scheduler tell, and the objective. Raises ConfigError for one that does not fit it."""
    objective = bind(Objective, job.cfg.loss, "loss")
    check_packing(job.settings.trainer.quantize, device)
    load_parts = loader(job.cfg, family, device)
    base = load_parts([])
    objective.check(family.process(base))
    check_sampling(family, base, job.settings.sampling)
    return load_parts, base, objective


def encoder_hashes(cfg: DictConfig, family: Family) -> dict[str, str]:
    """What identifies the encoders to the caches; nothing is loaded for it."""
    return {group: weights_hash(family, cfg.family.source, group, cfg.family.tokenizer) for group in ("vae", "text")}


def check_resolution(family: Family, source: str, trained_at: int, resolutions: Sequence[int]) -> None:
    """Raises ConfigError for pictures of an eighth of the base's own size or less: an embedded base's numbers for a published one."""
    if 8 * max(resolutions) > trained_at:
        return
    configs = {path.stem: OmegaConf.load(path) for path in sorted((conf_folder() / "family").glob("*.yaml"))}
    fitting = [
        f"family={name}" for name, config in configs.items() if config.name == family.name and 8 * config.recipe.resolution > trained_at
    ]
    raise ConfigError(
        f"data.resolution={max(resolutions)} is far below the {trained_at} px of {source}: these are the numbers of a smaller base. "
        f"Use {' or '.join([*fitting, f'data.resolution={trained_at}'])}, with family.source={source}."
    )


def check_disk(run_dir: Path, parameters: dict, keep: int) -> None:
    """Raises ConfigError if checkpoints (weights, EMA and an optimizer's up to four moments) and the run's files would not fit."""
    needed = 4 * 6 * sum(p.numel() for p in parameters.values()) * (keep + 3) + SPARE_BYTES
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"run_dir={run_dir} needs about {needed >> 20} MiB, and {free >> 20} MiB are free; free some, or set runs_dir.")


def start_run(job: Job, data: PreparedData, going_on: bool) -> None:
    """The folder, with all that is needed to repeat the run."""
    if not job.processes.is_first:
        return
    job.run_dir.mkdir(parents=True, exist_ok=True)
    if not going_on:
        runs.save_config(job.run_dir, job.cfg)
        runs.write_provenance(job.run_dir, seed=job.cfg.seed, dataset_sha256=data.dataset_hash, config_sha256=runs.config_hash(job.cfg))
    job.events.begin(name=job.cfg.name, steps=job.settings.trainer.steps)


def restore(job: Job, module: StepModule, checkpoints: Path) -> None:
    if job.processes.is_first:
        runs.remove_unfinished(job.run_dir)
    job.processes.wait()
    checkpoint, problems = load_last_good(checkpoints)
    check_shared(job.processes, checkpoint)
    for problem in problems:
        job.console.print(f"[yellow]{problem} Falling back to the one before.")
    if checkpoint is not None:
        module.restore(checkpoint)
        job.console.print(f"Going on with {job.run_dir} from step {module.step}.")
    job.events.tell("resumed", module.step)


def check_shared(processes: Processes, checkpoint: dict | None) -> None:
    """Raises CheckpointError unless all processes go on from the same step."""
    steps = processes.gather(None if checkpoint is None else checkpoint["step"])
    if len(set(steps)) > 1:
        raise CheckpointError(f"The processes found checkpoints of the steps {steps}; runs_dir must be on a disk that all machines share.")


def make_loggers(job: Job) -> list:
    options = job.cfg.logger
    loggers = []
    if options.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(job.run_dir, name="tensorboard", version=""))
    if options.wandb:
        try:
            from lightning.pytorch.loggers import WandbLogger

            logger = WandbLogger(
                name=job.run_dir.name, save_dir=job.run_dir, project=options.project, offline=bool(options.offline), id=job.run_dir.name,
                resume="allow", config=OmegaConf.to_container(job.cfg, resolve=True),
            )  # fmt: skip
        except ModuleNotFoundError as error:
            raise ConfigError('logger.wandb=true needs wandb: pip install ".[wandb]".') from error
        loggers.append(logger)
    return loggers


# ---- after the last step ----


def leave_if(stopped: int | None, job: Job, step: int) -> None:
    """Ends the program where signal `stopped` asked for it, and all is saved."""
    if stopped is None:
        return
    job.console.print(
        f"Stopped at step {step}; all is saved. The same command goes on from there, or: python train.py resume={job.run_dir}"
    )
    raise SystemExit(runs.EXIT_INTERRUPTED if stopped == 2 else runs.EXIT_TERMINATED)


def finish_wandb(run, offline: bool, console: Console) -> None:
    """Ends the W&B run now: at the interpreter's exit, a loaded machine may end before its file is written."""
    folder = Path(run.dir).parent
    run.finish()
    if offline and not list(folder.glob("*.wandb")):
        console.print(f"[yellow]W&B wrote no run file into {folder}; metrics.csv in the run folder has every number.", soft_wrap=True)
