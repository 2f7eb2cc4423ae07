"""What a run knows of itself: validation loss with the adapter on and off, and an identity curve on held-out references.

Everything is fixed but the weights: held-out pictures, noise, noise levels, prompts and seeds. The checkpoint that is kept is
chosen by these numbers, not by being the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps

from charforgex.curation.manifest import read_picture
from charforgex.data.datamodule import CharacterData
from charforgex.draws import seed_of
from charforgex.embedders import Embedder
from charforgex.evaluation import choosing, levels
from charforgex.evaluation.alignment import Follower
from charforgex.evaluation.identity import similarity
from charforgex.evaluation.memory import nearest
from charforgex.evaluation.metrics.levels import value
from charforgex.evaluation.variety import diversity
from charforgex.families.base import Family
from charforgex.generation.sampling import sample
from charforgex.generation.settings import SamplingSettings
from charforgex.generation.sheets import contact_sheet
from charforgex.lora.inject import without_adapter
from charforgex.runs import replace_atomic
from charforgex.training.blocks import uncompiled
from charforgex.training.live import LiveText
from charforgex.training.losses import computing_in
from charforgex.training.settings import EvaluationSettings
from charforgex.types import Components, Text

COLUMNS = 8  # of contact sheets


@dataclass
class Scores:
    """One checkpoint's numbers. `identity` and `nearest` are cosines, `diversity` a cosine distance."""

    step: int
    identity: float
    prompt_following: float
    diversity: float
    nearest: float
    validation: float
    levels: dict[str, float] = field(default_factory=dict)  # the validation loss by noise level
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class Anchors:
    """What the curve is read against: other characters, the base model with the trigger, and real pictures of the character."""

    floor: float | None
    base: float
    ceiling: float
    prompt_following: float
    diversity: float
    validation: float
    levels: dict[str, float] = field(default_factory=dict)  # the validation loss by noise level
    extra: dict[str, float] = field(default_factory=dict)

    def gain(self, identity: float) -> float:
        return choosing.gain(identity, self.base, self.ceiling)

    def value(self, scores: Scores) -> float:
        """What the best checkpoint has most of: `choosing.worth`."""
        gained = self.gain(scores.identity)
        return choosing.worth(gained, scores.prompt_following, scores.diversity, self.prompt_following, self.diversity)


class Knowing:
    """Measures the denoiser in `parts`, which also hold the scheduler and a VAE that decodes."""

    def __init__(
        self,
        family: Family,
        parts: Components,
        data: CharacterData,
        embedder: Embedder,
        follower: Follower,
        settings: EvaluationSettings,
        sampling: SamplingSettings,
        live: LiveText,
        others: Sequence[Image.Image] = (),
        seed: int = 0,
    ):
        self.family, self.parts, self.data = family, parts, data
        self.embedder, self.follower, self.settings, self.sampling = embedder, follower, settings, sampling
        self.process, self.live = family.process(parts), live
        self.prompts = [prompt for prompt in settings.prompts for _ in range(settings.seeds)]
        self.seeds = [seed_of(seed, "evaluation", i) % 2**31 for i in range(len(self.prompts))]
        self.references = data.references()
        self.training_pictures = [read_picture(path, data.background) for path in data.paths("train")]
        self.reference_vectors = embedder(self.references)
        self.training_features = follower.features(self.training_pictures)
        self.other_vectors = embedder(others) if others else None
        self.base_pictures: list[Image.Image] = []

    # ---- pictures ----

    @uncompiled
    def draw(self) -> list[Image.Image]:
        """The evaluation pictures by the denoiser as it stands."""
        text, negative = self._text(self.prompts), self._text([self.sampling.negative])
        size = max(self.data.resolutions)
        return sample(
            self.family, self.parts, None, self.seeds, text=text, negative_text=negative, size=(size, size), steps=self.sampling.steps,
            guidance=self.sampling.guidance, true_guidance=self.sampling.true_guidance, scheduler=self.sampling.scheduler,
            batch_size=self.sampling.batch_size,
        )  # fmt: skip

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> Text:
        return self.live.encode(prompts, self.data.encoded(prompts).to(self.parts.denoiser.device))

    def sheet(self, pictures: Sequence[Image.Image], path: Path, title: str) -> None:
        """References above, then the base model and the LoRA: the first picture of each prompt."""
        each = slice(0, COLUMNS * self.settings.seeds, self.settings.seeds)
        prompts = self.prompts[each]
        size = pictures[0].size
        references = [ImageOps.pad(r, size, Image.Resampling.LANCZOS, (250, 249, 246)) for r in self.references]
        rows = [(references * len(prompts))[: len(prompts)], self.base_pictures[each], list(pictures)[each]]
        labels = [prompt.split(", ", 1)[-1] for prompt in prompts]
        image = contact_sheet(rows, ("held-out references", "base model", "LoRA"), labels, title)
        with replace_atomic(path) as temporary:
            image.save(temporary)

    # ---- numbers ----

    @uncompiled
    def validation(self) -> tuple[float, dict[str, float]]:
        """Mean loss over held-out pictures x fixed noise x noise levels, and the means by noise level (`evaluation.levels`)."""
        denoiser, count = self.parts.denoiser, self.settings.times
        with torch.no_grad(), computing_in(next(denoiser.parameters()).dtype, denoiser.device):
            seen = [self.live.batch(batch.to(denoiser.device)) for batch in self.data.validation()]
            found = [levels.losses(self.family, denoiser, self.process, batch, count) for batch in seen]
        told = value(torch.cat(found, 1).numpy(), levels.times(self.process, count).tolist())
        return told.estimate, told.parts

    def _measure(self, pictures: Sequence[Image.Image]) -> dict:
        features = self.follower.features(pictures)
        following = self.follower.score(pictures, self.prompts)
        extra = {}
        if hasattr(self.follower, "clip_score"):
            clip = self.follower.clip_score(pictures, self.prompts)
            extra["clip_score"] = sum(clip) / len(clip)
        return {
            "identity": similarity(self.embedder(pictures), self.reference_vectors).mean().item(),
            "prompt_following": sum(following) / len(following),
            "diversity": diversity(features),
            "nearest": nearest(features, self.training_features)[0].mean().item(),
            "extra": extra,
        }

    def anchors(self) -> Anchors:
        """Measured with the adapter off, so they hold for the whole run."""
        with without_adapter(self.parts.denoiser), self.live.base_speaking():
            self.base_pictures = self.draw()
            validation, by_level = self.validation()
        base = self._measure(self.base_pictures)
        real = self.embedder(self.training_pictures)
        floor = similarity(self.other_vectors, self.reference_vectors).mean().item() if self.other_vectors is not None else None
        return Anchors(
            floor=floor, base=base["identity"], ceiling=similarity(real, self.reference_vectors).mean().item(),
            prompt_following=base["prompt_following"], diversity=base["diversity"], validation=validation, levels=by_level,
            extra=base["extra"],
        )  # fmt: skip

    def scores(self, step: int) -> tuple[Scores, list[Image.Image]]:
        pictures = self.draw()
        validation, by_level = self.validation()
        return Scores(step=step, validation=validation, levels=by_level, **self._measure(pictures)), pictures


def as_metrics(scores: Scores, anchors: Anchors) -> dict[str, float]:
    """The names that metrics.csv, TensorBoard and W&B share, with those of an evaluation (`evaluation.trackers`)."""
    metrics = {
        "identity/lora": scores.identity, "identity/base": anchors.base, "identity/ceiling": anchors.ceiling,
        "identity/gain": anchors.gain(scores.identity), "prompt_following/lora": scores.prompt_following,
        "prompt_following/base": anchors.prompt_following, "diversity/lora": scores.diversity, "diversity/base": anchors.diversity,
        "nearest_training_picture/lora": scores.nearest, "validation/lora": scores.validation, "validation/base": anchors.validation,
        "value": anchors.value(scores),
    }  # fmt: skip
    if anchors.floor is not None:
        metrics["identity/floor"] = anchors.floor
    extra = {f"{name}/{who}": number for who, of in (("lora", scores), ("base", anchors)) for name, number in of.extra.items()}
    return metrics | {f"validation/{time}": loss for time, loss in scores.levels.items()} | extra


def plain(item: Scores | Anchors) -> dict:
    return asdict(item)
