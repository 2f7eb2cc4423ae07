"""`python train.py experiment=charworld_pretrain pretrain.family=<family> pretrain.stage=<stage>`: how the embedded models came to be.

Stages: vae, text (the text encoders, for SDXL with CLIP), judge, base (the denoiser), decoder (the VAE's, with its encoder frozen, so
that the base stays valid), guidance (Flux's base learns to take guidance as an input), faces (the detector), pose (the reader of
poses), flow (frames between frames), captioner (with the embedded CLIP's eye). Flux and SD3 share their VAE and T5, and have SDXL's CLIPs.
Each runs through the loop that trains LoRAs: resumable at any instant, logged, with its checkpoints. AnimateDiff has a base alone, made
from SDXL's embedded one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from charforgex import runs
from charforgex.binding import Range
from charforgex.charworld import models
from charforgex.charworld.assets import ROOT, SCHEDULERS
from charforgex.charworld.crowds import Cast
from charforgex.charworld.poses import Moments
from charforgex.config import bind
from charforgex.data.rendered import RenderedBank, RenderedClips
from charforgex.draws import python_rng
from charforgex.errors import ConfigError
from charforgex.families import registry
from charforgex.families.base import ALL, Family
from charforgex.families.loading import weights_hash
from charforgex.quiet import quiet
from charforgex.training import filming, report, stages
from charforgex.training.checkpoints import load_last_good
from charforgex.training.detecting import FacesModule
from charforgex.training.events import Events
from charforgex.training.interpolating import FlowModule, Moves
from charforgex.training.job import choose_device
from charforgex.training.logs import StepLog
from charforgex.training.loop import StepLoader, fit
from charforgex.training.losses import Objective
from charforgex.training.optimizers import build_optimizer, check_optimizer, schedule
from charforgex.training.posing import PoseModule
from charforgex.training.run import Clock, Settings
from charforgex.training.settings import Positive
from charforgex.types import Components

DENOISERS = {"sdxl": models.unet, "flux": models.flux, "sd3": models.sd3, "animatediff": models.motion_unet}
VARIANTS = 12  # pictures of each character in the judge's bank
# stages that train no part of a base: their folders
EMBEDDED = {"judge": "judge", "faces": "detector", "pose": "pose", "flow": "interpolator", "captioner": "captioner"}


def folders(stage: str, family: str) -> list[str]:
    """What a stage trains. Flux and SD3 share all but the transformer."""
    if stage in EMBEDDED:
        return [EMBEDDED[stage]]
    if family == "animatediff":
        return ["animatediff/unet", "animatediff/text_encoder"]  # the VAE and the tokenizer are SDXL's
    if stage in ("base", "guidance"):
        return [f"{family}/{registry.get(family).denoiser_name}"]
    if stage in ("vae", "decoder"):
        return ["sdxl/vae"] if family == "sdxl" else ["flux/vae", "sd3/vae"]
    if family == "sdxl":
        return ["sdxl/text_encoder", "sdxl/text_encoder_2", "sdxl/tokenizer", "sdxl/tokenizer_2", "clip"]
    return ["flux/text_encoder_2", "flux/tokenizer_2", "sd3/text_encoder_3", "sd3/tokenizer_3"]


@dataclass(frozen=True)
class PretrainSettings:
    stage: Literal["vae", "text", "judge", "base", "decoder", "guidance", "faces", "pose", "flow", "captioner"]
    family: Literal["sdxl", "flux", "sd3", "animatediff"] = "sdxl"
    out: Path | None = None
    start: str | None = None
    pictures: Positive = 60000
    clips: Positive = 6000
    clip_share: Annotated[float, Range(at_least=0, at_most=1)] = 0.75
    batch_size: Positive = 32


class Draws(Dataset):
    """Micro-batch number k of a bank, a function of (seed, k)."""

    def __init__(self, bank: RenderedBank, batch_size: int, make, seed: int, first: int, count: int):
        self.bank, self.batch_size, self.make, self.seed, self.first, self.count = bank, batch_size, make, seed, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int):
        if place >= self.count:
            raise IndexError(place)
        rng = python_rng(self.seed, "pretrain", self.first + place)
        return self.make(self.bank, rng.sample(range(len(self.bank)), self.batch_size), rng)


def run_pretraining(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool) -> dict[str, Any]:
    """Trains one stage. Returns result.json: the measures on pictures that were not trained on, and where the weights are."""
    with quiet(), Events(run_dir) as events:
        return _run(cfg, settings, run_dir, going_on, events)


def _run(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool, events: Events) -> dict[str, Any]:
    options = bind(PretrainSettings, cfg.pretrain, "pretrain")
    if options.family == "animatediff" and options.stage != "base" and options.stage not in EMBEDDED:
        raise ConfigError(f"pretrain.stage={options.stage}: of animatediff only the base is trained, the rest is SDXL's; say base.")
    check_optimizer(settings.optimizer.name, choose_device(settings.trainer.accelerator))
    console, clock = Console(), Clock(run_dir)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    cache = Path(cfg.cache_dir)
    with console.status("rendering pictures"):
        bank, unseen = make_banks(options, cache)
    start = ROOT if options.start == "embedded" else Path(options.start) if options.start else None
    module = build_module(options, start, cfg, settings, bank)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not going_on:
        runs.save_config(run_dir, cfg)
        runs.write_provenance(run_dir, seed=cfg.seed)
    events.begin(name=cfg.name, steps=settings.trainer.steps)
    if going_on:
        checkpoint, problems = load_last_good(run_dir / "checkpoints")
        for problem in problems:
            console.print(f"[yellow]{problem} Falling back to the one before.")
        if checkpoint is not None:
            module.restore(checkpoint)
        events.tell("resumed", module.step)
    log = StepLog(run_dir / "metrics.csv", module.step)
    measures: dict[str, float] = {}

    def measure(step: int) -> None:
        module.eval()
        with module.averaged():
            measures.update(module.measure(unseen) if hasattr(module, "measure") else {})
        module.train()
        module.tell(step, measures, {})
        console.print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in measures.items()), highlight=False)
        clock.save()

    count = sum(p.numel() for p in module.trainable.values())
    report.show(console, "Pre-training", [("stage", options.stage), ("parameters", f"{count / 1e6:.2f} M"), ("folder", str(run_dir))])
    stopped = fit(module, run_dir / "checkpoints", settings.trainer, [log], console, measure, settings.evaluation.every, set, events)
    clock.save()
    if stopped is not None:
        console.print(f"Stopped at step {module.step}; all is saved. The same command goes on from there.")
        raise SystemExit(runs.EXIT_INTERRUPTED if stopped == 2 else runs.EXIT_TERMINATED)
    out = options.out or run_dir / "weights"
    with module.averaged():
        save_stage(options, module, bank, out)
    pictures = module.step * options.batch_size * settings.trainer.accumulate
    full = runs.provenance(seed=cfg.seed)
    provenance = {
        "licence": "Apache-2.0",
        "made_by": "CharForgeX, on pictures drawn by CharForgeX",
        "command": f"python train.py experiment=charworld_pretrain pretrain.family={options.family} pretrain.stage={options.stage}",
        "started_from": beginning_of(options),
        "seed": cfg.seed,
        "steps": module.step,
        "pictures_seen": pictures,
        "seconds": round(clock.seconds()),
        "measures": measures,
    } | {name: full[name] for name in ("platform", "cpus", "versions")}
    for folder in folders(options.stage, options.family):
        earlier = start / folder / "provenance.json" if start else None
        if earlier is not None and earlier.is_file():
            provenance["before"] = json.loads(earlier.read_text(encoding="utf-8"))
        runs.write_json(out / folder / "provenance.json", provenance)
        shutil.copyfile(ROOT / "LICENSE", out / folder / "LICENSE")
    result = {
        "weights": str(out),
        "stage": options.stage,
        "steps": module.step,
        "measures": measures,
        "seconds": clock.seconds(),
        "value": 0.0,
    }
    runs.write_result(run_dir, result)
    console.print(f"Weights in {out}")
    return result


def beginning_of(options: PretrainSettings) -> str | None:
    """What the weights were before. Of a folder just its name: where it lies is nobody's business."""
    if options.start is None:
        return "sdxl's embedded base" if options.family == "animatediff" and options.stage == "base" else None
    return Path(options.start).name


def make_banks(options: PretrainSettings, cache: Path):
    """What a stage learns on, and what it is measured on."""
    if options.stage == "pose":
        return Moments(options.pictures, seed=1), Moments(800, seed=2, held_out=True)
    if options.stage == "flow":
        return Moves(options.pictures, seed=1), Moves(400, seed=2, held_out=True)
    if options.stage == "faces":
        return Cast(options.pictures, seed=1), Cast(400, seed=2, held_out=True)
    if options.family == "animatediff" and options.stage == "base":
        pictures, clips = RenderedBank(cache, options.pictures, seed=1), RenderedClips(cache, options.clips, seed=1)
        return filming.Films(pictures, clips, options.clip_share), None
    variants = VARIANTS if options.stage == "judge" else 1
    unseen = RenderedBank(cache, 2400, seed=2, variants=variants, held_out=options.stage in ("judge", "text", "captioner"))
    return RenderedBank(cache, options.pictures, seed=1, variants=variants), unseen


def build_module(options: PretrainSettings, start: Path | None, cfg: DictConfig, settings: Settings, bank: RenderedBank):
    """The stage's module, its networks fresh or as they are in `start`."""
    torch.manual_seed(cfg.seed)  # the initial weights
    o, t = settings.optimizer, settings.trainer

    def make_loader(first_step: int) -> StepLoader:
        first, count = first_step * t.accumulate, (t.steps - first_step) * t.accumulate
        draws = Draws(bank, options.batch_size, module.batch, cfg.seed, first, count)
        return StepLoader(DataLoader(draws, batch_size=None, collate_fn=lambda batch: batch), t.accumulate)

    common = {
        "make_optimizer": lambda trainable: build_optimizer(o, trainable),
        "learning_rate": schedule(o.schedule, t.steps, o.warmup), "seed": cfg.seed, "grad_clip": o.grad_clip, "ema_decay": t.ema,
        "make_loader": make_loader,
    }  # fmt: skip
    match options.stage:
        case "vae" | "decoder":
            if options.stage == "decoder" and start is None:
                raise ConfigError("pretrain.stage=decoder goes on from a VAE; set pretrain.start=embedded or a folder of weights.")
            fresh = models.vae(latent_channels=4 if options.family == "sdxl" else 16)
            vae = load_vae(start / folders("vae", options.family)[0]) if start else fresh
            module = stages.VaeModule(vae, decoder_only=options.stage == "decoder", **common)
        case "text":
            if start is not None:
                raise ConfigError("pretrain.stage=text starts from nothing: its heads are not kept; leave pretrain.start=null.")
            module = (stages.TextModule if options.family == "sdxl" else stages.T5Module)(**common)
        case "judge":
            module = stages.JudgeModule(**common)
            if start is not None:
                from charforgex.charworld.assets import load_judge

                module.network.load_state_dict(load_judge(start).state_dict())
        case "captioner":
            from charforgex.training.captioning import CaptionModule

            module = CaptionModule(start, **common)
        case "pose":
            module = PoseModule(**common)
            if start is not None:
                from charforgex.charworld.assets import load_pose_reader

                module.network.load_state_dict(load_pose_reader(start).state_dict())
        case "faces":
            module = FacesModule(**common)
            if start is not None:
                from charforgex.charworld.assets import load_detector

                module.network.load_state_dict(load_detector(start).state_dict())
        case "flow":
            if options.start == "embedded":
                raise ConfigError(
                    "pretrain.stage=flow: no such network is embedded; leave pretrain.start=null, or name a folder of weights."
                )
            module = FlowModule(**common)
            if start is not None:
                from charforgex.generation.ifnet import load

                module.network.load_state_dict(load(start / "interpolator/model.safetensors").state_dict())
        case "base" if options.family == "animatediff":
            family, home = registry.get(options.family), start or Path(cfg.cache_dir) / "motion_start"
            if start is None:
                filming.write_start(home / family.name)
                write_index(home / family.name)
            parts = family.load(str(home / family.name))
            kept = partial(kept_latents, cfg, family, parts, home)
            latents = {"pictures": kept(bank.pictures, filming.frames_of), "clips": kept(bank.clips, filming.clips_of, batch_size=30)}
            module = filming.FilmModule(family, parts, latents, objective=bind(Objective, cfg.loss, "loss"), **common)
        case "base" | "guidance":
            if options.stage == "guidance" and (start is None or options.family != "flux"):
                raise ConfigError(
                    "pretrain.stage=guidance goes on from a base of Flux; set pretrain.family=flux and pretrain.start=embedded or a folder."
                )
            family = registry.get(options.family)
            parts = base_parts(family, start or ROOT, fresh=start is None)
            latents = kept_latents(cfg, family, parts, start or ROOT, bank, stages.pixels_of)
            kind = stages.BaseModule if options.stage == "base" else stages.GuidanceModule
            module = kind(family, parts, latents, objective=bind(Objective, cfg.loss, "loss"), **common)
    return module


def kept_latents(
    cfg: DictConfig, family: Family, parts: Components, home: Path, bank, pixels: Callable, batch_size: int = 250
) -> np.ndarray:
    """`stages.encode_bank`, kept in cache_dir under the VAE's and the bank's names."""
    vae = weights_hash(family, str(home / family.name), "vae")
    path = Path(cfg.cache_dir) / f"latents_{bank.name}_{vae[:16]}.npy"
    return stages.encode_bank(family, parts, bank, path, pixels, batch_size)


def load_vae(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)


def base_parts(family: Family, root: Path, fresh: bool) -> Components:
    """The base in `root`, float32, with its denoiser's weights drawn anew if `fresh`."""
    parts = family.load(str(root / family.name), only=("vae", "text") if fresh else ALL)
    if fresh:
        parts.modules[family.denoiser_name] = DENOISERS[family.name]()
    parts.denoiser.requires_grad_(True)
    return parts


def save_stage(options: PretrainSettings, module, bank: RenderedBank, out: Path) -> None:
    """The trained networks as fp16 diffusers and transformers folders under `out`, as the package has them."""
    out.mkdir(parents=True, exist_ok=True)
    match options.stage:
        case "vae" | "decoder":
            if options.stage == "vae":
                mean, std = module.latent_statistics(bank)
                shift = {} if options.family == "sdxl" else {"shift_factor": round(mean, 5)}
                module.network.register_to_config(scaling_factor=round(1 / std, 5), **shift)
            for folder in folders(options.stage, options.family):
                _save(module.network, out / folder)
        case "base" if options.family == "animatediff":
            home = out / options.family
            for name in ("unet", "text_encoder"):
                _save(module.base[name], home / name)
            for name in ("vae", "tokenizer"):
                shutil.copytree(Path(module.base.source) / name, home / name, dirs_exist_ok=True)
            write_index(home)
        case "base" | "guidance":
            _save(module.denoiser, out / folders("base", options.family)[0])
            write_index(out / options.family)
        case "judge" | "faces" | "pose" | "flow":
            folder = out / EMBEDDED[options.stage]
            folder.mkdir(parents=True, exist_ok=True)
            weights = {n: t.half().contiguous() for n, t in module.network.state_dict().items() if t.is_floating_point()}
            save_file(weights, folder / "model.safetensors")
        case "text" | "captioner":
            module.network.save(out, _save)


def _save(network: nn.Module, folder: Path) -> None:
    """A float16 copy; the network itself stays as it is."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    runs.write_json(folder / "config.json", config)
    network.float().load_state_dict(state)


def write_index(folder: Path) -> None:
    """model_index.json, the scheduler and the denoiser's config of the embedded base of that name."""
    family = registry.get(folder.name)
    addresses = {name: address for group in family.components.values() for name, address in group.items()}
    scheduler = SCHEDULERS[family.name]
    addresses["scheduler"] = f"diffusers.{scheduler['_class_name']}"
    index = {"_class_name": family.pipelines[0]} | ({"force_zeros_for_empty_prompt": True} if family.name == "sdxl" else {})
    runs.write_json(folder / "model_index.json", index | {name: address.split(".") for name, address in addresses.items()})
    runs.write_json(folder / "scheduler/scheduler_config.json", scheduler)
    with torch.device("meta"):
        DENOISERS[family.name]().save_config(folder / family.denoiser_name)
