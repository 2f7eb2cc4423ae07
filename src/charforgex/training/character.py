"""The main job: a character's pictures to the LoRA, its proof and its files. One function a stage, in the order they run."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from charforgex import binding, runs
from charforgex.charworld.demo import DEMO, number_of, other_characters, trigger_of, write_character
from charforgex.config import bind
from charforgex.curation.manifest import read_picture
from charforgex.data.captions import class_of
from charforgex.data.datamodule import CharacterData
from charforgex.data.mess import DEMO as MESS
from charforgex.data.mess import write_mess
from charforgex.embedders import get_embedder
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.alignment import get_follower
from charforgex.families import registry
from charforgex.families.base import Family
from charforgex.families.loading import denoiser_config, load_components
from charforgex.families.tokens import save_tokens
from charforgex.lora.checkpoints import folder_name, read_checkpoint, saved_steps
from charforgex.lora.inject import adapter_parameters, inject, read_adapters
from charforgex.lora.lycoris import WRITABLE
from charforgex.lora.metadata import build
from charforgex.lora.writing import save_verified
from charforgex.quiet import quiet
from charforgex.training import report, trial
from charforgex.training.blocks import check_compiler, checkpoint_blocks, compile_blocks, first_grids
from charforgex.training.curves import draw_curves
from charforgex.training.job import (
    DTYPES,
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
)
from charforgex.training.knowing import Knowing, Scores, as_metrics, plain
from charforgex.training.live import LiveText, adapt, learn_tokens, word_and_start
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import StepLoader, fit, step_loader
from charforgex.training.losses import Objective
from charforgex.training.module import DenoiserModule
from charforgex.training.optimizers import build_optimizer, check_optimizer, schedule
from charforgex.training.processes import ALONE, Processes
from charforgex.training.run import Clock, Settings, data_options
from charforgex.training.sharding import check_splittable, split
from charforgex.types import Components

DEMO_PICTURES = 30
HELD_OUT = "so nothing could tell whether the LoRA is the character"


@dataclass(frozen=True)
class Character:
    """Whose pictures: a folder or manifest, the trigger, and other people's pictures for the identity floor."""

    source: Path
    trigger: str | None
    others: str | None


@dataclass
class CharacterJob(Job):
    character: Character | None = None


def train_character(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool, processes: Processes = ALONE) -> dict[str, Any]:
    """Returns what result.json holds. See `training.run.run`."""
    job = CharacterJob(cfg, settings, run_dir, speaker(processes), Clock(run_dir), processes)
    with quiet(), job.events:
        return _train(job, going_on)


def _train(job: CharacterJob, going_on: bool) -> dict[str, Any]:
    cfg, settings, run_dir, processes = job.cfg, job.settings, job.run_dir, job.processes
    set_threads(settings.trainer.threads)
    family = registry.get(cfg.family.name)
    device = choose_device(settings.trainer.accelerator)
    check_optimizer(settings.optimizer.name, device)
    if settings.trainer.compile:
        check_compiler(device)
    character = job.character = processes.after_first(lambda: find_character(cfg, run_dir))
    prompts = with_trigger(settings.evaluation.prompts, character.trigger)
    settings = job.settings = replace(settings, evaluation=replace(settings.evaluation, prompts=prompts))
    word, start = word_and_start(character.trigger, settings.text_encoder.tokens_init) if settings.text_encoder.tokens else (None, None)
    targets = settings.lora.targets
    targets = family.lora_targets(targets, denoiser_config(family, cfg.family.source)) if isinstance(targets, str) else targets
    load_parts, base, objective = open_base(job, family, device)

    source, val_count = processes.tell(lambda: runs.plain(curated(job)))
    data = bind(
        CharacterData,
        data_options(cfg) | {"val_count": val_count},
        "data",
        source=Path(source),
        trigger=character.trigger,
        class_word=class_of(character.trigger, cfg.data.class_word) if objective.prior_weight else None,
        cache=Path(cfg.cache_dir),
        seed=cfg.seed,
    )
    if not data.val:
        raise DataError(f"No picture is held out, {HELD_OUT}; set data.val_count to 1 or more.")
    check_resolution(family, cfg.family.source, family.default_size(base), data.resolutions)
    parts = load_parts(["denoiser"])
    if settings.trainer.splits_base:
        check_splittable(parts.denoiser, cfg.family.source)
    blocks = family.blocks(parts.denoiser)
    if settings.trainer.gradient_checkpointing:
        checkpoint_blocks(parts.denoiser, blocks, settings.trainer.gradient_checkpointing)
    lora = settings.lora
    adapted = inject(parts.denoiser, targets, lora.rank, lora.alpha, cfg.seed, ranks=lora.ranks, alphas=lora.alphas, **lora.how())
    live = LiveText(family, load_encoders(cfg, family, device, settings.text_encoder.learns))
    if settings.text_encoder.lr is not None:
        adapted += adapt(live, lora.rank, lora.alpha, cfg.seed, **lora.how())
    if word is not None:
        learn_tokens(live, word, settings.text_encoder.tokens, start)
    check_disk(run_dir, adapter_parameters(parts.denoiser) | live.parameters(), settings.trainer.keep)
    if settings.trainer.splits_base:
        split(parts.denoiser, blocks, adapter_parameters(parts.denoiser).values(), device, processes.count)

    start_run(job, data, going_on)
    made = processes.after_first(
        lambda: data.prepare(
            family,
            load_parts,
            weights=encoder_hashes(cfg, family),
            pixel_multiple=family.pixel_multiple(parts),
            latent_stride=family.latent_stride(parts),
            prompts=[*settings.evaluation.prompts, settings.sampling.negative],
            dtype=cfg.family.dtype,
            progress=processes.is_first,
        )
    )
    module = make_module(job, family, parts, objective, data, live)
    show_plan(job, family, parts, objective, data, adapted, module, made)

    checkpoints = run_dir / "checkpoints"
    if going_on:
        restore(job, module, checkpoints)
    measuring = None
    if job.measures:
        parts.modules |= load_parts(["vae"]).modules
        parts["vae"].encoder = None  # pictures are all encoded; only previews are decoded from here on
        measuring = Measuring(job, family, parts, data, module)
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
    result = processes.tell(lambda: finish(job, family, parts, data, module, measuring))
    if job.cfg.logger.wandb and processes.is_first:
        finish_wandb(loggers[-1].experiment, bool(job.cfg.logger.offline), job.console)
    return result


# ---- before the first step ----


def find_character(cfg: DictConfig, run_dir: Path) -> Character:
    """Where the pictures are. A demo character becomes a folder like any other, and brings its trigger: raw pictures among what curation is
    to find, without captions; where there is no curation, clean ones with captions."""
    source, others = str(cfg.data.source), cfg.evaluation.others
    if not source.startswith(DEMO):
        return Character(Path(source), cfg.data.trigger, others)
    number = number_of(source, "data.source")
    if cfg.data.trigger is not None:
        raise ConfigError(f"data.trigger={cfg.data.trigger} has no effect with data.source={source}, whose captions have their own.")
    folder = run_dir / "pictures"
    if cfg.get("curation"):
        if not folder.is_dir() or len(list(folder.iterdir())) < sum(MESS.values()):
            write_mess(folder, number, captions=False)
    elif not (folder / f"{DEMO_PICTURES - 1:03d}.txt").exists():
        write_character(folder, number, DEMO_PICTURES)
    return Character(folder, trigger_of(number), others or source)


def curated(job: CharacterJob) -> tuple[Path, int | None]:
    """What is trained on, and how many pictures of it are held out where it does not say so itself: the manifest that curation makes of a
    folder, else the source as it is."""
    cfg, source = job.cfg, job.character.source
    val_count = binding.fit(cfg.data.val_count, binding.annotation(CharacterData, "val_count"), "data.val_count")
    if not cfg.get("curation") or not source.is_dir():
        return source, val_count
    from charforgex.curation.run import Source, make_dataset
    from charforgex.curation.settings import CurationSettings
    from charforgex.curation.split import SplitSettings

    settings = bind(CurationSettings, cfg.curation, "curation")
    if val_count is not None:
        if settings.split.val != (usual := SplitSettings.val):
            raise ConfigError(
                f"data.val_count={val_count} and curation.split.val={settings.split.val:g} say it twice; leave one as it was "
                f"(null, {usual:g})."
            )
        settings = replace(settings, split=replace(settings.split, val=val_count))
    if settings.split.val == 0:
        key = "curation.split.val" if val_count is None else "data.val_count"
        raise ConfigError(f"{key}=0 holds no picture out, {HELD_OUT}; set it to 1 or more.")
    if cfg.data.subject_weight == 1:
        settings = replace(settings, masks="none")  # nothing would look at them
    if str(cfg.data.source).startswith(DEMO) and settings.captions.backend == "sidecar":
        settings = replace(settings, captions=replace(settings.captions, backend="charworld"))
    made = make_dataset(Source(str(source), job.character.trigger), settings, job.run_dir / "dataset", Path(cfg.cache_dir), job.console)
    return Path(made["manifest"]), None


def load_encoders(cfg: DictConfig, family: Family, device: str, wanted: bool) -> Components:
    """The CLIP encoders that the base has, with their tokenizers; nothing if they do not learn. T5 is never among them."""
    names = [name for clip in family.clip_encoders for name in (clip, clip.replace("text_encoder", "tokenizer"))] if wanted else []
    return load_components(family, cfg.family.source, names, DTYPES[cfg.family.dtype], device, cfg.family.tokenizer)


def make_module(
    job: CharacterJob, family: Family, parts: Components, objective: Objective, data: CharacterData, live: LiveText
) -> DenoiserModule:  # fmt: skip
    s, encoders = job.settings, live.parameters()

    def rate(name: str) -> float:
        factor = s.lora.up_ratio if name.endswith(".up") else 1.0
        if name not in encoders:
            return factor
        return factor * (s.text_encoder.tokens_lr if name.endswith(".tokens") else s.text_encoder.lr) / s.optimizer.lr

    def decays(name: str) -> bool:
        """Not what is no change at zero: magnitudes, tokens, and factors that begin with the base's own directions."""
        return s.lora.init == "zero" and not name.endswith((".magnitude", ".tokens"))

    def make_loader(first_step: int) -> StepLoader:
        return step_loader(data, first_step, s.trainer, job.processes)

    return DenoiserModule(
        family, parts.denoiser, family.process(parts), objective, adapter_parameters(parts.denoiser) | encoders, live,
        make_optimizer=lambda trainable: build_optimizer(s.optimizer, trainable, rate, decays),
        learning_rate=schedule(s.optimizer.schedule, s.trainer.steps, s.optimizer.warmup),
        seed=job.cfg.seed, grad_clip=s.optimizer.grad_clip, ema_decay=s.trainer.ema, make_loader=make_loader,
        processes=job.processes,
    )  # fmt: skip


def show_plan(job: CharacterJob, family, parts, objective, data, adapted, module, made) -> None:
    """The effective objective, the data and the time that it will take."""
    s = job.settings
    trainable = sum(p.numel() for p in module.trainable.values())
    names = [name for name in family.components["text"] if name.startswith("tokenizer")]
    tokenizers = load_components(family, job.cfg.family.source, names, torch.float32, tokenizer=job.cfg.family.tokenizer)
    stride = family.latent_stride(parts)
    grids = [(item.cut.size[0] // stride, item.cut.size[1] // stride) for item in data.items]
    lines = report.objective_lines(
        family, parts, family.process(parts), objective, s.lora, adapted, s.optimizer, s.trainer, trainable, max(grids, key=math.prod)
    )
    if s.text_encoder.lr is not None:
        lines.append(("text encoders", f"{', '.join(module.live.networks)} learn with lr {s.text_encoder.lr:g}"))
    if s.text_encoder.tokens:
        lines.append(("new tokens", f"{s.text_encoder.tokens} in {', '.join(module.live.tokens)} with lr {s.text_encoder.tokens_lr:g}"))
    job.show("Objective", lines)
    job.show("Data", report.data_lines(family, tokenizers, data))
    if s.trainer.compile:
        compile_blocks(parts.denoiser, family.blocks(parts.denoiser))
    expected, _ = report.trial(module, s.trainer.steps, first_grids(grids) if s.trainer.compile else [])
    memory = f"{report.peak_memory_bytes() / 2**30:.2f} GiB so far"
    encoded = f"{made['latent']} pictures and {made['text']} captions encoded, the rest was cached"
    job.show("Plan", [("cache", encoded), ("time", expected), ("memory", memory), ("folder", str(job.run_dir))])


# ---- while it trains ----


class Measuring:
    """Called with the step at every evaluation: draws, measures, logs, and remembers the best checkpoint."""

    def __init__(self, job: CharacterJob, family: Family, parts: Components, data: CharacterData, module: DenoiserModule):
        self.job, self.module = job, module
        self.log = StepLog(job.run_dir / "metrics.csv", module.step) if job.processes.is_first else None
        others = other_pictures(job.character.others, data)
        with job.console.status("measuring the base model"):
            self.knowing = Knowing(
                family, parts, data, get_embedder(job.settings.evaluation.embedder),
                get_follower(job.settings.evaluation.follower), job.settings.evaluation, job.settings.sampling, module.live, others,
                job.cfg.seed,
            )  # fmt: skip
            self.anchors = self.knowing.anchors()
        self.history = [scores for scores in self._earlier() if scores.step <= module.step]

    def _earlier(self) -> list[Scores]:
        path = self.job.run_dir / "scores.json"
        return [Scores(**row) for row in json.loads(path.read_text())["checkpoints"]] if path.exists() else []

    @property
    def best(self) -> Scores | None:
        return max(self.history, key=self.anchors.value, default=None)

    @property
    def best_step(self) -> int:
        return self.best.step if self.best else -1

    def __call__(self, step: int) -> None:
        with self.module.averaged():
            scores, pictures = self.knowing.scores(step)
        self.history = [*(s for s in self.history if s.step < step), scores]
        if not self.job.processes.is_first:
            return
        rows = {"anchors": plain(self.anchors), "checkpoints": [plain(s) for s in self.history]}
        runs.write_json(self.job.run_dir / "scores.json", rows)
        sheet = self.job.run_dir / "samples" / f"step-{step:08d}.png"
        self.knowing.sheet(pictures, sheet, f"step {step}")
        self.module.tell(step, as_metrics(scores, self.anchors), {"samples": sheet})
        self.job.clock.save()
        self.job.console.print(
            f"step {step}: identity {scores.identity:.3f} (base {self.anchors.base:.3f}, real {self.anchors.ceiling:.3f}), "
            f"prompt-following {scores.prompt_following:.2f} (base {self.anchors.prompt_following:.2f}), "
            f"validation {scores.validation:.4f} (base {self.anchors.validation:.4f})", highlight=False,
        )  # fmt: skip
        settings, numbers = self.job.settings, {**plain(scores), "value": self.anchors.value(scores)}
        trial.report(settings.trial, step, settings.trainer.steps, numbers)


def other_pictures(source: str | None, data: CharacterData) -> list:
    """Pictures of other people, for the identity floor: a folder's, or the demo's other characters."""
    if source is None:
        return []
    if str(source).startswith(DEMO):
        return other_characters(number_of(str(source), "evaluation.others"))
    folder = Path(source)
    pictures = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        with contextlib.suppress(DataError):
            pictures.append(read_picture(path, data.background))
    if not pictures:
        raise ConfigError(f"evaluation.others={source} holds no readable picture.")
    return pictures


# ---- after the last step ----


def finish(
    job: CharacterJob, family: Family, parts: Components, data: CharacterData, module: DenoiserModule, measuring: Measuring
) -> dict[str, Any]:
    """Takes the best checkpoint, saves the LoRA in both formats, and the sheet, curves and result.json."""
    best, anchors, run_dir = measuring.best, measuring.anchors, job.run_dir
    path = run_dir / "checkpoints" / folder_name(best.step)
    if path not in saved_steps(run_dir / "checkpoints"):
        raise AssertionError(f"the best checkpoint {path} was not kept")
    module.restore(read_checkpoint(path))
    metadata_of = lambda lora: build(  # noqa: E731
        lora, family, title=job.cfg.name, base=str(job.cfg.family.source), trigger=job.character.trigger or "", tags=data.tag_frequency(),
        resolution=(max(data.resolutions),) * 2, prediction=family.process(parts).prediction, steps=best.step,
        learning_rate=job.settings.optimizer.lr, batch_size=data.batch_size * job.settings.trainer.accumulate, pictures=len(data.train),
        seed=job.cfg.seed, config_sha256=runs.config_hash(job.cfg), dataset_sha256=data.dataset_hash,
    )  # fmt: skip
    with module.averaged():
        lora = read_adapters({family.denoiser_name: parts.denoiser, **module.live.adapters()})
        tokens = save_new_tokens(job, family, module.live)
        files = {"kohya": run_dir / f"{job.cfg.name}.safetensors", "diffusers": run_dir / f"{job.cfg.name}_diffusers.safetensors"}
        if not set(lora.kinds()) <= {"lora", *WRITABLE["diffusers"]}:
            del files["diffusers"]  # which has no words for LoHa and LoKr
        for format, file in files.items():
            metadata = metadata_of(lora) | ({} if tokens is None else {"charforgex.tokens": tokens.name})
            save_verified(lora, file, format, family, parts.denoiser, metadata=metadata, encoders=module.live.adapters())
        pictures = measuring.knowing.draw()
    measuring.knowing.sheet(pictures, run_dir / "sheet.png", f"{job.cfg.name}: {job.character.trigger}")
    job.events.picture("sheet", run_dir / "sheet.png", best.step)
    draw_curves(read_log(run_dir / "metrics.csv"), run_dir / "curves.png", best.step)

    ratio = best.prompt_following / anchors.prompt_following if anchors.prompt_following else None
    gain = anchors.gain(best.identity)
    result = {
        "lora": str(files["kohya"]),
        "lora_diffusers": str(files["diffusers"]) if "diffusers" in files else None,
        "tokens": tokens and str(tokens),
        "trigger": job.character.trigger,
        "value": anchors.value(best),
        "identity": {"floor": anchors.floor, "base": anchors.base, "lora": best.identity, "ceiling": anchors.ceiling, "gain": gain},
        "prompt_following": {"base": anchors.prompt_following, "lora": best.prompt_following, "ratio": ratio},
        "diversity": {"base": anchors.diversity, "lora": best.diversity},
        "nearest_training_picture": best.nearest,
        "validation": {"base": anchors.validation, "lora": best.validation},
        "levels": {"base": anchors.levels, "lora": best.levels},
        "extra": {"base": anchors.extra, "lora": best.extra},
        "best_step": best.step,
        "steps": measuring.history[-1].step,
        "seconds": job.clock.seconds(),
        "peak_memory_bytes": report.peak_memory_bytes(),
        "sheet": str(run_dir / "sheet.png"),
        "curves": str(run_dir / "curves.png"),
        "config": str(run_dir / "config.yaml"),
    }
    runs.write_result(run_dir, result)
    show_result(job, result)
    return result


def save_new_tokens(job: CharacterJob, family: Family, live: LiveText) -> Path | None:
    """The file of new tokens beside the LoRA, whose metadata names it; None if there are none."""
    if not live.tokens:
        return None
    values = {name: new.values() for name, new in live.tokens.items()}
    return save_tokens(job.run_dir / f"{job.cfg.name}_tokens.safetensors", family, values)


def show_result(job: CharacterJob, result: dict[str, Any]) -> None:
    identity, following = result["identity"], result["prompt_following"]
    floor = "" if identity["floor"] is None else f"other characters {identity['floor']:.2f}, "
    prompt = job.settings.evaluation.prompts[0]
    report.show(job.console, "Done", [
        ("identity", f"{identity['lora']:.3f} ({floor}base model {identity['base']:.2f}, real pictures {identity['ceiling']:.2f}): "
                     f"{identity['gain']:.0%} of the way from base to real"),
        ("prompt-following", f"{following['lora']:.2f}, the base's own {following['base']:.2f}"),
        ("best checkpoint", f"step {result['best_step']} of {result['steps']}"),
        ("time, memory", f"{result['seconds'] / 60:.1f} min, {result['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ])  # fmt: skip
    for name, value in (("LoRA", result["lora"]), ("judge it", result["sheet"]), ("curves", result["curves"])):
        job.console.print(f" [bold]{name}[/]  {value}", soft_wrap=True, highlight=False)  # paths and commands are copied: never wrapped
    job.console.print(
        f'\nUse it:\npython generate.py lora={result["lora"]} prompt="{prompt}"', soft_wrap=True, highlight=False, markup=False
    )
