"""Flux.1: a transformer on packed latents with T5 and a pooled CLIP vector. Black Forest Labs 2024; dev, schnell and their fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from charforgex.errors import ConfigError
from charforgex.families import mmdit, originals, sgm
from charforgex.families.base import Family
from charforgex.families.originals import CLIP_BESIDES, T5_BESIDES, Spelling, clip, each, t5
from charforgex.families.parts import adaptable
from charforgex.families.process import STEPS, FlowMatching
from charforgex.families.text import seen, t5_states, token_ids
from charforgex.lora.names import Place
from charforgex.types import Components, Crop, Text

PATCH = 2

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "single_transformer_blocks.*.proj_out"]
TARGETS = {
    "attention": ATTENTION,
    "attention_mlp": [*ATTENTION, *MLP],
    "all": [*ATTENTION, *MLP, "norm.linear", "norm1.linear", "norm1_context.linear"],
}


class Flux(Family):
    name = "flux"
    denoiser_name = "transformer"
    channels_per_latent = PATCH**2
    has_true_guidance = True
    components: ClassVar = {
        "denoiser": {"transformer": "diffusers.FluxTransformer2DModel"},
        "vae": {"vae": "diffusers.AutoencoderKL"},
        "text": {
            "tokenizer": "transformers.CLIPTokenizer",
            "tokenizer_2": "transformers.T5Tokenizer",
            "text_encoder": "transformers.CLIPTextModel",
            "text_encoder_2": "transformers.T5EncoderModel",
        },
    }
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    variants = ("dev", "schnell")
    original: ClassVar = {
        "transformer": [Spelling(originals.flux, ("model.diffusion_model.", ""))],
        "vae": sgm.vae_spellings("vae.", "first_stage_model."),
        "text_encoder": [Spelling(each(clip), ("text_encoders.clip_l.transformer.", ""), CLIP_BESIDES)],
        "text_encoder_2": [Spelling(each(t5), ("text_encoders.t5xxl.transformer.", ""), T5_BESIDES)],
    }
    reads_text = ("context_embedder",)
    first_reads_text = tuple(f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv")
    lora_labels: ClassVar = {
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "ss_base_model_version": "flux1",
    }

    def facts(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Besides the sizes, how many tokens T5 gives: 512, and 256 where there is no guidance vector (schnell)."""
        stride = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        distilled = bool(configs["transformer"]["guidance_embeds"])
        return {
            "latent_stride": stride,
            "pixel_multiple": stride * PATCH,
            "default_size": 1024 if stride == 8 else configs["vae"]["sample_size"],
            "text_tokens": 512 if distilled else 256,
            "guidance_embeds": distilled,
        }

    def process(self, parts: Components) -> FlowMatching:
        return FlowMatching.from_config(parts["scheduler"].config)

    def is_distilled(self, parts: Components) -> bool:
        return parts.config["guidance_embeds"]

    @torch.no_grad()
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        ids = token_ids(parts["tokenizer_2"], captions, self._length(parts))
        return self.encode_live(parts, captions, Text(t5_states(parts["text_encoder_2"], ids)))

    def encode_live(self, parts: Components, captions: Sequence[str], cached: Text) -> Text:
        clip = parts["text_encoder"]
        return Text(cached.tokens_BLD, clip(token_ids(parts["tokenizer"], captions).to(clip.device)).pooler_output)

    def text_size(self, parts: Components, denoiser_config: Mapping[str, Any]) -> tuple[int, int, int]:
        length = self._length(parts) if "tokenizer_2" in parts else parts.config["text_tokens"]
        return length, denoiser_config["joint_attention_dim"], denoiser_config["pooled_projection_dim"]

    def word_starts(self, parts: Components) -> Mapping[str, int]:
        return {"tokenizer_2": 0}

    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        return [seen(parts["tokenizer"], caption), seen(parts["tokenizer_2"], caption, self._length(parts))]

    @staticmethod
    def _length(parts: Components) -> int:
        return min(parts.config["text_tokens"], parts["tokenizer_2"].model_max_length)

    @torch.no_grad()
    def encode_pixels(self, parts: Components, pixels_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        vae = parts["vae"]
        posterior = vae.encode(pixels_BPHW.to(vae.device, vae.dtype)).latent_dist
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode_latents(self, parts: Components, latents_BChw: Tensor) -> Tensor:
        vae = parts["vae"]
        latents = latents_BChw.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents).sample.float().clamp(-1, 1)

    def blocks(self, denoiser) -> list[torch.nn.Module]:
        return [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]

    def pack(self, latents_BChw: Tensor) -> Tensor:
        """Each 2 x 2 latents as one token: (B, C, 2h, 2w) to (B, h w, 4 C), channels slowest."""
        b, c, h, w = latents_BChw.shape
        patches = latents_BChw.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        b, _, c = packed.shape
        patches = packed.view(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, height, width)

    def denoise(self, denoiser, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop, guidance_B: Tensor | None = None) -> Tensor:
        """`guidance_B` (float32) is `training_guidance` where it is not given. Networks without a guidance vector take none.

        The network would round its times to its own dtype, in bfloat16 to multiples of 4 of 1000: they go in behind that.
        """
        if guidance_B is None:
            guidance_B = torch.full_like(t_B, self.training_guidance, dtype=torch.float32)
        times = STEPS * t_B.float()
        exact = denoiser.time_text_embed.register_forward_pre_hook(lambda module, args: (times, *args[1:]))
        try:
            return self._denoise(denoiser, noisy, t_B.float(), text, guidance_B)
        finally:
            exact.remove()

    def _denoise(self, denoiser, noisy: Tensor, t_B: Tensor, text: Text, guidance_B: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        device = noisy.device
        rows, columns = torch.meshgrid(
            torch.arange(height // PATCH, device=device), torch.arange(width // PATCH, device=device), indexing="ij"
        )  # fmt: skip
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(noisy.dtype)
        tokens = text.tokens_BLD.to(noisy.dtype)
        packed = denoiser(
            hidden_states=self.pack(noisy),
            timestep=t_B,
            guidance=guidance_B if denoiser.config.guidance_embeds else None,
            pooled_projections=text.pooled_BD.to(noisy.dtype),
            encoder_hidden_states=tokens,
            txt_ids=tokens.new_zeros(tokens.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        return self.unpack(packed, height, width)

    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        return "flux_dev" if denoiser_config["guidance_embeds"] else "flux_schnell"

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        return mmdit.flux(adaptable(self, denoiser_config))

    def lora_dialects(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Place]]:
        return {"xlabs": mmdit.xlabs(self.lora_names(denoiser_config))}

    def lora_targets(self, preset: str, denoiser_config: Mapping[str, Any]) -> list[str]:
        if preset not in TARGETS:
            raise ConfigError(f"lora.targets={preset} is unknown for flux; choose one of {', '.join(TARGETS)}.")
        return TARGETS[preset]

    def tiny(self, seed: int = 0) -> Components:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
        from transformers import CLIPTextModel

        from charforgex.families.loading import finish
        from charforgex.families.tiny import clip_text_config, clip_tokenizer, flow_vae, t5_encoder, t5_tokenizer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                "transformer": FluxTransformer2DModel(
                    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
                ),
                "vae": flow_vae(),
                "text_encoder": CLIPTextModel(clip_text_config()),
                "text_encoder_2": t5_encoder(32),
            }  # fmt: skip
        modules["tokenizer"], modules["tokenizer_2"] = clip_tokenizer(), t5_tokenizer()
        modules["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        facts = self.facts({name: modules[name].config for name in ("transformer", "vae")})
        return finish(Components("tiny", self.denoiser_name, modules, facts | {"default_size": 64}))
