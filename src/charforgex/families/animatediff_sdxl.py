"""AnimateDiff for SDXL: its UNet, both text encoders and size conditioning, with motion modules between the layers. Guo et al. 2023.

The published modules are a beta. Their noise schedule is that of AnimateDiff's own code for SDXL: scaled linear betas up to 0.020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from charforgex.families import motion_base, spelled
from charforgex.families.clips import Clips
from charforgex.families.originals import Spelling
from charforgex.families.parts import read_config
from charforgex.families.sdxl import Sdxl, size_conditions
from charforgex.lora.names import Place
from charforgex.types import Components, Crop, Text


class AnimateDiffSdxl(Clips, Sdxl):
    name = "animatediff_sdxl"
    pictures = "sdxl"
    halves = (Sdxl, motion_base.SdxlMotion)
    components: ClassVar = {**Sdxl.components, "denoiser": {"unet": "diffusers.UNetMotionModel"}}
    pipelines = ("AnimateDiffSDXLPipeline",)
    original: ClassVar = {**Sdxl.original, "unet": [Spelling(spelled.motion, ("model.diffusion_model.", ""))]}
    lora_unread: ClassVar = spelled.MOTION_UNREAD
    lora_labels: ClassVar = {  # none of Sdxl's: a LoRA of that is no motion LoRA
        "modelspec.architecture": "animatediff-sdxl/lora",
        "modelspec.implementation": "https://github.com/guoyww/AnimateDiff",
    }

    def conditions(self, text: Text, crop: Crop, noisy: Tensor) -> dict[str, Tensor]:
        """As of pictures, once a clip: the network has no place for one of each frame. Where frames have texts of their own, the pooled
        vector is the mean of theirs."""
        if len(text) == len(noisy):
            return size_conditions(text.pooled_BD, crop, noisy)
        pooled_BTD = text.pooled_BD.unflatten(0, (len(noisy), -1))
        first = pooled_BTD[:, :1]
        return size_conditions((first + (pooled_BTD - first).mean(1, keepdim=True))[:, 0], crop, noisy)  # of one text exactly that text's

    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        return "animatediff_sdxl"

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        return spelled.original_names(self, denoiser_config)

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]:
        return spelled.motion_dialects(self.lora_names(denoiser_config))

    def pipeline_settings(self, parts: Components) -> dict[str, Any]:
        said = super().pipeline_settings(parts)
        return said | {"force_zeros_for_empty_prompt": parts.config.get("force_zeros_for_empty_prompt", True)}

    def tiny(self, seed: int = 0) -> Components:
        from diffusers import EulerDiscreteScheduler, UNetMotionModel

        parts = Sdxl().tiny(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts.modules["unet"] = UNetMotionModel(
                sample_size=8, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=64,
                down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
                up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"), num_attention_heads=(1, 2, 4),
                transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, motion_num_attention_heads=2,
                motion_max_seq_length=8, use_motion_mid_block=False, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            ).eval().requires_grad_(False)  # fmt: skip
        parts.modules["scheduler"] = EulerDiscreteScheduler.from_config(read_config(self.configs, "scheduler"))
        parts.config |= self.facts({name: parts[name].config for name in ("unet", "vae")})
        return parts
