"""The student of a distillation: a LoRA that learns to predict what its teachers predict, and how far from them it is.

The error is relative: sqrt(sum |student - teacher|^2 / sum |teacher - base|^2) over held-out latents and noise levels. 0 is the teachers
themselves, 1 is no better than the base without any LoRA.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load, save
from torch import Tensor, nn

from charforgex import runs
from charforgex.data.datamodule import CharacterData
from charforgex.draws import python_rng, seed_of
from charforgex.errors import ConfigError, DataError, LoraError
from charforgex.families.base import Family
from charforgex.families.bases import Base
from charforgex.families.loading import denoiser_config, weights_hash
from charforgex.generation.sampling import sample_latents
from charforgex.generation.stack import Stack
from charforgex.lora import lowrank
from charforgex.lora.checkpoints import folder_name
from charforgex.lora.formats import open_lora
from charforgex.lora.inject import TRAINED, acting, adapter_parameters, inject, load_adapter, read_adapter
from charforgex.lora.state import Layer, Lora
from charforgex.toolbox.common import Opened, lineage
from charforgex.toolbox.common import save as save_lora
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.character import DTYPES, choose_device
from charforgex.training.checkpoints import SafeCheckpointIO, load_last_good
from charforgex.training.distilling import Settings, Teachers, number_to_learn
from charforgex.training.live import LiveText
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import StepLoader, fit
from charforgex.training.losses import Objective, computing_in, diffusion_loss
from charforgex.training.module import DenoiserModule
from charforgex.training.optimizers import build_optimizer, schedule
from charforgex.training.settings import OptimizerSettings, TrainerSettings
from charforgex.types import Batch, Components, Crop, Text

LEVELS = 4  # noise levels of the held-out error
MEASURED = 10  # times on the way
EMA = 0.98
DROPPED = 0.1  # share of captions that are learnt as "", for guidance

Set = tuple[str, ...]  # of LoRAs
Layers = dict[str, list[tuple[Layer, float]]]  # of the denoiser by path, with their weights


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


# ---- what teachers and student say ----


@dataclass(frozen=True)
class Said:
    """Captions encoded, on the CPU: as the base says them, and under (set, caption) as a set does where LoRAs change the encoders."""

    plain: dict[str, Text]
    changed: dict[tuple[Set, str], Text]

    @staticmethod
    @torch.no_grad()
    def of(stack: Stack, teachers: Teachers, captions: Sequence[str], load_text: Callable[[], Components], encoded: bool) -> Said:
        """`encoded`: whether the batches bring what the base says. Then encoders are loaded only if LoRAs change them."""
        inside = f"{stack.family.denoiser_name}."
        changes = [{name: layer for name, layer in one.lora.layers.items() if not name.startswith(inside)} for one in stack.adapters]
        if encoded and not any(changes):
            return Said({}, {})
        parts = load_text()
        encode = lambda caption: stack.family.encode_text(parts, [caption]).to("cpu")  # noqa: E731
        captions = list(dict.fromkeys(captions))
        plain = {} if encoded else {caption: encode(caption) for caption in captions}
        changed: dict[tuple[Set, str], Text] = {}
        for adapter, layers in zip(stack.adapters, changes, strict=True):
            if layers:
                load_adapter(parts, Lora(layers), adapter.name, teachers.weights[adapter.name])
        if any(changes):
            context = acting(*parts.networks().values())
            for names in dict.fromkeys(names for caption in captions for names in teachers.answering(caption)):
                with context(names):
                    changed |= {(names, caption): encode(caption) for caption in captions if names in teachers.answering(caption)}
                    changed.setdefault((names, ""), encode(""))  # against which they guide when they draw
        return Said(plain, changed)

    def to(self, names: Set, captions: Sequence[str], plain: Text) -> Text:
        """To a set of teachers, where the base says `plain`."""
        rows = [self.changed.get((names, caption), plain[[row]]) for row, caption in enumerate(captions)]
        return Text.stack([row.to(plain.tokens_BLD.device) for row in rows])


class Student(DenoiserModule):
    """Trains the student alone; teachers answer without gradients."""

    def __init__(self, teachers: Teachers, said: Said, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.teachers, self.said, self.acting = teachers, said, acting(self.denoiser)

    def training_step(self, batch: list, index: int) -> None:
        with self.acting([TRAINED]):  # around the backward pass too, where checkpointed blocks are run again
            super().training_step(batch, index)

    def losses(self, micro: Batch, key: tuple) -> Tensor:
        """Mean square (B,) by which student and teachers differ."""
        clean, noise, t_B = self.objective.draw(self.process, micro, *key)
        noisy = self.process.add_noise(clean, noise, t_B)
        with torch.no_grad():
            wanted = self.answers(noisy, t_B, micro)
        return diffusion_loss(self.predict(noisy, t_B, micro.text, micro.crop), wanted, torch.ones_like(t_B))

    def predict(self, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        """By whichever adapters act."""
        with computing_in(next(self.denoiser.parameters()).dtype, noisy.device):
            return self.family.denoise(self.denoiser, noisy, t_B, text, crop)

    def answers(self, noisy: Tensor, t_B: Tensor, batch: Batch) -> Tensor:
        """The teachers' predictions, each row by those whom its caption asks, float32."""
        found = torch.zeros_like(noisy, dtype=torch.float32)
        asked: dict[Set, list[tuple[int, float]]] = {}  # whom -> rows, and what share of the answer theirs is
        for row, caption in enumerate(batch.captions):
            sets = self.teachers.answering(caption)
            for names in sets:
                asked.setdefault(names, []).append((row, 1 / len(sets)))
        for names, places in asked.items():
            rows = torch.tensor([row for row, _ in places], device=noisy.device)
            share = torch.tensor([share for _, share in places], device=noisy.device).view(-1, *[1] * (noisy.ndim - 1))
            text = self.said.to(names, [batch.captions[row] for row, _ in places], batch.text[rows])
            crop = Crop(batch.crop.original_B2[rows], batch.crop.top_left_B2[rows], batch.crop.target_B2[rows])
            with self.acting(names):
                said = self.predict(noisy[rows], t_B[rows], text, crop)
            found.index_add_(0, rows, said.float() * share)
        return found


class Exam:
    """Held-out latents with fixed noise, what the teachers answer, and how far from that the base is."""

    @torch.no_grad()
    def __init__(self, module: Student, held_out: Sequence[Batch]):
        self.module, self.questions, self.energy = module, [], 0.0
        device = module.denoiser.device
        for number, batch in enumerate(held_out):
            batch = batch.to(device)
            tokens = batch.mean_BChw.shape[-2] * batch.mean_BChw.shape[-1] // 4
            for level in range(LEVELS):
                share = torch.full((len(batch),), (level + 0.5) / LEVELS)
                t_B = module.process.snap(module.objective.quantile(share, module.process, tokens))
                clean, noise, t_B = module.objective.draw(module.process, batch, "held out", number, level, t_B=t_B)
                noisy = module.process.add_noise(clean, noise, t_B)
                wanted = module.answers(noisy, t_B, batch)
                with module.acting([]):
                    base = module.predict(noisy, t_B, batch.text, batch.crop)
                self.questions.append((noisy, t_B, batch.text, batch.crop, wanted))
                self.energy += (wanted - base.float()).double().square().sum().item()
        if not self.energy:
            raise LoraError("On no held-out prompt do the LoRAs change a prediction, so nothing can be learnt from them.")

    @torch.no_grad()
    def error(self) -> float:
        """The student's, relative to what the teachers change."""
        missed = 0.0
        for *question, wanted in self.questions:
            with self.module.acting([TRAINED]):
                said = self.module.predict(*question)
            missed += (said.float() - wanted).double().square().sum().item()
        return math.sqrt(missed / self.energy)


class Measuring:
    """Called with the step; errors.json remembers for a resumed run."""

    def __init__(self, folder: Path, module: Student, exam: Exam, console: Console):
        self.path, self.module, self.exam, self.console = folder / "errors.json", module, exam, console
        self.errors: dict[str, float] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def __call__(self, step: int) -> None:
        with self.module.averaged():
            self.errors[str(step)] = self.exam.error()
        runs.write_json(self.path, self.errors)
        self.console.print(f"step {step}: held-out error {self.errors[str(step)]:.4f} (truncated {self.errors['0']:.4f})", highlight=False)

    @property
    def best_step(self) -> int:
        return int(min(self.errors, key=self.errors.get))


# ---- the student's beginning ----


def teachers_layers(stack: Stack, teachers: Teachers) -> Layers:
    """Of each of the denoiser's modules that a teacher changes, the layers and their weights. Raises LoraError if there is none."""
    found: Layers = {}
    for adapter in stack.adapters:
        for path, layer in adapter.lora.of(stack.family.denoiser_name).items():
            if not layer.is_zero:
                found.setdefault(path, []).append((layer, teachers.weights[adapter.name]))
    if not found:
        raise LoraError(f"The LoRAs change nothing in the {stack.family.denoiser_name}, which is what a student learns in.")
    return found


def start_of(layers: Sequence[tuple[Layer, float]], weight: Tensor | None) -> lowrank.Spectrum:
    """The directions of the weighted sum. The base's `weight` is needed for kinds that are no products."""
    if all(layer.kind == "lora" for layer, _ in layers):
        return lowrank.spectrum(lowrank.stacked([lowrank.product(layer) for layer, _ in layers], [share for _, share in layers]))
    return lowrank.dense_spectrum(sum(share * layer.change(weight) for layer, share in layers))


@torch.no_grad()
def put_student(denoiser: nn.Module, layers: Layers, settings: Settings) -> None:
    """Adds the student beside its teachers: of each layer's sum the largest directions. Directions that the sum has not are drawn and
    change nothing yet."""
    starts = {}
    for path, found in layers.items():
        weight = denoiser.get_submodule(path).get_base_layer().weight
        spectrum = start_of(found, weight.detach().float().cpu())
        if spectrum.values.numel() and spectrum.values[0] > 0:
            starts[path] = lowrank.layer_of(spectrum.truncated(min(settings.rank, spectrum.numerical_rank())))
    if not starts:
        raise LoraError(f"The sum of the LoRAs is zero with weights={settings.weights}: nothing is left to be learnt.")
    whole = {path: f"re:{re.escape(path)}" for path in starts}  # a short path is the end of others, too
    ranks = {whole[path]: min(settings.rank, len(layer.up), layer.down[0].numel()) for path, layer in starts.items()}
    ranks = {pattern: rank for pattern, rank in ranks.items() if rank < settings.rank}
    inject(denoiser, list(whole.values()), settings.rank, settings.rank, settings.seed, ranks=ranks, alphas=ranks)
    parameters = adapter_parameters(denoiser)
    for path, layer in starts.items():
        parameters[f"{path}.up"][:, : layer.rank] = layer.up.to(denoiser.device)
        parameters[f"{path}.down"][: layer.rank] = layer.down.to(denoiser.device)


def make_module(
    settings: Settings, family: Family, parts: Components, objective: Objective, teachers: Teachers, said: Said,
    lesson: Drawn | CharacterData,
) -> Student:  # fmt: skip
    sizes = {name: parameter.detach().square().mean().sqrt().item() for name, parameter in adapter_parameters(parts.denoiser).items()}

    def rate(name: str) -> float:
        """The factor's size, to a power of two, so that many share a group."""
        return 2.0 ** round(math.log2(sizes[name]))

    def make_loader(first_step: int, rank: int, world: int) -> StepLoader:
        return StepLoader(Steps(lesson, range(first_step, settings.steps)), 1)

    optimizer = OptimizerSettings(lr=settings.lr, weight_decay=0.0)
    return Student(
        teachers, said, family, parts.denoiser, family.process(parts), objective, adapter_parameters(parts.denoiser),
        LiveText(family, Components(parts.source, parts.denoiser_name)),
        make_optimizer=lambda trainable: build_optimizer(optimizer, trainable, rate),
        learning_rate=schedule("cosine", settings.steps, min(10, settings.steps // 10)),
        seed=settings.seed, grad_clip=0.0, ema_decay=EMA, make_loader=make_loader,
    )  # fmt: skip


# ---- what both look at ----


class Drawn:
    """Latents that the teachers drew, the last of which are held out. Batch k is a function of (seed, k)."""

    def __init__(self, latents: Tensor, prompts: Sequence[str], said: Said, stride: int, batch_size: int, seed: int):
        self.latents, self.prompts, self.said, self.stride, self.seed = latents, prompts, said, stride, seed
        self.count = number_to_learn(len(prompts))
        self.batch_size = min(batch_size, self.count)

    def batch(self, step: int) -> Batch:
        rng = python_rng(self.seed, "distilling", step)
        rows = rng.sample(range(self.count), self.batch_size)
        return self._of(rows, ["" if rng.random() < DROPPED else self.prompts[row] for row in rows])

    def hold_out(self) -> list[Batch]:
        rows = list(range(self.count, len(self.prompts)))
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [self._of(part, [self.prompts[row] for row in part]) for part in parts]

    def _of(self, rows: list[int], captions: list[str]) -> Batch:
        latents = self.latents[rows]
        crop = Crop.whole(len(rows), *(side * self.stride for side in latents.shape[-2:]))
        text = Text.stack([self.said.plain[caption] for caption in captions])
        return Batch(latents, torch.zeros_like(latents), text, crop, captions=tuple(captions))


@dataclass(frozen=True)
class Steps:
    """The batches of some steps, as a loader."""

    lesson: Drawn | CharacterData
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.lesson.batch, self.steps)


@torch.no_grad()
def drawn_latents(
    folder: Path, stack: Stack, parts: Components, teachers: Teachers, said: Said, prompts: Sequence[str], seed: int, console: Console
) -> Tensor:
    """A latent (N, C, h, w) for each prompt, drawn by whom it asks; of a resumed run those that it drew before."""
    path, family, recipe = folder / "latents.safetensors", stack.family, stack.recipe
    if path.exists():
        return load(path.read_bytes())["latents"]
    asked: dict[Set, list[int]] = {}
    for row, prompt in enumerate(prompts):
        asked.setdefault(teachers.answering(prompt)[0], []).append(row)
    context, found, size = acting(parts.denoiser), {}, family.default_size(parts)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("drawing what to learn from", total=len(prompts)), 0
        for names, rows in asked.items():
            mine = [prompts[row] for row in rows]
            plain, empty = Text.stack([said.plain[prompt] for prompt in mine]), said.plain[""]
            with context(names):
                latents = sample_latents(
                    family, parts, said.to(names, mine, plain), [seed_of("distilling", seed, row) for row in rows], size=(size, size),
                    steps=recipe.sampling_steps, guidance=recipe.guidance, true_guidance=recipe.true_guidance,
                    negative_text=said.to(names, [""], empty),
                    on_step=lambda step, steps, done=done, rows=rows: bar.update(task, completed=done + len(rows) * step / steps),
                )  # fmt: skip
            found |= dict(zip(rows, latents, strict=True))
            done += len(rows)
    latents = torch.stack([found[row] for row in range(len(prompts))])
    runs.write_atomic(path, save({"latents": latents}))
    return latents


def read_pictures(settings: Settings, stack: Stack, batch_size: int, dtype: torch.dtype, device: str) -> CharacterData:
    """The pictures and captions, encoded; some are held out. Raises DataError."""
    family, tokenizer = stack.family, settings.tokenizer
    data = CharacterData(
        settings.pictures, settings.cache_dir, stack.recipe.resolution, batch_size=batch_size, caption_dropout=DROPPED, seed=settings.seed
    )
    if not data.val:
        raise DataError(f"Of {settings.pictures} no picture is held out, so nothing could tell how near the student comes; add some.")
    bare = family.load(stack.base, [])
    data.prepare(
        family, lambda groups: family.load(stack.base, groups, dtype, device, tokenizer=tokenizer),
        weights={group: weights_hash(family, stack.base, group, tokenizer) for group in ("vae", "text")},
        pixel_multiple=family.pixel_multiple(bare), latent_stride=family.latent_stride(bare), dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return data


def all_captions(data: CharacterData) -> list[str]:
    return ["", *(text for found in data.texts.values() for text in found), *(record.captions[0] for record in data.val)]


# ---- what comes out ----


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
