"""Base models of random weights in the real layouts, whole on disk for whole jobs, or a denoiser alone where it is to be used.

Every config is the published one that the package carries, narrower and shallower as a `Scale` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from charforgex.families.base import Family


@dataclass(frozen=True)
class Scale:
    """Models of one size, and what is measured on them unless the command line says otherwise: pixels, steps a round, rounds."""

    name: str
    models: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)  # family -> text widths divided by, denoiser's changes
    vae_by: int = 1
    t5_layers: int = 24
    resolution: int = 256
    picture: int = 1024
    steps: int = 10
    rounds: int = 5


def _sdxl(by: int, depth: list[int]) -> tuple[int, dict[str, Any]]:
    return by, {
        "block_out_channels": [320 // by, 640 // by, 1280 // by], "cross_attention_dim": 2048 // by, "norm_num_groups": 4,
        "addition_time_embed_dim": 256 // by, "projection_class_embeddings_input_dim": 2816 // by, "transformer_layers_per_block": depth,
    }  # fmt: skip


def _flux(double: int, single: int, heads: int, axes: list[int]) -> tuple[int, dict[str, Any]]:
    return 16, {
        "num_layers": double, "num_single_layers": single, "num_attention_heads": heads, "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
    }  # fmt: skip


def _sd3(layers: int, heads: int, width: int) -> tuple[int, dict[str, Any]]:
    return 16, {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width, "caption_projection_dim": heads * width,
    }  # fmt: skip


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "quick", {"sdxl": _sdxl(16, [1, 1, 2]), "flux": _flux(1, 1, 2, [8, 12, 12]), "sd3": _sd3(2, 2, 32)}, vae_by=4, t5_layers=1,
            resolution=64, picture=128, steps=6, rounds=2,
        ),
        Scale("mini", {"sdxl": _sdxl(4, [1, 1, 1]), "flux": _flux(2, 4, 4, [8, 28, 28]), "sd3": _sd3(4, 4, 64)}, vae_by=4, t5_layers=4),
        Scale("deep", {"sdxl": _sdxl(8, [1, 2, 10]), "flux": _flux(19, 38, 2, [8, 28, 28]), "sd3": _sd3(38, 2, 64)}, vae_by=4, t5_layers=4),
        Scale("real", resolution=1024, steps=12, rounds=1),
    )
}  # fmt: skip
REAL = {"sdxl": "unet", "flux": "dev/transformer", "sd3": "35_large/transformer"}  # which published one is the real one
T5_TOKENS = {"flux": 512, "sd3": 256}


def denoiser_config(family: Family, scale: Scale) -> dict[str, Any]:
    from charforgex.families.sources import read_json

    text_by, changes = scale.models.get(family.name, (1, {}))
    config = dict(read_json(family.configs / REAL[family.name] / "config.json"))
    narrow = {key: config[key] // text_by for key in ("joint_attention_dim", "pooled_projection_dim") if config.get(key)}
    return config | narrow | changes


def build_denoiser(family: Family, scale: Scale, dtype, device: str) -> nn.Module:
    """The denoiser with random weights, made on the device in its dtype: no copy of it is ever anywhere else."""
    import torch

    from charforgex.families.parts import build

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return build(family, family.denoiser_name, denoiser_config(family, scale)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _narrowed(name: str, config: dict[str, Any], scale: Scale, text_by: int, vocabulary: int) -> dict[str, Any]:
    """A VAE's or text encoder's own config, smaller; the vocabulary is that of tokenizers that need no download."""
    if name == "vae":
        return config | {"block_out_channels": [width // scale.vae_by for width in config["block_out_channels"]]}
    keys = ("d_model", "d_ff", "num_heads") if "d_model" in config else ("hidden_size", "intermediate_size", "projection_dim")
    narrow = {key: config[key] // text_by for key in keys} | {"vocab_size": vocabulary}
    return config | narrow | ({"num_layers": scale.t5_layers} if "d_model" in config else {})


def save_base(family: Family, scale: Scale, dtype, device: str, folder: Path) -> None:
    """A whole random base model as an ordinary diffusers folder."""
    import diffusers
    import torch

    from charforgex.families.parts import build
    from charforgex.families.sources import read_json
    from charforgex.families.tiny import clip_tokenizer, t5_tokenizer
    from charforgex.types import Components

    modules = {family.denoiser_name: build_denoiser(family, scale, dtype, device)}
    for name, address in family.components["text"].items():
        if name.startswith("tokenizer"):
            padding = "<|endoftext|>" if name == "tokenizer" else "!"
            modules[name] = t5_tokenizer(T5_TOKENS[family.name]) if "T5" in address else clip_tokenizer(padding)
    for name in ("vae", *(name for name in family.components["text"] if name.startswith("text_encoder"))):
        vocabulary = len(modules[name.replace("text_encoder", "tokenizer")]) if name != "vae" else 0
        config = _narrowed(name, dict(read_json(family.configs / name / "config.json")), scale, scale.models[family.name][0], vocabulary)
        with torch.device(device):
            modules[name] = build(family, name, config).to(dtype)
    place = next(path for path in (family.configs / "scheduler", family.configs / "dev" / "scheduler") if path.exists())
    scheduler = read_json(place / "scheduler_config.json")
    modules["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    facts = family.facts({name: modules[name].config for name in (family.denoiser_name, "vae")})
    family.pipeline(Components("random", family.denoiser_name, modules, facts)).save_pretrained(folder)
