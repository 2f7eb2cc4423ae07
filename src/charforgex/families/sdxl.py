"""SDXL: a UNet with two CLIP text encoders and size conditioning. Podell et al. 2023."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from charforgex.errors import ConfigError
from charforgex.families import sgm
from charforgex.families.base import Family
from charforgex.families.originals import CLIP_BESIDES, Spelling, clip, each
from charforgex.families.parts import adaptable, unet_facts
from charforgex.families.process import Ddpm
from charforgex.families.text import CLIP_TOKENS, clip_states, seen, token_ids
from charforgex.lora.names import Place
from charforgex.types import Components, Crop, Text

TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "attention_mlp": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
}
TARGETS["all"] = [*TARGETS["attention_mlp"], "conv1", "conv2", "conv_shortcut", "time_emb_proj"]


class Sdxl(Family):
    name = "sdxl"
    denoiser_name = "unet"
    components: ClassVar = {
        "denoiser": {"unet": "diffusers.UNet2DConditionModel"},
        "vae": {"vae": "diffusers.AutoencoderKL"},
        "text": {
            "tokenizer": "transformers.CLIPTokenizer",
            "tokenizer_2": "transformers.CLIPTokenizer",
            "text_encoder": "transformers.CLIPTextModel",
            "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        },
    }
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    original: ClassVar = {
        "unet": [Spelling(each(sgm.unet), ("model.diffusion_model.",))],
        "vae": sgm.vae_spellings("first_stage_model."),
        "text_encoder": [Spelling(each(clip), ("conditioner.embedders.0.transformer.", ""), CLIP_BESIDES)],
        "text_encoder_2": [Spelling(each(sgm.clip_g), ("conditioner.embedders.1.model.",)), Spelling(each(clip), ("",))],
    }
    reads_text = ("attn2.to_k", "attn2.to_v")
    lora_labels: ClassVar = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "ss_base_model_version": "sdxl_base_v1-0",
    }

    def stand_in(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """The first encoder gives its penultimate states alone; some checkpoints leave its last layer out."""
        unused = component == "text_encoder" and re.search(r"(^|\.)(encoder\.layers\.11|final_layer_norm)\.", key)
        return torch.zeros(shape) if unused else None

    def facts(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return unet_facts(configs)

    def process(self, parts: Components) -> Ddpm:
        return Ddpm.from_config(parts["scheduler"].config)

    @torch.no_grad()
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        return self.encode_live(parts, captions)

    def num_learning_layers(self, component: str, depth: int) -> int:
        return depth - 1 if component == "text_encoder" else depth  # its last states are not read

    def encode_live(self, parts: Components, captions: Sequence[str], cached: Text | None = None) -> Text:
        one, _ = clip_states(parts["text_encoder"], token_ids(parts["tokenizer"], captions))
        two, pooled = clip_states(parts["text_encoder_2"], token_ids(parts["tokenizer_2"], captions))
        tokens = torch.cat([one, two], dim=-1)
        if parts.config.get("force_zeros_for_empty_prompt", True):
            unsaid = torch.tensor([not caption.strip() for caption in captions], device=tokens.device)
            tokens, pooled = tokens.masked_fill(unsaid[:, None, None], 0), pooled.masked_fill(unsaid[:, None], 0)
        return Text(tokens, pooled)

    def text_size(self, parts: Components, denoiser_config: Mapping[str, Any]) -> tuple[int, int, int]:
        length = parts["tokenizer"].model_max_length if "tokenizer" in parts else CLIP_TOKENS
        pooled = denoiser_config["projection_class_embeddings_input_dim"] - 6 * denoiser_config["addition_time_embed_dim"]
        return length, denoiser_config["cross_attention_dim"], pooled

    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        return [seen(parts[name], caption) for name in ("tokenizer", "tokenizer_2")]

    @torch.no_grad()
    def encode_pixels(self, parts: Components, pixels_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        vae = parts["vae"]
        posterior = vae.encode(pixels_BPHW.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode_latents(self, parts: Components, latents_BChw: Tensor) -> Tensor:
        vae = parts["vae"]
        latents = latents_BChw.to(vae.device, vae.dtype) / vae.config.scaling_factor
        return vae.decode(latents).sample.float().clamp(-1, 1)

    def blocks(self, denoiser) -> list[torch.nn.Module]:
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]

    def denoise(self, denoiser, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        index = (t_B.float() * 999).round().long()
        conditions = size_conditions(text.pooled_BD, crop, noisy)
        tokens = text.tokens_BLD.to(noisy.dtype)
        return denoiser(noisy, index, encoder_hidden_states=tokens, added_cond_kwargs=conditions, return_dict=False)[0]

    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        return "sdxl_base"

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        paths = adaptable(self, denoiser_config)
        original = {path: sgm.unet(f"{path}.weight", denoiser_config).key for path in paths}
        return {path: Place(key.removesuffix(".weight")) for path, key in original.items()}

    def lora_targets(self, preset: str, denoiser_config: Mapping[str, Any]) -> list[str]:
        if preset not in TARGETS:
            raise ConfigError(f"lora.targets={preset} is unknown for sdxl; choose one of {', '.join(TARGETS)}.")
        return TARGETS[preset]

    def pipeline_settings(self, parts: Components) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": parts.config.get("force_zeros_for_empty_prompt", True), "add_watermarker": False}

    def tiny(self, seed: int = 0) -> Components:
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        from charforgex.families.loading import finish
        from charforgex.families.tiny import clip_text_config, clip_tokenizer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                "unet": UNet2DConditionModel(
                    sample_size=8, block_out_channels=(4, 8), layers_per_block=2, norm_num_groups=2,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=64,
                    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
                ),
                "vae": AutoencoderKL(
                    block_out_channels=(4, 4, 4, 4), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                    layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=64, scaling_factor=0.13025,
                ),
                "text_encoder": CLIPTextModel(clip_text_config()),
                "text_encoder_2": CLIPTextModelWithProjection(clip_text_config()),
            }  # fmt: skip
        modules["tokenizer"], modules["tokenizer_2"] = clip_tokenizer(), clip_tokenizer("!")
        modules["scheduler"] = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
        )
        facts = self.facts({name: modules[name].config for name in ("unet", "vae")})
        return finish(Components("tiny", self.denoiser_name, modules, {"force_zeros_for_empty_prompt": True} | facts))


def size_conditions(pooled_BD: Tensor, crop: Crop, noisy: Tensor) -> dict[str, Tensor]:
    """What SDXL's network is told besides the text's tokens, under diffusers' names: the pooled text, and sizes in pixels."""
    # in float32 whatever the network's dtype: bfloat16 cannot tell 1023 pixels from 1024
    time_ids = torch.cat([crop.original_B2, crop.top_left_B2, crop.target_B2], dim=1).to(noisy.device, torch.float32)
    return {"text_embeds": pooled_BD.to(noisy.dtype), "time_ids": time_ids}
