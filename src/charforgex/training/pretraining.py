"""`python train.py experiment=charworld_pretrain pretrain.stage=<stage>`: how the embedded models came to be, and go on.

Stages: vae, text (CLIP and both text encoders), judge, base (the denoiser), decoder (the VAE's, with its encoder frozen, so that
the base stays valid). Each runs through the loop that trains LoRAs: resumable at any instant, logged, with its checkpoints.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from charforgex import runs
from charforgex.charworld import models
from charforgex.charworld.assets import ROOT, SCHEDULER
from charforgex.config import bind
from charforgex.data.rendered import RenderedBank
from charforgex.draws import python_rng
from charforgex.errors import ConfigError
from charforgex.families import registry
from charforgex.families.loading import quiet, weights_hash
from charforgex.training import report, stages
from charforgex.training.checkpoints import load_last_good
from charforgex.training.logs import StepLog
from charforgex.training.loop import StepLoader, fit
from charforgex.training.losses import Objective
from charforgex.training.optimizers import build_optimizer, schedule
from charforgex.training.run import Clock, Settings
from charforgex.training.settings import Positive
from charforgex.types import Components

STAGES = ("vae", "text", "judge", "base", "decoder")
VARIANTS = 12  # pictures of each character in the judge's bank
FOLDERS = {"vae": ("sdxl/vae",), "decoder": ("sdxl/vae",), "judge": ("judge",), "base": ("sdxl/unet",)}
FOLDERS["text"] = ("sdxl/text_encoder", "sdxl/text_encoder_2", "sdxl/tokenizer", "sdxl/tokenizer_2", "clip")


@dataclass(frozen=True)
class PretrainSettings:
    stage: Literal["vae", "text", "judge", "base", "decoder"]
    out: Path | None = None
    start: str | None = None
    pictures: Positive = 60000
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
    with quiet():
        return _run(cfg, settings, run_dir, going_on)


def _run(cfg: DictConfig, settings: Settings, run_dir: Path, going_on: bool) -> dict[str, Any]:
    options = bind(PretrainSettings, cfg.pretrain, "pretrain")
    console, clock = Console(), Clock(run_dir)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    cache = Path(cfg.cache_dir)
    variants = VARIANTS if options.stage == "judge" else 1
    with console.status("rendering pictures"):
        bank = RenderedBank(cache, options.pictures, seed=1, variants=variants)
        unseen = RenderedBank(cache, 2400, seed=2, variants=variants, held_out=options.stage == "judge")
    start = ROOT if options.start == "embedded" else Path(options.start) if options.start else None
    module = build_module(options, start, cfg, settings, bank)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not going_on:
        runs.save_config(run_dir, cfg)
        runs.write_provenance(run_dir, seed=cfg.seed)
    else:
        checkpoint, problems = load_last_good(run_dir / "checkpoints")
        for problem in problems:
            console.print(f"[yellow]{problem} Falling back to the one before.")
        if checkpoint is not None:
            module.restore(checkpoint)
    log = StepLog(run_dir / "metrics.csv", module.step)
    measures: dict[str, float] = {}

    def measure(step: int) -> None:
        module.eval()
        with module.averaged():
            measures.update(module.measure(unseen) if hasattr(module, "measure") else {})
        module.train()
        log.log_metrics(measures, step=step)
        console.print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in measures.items()), highlight=False)
        clock.save()

    count = sum(p.numel() for p in module.trainable.values())
    report.show(console, "Pre-training", [("stage", options.stage), ("parameters", f"{count / 1e6:.2f} M"), ("folder", str(run_dir))])
    stopped = fit(module, run_dir / "checkpoints", settings.trainer, [log], console, measure, settings.evaluation.every, set)
    clock.save()
    if stopped is not None:
        console.print(f"Stopped at step {module.step}; all is saved. The same command goes on from there.")
        raise SystemExit(runs.EXIT_INTERRUPTED if stopped == 2 else runs.EXIT_TERMINATED)
    out = options.out or run_dir / "weights"
    with module.averaged():
        save_stage(options.stage, module, bank, out)
    pictures = module.step * options.batch_size * settings.trainer.accumulate
    full = runs.provenance(seed=cfg.seed)
    provenance = {
        "licence": "Apache-2.0",
        "made_by": "CharForgeX, on pictures drawn by CharForgeX",
        "command": f"python train.py experiment=charworld_pretrain pretrain.stage={options.stage}",
        "started_from": options.start,
        "seed": cfg.seed,
        "steps": module.step,
        "pictures_seen": pictures,
        "seconds": round(clock.seconds()),
        "measures": measures,
    } | {name: full[name] for name in ("platform", "cpus", "versions")}
    for folder in FOLDERS[options.stage]:
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


def build_module(options: PretrainSettings, start: Path | None, cfg: DictConfig, settings: Settings, bank: RenderedBank):
    """The stage's module, its networks fresh or as they are in `start`."""
    torch.manual_seed(cfg.seed)  # the initial weights
    o, t = settings.optimizer, settings.trainer

    def make_loader(first_step: int, rank: int, world: int) -> StepLoader:
        first, count = first_step * t.accumulate * world, (t.steps - first_step) * t.accumulate
        draws = Draws(bank, options.batch_size, module.batch, cfg.seed + rank, first, count)
        return StepLoader(DataLoader(draws, batch_size=None, collate_fn=lambda batch: batch), t.accumulate)

    common = {
        "make_optimizer": lambda parameters: build_optimizer(o.name, parameters, o.lr, o.weight_decay),
        "learning_rate": schedule(o.schedule, t.steps, o.warmup), "seed": cfg.seed, "grad_clip": o.grad_clip, "ema_decay": t.ema,
        "make_loader": make_loader,
    }  # fmt: skip
    match options.stage:
        case "vae" | "decoder":
            if options.stage == "decoder" and start is None:
                raise ConfigError("pretrain.stage=decoder goes on from a VAE; set pretrain.start=embedded or a folder of weights.")
            module = stages.VaeModule(load_vae(start) if start else None, decoder_only=options.stage == "decoder", **common)
        case "text":
            if start is not None:
                raise ConfigError("pretrain.stage=text starts from nothing: its heads are not kept; leave pretrain.start=null.")
            module = stages.TextModule(**common)
        case "judge":
            module = stages.JudgeModule(**common)
            if start is not None:
                from charforgex.charworld.assets import load_judge

                module.network.load_state_dict(load_judge(start).state_dict())
        case "base":
            parts = base_parts(start or ROOT, fresh=start is None)
            family = registry.get("sdxl")
            vae = weights_hash(family, str((start or ROOT) / "sdxl"), "vae")
            path = Path(cfg.cache_dir) / f"latents_{bank.name}_{vae[:16]}.npy"
            latents = stages.encode_bank(family, parts, bank, path)
            module = stages.BaseModule(family, parts, latents, objective=bind(Objective, cfg.loss, "loss"), **common)
    return module


def load_vae(root: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(root / "sdxl/vae", torch_dtype=torch.float32, use_safetensors=True)


def base_parts(root: Path, fresh: bool) -> Components:
    """The base in `root`, float32, with its denoiser's weights drawn anew if `fresh`."""
    parts = registry.get("sdxl").load(str(root / "sdxl"))
    if fresh:
        parts.modules["unet"] = models.unet()
    parts.denoiser.requires_grad_(True)
    return parts


def save_stage(stage: str, module, bank: RenderedBank, out: Path) -> None:
    """The trained networks as fp16 diffusers and transformers folders under `out`, as the package has them."""
    out.mkdir(parents=True, exist_ok=True)
    match stage:
        case "vae" | "decoder":
            if stage == "vae":
                module.network.register_to_config(scaling_factor=round(1 / module.latent_std(bank), 5))
            _save(module.network, out / "sdxl/vae")
        case "base":
            _save(module.denoiser, out / "sdxl/unet")
            write_index(out / "sdxl")
        case "judge":
            folder = out / "judge"
            folder.mkdir(parents=True, exist_ok=True)
            weights = {n: t.half().contiguous() for n, t in module.network.state_dict().items() if t.is_floating_point()}
            save_file(weights, folder / "model.safetensors")
        case "text":
            from transformers import CLIPTextModelWithProjection

            clip, tokens = module.network.clip, module.network.tokens
            two = CLIPTextModelWithProjection(clip.config.text_config)
            two.load_state_dict({name: t for name, t in clip.state_dict().items() if name.startswith("text_")})
            for network, folder in ((module.network.text_encoder, "sdxl/text_encoder"), (two, "sdxl/text_encoder_2"), (clip, "clip")):
                _save(network, out / folder)
            for folder in ("sdxl/tokenizer", "sdxl/tokenizer_2", "clip"):
                tokens.save_pretrained(out / folder)


def _save(network: nn.Module, folder: Path) -> None:
    """A float16 copy; the network itself stays as it is."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    runs.write_json(folder / "config.json", config)
    network.float().load_state_dict(state)


def write_index(folder: Path) -> None:
    """model_index.json and the scheduler of the embedded base: v-prediction with zero terminal SNR, trailing DDIM."""
    library = {"unet": "diffusers", "vae": "diffusers", "scheduler": "diffusers"}
    classes = {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler", "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer",
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    runs.write_json(folder / "model_index.json", index | {name: [library.get(name, "transformers"), cls] for name, cls in classes.items()})
    runs.write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
