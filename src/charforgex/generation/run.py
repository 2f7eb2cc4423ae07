"""generate.py: a base and LoRAs, prompts x seeds x strengths, to pictures that say how they were made."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import ConfigError, ModelError
from charforgex.generation import report
from charforgex.generation.prompts import check_templates, expand, read_prompts
from charforgex.generation.settings import SamplingSettings, Settings
from charforgex.runs import create_run_dir, save_config, sha256_file, versions, write_provenance

if TYPE_CHECKING:
    from charforgex.generation.metadata import LoraUse, Recipe
    from charforgex.generation.stack import Adapter, Stack
    from charforgex.types import Components

ROOT = "generated"


@dataclass(frozen=True)
class Job:
    """One picture to make. `strengths` has one number for each LoRA."""

    number: int
    template: str
    prompt: str
    seed: int
    strengths: tuple[float, ...]


def generate(cfg: Any) -> dict[str, Any]:
    """Makes the pictures that generate.yaml's settings ask for, and returns the content of result.json (see docs/generate.md).

    All that can be known without the base model's weights is checked before they are loaded. Each picture is on disk as soon as its
    batch is done, so an interruption loses one batch. Raises a CharForgeError.
    """
    started = time.perf_counter()
    settings = bind(Settings, cfg, "")
    _check_out(settings)
    if settings.mode == "video":
        from charforgex.generation.video import generate_clips

        return generate_clips(cfg, settings)
    templates = read_prompts(settings.prompt, settings.prompt_file)

    from charforgex.families.registry import refuse_clips
    from charforgex.generation.metadata import save_png
    from charforgex.generation.sampling import check_sampling
    from charforgex.generation.stack import read_stack

    stack = read_stack(settings)
    refuse_clips(stack.family, "mode=picture", "choose another family, or say mode=video.")
    settings = settings.filled(stack.recipe)
    scheduler = check_sampling(stack.family, stack.bare, settings, settings.guidance_rescale)
    trigger = trigger_word(settings, stack, templates)
    check_templates(templates, settings.wildcard_dir, trigger)
    size = size_of(settings, stack)
    device, dtype = device_of(settings), dtype_of(settings)
    jobs = plan(templates, settings, trigger)
    out = create_run_dir(ROOT, "") if settings.out is None else settings.out
    out.mkdir(parents=True, exist_ok=True)
    tracker = report.start_wandb(settings.logger, out) if settings.logger.wandb else None
    save_config(out, cfg)
    write_provenance(out, seed=jobs[0].seed, inputs={adapter.name: adapter.path for adapter in stack.adapters})

    with report.progress(len(jobs)) as bar, hashing(stack) as hash_of_base:
        bar.say(f"loading {stack.base}")
        parts = load(stack, device, dtype, settings.tokenizers)
        loaded = time.perf_counter()
        truncated = truncated_prompts(stack, parts, [job.prompt for job in jobs])
        common = shared(stack, settings, size, scheduler, dtype, settings.guidance_rescale)
        loras = lora_uses(stack)
        files: dict[int, Path] = {}
        for batch, pictures in _sampled(stack, parts, jobs, settings, size, bar.step):
            for job, picture in zip(batch, pictures, strict=True):
                recipe = _recipe(job, common, hash_of_base(), loras)
                path = out / f"{file_stem(job.number, len(jobs), job.seed, job.prompt)}.png"
                files[job.number] = save_png(picture, path, recipe)
    sampled = time.perf_counter()

    pictures = [
        {
            "file": str(files[job.number]), "prompt": job.prompt, "template": job.template, "seed": job.seed,
            "scales": {adapter.name: strength for adapter, strength in zip(stack.adapters, job.strengths, strict=True)},
        }
        for job in jobs
    ]  # fmt: skip
    settings_used = {key: value for key, value in common.items() if key not in ("family", "base", "base_is_file", "versions")}
    result = {
        "out": str(out),
        "sheets": [str(path) for path in report.write_sheets(out, pictures, public_name(stack.base), settings_used)]
        if settings.sheet
        else [],
        "pictures": pictures,
        "family": stack.family.name,
        "base": stack.base,
        "loras": told_loras(stack, loras),
        "settings": settings_used | {"device": device},
        "truncated": truncated,
        "warnings": stack.warnings,
        "seconds": {"load": loaded - started, "sample": sampled - loaded, "total": time.perf_counter() - started},
    }
    report.finish(out, result, settings.logger, tracker)
    return result


def plan(templates: Sequence[str], settings: Settings, trigger: str | None) -> list[Job]:
    """Every picture in the order of its file: by prompt, then seed, then strengths. Wildcards are drawn by the picture's seed."""
    jobs = []
    for number, template in enumerate(templates):
        for seed in settings.all_seeds():
            prompt = expand(template, seed, number, settings.wildcard_dir, trigger)
            jobs += [Job(len(jobs) + i, template, prompt, seed, strengths) for i, strengths in enumerate(settings.combinations())]
    return jobs


def load(stack: Stack, device: str, dtype: Any, tokenizer: str | None = None) -> Components:
    """The whole base with its LoRAs in it. Raises ModelError or LoraError."""
    with enough_memory("a smaller base, or dtype=bfloat16"):
        parts = stack.family.load(stack.base, dtype=dtype, device=device, tokenizer=tokenizer)
        for adapter in stack.adapters:
            add(parts, adapter)
    return parts


def add(parts: Components, adapter: Adapter) -> None:
    """Puts a LoRA and its new tokens into a loaded base. Raises LoraError."""
    from charforgex.families.tokens import add_tokens
    from charforgex.lora.inject import load_adapter

    load_adapter(parts, adapter.lora, adapter.name)
    for component, rows in adapter.tokens.items():
        add_tokens(parts, component, adapter.trigger.split()[0], rows)


def _sampled(
    stack: Stack, parts: Components, jobs: list[Job], settings: Settings, size: tuple[int, int], on_step: Callable[[float], None]
) -> Iterator[tuple[list[Job], list]]:
    """Batches of jobs with their pictures; the pictures of one batch share their LoRA strengths."""
    from charforgex.generation.sampling import sample
    from charforgex.lora.inject import set_scales

    for strengths in settings.combinations():
        if stack.adapters:
            set_scales(parts, {adapter.name: strength for adapter, strength in zip(stack.adapters, strengths, strict=True)})
        mine = [job for job in jobs if job.strengths == strengths]
        for start in range(0, len(mine), settings.batch_size):
            batch = mine[start : start + settings.batch_size]
            share = len(batch)
            with enough_memory(f"batch_size={max(1, len(batch) // 2)}, or a smaller width and height"):
                pictures = sample(
                    stack.family, parts, [job.prompt for job in batch], [job.seed for job in batch], size=size, steps=settings.steps,
                    guidance=settings.guidance, true_guidance=settings.true_guidance, negative=settings.negative,
                    guidance_rescale=settings.guidance_rescale, batch_size=settings.batch_size, scheduler=settings.scheduler,
                    on_step=lambda _done, total, share=share: on_step(share / total),
                )  # fmt: skip
            yield batch, pictures


@contextmanager
def enough_memory(way_out: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the device's memory is not enough; try {way_out}.") from error


# ---- what is checked first ----


def _check_out(settings: Settings) -> None:
    out = settings.out
    if out is None:
        if settings.overwrite:
            raise ConfigError("overwrite=true has no effect without out=<folder>: each run has a folder of its own.")
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder.")
    if not settings.overwrite and (out / "result.json").exists():
        raise ConfigError(f"out={out} holds the pictures of an earlier run; choose another folder, or say overwrite=true.")


def trigger_word(settings: Settings, stack: Stack, templates: Sequence[str]) -> str | None:
    if settings.trigger is not None:
        if not any("{trigger}" in template or "__" in template for template in templates):
            raise ConfigError(f"trigger={settings.trigger} has no effect: no prompt holds {{trigger}}.")
        return settings.trigger
    return ", ".join(dict.fromkeys(adapter.trigger for adapter in stack.adapters if adapter.trigger)) or None


def size_of(settings: Settings, stack: Stack) -> tuple[int, int]:
    from charforgex.generation.sampling import check_size

    default, multiple = stack.family.default_size(stack.bare), stack.family.pixel_multiple(stack.bare)
    height, width = settings.height or default, settings.width or default
    check_size((height,), multiple, name="height")
    check_size((width,), multiple, name="width")
    return height, width


def device_of(settings: Settings) -> str:
    import torch

    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if settings.device == "auto":
        return there[0]
    kind, _, index = settings.device.partition(":")
    if kind not in there or (index and (kind != "cuda" or not index.isdigit() or int(index) >= torch.cuda.device_count())):
        raise ConfigError(f"device={settings.device} is not on this machine; there is {', '.join(there)}.")
    return settings.device


def dtype_of(settings: Settings):
    import torch

    device = device_of(settings)
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float16


# ---- what a picture says about itself ----


@contextmanager
def hashing(stack: Stack) -> Iterator[Callable[[], str]]:
    """The base's hash, worked out while the base is loaded: both wait for the disk."""
    from concurrent.futures import ThreadPoolExecutor

    from charforgex.families.loading import TINY

    if stack.base == TINY or "+" in stack.base:  # these build networks to be hashed, which no second thread may do beside the loading
        yield cache(lambda: base_hash(stack))
        return
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(base_hash, stack).result


def base_hash(stack: Stack) -> str:
    from charforgex.families.loading import weights_hash

    path = Path(stack.base).expanduser()
    return sha256_file(path) if path.is_file() else weights_hash(stack.family, stack.base, "denoiser")


def shared(
    stack: Stack, settings: SamplingSettings, size: tuple[int, int], scheduler: Any, dtype: Any, guidance_rescale: float = 0.0
) -> dict[str, Any]:
    """What the recipes of all pictures of a run have in common; `size` is (height, width)."""
    return dict(
        negative=settings.negative, width=size[1], height=size[0], steps=settings.steps, guidance=settings.guidance,
        true_guidance=settings.true_guidance if stack.family.has_true_guidance else None,
        guidance_rescale=guidance_rescale, scheduler=settings.scheduler, scheduler_class=type(scheduler).__name__,
        schedule_type="Karras" if scheduler.config.get("use_karras_sigmas") else None, family=stack.family.name,
        base=public_name(stack.base), base_is_file=Path(stack.base).expanduser().is_file(), dtype=str(dtype).removeprefix("torch."),
        versions={name: versions()[name] for name in ("charforgex", "torch", "diffusers")},
    )  # fmt: skip


def lora_uses(stack: Stack) -> list[LoraUse]:
    from charforgex.generation.metadata import LoraUse
    from charforgex.lora.metadata import hashes

    found = []
    for adapter in stack.adapters:
        known = hashes(adapter.path)
        found.append(LoraUse(adapter.name, known["sha256"], known["autov3"], 1.0))
    return found


def told_loras(stack: Stack, uses: Sequence[LoraUse]) -> list[dict[str, Any]]:
    """The LoRAs as result.json has them."""
    return [
        {"path": str(adapter.path), "name": adapter.name, "sha256": use.sha256, "trigger": adapter.trigger}
        for adapter, use in zip(stack.adapters, uses, strict=True)
    ]


def _recipe(job: Job, common: dict[str, Any], base_sha256: str, loras: list[LoraUse]) -> Recipe:
    from dataclasses import replace

    from charforgex.generation.metadata import Recipe

    uses = tuple(replace(use, scale=strength) for use, strength in zip(loras, job.strengths, strict=True))
    return Recipe(prompt=job.prompt, template=job.template, seed=job.seed, base_sha256=base_sha256, loras=uses, **common)


def file_stem(number: int, of: int, seed: int, prompt: str) -> str:
    """A file's name without its suffix; numbers begin with 1 and sort."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{str(number + 1).zfill(max(3, len(str(of))))}_seed{seed}{'_' if words else ''}{words}"


def public_name(base: str) -> str:
    """A path says something about its owner's machine, so pictures carry its last part alone."""
    from charforgex.families.sources import addresses

    paths = {address: Path(address).expanduser() for address in addresses(base)}
    return "+".join(path.resolve().name if path.exists() else address for address, path in paths.items())


def truncated_prompts(stack: Stack, parts: Components, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Prompts of which the text encoders see only the beginning."""
    found = []
    for prompt in dict.fromkeys(prompts):
        seen, cut = max(stack.family.seen_text(parts, prompt), key=lambda pair: pair[1])
        if cut:
            found.append({"prompt": prompt, "seen": seen, "tokens_cut": cut})
    return found
