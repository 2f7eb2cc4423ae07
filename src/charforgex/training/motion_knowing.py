"""What a training of motion knows of itself: the loss on held-out clips, and clips from fixed noise, each with the adapters on and off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from charforgex.data.clips import ClipData
from charforgex.draws import seed_of
from charforgex.embedders import Embedder
from charforgex.evaluation import levels, motion
from charforgex.families.base import Family
from charforgex.filming import Output, writing
from charforgex.generation.clips import decode_frames, sample_clip
from charforgex.generation.settings import SamplingSettings
from charforgex.generation.sheets import contact_sheet
from charforgex.runs import replace_atomic
from charforgex.training.losses import computing_in
from charforgex.training.motion import motion_losses
from charforgex.training.settings import MotionEvaluationSettings
from charforgex.types import Components

SHOWN = 8  # frames in a row of a sheet
COLUMNS = 4  # clips of a GIF side by side
PROMPTS = 4  # captions of held-out clips, where no prompts are given
REFERENCES = 16  # held-out clips that motion is compared with


@dataclass
class MotionScores:
    """Of the base or of a checkpoint. `validation` is the loss that is minimised, on held-out clips; `moves` what `evaluation.motion` says
    of the drawn clips, on average."""

    step: int
    validation: float
    levels: dict[str, float] = field(default_factory=dict)  # the validation loss by noise level
    moves: dict[str, float] = field(default_factory=dict)


class MotionKnowing:
    """Measures the denoiser in `parts`, which also hold the scheduler and a VAE that decodes. `debias` is that of the loss.

    Losses are of all that learns. Clips are drawn inside `alone()`: with what learnt the motion and not with what learnt the look.
    """

    def __init__(
        self, family: Family, parts: Components, data: ClipData, prompts: Sequence[str], embedder: Embedder,
        settings: MotionEvaluationSettings, sampling: SamplingSettings, debias: float, alone: Callable[[], AbstractContextManager],
        seed: int = 0,
    ):  # fmt: skip
        self.family, self.parts, self.data, self.embedder = family, parts, data, embedder
        self.settings, self.sampling, self.debias, self.alone = settings, sampling, debias, alone
        self.process = family.process(parts)
        self.prompts = [prompt for prompt in prompts for _ in range(settings.seeds)]
        self.seeds = [seed_of(seed, "evaluation", i) % 2**31 for i in range(len(self.prompts))]
        self.references = list(islice(data.references(), REFERENCES))
        self.histories = [motion.history(clip) for clip in self.references]
        self.real = self._moves(self.references)  # how held-out clips move; alike: each to the others
        self.base_clips: list[np.ndarray] = []

    def anchor(self) -> MotionScores:
        """Measured before anything is learnt, so it holds for the whole run."""
        self.base_clips = self.draw()
        return MotionScores(0, *self.validation(), self._moves(self.base_clips, self.histories))

    def scores(self, step: int) -> tuple[MotionScores, list[np.ndarray]]:
        clips = self.draw()
        return MotionScores(step, *self.validation(), self._moves(clips, self.histories)), clips

    # ---- clips ----

    def draw(self) -> list[np.ndarray]:
        """The evaluation's clips by the denoiser as it stands, uint8 (T, H, W, 3), all of one size."""
        how, denoiser = self.sampling, self.parts.denoiser
        size = max(self.data.resolutions)
        found = []
        for prompt, seed in zip(self.prompts, self.seeds, strict=True):
            with self.alone(), computing_in(next(denoiser.parameters()).dtype, denoiser.device):
                latents = sample_clip(
                    self.family, self.parts, self.data.text(prompt), seed, frames=self.data.frames, size=(size, size), steps=how.steps,
                    guidance=how.guidance, negative_text=self.data.text(how.negative), scheduler=how.scheduler,
                )  # fmt: skip
            found.append(np.stack(list(decode_frames(self.family, self.parts, latents))))
        return found

    def _moves(self, clips: Sequence[np.ndarray], references: Sequence[np.ndarray] = ()) -> dict[str, float]:
        """Means over clips. Without references each is held against the others; `alike` is left out where there are none."""
        found: dict[str, list[float]] = {"strength": [], "flicker": [], "drift": [], "alike": []}
        flows = [motion.flow_of(clip) for clip in clips]
        histories = [motion.history(clip, flow) for clip, flow in zip(clips, flows, strict=True)]
        for number, (clip, flow) in enumerate(zip(clips, flows, strict=True)):
            found["strength"].append(motion.strength(clip, float(self.data.fps), flow))
            found["flicker"].append(motion.flicker(clip, flow))
            found["drift"].append(motion.drift(clip, self.embedder))
            others = references or histories[:number] + histories[number + 1 :]
            if others:
                found["alike"].append(motion.alike(histories[number], others))
        return {name: float(np.mean(values)) for name, values in found.items() if values}

    # ---- the loss ----

    @torch.no_grad()
    def validation(self) -> tuple[float, dict[str, float]]:
        """Mean loss over held-out clips x fixed noise x noise levels, with the middle frame as the anchor, and the means by level."""
        denoiser, count = self.parts.denoiser, self.settings.times
        rows: list[list[torch.Tensor]] = [[] for _ in range(count)]
        with computing_in(next(denoiser.parameters()).dtype, denoiser.device):
            for batch in self.data.validation():
                batch = batch.to(denoiser.device)
                anchor_B, even_B = torch.full((len(batch),), self.data.frames // 2), torch.ones(len(batch), device=denoiser.device)
                for row, pair in zip(rows, levels.predictions(self.family, denoiser, self.process, batch, count), strict=True):
                    row.append(motion_losses(*pair, even_B, anchor_B, self.debias).cpu())
        means = [torch.cat(row).double().mean().item() for row in rows]
        by_level = {f"t={time:.3f}": mean for time, mean in zip(levels.times(self.process, count).tolist(), means, strict=True)}
        return sum(means) / count, by_level

    # ---- to look at ----

    def sheet(self, clips: Sequence[np.ndarray], path: Path, title: str) -> None:
        """Frames of the first clip of each prompt from left to right: a held-out clip above, then the base and what was learnt."""
        each = slice(0, COLUMNS * self.settings.seeds, self.settings.seeds)
        rows, labels = [_row(self.references[0], clips[0].shape[1:3])], ["held out"]
        for number, (base, own) in enumerate(zip(self.base_clips[each], clips[each], strict=True), 1):
            rows += [_row(base), _row(own)]
            labels += [f"{number}: base", f"{number}: learnt"]
        told = "  ".join(f"{number}: {prompt}" for number, prompt in enumerate(self.prompts[each], 1))
        image = contact_sheet(rows, labels, (), title, told)
        with replace_atomic(path) as temporary:
            image.save(temporary)

    def gif(self, clips: Sequence[np.ndarray], path: Path) -> None:
        """The first clip of each prompt side by side as they move: the base above, what was learnt below."""
        each = slice(0, COLUMNS * self.settings.seeds, self.settings.seeds)
        rate = Fraction(self.data.fps)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(Output(path, rate, rate.numerator)) as out:
            for number, pixels in enumerate(_grids([self.base_clips[each], list(clips[each])])):
                out.write(pixels, number / rate, 1 / rate)


def _row(clip: np.ndarray, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Frames evenly over a clip, reduced to `size` (height, width) if need be."""
    chosen = sorted({round(place * (len(clip) - 1) / (SHOWN - 1)) for place in range(SHOWN)})
    pictures = [Image.fromarray(clip[index]) for index in chosen]
    return pictures if size is None else [picture.resize(size[::-1], Image.Resampling.LANCZOS) for picture in pictures]


def _grids(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> Iterator[np.ndarray]:
    """For each frame one picture of all clips, white between them."""
    frames, height, width = rows[0][0].shape[:3]
    for frame in range(frames):
        grid = np.full((len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3), 255, np.uint8)
        for y, row in enumerate(rows):
            for x, clip in enumerate(row):
                grid[y * (height + gap) :, x * (width + gap) :][:height, :width] = clip[frame]
        yield grid


def as_metrics(scores: MotionScores, base: MotionScores, value: float) -> dict[str, float]:
    """The names of metrics.csv, TensorBoard and W&B."""
    metrics = {"validation/lora": scores.validation, "validation/base": base.validation, "value": value}
    metrics |= {f"validation/{time}": loss for time, loss in scores.levels.items()}
    return metrics | {f"motion/{name}/{who}": number for who, of in (("lora", scores), ("base", base)) for name, number in of.moves.items()}


def plain(item: MotionScores) -> dict:
    return asdict(item)
