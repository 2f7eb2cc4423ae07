"""What LoRA files call the layers of Stable Diffusion 1.5, of which nothing else is known here, and of the motion modules in AnimateDiff.

What AnimateDiff publishes (Guo et al. 2023) has a name of its own for each module, in diffusers' old form of attention processors;
ComfyUI's nodes and the MotionDirector trainer (Zhao et al. 2023) have the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from charforgex.families import sgm
from charforgex.families.originals import CLIP_BESIDES, Original, Shapes, Spelling, clip, each
from charforgex.families.parts import adaptable
from charforgex.lora.names import Place

MOTION = re.compile(r"((?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+)\.(.+)")
INSIDE = {".attn1.": ".attention_blocks.0.", ".attn2.": ".attention_blocks.1.", ".norm1.": ".norms.0.", ".norm2.": ".norms.1."}
INSIDE |= {".norm3.": ".ff_norm.", ".pos_embed.": ".attention_blocks.0.pos_encoder."}

# ComfyUI-AnimateDiff-Evolved and sd-webui-animatediff read AnimateDiff's own names of motion modules and no others
MOTION_UNREAD = dict.fromkeys(("kohya", "comfyui"), ".motion_modules.")


class Sd15:
    name = "sd15"
    denoiser_name = "unet"
    kohya_has_our_names = True
    lora_unread: ClassVar[Mapping[str, str]] = {}
    pictures: ClassVar[str] = ""
    components: ClassVar = {
        "denoiser": {"unet": "diffusers.UNet2DConditionModel"},
        "text": {"tokenizer": "transformers.CLIPTokenizer", "text_encoder": "transformers.CLIPTextModel"},
    }
    original: ClassVar = {
        "unet": [Spelling(each(sgm.unet), ("model.diffusion_model.",))],
        "text_encoder": [Spelling(each(clip), ("cond_stage_model.transformer.", ""), CLIP_BESIDES)],
    }
    lora_labels: ClassVar = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "ss_base_model_version": "sd_v1",
    }

    @property
    def configs(self) -> Path:
        return Path(__file__).parent / "configs" / self.name

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        return original_names(self, denoiser_config)

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]:
        return {}


def original_names(family, denoiser_config: Mapping[str, Any]) -> dict[str, Place]:
    """Where each module of a UNet that can be adapted stands in the original network: what its tensors are called in single files."""
    shapes = {f"{path}.weight": shape for path, shape in adaptable(family, denoiser_config).items()}
    named = family.original["unet"][0].names(shapes, denoiser_config)
    return {key.removesuffix(".weight"): Place(original.key.removesuffix(".weight")) for key, original in named.items()}


def motion(shapes: Shapes, config: Mapping) -> dict[str, Original]:
    """A UNet with motion modules: they in AnimateDiff's names, the rest in the original's."""
    return {key: Original(motion_name(key)) if MOTION.match(key) else sgm.unet(key, config) for key in shapes}


def motion_name(ours: str) -> str:
    start, inside = MOTION.fullmatch(ours).groups()
    for mine, theirs in INSIDE.items():
        inside = inside.replace(mine, theirs)
    return f"{start}.temporal_transformer.{inside}"


class AnimateDiff(Sd15):
    name = "animatediff"
    pictures = "sd15"
    lora_unread: ClassVar = MOTION_UNREAD
    lora_labels: ClassVar = {  # none of Sd15's: a LoRA of that is no motion LoRA
        "modelspec.architecture": "animatediff/lora",
        "modelspec.implementation": "https://github.com/guoyww/AnimateDiff",
    }
    components: ClassVar = {**Sd15.components, "denoiser": {"unet": "diffusers.UNetMotionModel"}}
    original: ClassVar = {**Sd15.original, "unet": [Spelling(motion, ("model.diffusion_model.", ""))]}

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]:
        return motion_dialects(self.lora_names(denoiser_config))


def motion_dialects(names: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """`animatediff`: motion LoRAs. AnimateDiff's own adapt attention; its loader and ComfyUI-AnimateDiff-Evolved's take `processor.`
    and `_lora` out of any name, so that MotionDirector's have layers of the MLPs besides, as ours may."""
    return {"animatediff": {path: Place(_processor(place.path)) for path, place in names.items() if MOTION.match(path)}}


def _processor(path: str) -> str:
    """...attention_blocks.0.to_out.0 is ...attention_blocks.0.processor.to_out_lora, and ...ff.net.2 is ...ff.net.processor.2_lora."""
    head, _, last = path.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{last}_lora"
