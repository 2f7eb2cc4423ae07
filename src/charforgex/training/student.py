"""The student of a distillation: a LoRA that learns to predict what its teachers predict, and how far from them it is.

The error is `relative_error` of student - teacher to teacher - base over held-out latents and noise levels. 0 is the teachers
themselves, 1 is no better than the base without any LoRA.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from charforgex import runs
from charforgex.data.datamodule import CharacterData
from charforgex.errors import LoraError
from charforgex.evaluation.functional import energy, relative_error
from charforgex.families.base import Family
from charforgex.generation.stack import Stack
from charforgex.lora import lowrank
from charforgex.lora.inject import TRAINED, acting, adapter_parameters, inject
from charforgex.lora.state import Layer
from charforgex.training.distilling import Settings, Teachers
from charforgex.training.lessons import Drawn, Said, Set, Steps
from charforgex.training.live import LiveText
from charforgex.training.loop import StepLoader
from charforgex.training.losses import Objective, computing_in, diffusion_loss
from charforgex.training.module import DenoiserModule
from charforgex.training.optimizers import build_optimizer, schedule
from charforgex.training.settings import OptimizerSettings
from charforgex.types import Batch, Components, Crop, Text

LEVELS = 4  # noise levels of the held-out error
EMA = 0.98

Layers = dict[str, list[tuple[Layer, float]]]  # of the denoiser by path, with their weights


class Student(DenoiserModule):
    """Trains the student alone; teachers answer without gradients."""

    way_out = "Set gradient_checkpointing=true, or precision=bfloat16."

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
                self.energy += energy(wanted - base.float())
        if not self.energy:
            raise LoraError("On no held-out prompt do the LoRAs change a prediction, so nothing can be learnt from them.")

    @torch.no_grad()
    def error(self) -> float:
        """The student's, relative to what the teachers change."""
        missed = 0.0
        for *question, wanted in self.questions:
            with self.module.acting([TRAINED]):
                said = self.module.predict(*question)
            missed += energy(said.float() - wanted)
        return relative_error(missed, self.energy)


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

    def make_loader(first_step: int) -> StepLoader:
        return StepLoader(Steps(lesson, range(first_step, settings.steps)), 1)

    optimizer = OptimizerSettings(lr=settings.lr, weight_decay=0.0)
    return Student(
        teachers, said, family, parts.denoiser, family.process(parts), objective, adapter_parameters(parts.denoiser),
        LiveText(family, Components(parts.source, parts.denoiser_name)),
        make_optimizer=lambda trainable: build_optimizer(optimizer, trainable, rate),
        learning_rate=schedule("cosine", settings.steps, min(10, settings.steps // 10)),
        seed=settings.seed, grad_clip=0.0, ema_decay=EMA, make_loader=make_loader,
    )  # fmt: skip
