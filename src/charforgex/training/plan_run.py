"""`charforgex plan`: memory and time of a training by its settings, before anything is downloaded. `plan(cfg)` is the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from charforgex.errors import ConfigError
from charforgex.training.run import Settings, check

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from charforgex.training.planning import Cost, Machine, Plan, Work


def plan(cfg: DictConfig) -> dict[str, Any]:
    """Prints a table of plans and the settings of the one to take. Returns it, with all costs in bytes. Raises CharForgeError."""
    from rich.console import Console

    from charforgex.quiet import quiet

    settings = check(cfg)
    with quiet():
        from charforgex.training.planning import calibrated

        work, found, best, memory, device = _chosen(cfg, settings)
        machine = calibrated(device, work.dtype)
    show(Console(), work, found, machine, memory, best, device)
    rows = {plan.settings(): {"memory_bytes": cost.memory, "step_seconds": machine.seconds(cost)} for plan, cost in found.items()}
    return {"plans": rows, "chosen": best and best.settings()}


def planned(cfg: DictConfig, settings: Settings) -> DictConfig:
    """The config of a training with the chosen settings in the place of `trainer.plan`: what is kept of the run says what it was done with.

    Raises ConfigError if nothing fits.
    """
    from charforgex.quiet import quiet

    with quiet():
        from charforgex.training.job import choose_device
        from charforgex.training.planning import GIB

        if settings.trainer.memory is None and choose_device(settings.trainer.accelerator) != "cuda":
            raise ConfigError("trainer.plan=auto: what is free on this computer changes, and the plan with it; set trainer.memory, in GiB.")
        _, found, best, memory, _ = _chosen(cfg, settings)
    if best is None:
        least = min(cost.memory for cost in found.values())
        raise ConfigError(
            f"trainer.plan=auto: nothing fits {memory / GIB:.1f} GiB, the least is {least / GIB:.1f}; "
            "lower data.resolution, data.batch_size or sampling.batch_size."
        )
    print(f"plan: {best.settings()}, predicted {found[best].memory / GIB:.1f} of {memory / GIB:.1f} GiB")
    cfg = cfg.copy()
    cfg.trainer.quantize, cfg.trainer.gradient_checkpointing = best.quantize, best.gradient_checkpointing
    cfg.trainer.plan = cfg.trainer.memory = None
    return cfg


def _chosen(cfg: DictConfig, settings: Settings) -> tuple[Work, dict[Plan, Cost], Plan | None, float, str]:
    """What is trained, all plans' costs, the best, the bytes that it may take and where."""
    from charforgex.training.job import choose_device
    from charforgex.training.planning import GIB, available_bytes, candidates, costs, fastest

    if "pretrain" in cfg or settings.motion is not None or "backend" in cfg:
        raise ConfigError("Plans are of a character's training here; leave pretrain, motion and backend out, or trainer.plan null.")
    device, trainer = choose_device(settings.trainer.accelerator), settings.trainer
    work = described(cfg, settings)
    memory = available_bytes(device) if trainer.memory is None else trainer.memory * GIB
    found = costs(work, candidates(trainer.quantize, trainer.gradient_checkpointing))
    return work, found, fastest(found, memory), memory, device


def described(cfg: DictConfig, settings: Settings) -> Work:
    """What is trained, by the settings, with square pictures of the largest size. Nothing is loaded but configs, of published bases our
    own copies of them. Raises ConfigError for what is not planned."""
    from charforgex.config import bind
    from charforgex.data.buckets import sides
    from charforgex.families import registry
    from charforgex.training.job import DTYPES
    from charforgex.training.losses import Objective
    from charforgex.training.planning import STATES, Work

    family = registry.get(cfg.family.name)
    if settings.text_encoder.learns:
        raise ConfigError("text_encoder.lr and text_encoder.tokens are not planned: encoders that learn are not counted; leave them out.")
    if settings.optimizer.name not in STATES:
        raise ConfigError(f"optimizer={settings.optimizer.name} is not planned; there are {', '.join(STATES)}.")
    base, configs = known(family, cfg.family.source, cfg.family.tokenizer)
    config = configs[family.denoiser_name]
    side = max(sides(cfg.data.resolution)) // family.pixel_multiple(base) * family.pixel_multiple(base) // family.latent_stride(base)
    targets = settings.lora.targets
    return Work(
        family, base, configs, DTYPES[cfg.family.dtype], cfg.data.batch_size, (side, side), family.text_size(base, config),
        family.lora_targets(targets, config) if isinstance(targets, str) else targets, settings.lora,
        bind(Objective, cfg.loss, "loss"), settings.optimizer.name, bool(settings.trainer.ema),
        draws=(min(settings.sampling.batch_size, len(settings.evaluation.prompts) * settings.evaluation.seeds), family.default_size(base)),
    )  # fmt: skip


def known(family: Any, source: str, tokenizer: str | None) -> tuple[Any, dict[str, Any]]:
    """A base's scheduler, facts and tokenizers as components, and the configs of its denoiser and VAE."""
    from charforgex.families.loading import TINY, Base, load_components

    names = [name for name in family.components["text"] if name.startswith("tokenizer")]
    variant = published(family, source)
    if variant is not None:
        return _from_own_configs(family, source, variant)
    parts = load_components(family, source, names, _float32(), tokenizer=tokenizer)
    if str(source) == TINY:
        tiny = family.tiny()
        return parts, {family.denoiser_name: dict(tiny.denoiser.config), "vae": dict(tiny["vae"].config)}
    base = Base(family, source, [])
    return parts, {name: base.config(name) for name in (family.denoiser_name, "vae")}


def published(family: Any, source: str) -> str | None:
    """Which variant of our own configs is a published base's, known by its hub id in conf/family; None for any other source."""
    from omegaconf import OmegaConf

    from charforgex.config import conf_folder
    from charforgex.families.sources import EMBEDDED

    choices = [path.stem for path in (conf_folder() / "family").glob("*.yaml") if OmegaConf.load(path).source == source != EMBEDDED]
    fitting = [variant for stem in choices for variant in family.variants if stem.endswith(variant)]
    return max(fitting, key=len, default=None)


def _from_own_configs(family: Any, source: str, variant: str) -> tuple[Any, dict[str, Any]]:
    import diffusers

    from charforgex.families.single_file import own_config
    from charforgex.types import Components

    configs = {name: own_config(family, name, variant) for name in (family.denoiser_name, "vae")}
    told = own_config(family, "scheduler", variant)
    scheduler = getattr(diffusers, told["_class_name"]).from_config(told)
    return Components(source, family.denoiser_name, {"scheduler": scheduler}, family.facts(configs)), configs


def _float32() -> Any:
    import torch

    return torch.float32


def show(console: Any, work: Work, found: dict[Plan, Cost], machine: Machine, memory: float, best: Plan | None, device: str) -> None:
    from rich import box
    from rich.table import Table

    from charforgex.training.planning import GIB

    stride = work.family.latent_stride(work.base)
    height, width = (side * stride for side in work.grid)
    dtype = str(work.dtype).removeprefix("torch.")
    title = (
        f"{work.family.name}, {width}x{height}, batch {work.batch_size}, rank {work.lora.rank}, {dtype}, {memory / GIB:.1f} GiB ({device})"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("quantize", "blocks\ntwice", "base", "kept and\npassing", "averages", "drawing", "memory", "seconds", ""):
        table.add_column(column, justify="left" if column in ("quantize", "blocks\ntwice", "") else "right", no_wrap=True)
    for plan, cost in found.items():
        parts = [f"{part / GIB:.2f}" for part in (cost.held, cost.step, cost.learning, cost.drawing, cost.memory)]
        note = "best" if plan == best else "fits" if cost.memory <= memory else "too large"
        twice = plan.gradient_checkpointing
        twice = str(twice) if not isinstance(twice, bool) else "all" if twice else "none"
        table.add_row(plan.quantize or "null", twice, *parts, f"{machine.seconds(cost):.3g}", note)
    console.print(table)
    console.print("GiB; memory is the larger of step and drawing with base and averages, 5 % and 0.6 GiB. Predicted, not measured.")
    if best is None:
        least = min(found.values(), key=lambda cost: cost.memory)
        console.print(
            f"[yellow]Nothing fits {memory / GIB:.1f} GiB; the least is {least.memory / GIB:.1f}. Lower data.resolution or "
            "data.batch_size, or leave trainer.quantize and trainer.gradient_checkpointing as they are by default."
        )
    else:
        console.print(f"\n{best.settings()}", highlight=False, soft_wrap=True)
