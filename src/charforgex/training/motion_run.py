"""From clips to a motion LoRA and the LoRA of how the clips look, or to motion modules: one function a stage, in the order they run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from charforgex import runs
from charforgex.charworld.demo import DEMO, motion_of, motion_prompts, write_motion
from charforgex.config import bind
from charforgex.data.clips import ClipData
from charforgex.embedders import get_embedder
from charforgex.errors import ConfigError, DataError, LoraError
from charforgex.families import registry
from charforgex.families.base import Family
from charforgex.families.loading import denoiser_config, load_components
from charforgex.families.parts import adaptable
from charforgex.lora.checkpoints import folder_name, read_checkpoint, saved_steps
from charforgex.lora.formats import read
from charforgex.lora.inject import adapter_parameters, inject, read_adapter
from charforgex.lora.metadata import build
from charforgex.lora.state import Lora
from charforgex.lora.targets import chosen
from charforgex.lora.writing import write
from charforgex.quiet import quiet
from charforgex.training import report, trial
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.curves import draw_motion_curves
from charforgex.training.job import (
    Job,
    check_disk,
    check_resolution,
    choose_device,
    encoder_hashes,
    finish_wandb,
    leave_if,
    make_loggers,
    open_base,
    restore,
    set_threads,
    speaker,
    start_run,
    with_trigger,
)  # fmt: skip
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import StepLoader, fit, step_loader
from charforgex.training.losses import Objective
from charforgex.training.motion_knowing import PROMPTS, MotionKnowing, MotionScores, as_metrics, plain
from charforgex.training.motion_module import MotionLoraModule
from charforgex.training.optimizers import build_optimizer, check_optimizer, schedule
from charforgex.training.processes import ALONE, Processes
from charforgex.training.run import Clock, Settings, data_options
from charforgex.training.sharding import check_splittable, split
from charforgex.types import Components


@dataclass
class Learning:
    """What learns, by name; either may be empty. `adapted` are the modules that have an adapter."""

    temporal: dict[str, nn.Parameter]
    spatial: dict[str, nn.Parameter]
    adapted: list[str]


def train_motion(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool, processes: Processes = ALONE) -> dict[str, Any]:
    """Returns what result.json holds. See `training.run.run`."""
    job = Job(cfg, settings, run_dir, speaker(processes), Clock(run_dir), processes)
    with quiet(), job.events:
        return _train(job, going_on)


def _train(job: Job, going_on: bool) -> dict[str, Any]:
    cfg, settings, run_dir, processes = job.cfg, job.settings, job.run_dir, job.processes
    set_threads(settings.trainer.threads)
    family = registry.get(cfg.family.name)
    device = choose_device(settings.trainer.accelerator)
    check_optimizer(settings.optimizer.name, device)
    wanted = targets_of(family, settings, denoiser_config(family, cfg.family.source))
    load_parts, base, objective = open_base(job, family, device)
    if cfg.data.frames > (known := base.config["max_frames"]):
        raise ConfigError(f"data.frames={cfg.data.frames}: the motion modules of {cfg.family.source} know {known} at once; take fewer.")
    source, prompts = processes.after_first(lambda: find_clips(cfg, settings, run_dir))
    where = {"source": source, "trigger": cfg.data.trigger, "cache": Path(cfg.cache_dir), "seed": cfg.seed}
    data = processes.after_first(lambda: bind(ClipData, data_options(cfg), "data", **where))
    if not data.val:
        why = "; ".join(note for note in data.notes if "held out" in note) or "data.val_count=0; set it to 1 or more"
        raise DataError(f"Nothing could tell whether the motion is learnt: {why}.")
    check_resolution(family, cfg.family.source, family.default_size(base), data.resolutions)
    parts = load_parts(["denoiser"])
    if settings.trainer.splits_base:
        check_splittable(parts.denoiser, cfg.family.source)
    if settings.trainer.gradient_checkpointing:
        checkpoint_blocks(parts.denoiser, family.blocks(parts.denoiser), settings.trainer.gradient_checkpointing)
    learning = learn(family, parts.denoiser, settings, wanted, cfg.seed)
    check_disk(run_dir, learning.temporal | learning.spatial, settings.trainer.keep)
    if settings.trainer.splits_base:
        learns = [*learning.temporal.values(), *learning.spatial.values()]
        split(parts.denoiser, family.blocks(parts.denoiser), learns, device, processes.count)

    start_run(job, data, going_on)
    prompts = prompts or list(dict.fromkeys(record.captions[0] for record in data.val))[:PROMPTS]
    made = processes.after_first(lambda: data.prepare(
        family, load_parts, weights=encoder_hashes(cfg, family), pixel_multiple=family.pixel_multiple(parts),
        latent_stride=family.latent_stride(parts), prompts=[*prompts, settings.sampling.negative], dtype=cfg.family.dtype,
        progress=processes.is_first,
    ))  # fmt: skip
    module = make_module(job, family, parts, objective, data, learning)
    show_plan(job, family, parts, objective, data, learning, module, made)
    measuring = None
    if job.measures:
        parts.modules |= load_parts(["vae"]).modules
        parts["vae"].encoder = None  # clips are all encoded; only previews are decoded from here on
        measuring = Measuring(job, family, parts, data, module, prompts)  # before anything is learnt
    checkpoints = run_dir / "checkpoints"
    if going_on:
        restore(job, module, checkpoints)
    if measuring is not None:
        measuring.go_on()
    loggers = [measuring.log, *make_loggers(job)] if processes.is_first else []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    stopped = fit(
        module, checkpoints, settings.trainer, loggers, job.console, measuring or (lambda step: None), settings.evaluation.every,
        lambda: {measuring.best_step}, job.events,
    )  # fmt: skip
    if processes.is_first:
        job.clock.save()
    leave_if(stopped, job, module.step)
    if measuring is not None and not processes.is_first:
        measuring.knowing.draw()  # for its part of the base, which the first process needs in `finish`
    result = processes.tell(lambda: finish(job, family, parts, data, module, measuring, learning))
    if job.cfg.logger.wandb and processes.is_first:
        finish_wandb(loggers[-1].experiment, bool(job.cfg.logger.offline), job.console)
    return result


# ---- before the first step ----


def find_clips(cfg: DictConfig, settings: Settings, run_dir: Path) -> tuple[Path, list[str]]:
    """Where the videos are, and the prompts of the clips that are drawn; none where captions of held-out clips are to serve.

    A demo's motion becomes a folder like any other, and is asked of other characters.
    """
    source, prompts = str(cfg.data.source), with_trigger(settings.evaluation.prompts or (), cfg.data.trigger)
    if not source.startswith(DEMO):
        return Path(source), list(prompts)
    name = motion_of(source, "data.source")
    if cfg.data.trigger is not None:
        raise ConfigError(f"data.trigger={cfg.data.trigger} has no effect with data.source={source}, whose captions have none.")
    folder = write_motion(run_dir / "clips", name, cfg.data.frames, cfg.data.fps)
    return folder, list(prompts or motion_prompts(name, PROMPTS))


def targets_of(family: Family, settings: Settings, config: Mapping[str, Any]) -> list[str]:
    """The modules that get an adapter, by whole paths. Raises ConfigError where a path that is to learn would have none."""
    motion, targets = settings.motion, settings.lora.targets
    if isinstance(targets, str):
        targets = family.lora_targets(targets, config)
    paths = chosen("lora.targets", targets, list(adaptable(family, config)))
    temporal = [path for path in paths if family.temporal in path]
    halves = {
        "temporal": temporal if motion.temporal and motion.train == "lora" else None,
        "spatial": [path for path in paths if path not in set(temporal)] if motion.spatial else None,
    }
    for name, found in halves.items():
        if found == []:
            raise ConfigError(f"lora.targets={settings.lora.targets} has no module for motion.{name}; choose others, or set that to false.")
    return [path for found in halves.values() for path in found or ()]


def learn(family: Family, denoiser: nn.Module, settings: Settings, wanted: list[str], seed: int) -> Learning:
    """Adapters on the modules that are wanted, and the motion modules' own weights, in float32, where they are to learn themselves."""
    lora, adapted = settings.lora, []
    if wanted:
        adapted = inject(denoiser, wanted, lora.rank, lora.alpha, seed, ranks=lora.ranks, alphas=lora.alphas, **lora.how())
    adapter = adapter_parameters(denoiser)
    temporal = {name: parameter for name, parameter in adapter.items() if family.temporal in name}
    spatial = {name: parameter for name, parameter in adapter.items() if name not in temporal}
    if settings.motion.train == "module":
        temporal = {name: parameter for name, parameter in denoiser.named_parameters() if family.temporal in name}
        for parameter in temporal.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return Learning(temporal, spatial, adapted)


def make_module(
    job: Job, family: Family, parts: Components, objective: Objective, data: ClipData, learning: Learning
) -> MotionLoraModule:  # fmt: skip
    s, motion = job.settings, job.settings.motion
    spatial_lr = motion.spatial_lr or job.cfg.family.recipe.get("spatial_lr")
    rates = {"temporal": s.optimizer.lr, "spatial": s.optimizer.lr if s.optimizer.name == "prodigy" else spatial_lr}

    def make_optimizer(trainable: dict[str, nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
        return {
            path: build_optimizer(
                replace(s.optimizer, lr=rates[path]), own,
                lambda name: s.lora.up_ratio if name.endswith(".up") else 1.0, lambda name: s.lora.init == "zero",
            )
            for path, own in (("temporal", learning.temporal), ("spatial", learning.spatial)) if own
        }  # fmt: skip

    def make_loader(first_step: int) -> StepLoader:
        return step_loader(data, first_step, s.trainer, job.processes)

    return MotionLoraModule(
        family, parts.denoiser, family.process(parts), objective, learning.temporal, learning.spatial, motion.masked, motion.dropout,
        motion.debias, make_optimizer=make_optimizer, learning_rate=schedule(s.optimizer.schedule, s.trainer.steps, s.optimizer.warmup),
        seed=job.cfg.seed, grad_clip=s.optimizer.grad_clip, ema_decay=s.trainer.ema, make_loader=make_loader,
        processes=job.processes,
    )  # fmt: skip


def show_plan(
    job: Job, family: Family, parts: Components, objective: Objective, data: ClipData, learning: Learning, module: MotionLoraModule,
    made: Mapping[str, int],
) -> None:  # fmt: skip
    """The effective objective, the data and the time that it will take."""
    s, motion = job.settings, job.settings.motion
    names = [name for name in family.components["text"] if name.startswith("tokenizer")]
    tokenizers = load_components(family, job.cfg.family.source, names, torch.float32, tokenizer=job.cfg.family.tokenizer)
    stride = family.latent_stride(parts)
    grids = [(item.cut.size[0] // stride, item.cut.size[1] // stride) for item in data.items]
    lines = report.objective_lines(
        family, parts, family.process(parts), objective, s.lora, learning.adapted, s.optimizer, s.trainer,
        sum(p.numel() for p in module.trainable.values()), max(grids, key=math.prod),
    )  # fmt: skip
    if learning.temporal:
        what = "a LoRA of the motion modules" if motion.train == "lora" else "the motion modules themselves"
        lines.append(("motion", f"{what}, lr {s.optimizer.lr:g}, on whole clips; what frames share counts less by {motion.debias:g}"))
    if learning.spatial:
        rate = module.solvers["spatial"].param_groups[0]["lr"]
        alone = f", in {1 - motion.masked:.0%} of the steps" if learning.temporal else ""
        lines.append(("look", f"a LoRA of its own, lr {rate:g}, on single frames{alone}, dropout {motion.dropout:g}"))
    job.show("Objective", lines)
    count = f"{len(data.items)} clips of {data.frames} frames at {float(data.fps):g} a second to train on, {len(data.val_items)} held out"
    job.show("Data", report.data_lines(family, tokenizers, data, told=("clips", count)))
    expected, _ = report.trial(module, s.trainer.steps)
    encoded = f"{made['latent']} clips and {made['text']} captions encoded, the rest was cached"
    memory = f"{report.peak_memory_bytes() / 2**30:.2f} GiB so far"
    job.show("Plan", [("cache", encoded), ("time", expected), ("memory", memory), ("folder", str(job.run_dir))])


# ---- while it trains ----


class Measuring:
    """Called with the step at every evaluation: draws clips, measures, logs, and remembers the best checkpoint.

    Made before anything is learnt or restored, because it measures the base first.
    """

    def __init__(self, job: Job, family: Family, parts: Components, data: ClipData, module: MotionLoraModule, prompts: Sequence[str]):
        self.job, self.module = job, module
        s = job.settings
        debias = s.motion.debias if module.temporal else 0.0
        with job.console.status("measuring the base model"):
            self.knowing = MotionKnowing(
                family, parts, data, prompts, get_embedder(s.evaluation.embedder), s.evaluation, s.sampling, debias,
                module.without_spatial if module.temporal else nullcontext, job.cfg.seed,
            )  # fmt: skip
            self.base = self.knowing.anchor()
        self.history: list[MotionScores] = []

    def go_on(self) -> None:
        """With what an earlier sitting measured up to the module's step."""
        self.log = StepLog(self.job.run_dir / "metrics.csv", self.module.step) if self.job.processes.is_first else None
        path = self.job.run_dir / "scores.json"
        earlier = [MotionScores(**row) for row in json.loads(path.read_text())["checkpoints"]] if path.exists() else []
        self.history = [scores for scores in earlier if scores.step <= self.module.step]

    def value(self, scores: MotionScores) -> float:
        """What the best checkpoint has most of: the share of the base's loss on held-out clips that is gone."""
        return 1 - scores.validation / self.base.validation

    @property
    def best(self) -> MotionScores | None:
        return max(self.history, key=self.value, default=None)

    @property
    def best_step(self) -> int:
        return self.best.step if self.best else -1

    def __call__(self, step: int) -> None:
        run_dir = self.job.run_dir
        with self.module.averaged():
            scores, clips = self.knowing.scores(step)
        self.history = [*(s for s in self.history if s.step < step), scores]
        if not self.job.processes.is_first:
            return
        runs.write_json(run_dir / "scores.json", {"base": plain(self.base), "checkpoints": [plain(s) for s in self.history]})
        sheet, moving = (run_dir / "samples" / f"step-{step:08d}.{suffix}" for suffix in ("png", "gif"))
        self.knowing.sheet(clips, sheet, f"step {step}")
        self.knowing.gif(clips, moving)
        self.module.tell(step, as_metrics(scores, self.base, self.value(scores)), {"samples": sheet, "clips": moving})
        self.job.clock.save()
        moves, still = scores.moves, self.base.moves
        told = ", ".join(f"{name} {moves[name]:.3f} (base {still[name]:.3f})" for name in moves)
        self.job.console.print(
            f"step {step}: validation {scores.validation:.4f} (base {self.base.validation:.4f}), {told}", highlight=False
        )
        settings, numbers = self.job.settings, {"value": self.value(scores), "validation": scores.validation}
        trial.report(settings.trial, step, settings.trainer.steps, numbers)


# ---- after the last step ----


def finish(
    job: Job, family: Family, parts: Components, data: ClipData, module: MotionLoraModule, measuring: Measuring, learning: Learning
) -> dict[str, Any]:  # fmt: skip
    """Takes the best checkpoint, saves what was learnt, and the clips, the sheet, curves and result.json."""
    best, base, run_dir = measuring.best, measuring.base, job.run_dir
    path = run_dir / "checkpoints" / folder_name(best.step)
    if path not in saved_steps(run_dir / "checkpoints"):
        raise AssertionError(f"the best checkpoint {path} was not kept")
    module.restore(read_checkpoint(path))
    with module.averaged():
        files = save(job, family, parts, data, learning, best.step)
        clips = measuring.knowing.draw()
    measuring.knowing.sheet(clips, run_dir / "sheet.png", job.cfg.name)
    measuring.knowing.gif(clips, run_dir / "clips.gif")
    for name, path in (("sheet", run_dir / "sheet.png"), ("clips", run_dir / "clips.gif")):
        job.events.picture(name, path, best.step)
    draw_motion_curves(read_log(run_dir / "metrics.csv"), run_dir / "curves.png", best.step)
    result = {
        **{name: None if file is None else str(file) for name, file in files.items()},
        "value": measuring.value(best),
        "trigger": job.cfg.data.trigger,
        "family": family.name,
        "base": str(job.cfg.family.source),
        "validation": {"base": base.validation, "lora": best.validation},
        "levels": {"base": base.levels, "lora": best.levels},
        "motion": {"base": base.moves, "lora": best.moves, "held_out": measuring.knowing.real},
        "prompts": list(measuring.knowing.prompts),
        "best_step": best.step,
        "steps": measuring.history[-1].step,
        "seconds": job.clock.seconds(),
        "peak_memory_bytes": report.peak_memory_bytes(),
        "sheet": str(run_dir / "sheet.png"),
        "clips": str(run_dir / "clips.gif"),
        "curves": str(run_dir / "curves.png"),
        "config": str(run_dir / "config.yaml"),
    }
    runs.write_result(run_dir, result)
    show_result(job, result)
    return result


def save(job: Job, family: Family, parts: Components, data: ClipData, learning: Learning, step: int) -> dict[str, Path | None]:
    """The files of what learnt: `lora`, the motion's, `look`, that of single frames, and `motion_modules`, a folder."""
    cfg, run_dir = job.cfg, job.run_dir
    found: dict[str, Path | None] = {"lora": None, "look": None, "motion_modules": None}
    layers = read_adapter(parts.denoiser, family.denoiser_name).layers if learning.adapted else {}
    halves = {
        "lora": {name: layer for name, layer in layers.items() if family.temporal in name},
        "look": {name: layer for name, layer in layers.items() if family.temporal not in name},
    }
    for half, own in halves.items():
        if not own:
            continue
        lora = Lora(own)
        title = f"{cfg.name}_{'motion' if half == 'lora' else half}"
        metadata = build(
            lora, family if half == "lora" else registry.spelling(family.pictures),  # what looks like the clips is of the pictures' base
            title=title, base=str(cfg.family.source), trigger=cfg.data.trigger or "", tags=data.tag_frequency(),
            resolution=(max(data.resolutions),) * 2, prediction=family.process(parts).prediction, steps=step,
            learning_rate=job.settings.optimizer.lr, batch_size=data.batch_size * job.settings.trainer.accumulate, pictures=len(data.items),
            seed=cfg.seed, config_sha256=runs.config_hash(cfg), dataset_sha256=data.dataset_hash,
        )  # fmt: skip
        metadata |= {"charforgex.frames": str(data.frames), "charforgex.fps": f"{float(data.fps):g}"}
        found[half] = write(lora, run_dir / f"{title}.safetensors", "diffusers", family, parts.denoiser.config, metadata=metadata)
        back = read(found[half], family, parts.denoiser.config)
        if back.sha256() != lora.rounded(torch.float16).sha256():
            raise LoraError(f"{found[half]} does not hold what was trained; the checkpoints in {run_dir} do.")
    if job.settings.motion.train == "module":
        found["motion_modules"] = family.save_motion(parts.denoiser, run_dir / f"{cfg.name}_modules")
    return found


def show_result(job: Job, result: dict[str, Any]) -> None:
    validation, motion = result["validation"], result["motion"]
    told = ", ".join(f"{name} {value:.3f} (base {motion['base'][name]:.3f})" for name, value in motion["lora"].items())
    report.show(job.console, "Done", [
        ("held-out clips", f"loss {validation['lora']:.4f}, the base's own {validation['base']:.4f}: {result['value']:.1%} less"),
        ("drawn clips", told),
        ("best checkpoint", f"step {result['best_step']} of {result['steps']}"),
        ("time, memory", f"{result['seconds'] / 60:.1f} min, {result['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ])  # fmt: skip
    files = {"motion": "lora", "look": "look", "motion modules": "motion_modules", "judge it": "clips", "curves": "curves"}
    for name, key in files.items():
        if result[key] is not None:
            job.console.print(f" [bold]{name}[/]  {result[key]}", soft_wrap=True, highlight=False)  # paths are copied: never wrapped
    lora, modules = result["lora"] or result["look"], result["motion_modules"]
    use = f"base={modules}+{result['base']}" if modules else f"lora={lora}"
    job.console.print(
        f'\nUse it:\npython generate.py mode=video {use} prompt="{result["prompts"][0]}"', soft_wrap=True, highlight=False, markup=False
    )
