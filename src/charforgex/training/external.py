"""A character's training that another tool does: our pictures in, its LoRA out, checked and in our formats. See `backends`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from charforgex import runs
from charforgex.backends.pictures import write_pictures
from charforgex.backends.run import TOOLS, Done, check, check_installation
from charforgex.backends.run import Job as ToolJob
from charforgex.backends.run import train as train_with
from charforgex.config import bind
from charforgex.data.captions import class_of
from charforgex.data.datamodule import CharacterData
from charforgex.errors import ConfigError, LoraError
from charforgex.families import registry
from charforgex.families.base import Family
from charforgex.families.loading import Base, denoiser_config
from charforgex.lora.formats import read
from charforgex.lora.metadata import build
from charforgex.lora.state import Lora
from charforgex.lora.writing import write
from charforgex.quiet import quiet
from charforgex.training import report
from charforgex.training.character import CharacterJob, curated, find_character
from charforgex.training.job import DTYPES, start_run, with_trigger
from charforgex.training.logs import StepLog
from charforgex.training.run import Clock, Settings, data_options


def train_external(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool) -> dict[str, Any]:
    """Returns what result.json holds. See `training.run.run`."""
    job = CharacterJob(cfg, settings, run_dir, Console(), Clock(run_dir))
    with quiet(), job.events:
        return _train(job, going_on)


def _train(job: CharacterJob, going_on: bool) -> dict[str, Any]:
    cfg, settings, run_dir = job.cfg, job.settings, job.run_dir
    backend, differences = check(cfg)
    check_installation(backend)
    family = registry.get(cfg.family.name)
    character = job.character = find_character(cfg, run_dir)
    prompts = with_trigger(settings.evaluation.prompts, character.trigger)
    class_word = class_of(character.trigger, cfg.data.class_word) if cfg.loss.prior_weight else None
    shapes = denoiser_config(family, cfg.family.source)
    parts = family.load(cfg.family.source, [], DTYPES[cfg.family.dtype], tokenizer=cfg.family.tokenizer)
    prediction = family.process(parts).prediction
    if prediction == "v_prediction":
        raise ConfigError(
            f"family.source={cfg.family.source} predicts velocity, which is not handed on to {backend.name}; train without backend."
        )
    source, val_count = curated(job)
    data = bind(
        CharacterData, data_options(cfg) | {"val_count": val_count}, "data", source=source, trigger=character.trigger,
        class_word=class_word, cache=Path(cfg.cache_dir), seed=cfg.seed,
    )  # fmt: skip
    start_run(job, data, going_on)
    runs.remove_unfinished(run_dir)
    work = run_dir / "backend"
    pictures = write_pictures(
        data.train, data.manifest.file, work / "pictures", data.background, data.repeats, with_masks=data.subject_weight != 1
    )
    if data.regular:
        manifest, regular = data.regularisation.read(character.trigger, {record.sha256 for record in data.train})
        pictures += write_pictures(regular, manifest.file, work / "regular", data.background, regular=True)
    spare = sum(len(record.captions) > 1 for record in data.train)
    lines = [("tool", f"{backend.name} in {backend.folder}"), ("pictures", f"{len(data.train)} to train on, {len(data.val)} held out")]
    lines += [("caption", record.captions[0]) for record in data.train[:3]]
    lines += [("differs", note) for note in differences]
    lines += [("note", f"of {spare} pictures with several captions the first is used")] if spare else []
    lines += [("skipped", f"{problem.path}: {problem.reason}") for problem in data.problems]
    job.show("Plan", [*lines, ("folder", str(run_dir))])

    log = StepLog(run_dir / "metrics.csv", TOOLS[backend.name].done_before(work, cfg.name))
    tool = ToolJob(cfg, backend, work, job.console, lambda step, numbers: log.log_metrics(numbers, step=step))
    try:
        done = train_with(
            tool, pictures, prompts, character.trigger, class_word, single_files(family, cfg), lambda path: read(path, family, shapes)
        )
    finally:
        log.finalize("")
        job.clock.save()
    return finish(job, tool, family, shapes, prediction, data, done)


def single_files(family: Family, cfg: DictConfig) -> dict[str, Path]:
    """The base's components that come from files of their own, which kohya is told one by one."""
    base = Base(family, cfg.family.source, [], cfg.family.tokenizer)
    return {name: giver.path for name, giver in base.givers.items() if giver.path.is_file()}


# ---- after the last step ----


def finish(
    job: CharacterJob, tool: ToolJob, family: Family, shapes: Mapping[str, Any], prediction: str, data: CharacterData, done: Done
) -> dict[str, Any]:
    """The LoRA in both formats, those on the way in steps/, samples and result.json."""
    cfg, run_dir = job.cfg, job.run_dir

    def saved(lora: Lora, path: Path, format: str, steps: int) -> str:
        metadata = build(
            lora, family, title=path.stem, base=str(cfg.family.source), trigger=job.character.trigger or "", tags=data.tag_frequency(),
            resolution=(max(data.resolutions),) * 2, prediction=prediction, steps=steps, learning_rate=job.settings.optimizer.lr,
            batch_size=data.batch_size * job.settings.trainer.accumulate, pictures=len(data.train), seed=cfg.seed,
            config_sha256=runs.config_hash(cfg), dataset_sha256=data.dataset_hash,
        )  # fmt: skip
        told = metadata | {"charforgex.backend": tool.settings.name}
        return str(write(lora, path, format, family, shapes, metadata=told))

    notes, steps = list(done.notes), {}
    for step, path in sorted(tool.tool.saved(tool.work, cfg.name).items()):
        try:
            lora = read(path, family, shapes)
            lora.check()
            steps[step] = saved(lora, run_dir / "steps" / f"{cfg.name}-{step:08d}.safetensors", "kohya", step)
        except LoraError as error:
            notes.append(f"the LoRA of step {step} is left out: {error}")
    result = {
        "lora": saved(done.lora, run_dir / f"{cfg.name}.safetensors", "kohya", done.steps),
        "lora_diffusers": saved(done.lora, run_dir / f"{cfg.name}_diffusers.safetensors", "diffusers", done.steps),
        "trigger": job.character.trigger,
        "value": None,
        "backend": tool.settings.name,
        "steps": done.steps,
        "on_the_way": {str(step): path for step, path in steps.items()},
        "notes": notes,
        "seconds": job.clock.seconds(),
        "samples": str(run_dir / "samples"),
        "log": str(tool.work / "log.txt"),
        "config": str(run_dir / "config.yaml"),
    }
    runs.write_result(run_dir, result)
    for note in notes:
        job.console.print(f"[yellow]{note}", soft_wrap=True, highlight=False)
    changed = len(done.lora) - len(done.lora.zero_layers())
    report.show(
        job.console, "Done", [("LoRA", result["lora"]), ("layers", f"{changed} of {len(done.lora)} learnt"), ("steps", str(done.steps))]
    )
    job.console.print(f"\nMeasure it:\npython evaluate.py lora={run_dir}", soft_wrap=True, highlight=False, markup=False)
    return result
