"""Run folders as training leaves them, on the tiny base, without any training."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from charforgex.charworld.demo import write_character
from charforgex.config import compose
from charforgex.families.sdxl import Sdxl
from charforgex.lora.checkpoints import folder_name
from charforgex.lora.inject import adapter_parameters, inject, read_adapters
from charforgex.lora.metadata import build
from charforgex.lora.writing import write
from charforgex.runs import save_config, write_json
from charforgex.training.checkpoints import SafeCheckpointIO

FAMILY, TRIGGER = Sdxl(), "zqx woman"
TINY = {"width": 32, "height": 32, "steps": 2, "cache_dir": "cache"}  # how pictures are drawn in tests


def write_run(folder: Path, *overrides: str, steps=(2, 4), best=4, pictures=8, seed=0) -> Path:
    """A finished run whose checkpoints have random adapters, and its moving averages others; the best one's is the run's LoRA."""
    source = folder.parent / f"{folder.name} pictures"
    write_character(source, 0, pictures)
    told = [f"data.source='{source}'", f"data.trigger='{TRIGGER}'", "data.val_count=3", f"name={folder.name}"]
    cfg = compose("train", ["debug=tiny", *told, *overrides])
    save_config(folder, cfg)
    for step in (0, *steps):
        write_checkpoint(folder, OmegaConf.to_container(cfg.lora, resolve=True), step, seed, best)
    write_json(folder / "result.json", {"lora": f"elsewhere/{folder.name}.safetensors", "best_step": best, "trigger": TRIGGER})
    return folder


def write_checkpoint(folder: Path, settings, step: int, seed: int, best: int) -> None:
    parts, draw = FAMILY.tiny(), torch.Generator().manual_seed(1000 * seed + step)
    how = {name: settings[name] for name in ("kind", "init", "rslora", "factor", "ranks", "alphas")}
    inject(parts.denoiser, ["to_q", "ff.net.2"], settings["rank"], settings["alpha"], **how)
    live = adapter_parameters(parts.denoiser)
    raw = {name: p.detach() + torch.randn(p.shape, generator=draw) for name, p in live.items()}
    tensors = {f"weights/{name}": value for name, value in raw.items()} | {f"ema/{name}": value * 0.5 for name, value in raw.items()}
    SafeCheckpointIO().save_checkpoint({"tensors": tensors, "step": step}, folder / "checkpoints" / folder_name(step))
    if step == best:
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(raw[name] * 0.5)
        lora = read_adapters({FAMILY.denoiser_name: parts.denoiser})
        metadata = build(lora, FAMILY, title=folder.name, base="tiny", trigger=TRIGGER)
        write(lora, folder / f"{folder.name}.safetensors", "kohya", FAMILY, parts.denoiser.config, metadata=metadata)
