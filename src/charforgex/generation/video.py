"""generate.py mode=video: prompts x seeds x strengths to clips that say how they were made.

One clip at a time; of a long one all latents are in memory, and a few frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex import filming, videos
from charforgex.errors import ConfigError, DataError
from charforgex.generation import report
from charforgex.generation.prompts import check_templates, expand, read_prompts
from charforgex.generation.run import (
    ROOT,
    device_of,
    dtype_of,
    enough_memory,
    file_stem,
    hashing,
    load,
    lora_uses,
    shared,
    size_of,
    told_loras,
    trigger_word,
    truncated_prompts,
)
from charforgex.generation.settings import Settings
from charforgex.generation.video_settings import STRENGTH
from charforgex.runs import create_run_dir, save_config, sha256_file, write_provenance

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from charforgex.generation.clips import Beginning
    from charforgex.generation.metadata import ClipRecipe, Recipe
    from charforgex.generation.stack import Stack
    from charforgex.generation.windows import Windowing
    from charforgex.types import Components


@dataclass(frozen=True)
class Job:
    """One clip to make. There are as many prompts as frames in `travel`, else one; `strengths` has one number for each LoRA."""

    number: int
    templates: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int
    strengths: tuple[float, ...]
    path: Path


@dataclass(frozen=True)
class Film:
    """What all clips of a run share. `rate` is frames a second, `size` (height, width)."""

    frames: int
    rate: Fraction
    size: tuple[int, int]
    windowing: Windowing
    strength: float | None


def generate_clips(cfg: Any, settings: Settings) -> dict[str, Any]:
    """Makes the clips, and returns the content of result.json (see docs/generate.md). Each is on disk as soon as it is done.

    All that can be known without the base model's weights is checked before they are loaded. Raises a CharForgeError.
    """
    started = time.perf_counter()
    scenes = read_scenes(settings)
    _check_format(settings)

    from charforgex.generation.clip_files import write_clip
    from charforgex.generation.clips import decode_frames
    from charforgex.generation.sampling import check_sampling
    from charforgex.generation.stack import read_stack

    stack = read_stack(settings)
    settings = settings.filled(stack.recipe)
    scheduler = check_sampling(stack.family, stack.bare, settings)
    templates = [template for scene in scenes for template in scene]
    trigger = trigger_word(settings, stack, templates)
    check_templates(templates, settings.wildcard_dir, trigger)
    film = film_of(settings, stack)
    device, dtype = device_of(settings), dtype_of(settings)
    out = create_run_dir(ROOT, "") if settings.out is None else settings.out
    jobs = plan(scenes, settings, trigger, out)
    out.mkdir(parents=True, exist_ok=True)
    tracker = report.start_wandb(settings.logger, out) if settings.logger.wandb else None
    save_config(out, cfg)
    inputs = {adapter.name: adapter.path for adapter in stack.adapters} | ({"init": settings.init} if settings.init else {})
    write_provenance(out, seed=jobs[0].seed, inputs=inputs)

    with report.progress(len(jobs)) as bar, hashing(stack) as hash_of_base:
        bar.say(f"loading {stack.base}")
        parts = load(stack, device, dtype, settings.tokenizers)
        loaded = time.perf_counter()
        truncated = truncated_prompts(stack, parts, [prompt for job in jobs for prompt in job.prompts])
        common = shared(stack, settings, film.size, scheduler, dtype) | {"clip": clip_recipe(settings, film)}
        uses = lora_uses(stack)
        clips: dict[int, dict[str, Any]] = {}
        for job, latents in _sampled(stack, parts, jobs, settings, film, bar.step):
            loras = tuple(replace(use, scale=scale) for use, scale in zip(uses, job.strengths, strict=True))
            recipe = recipe_of(job, settings, common, hash_of_base(), loras)
            with enough_memory("batch_size=1, or a smaller width and height"):
                frames = decode_frames(stack.family, parts, latents, settings.batch_size)
                how = settings.codec, settings.crf, settings.sheet, sound_of(settings)
                clips[job.number] = write_clip(frames, job.path, recipe, *how) | {
                    "templates": list(job.templates), "prompts": list(job.prompts), "seed": job.seed,
                    "scales": {adapter.name: scale for adapter, scale in zip(stack.adapters, job.strengths, strict=True)},
                }  # fmt: skip
    sampled = time.perf_counter()

    told = {key: value for key, value in common.items() if key not in ("family", "base", "base_is_file", "versions", "clip")}
    result = {
        "out": str(out),
        "clips": [clips[job.number] for job in jobs],
        "family": stack.family.name,
        "base": stack.base,
        "loras": told_loras(stack, uses),
        "settings": told | vars(common["clip"]) | _as_asked(settings) | {"device": device},
        "truncated": truncated,
        "warnings": stack.warnings + _speeds(stack, film),
        "seconds": {"load": loaded - started, "sample": sampled - loaded, "total": time.perf_counter() - started},
    }
    report.finish(out, result, settings.logger, tracker)
    return result


def _as_asked(settings: Settings) -> dict[str, Any]:
    travel = {str(frame): template for frame, template in settings.travel.items()} if settings.travel else None
    return {"travel": travel, "format": settings.format, "codec": settings.codec, "crf": settings.crf}


# ---- what is known first ----


def read_scenes(settings: Settings) -> list[tuple[str, ...]]:
    """The templates of each clip: one, or those that it travels through. Raises ConfigError."""
    if settings.travel is None:
        return [(template,) for template in read_prompts(settings.prompt, settings.prompt_file)]
    if settings.prompt is not None or settings.prompt_file is not None:
        raise ConfigError("travel and a prompt are both given; travel={0: ..., 8: ...} has the prompts of all frames.")
    return [tuple(read_prompts(list(settings.travel.values()), None))]


def _check_format(settings: Settings) -> None:
    path = Path("clip" if settings.format == "frames" else f"clip.{settings.format}")
    codec = filming.check_output(path, settings.codec)
    if (sound := sound_of(settings)) is not None:
        filming.check_sound(path, sound)
    if settings.crf is not None and (codec is None or filming.ENCODERS[codec][1] is None):
        raise ConfigError(f"crf={settings.crf} would have no effect: {codec or settings.format} keeps all that it can; leave it out.")


def sound_of(settings: Settings) -> Path | None:
    """The video whose sound the clips have: they have its times."""
    heard = settings.sound and not settings.is_from_picture and f".{settings.format}" in filming.FORMATS
    return settings.init if heard else None


def film_of(settings: Settings, stack: Stack) -> Film:
    """Raises ConfigError for frames, windows and travels that do not fit each other, DataError for an init that is too short."""
    from charforgex.generation.clips import first_step
    from charforgex.generation.interpolate import as_rate
    from charforgex.generation.windows import Windowing

    known = stack.bare.config["max_frames"]
    trained = min(stack.recipe.frames or known, known)
    learnt = {adapter.fps for adapter in stack.adapters if adapter.fps is not None}
    rate = as_rate(settings.fps or (learnt.pop() if len(learnt) == 1 else stack.recipe.fps or 8))
    window = settings.window or trained
    if window > known:
        raise ConfigError(f"window={window}: the motion modules of {stack.base} know {known} frames at once; take that many or fewer.")
    overlap = window // 4 if settings.overlap is None else settings.overlap
    if overlap >= window:
        raise ConfigError(f"overlap={overlap}: windows of {window} frames share fewer than they have; say at most {window - 1}.")
    frames = _frames(settings, trained, rate)
    idle = ("noise",) if settings.loop else ("overlap", "blend", "noise")
    for name in idle if frames <= window else ():
        if getattr(settings, name) is not None:
            raise ConfigError(f"{name}={getattr(settings, name)} has no effect: {frames} frames are one window of {window}; leave it out.")
    if settings.travel and max(settings.travel) >= frames:
        raise ConfigError(f"travel has a prompt at frame {max(settings.travel)}, and the clip ends with frame {frames - 1}; say frames=...")
    strength = None
    if settings.init is not None:
        strength = settings.strength or STRENGTH
        first_step(settings.steps, strength)
    windowing = Windowing(window, overlap, settings.blend or "pyramid", settings.loop, settings.noise or "shuffled")
    return Film(frames, rate, size_of(settings, stack), windowing, strength)


def _speeds(stack: Stack, film: Film) -> list[str]:
    """Of motion that is shown at another speed than it was learnt at."""
    return [
        f"{adapter.path.name} was trained at {adapter.fps:g} frames a second, and these clips have {float(film.rate):g}: its motion is "
        f"{'faster' if film.rate > adapter.fps else 'slower'}."
        for adapter in stack.adapters
        if adapter.fps is not None and abs(adapter.fps - film.rate) > 0.01
    ]


def _frames(settings: Settings, trained: int, rate: Fraction) -> int:
    from charforgex.generation import beginnings

    if settings.init is None:
        return settings.frames or trained
    if settings.is_from_picture:
        beginnings.picture(settings.init)
        return settings.frames or trained
    there = sum(1 for _ in islice(beginnings.at_rate(videos.frames(settings.init), rate), settings.frames))
    if settings.frames and there < settings.frames:
        raise DataError(f"init={settings.init} has {there} frames at {float(rate):g} a second; say frames={there}, or leave frames out.")
    return there


def plan(scenes: Sequence[tuple[str, ...]], settings: Settings, trigger: str | None, out: Path) -> list[Job]:
    """Every clip in the order of its file: by prompt, seed and strengths. Raises ConfigError for a folder of frames that is there."""
    asked = [(number, scene, seed) for number, scene in enumerate(scenes) for seed in settings.all_seeds()]
    combinations, jobs = settings.combinations(), []
    suffix = "" if settings.format == "frames" else f".{settings.format}"
    for number, scene, seed in asked:
        prompts = tuple(expand(template, seed, number + place, settings.wildcard_dir, trigger) for place, template in enumerate(scene))
        for strengths in combinations:
            path = out / f"{file_stem(len(jobs), len(asked) * len(combinations), seed, prompts[0])}{suffix}"
            if not suffix and path.exists():
                raise ConfigError(f"{path} exists, and folders of frames are never replaced; say out=<another folder>.")
            jobs.append(Job(len(jobs), scene, prompts, seed, strengths, path))
    return jobs


# ---- sampling ----


def _sampled(
    stack: Stack, parts: Components, jobs: Sequence[Job], settings: Settings, film: Film, on_share: Callable[[float], None]
) -> Iterator[tuple[Job, Tensor]]:
    """Jobs with their latents; those of the same LoRA strengths one after another."""
    from charforgex.generation.clips import sample_clip, travel
    from charforgex.generation.sampling import needs_negative
    from charforgex.lora.inject import set_scales

    family, way_out = stack.family, "a smaller width and height, or fewer frames in a window"
    with enough_memory(way_out):
        beginning = _beginning(stack, parts, settings, film)
    shares = travel(list(settings.travel), film.frames, settings.loop) if settings.travel else None
    guided = needs_negative(family, parts, settings.guidance)
    for strengths in settings.combinations():
        if stack.adapters:
            set_scales(parts, {adapter.name: strength for adapter, strength in zip(stack.adapters, strengths, strict=True)})
        negative = family.encode_text(parts, [settings.negative]) if guided else None
        for job in (job for job in jobs if job.strengths == strengths):
            with enough_memory(way_out):
                latents = sample_clip(
                    family, parts, family.encode_text(parts, job.prompts), job.seed, frames=film.frames, size=film.size,
                    steps=settings.steps, guidance=settings.guidance, negative_text=negative, shares_TK=shares, windowing=film.windowing,
                    beginning=beginning, scheduler=settings.scheduler, batch_size=settings.batch_size, on_share=on_share,
                )  # fmt: skip
            yield job, latents


def _beginning(stack: Stack, parts: Components, settings: Settings, film: Film) -> Beginning | None:
    from charforgex.generation import beginnings
    from charforgex.generation.clips import Beginning, encode_frames

    if settings.init is None:
        return None
    if settings.is_from_picture:
        frames: Iterable[np.ndarray] = [beginnings.picture(settings.init)]
    else:
        frames = islice(beginnings.at_rate(videos.frames(settings.init), film.rate), film.frames)
    latents = encode_frames(stack.family, parts, (beginnings.fitted(one, film.size) for one in frames), settings.batch_size)
    latents = latents.expand(-1, film.frames, -1, -1) if settings.is_from_picture else latents
    return Beginning(latents, film.strength, bool(settings.keep_first))


# ---- what a clip says about itself ----


def clip_recipe(settings: Settings, film: Film) -> ClipRecipe:
    from charforgex.generation.metadata import ClipRecipe

    how, init = film.windowing, settings.init
    return ClipRecipe(
        frames=film.frames, fps=float(film.rate), loop=how.loop, window=how.length, overlap=how.overlap, blend=how.blend, noise=how.noise,
        travel=None, init=init.name if init else None, init_sha256=sha256_file(init) if init else None, strength=film.strength,
        keep_first=bool(settings.keep_first), interpolate=settings.interpolate,
    )  # fmt: skip


def recipe_of(job: Job, settings: Settings, common: dict[str, Any], base_sha256: str, loras: tuple) -> Recipe:
    """Of a clip that travels, `prompt` is the first one."""
    from charforgex.generation.metadata import Recipe

    clip: ClipRecipe = common["clip"]
    if settings.travel:
        clip = replace(clip, travel={str(frame): prompt for frame, prompt in zip(settings.travel, job.prompts, strict=True)})
    return Recipe(
        prompt=job.prompts[0], template=job.templates[0], seed=job.seed, base_sha256=base_sha256, loras=loras, **common | {"clip": clip}
    )
