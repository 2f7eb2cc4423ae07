"""What a student learns from: latents that its teachers draw, or somebody's pictures, and their captions as each teacher says them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load, save
from torch import Tensor

from charforgex import runs
from charforgex.data.datamodule import CharacterData
from charforgex.draws import python_rng, seed_of
from charforgex.errors import DataError
from charforgex.families.loading import weights_hash
from charforgex.generation.sampling import sample_latents
from charforgex.generation.stack import Stack
from charforgex.lora.inject import acting, load_adapter
from charforgex.lora.state import Lora
from charforgex.training.distilling import Settings, Teachers, number_to_learn
from charforgex.types import Batch, Components, Crop, Text

DROPPED = 0.1  # share of captions that are learnt as "", for guidance

Set = tuple[str, ...]  # of LoRAs


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
