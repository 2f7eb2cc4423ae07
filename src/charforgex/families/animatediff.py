"""AnimateDiff: Stable Diffusion 1.5 with motion modules. Guo et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from charforgex.families import motion_base, spelled
from charforgex.families.clips import Clips
from charforgex.families.parts import read_config
from charforgex.families.text import seen, token_ids
from charforgex.types import Components, Text


class AnimateDiff(spelled.AnimateDiff, Clips):
    halves = (motion_base.Pictures, motion_base.Motion)
    components: ClassVar = {
        **spelled.AnimateDiff.components,
        "vae": {"vae": "diffusers.AutoencoderKL"},
    }
    pipelines = ("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline")

    @torch.no_grad()
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        return self.encode_live(parts, captions)

    def encode_live(self, parts: Components, captions: Sequence[str], cached: Text | None = None) -> Text:
        encoder = parts["text_encoder"]
        return Text(encoder(token_ids(parts["tokenizer"], captions).to(encoder.device))[0])

    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        return [seen(parts["tokenizer"], caption)]

    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        return "animatediff_v3"

    def tiny(self, seed: int = 0) -> Components:
        from diffusers import AutoencoderKL, DDIMScheduler, UNetMotionModel
        from transformers import CLIPTextModel

        from charforgex.families.loading import finish
        from charforgex.families.tiny import clip_text_config, clip_tokenizer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                "unet": UNetMotionModel(
                    sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=32,
                    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2, motion_num_attention_heads=2,
                    motion_max_seq_length=8, use_motion_mid_block=True,
                ),
                "vae": AutoencoderKL(
                    block_out_channels=(4, 4, 4, 4), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                    layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=64, scaling_factor=0.18215,
                ),
                "text_encoder": CLIPTextModel(clip_text_config()),
            }  # fmt: skip
        modules["tokenizer"] = clip_tokenizer()
        modules["scheduler"] = DDIMScheduler.from_config(read_config(self.configs, "scheduler"))
        facts = self.facts({name: modules[name].config for name in ("unet", "vae")})
        return finish(Components("tiny", self.denoiser_name, modules, facts))
