"""A distillation from its first latent to the written file: what `training.distilling` asks for, resumed where it was interrupted."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from charforgex import runs
from charforgex.errors import ConfigError
from charforgex.families.bases import Base
from charforgex.families.loading import denoiser_config
from charforgex.generation.stack import Stack
from charforgex.lora.checkpoints import folder_name
from charforgex.lora.formats import open_lora
from charforgex.lora.inject import load_adapter, read_adapter
from charforgex.lora.state import Layer, Lora
from charforgex.toolbox.common import Opened, lineage
from charforgex.toolbox.common import save as save_lora
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.checkpoints import SafeCheckpointIO, load_last_good
from charforgex.training.distilling import Settings, Teachers
from charforgex.training.job import DTYPES, choose_device
from charforgex.training.lessons import Drawn, Said, all_captions, drawn_latents, read_pictures
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import fit
from charforgex.training.losses import Objective
from charforgex.training.settings import TrainerSettings
from charforgex.training.student import EMA, LEVELS, Exam, Measuring, make_module, put_student, start_of, teachers_layers

MEASURED = 10  # times on the way


def sketched(settings: Settings, stack: Stack, teachers: Teachers) -> dict[str, Any]:
    """What would be made, by the files alone: how far off the plain truncation is in the space of the weights."""
    layers = teachers_layers(stack, teachers)
    told = {"out": str(settings.out), "rank": settings.rank, "layers": len(layers), "base": stack.base, "dry_run": True}
    if all(layer.kind == "lora" for found in layers.values() for layer, _ in found):  # others need the base's weights
        spectra = [start_of(found, None) for found in layers.values()]
        told["truncated"] = sum(found.error(settings.rank) for found in spectra) / len(spectra)
    show("Would be distilled", told)
    return told


def distilled(settings: Settings, stack: Stack, teachers: Teachers, prompts: list[str], out: Path) -> dict[str, Any]:
    """See `training.distilling.distill`."""
    started, console = time.monotonic(), Console()
    folder = work_folder(settings, stack, out)
    family = stack.family
    device = choose_device(settings.accelerator)
    dtype = DTYPES[("float32" if device == "cpu" else "bfloat16") if settings.precision == "auto" else settings.precision]
    objective = Objective(timesteps=stack.recipe.timesteps, shift=stack.recipe.shift)
    batch_size = settings.batch_size or stack.recipe.batch_size

    data = read_pictures(settings, stack, batch_size, dtype, device) if settings.pictures else None
    load_text = lambda: family.load(stack.base, ["text"], dtype, device, settings.tokenizer)  # noqa: E731
    captions = [*prompts, ""] if data is None else all_captions(data)
    said = Said.of(stack, teachers, captions, load_text, encoded=data is not None)
    parts = family.load(stack.base, ["denoiser"], dtype, device, settings.tokenizer)
    for adapter in stack.adapters:
        mine = Lora({f"{family.denoiser_name}.{path}": layer for path, layer in adapter.lora.of(family.denoiser_name).items()})
        if len(mine):
            load_adapter(parts, mine, adapter.name, teachers.weights[adapter.name])
    if data is None:
        latents = drawn_latents(folder, stack, parts, teachers, said, prompts, settings.seed, console)
        lesson = Drawn(latents, prompts, said, family.latent_stride(parts), batch_size, settings.seed)
        held_out = lesson.hold_out()
    else:
        lesson, held_out = data, data.validation()

    put_student(parts.denoiser, teachers_layers(stack, teachers), settings)
    if settings.gradient_checkpointing:
        checkpoint_blocks(parts.denoiser, family.blocks(parts.denoiser), True)
    module = make_module(settings, family, parts, objective, teachers, said, lesson)
    exam = Exam(module, held_out)
    measuring = Measuring(folder, module, exam, console)
    checkpoint, _ = load_last_good(folder / "checkpoints")
    if checkpoint is None:
        measuring(0)
    else:
        module.restore(checkpoint)
        console.print(f"Going on with {folder} from step {module.step}.")
    every = max(1, settings.steps // MEASURED)
    trainer = TrainerSettings(steps=settings.steps, accelerator=settings.accelerator, ema=EMA, checkpoint_every=every, keep=1)
    log = StepLog(folder / "metrics.csv", module.step)
    stopped = fit(module, folder / "checkpoints", trainer, [log], console, measuring, every, lambda: {measuring.best_step})
    if stopped is not None:
        console.print(f"Stopped at step {module.step}; all is saved. The same command goes on from there.")
        raise SystemExit(runs.EXIT_INTERRUPTED if stopped == 2 else runs.EXIT_TERMINATED)

    module.restore(SafeCheckpointIO().load_checkpoint(folder / "checkpoints" / folder_name(measuring.best_step)))
    with module.averaged():
        layers = read_adapter(parts.denoiser, family.denoiser_name).layers
    told = written(settings, stack, teachers, layers)
    errors, best = {int(step): error for step, error in measuring.errors.items()}, measuring.best_step
    result = told | {
        "rank": settings.rank, "error": {"truncated": errors[0], "distilled": errors[best]}, "best_step": best, "steps": settings.steps,
        "held_out": {"latents": sum(map(len, held_out)), "levels": LEVELS}, "errors": sorted(errors.items()),
        "loss": read_log(folder / "metrics.csv")["loss"], "seconds": time.monotonic() - started,
    }  # fmt: skip
    runs.write_json(out.with_suffix(".json"), result)
    shutil.rmtree(folder)
    show("Distilled", result)
    return result


def work_folder(settings: Settings, stack: Stack, out: Path) -> Path:
    """Where an interrupted distillation lies. Raises ConfigError if one of other settings does."""
    folder = out.with_suffix(".distilling")
    wanted = {"settings": repr(settings), "loras": [adapter.lora.sha256() for adapter in stack.adapters]}
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != wanted:
        if not settings.overwrite:
            raise ConfigError(f"{folder} holds an interrupted distillation of other settings; say overwrite=true to drop it.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs.remove_unfinished(folder)
    runs.write_json(path, wanted)
    return folder


def written(settings: Settings, stack: Stack, teachers: Teachers, layers: dict[str, Layer]) -> dict[str, Any]:
    """Writes the file; its metadata is the first LoRA's, with a trigger only if all have the same."""
    config = denoiser_config(stack.family, stack.base)
    base = Base(stack.base, stack.family.name, config, {})
    with ExitStack() as files:
        paths = [adapter.path for adapter in stack.adapters]
        opened = Opened(base, paths, [files.enter_context(open_lora(path, base.names)) for path in paths])
        told = {"rank": settings.rank, "steps": settings.steps, "together": settings.together, "seed": settings.seed}
        metadata = lineage(opened, "distill", told | {"weights": teachers.weights, "triggers": teachers.words})
        if len(set(teachers.words.values())) > 1:
            metadata = {key: value for key, value in metadata.items() if key not in ("charforgex.trigger", "modelspec.trigger_phrase")}
        return save_lora(opened, settings, layers.get, list(layers), metadata)


def show(title: str, told: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name in ("out", "base", "layers", "rank", "bytes_before", "bytes", "truncated", "best_step", "seconds"):
        if name in told:
            value = told[name]
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, error in told.get("error", {}).items():
        table.add_row(f"error, {name}", f"{error:.4f}")
    Console().print(table)
