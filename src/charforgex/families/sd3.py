"""Stable Diffusion 3 and 3.5: a joint-attention transformer with two CLIP encoders and T5. Esser et al. 2024."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from charforgex.errors import ConfigError
from charforgex.families import mmdit, originals, sgm
from charforgex.families.base import Family
from charforgex.families.originals import CLIP_BESIDES, T5_BESIDES, Spelling, clip, each, each_but_projection, t5
from charforgex.families.parts import adaptable
from charforgex.families.process import STEPS, FlowMatching
from charforgex.families.text import CLIP_TOKENS, clip_states, seen, t5_states, token_ids
from charforgex.lora.names import Place
from charforgex.types import Components, Crop, Text

T5_TOKENS = 256

JOINT = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
ATTENTION = [f"attn.{name}" for name in JOINT]
DUAL = [f"attn2.{name}" for name in JOINT[:4]]  # the second attention that SD3.5 medium has in its first blocks
MLP = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
TARGETS = {
    "attention": ATTENTION,
    "attention_dual": [*ATTENTION, *DUAL],
    "attention_mlp": [*ATTENTION, *MLP],
    "all": [*ATTENTION, *MLP, "norm1.linear", "norm1_context.linear"],  # and the second attention where there is one
}


class Sd3(Family):
    name = "sd3"
    denoiser_name = "transformer"
    components: ClassVar = {
        "denoiser": {"transformer": "diffusers.SD3Transformer2DModel"},
        "vae": {"vae": "diffusers.AutoencoderKL"},
        "text": {
            "tokenizer": "transformers.CLIPTokenizer",
            "tokenizer_2": "transformers.CLIPTokenizer",
            "tokenizer_3": "transformers.T5Tokenizer",
            "text_encoder": "transformers.CLIPTextModelWithProjection",
            "text_encoder_2": "transformers.CLIPTextModelWithProjection",
            "text_encoder_3": "transformers.T5EncoderModel",
        },
    }
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    optional = ("text_encoder", "text_encoder_2", "text_encoder_3")
    variants = ("medium", "35_medium", "35_large")
    original: ClassVar = {
        "transformer": [Spelling(originals.sd3, ("model.diffusion_model.", ""))],
        "vae": sgm.vae_spellings("first_stage_model.", "vae."),
        "text_encoder": [Spelling(each_but_projection, ("text_encoders.clip_l.transformer.", ""), CLIP_BESIDES)],
        "text_encoder_2": [Spelling(each(clip), ("text_encoders.clip_g.transformer.", ""))],
        "text_encoder_3": [Spelling(each(t5), ("text_encoders.t5xxl.transformer.", ""), T5_BESIDES)],
    }
    reads_text = ("context_embedder",)
    first_reads_text = tuple(f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv")
    lora_labels: ClassVar = {
        "modelspec.architecture": "stable-diffusion-3/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/sd3-ref",
        "ss_base_model_version": "sd3",
    }

    def stand_in(self, component: str, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """Stability AI's code takes CLIP-L's pooled state as it is: for diffusers' class its projection is the identity."""
        return torch.eye(*shape) if (component, key) == ("text_encoder", "text_projection.weight") else None

    def facts(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Besides the sizes, the widths of the text: they say what an absent encoder's zeros must be."""
        transformer, vae = configs["transformer"], configs["vae"]
        stride = 2 ** (len(vae["block_out_channels"]) - 1)
        return {
            "latent_stride": stride,
            "pixel_multiple": stride * transformer["patch_size"],
            "default_size": stride * transformer["sample_size"],
            "text_width": transformer["joint_attention_dim"],
            "pooled_width": transformer["pooled_projection_dim"],
        }

    def process(self, parts: Components) -> FlowMatching:
        return FlowMatching.from_config(parts["scheduler"].config)

    @torch.no_grad()
    def encode_text(self, parts: Components, captions: Sequence[str]) -> Text:
        """CLIP's penultimate states side by side, zero-padded to T5's width, then T5's. Encoders that are absent give zeros."""
        t5 = None
        if "text_encoder_3" in parts:
            t5 = t5_states(parts["text_encoder_3"], token_ids(parts["tokenizer_3"], captions, self._t5_length(parts)))
        return self._side_by_side(parts, captions, t5)

    def encode_live(self, parts: Components, captions: Sequence[str], cached: Text) -> Text:
        return self._side_by_side(parts, captions, cached.tokens_BLD[:, CLIP_TOKENS:])

    def _side_by_side(self, parts: Components, captions: Sequence[str], t5: Tensor | None) -> Text:
        found = [self._clip(parts, suffix, captions) for suffix in ("", "_2")]
        clips = [clip for clip in found if clip is not None]
        if t5 is None and not clips:
            raise ConfigError(f"{parts.source} has none of its three text encoders; a caption would mean nothing to it.")
        like, length = (clips[0][0], clips[0][0].shape[1]) if clips else (t5, CLIP_TOKENS)
        width = parts.config["pooled_width"] - sum(pooled.shape[-1] for _, pooled in clips)  # of CLIP encoders that are absent
        nothing = like.new_zeros(len(captions), length, width), like.new_zeros(len(captions), width)
        clips = [clip or nothing for clip in found] if clips else [nothing]
        tokens = torch.cat([states for states, _ in clips], dim=-1)
        tokens = F.pad(tokens, (0, parts.config["text_width"] - tokens.shape[-1]))
        if t5 is None:
            t5 = tokens.new_zeros(len(captions), T5_TOKENS, parts.config["text_width"])
        return Text(torch.cat([tokens, t5.to(tokens)], dim=1), torch.cat([pooled for _, pooled in clips], dim=-1))

    @staticmethod
    def _clip(parts: Components, suffix: str, captions: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        if f"text_encoder{suffix}" not in parts:
            return None
        return clip_states(parts[f"text_encoder{suffix}"], token_ids(parts[f"tokenizer{suffix}"], captions))

    @staticmethod
    def _t5_length(parts: Components) -> int:
        return min(T5_TOKENS, parts["tokenizer_3"].model_max_length)

    def text_size(self, parts: Components, denoiser_config: Mapping[str, Any]) -> tuple[int, int, int]:
        clip = next((parts[name].model_max_length for name in ("tokenizer", "tokenizer_2") if name in parts), CLIP_TOKENS)
        t5 = self._t5_length(parts) if "tokenizer_3" in parts else T5_TOKENS
        return clip + t5, denoiser_config["joint_attention_dim"], denoiser_config["pooled_projection_dim"]

    def word_starts(self, parts: Components) -> Mapping[str, int]:
        clip = next((name for name in ("tokenizer", "tokenizer_2") if name.replace("tokenizer", "text_encoder") in parts), None)
        starts = {clip: 1} if clip else {}
        if "text_encoder_3" in parts:
            starts["tokenizer_3"] = parts[clip].model_max_length if clip else CLIP_TOKENS
        return starts

    def seen_text(self, parts: Components, caption: str) -> list[tuple[str, int]]:
        found = [seen(parts[name], caption) for name in ("tokenizer", "tokenizer_2") if name in parts]
        return found + ([seen(parts["tokenizer_3"], caption, self._t5_length(parts))] if "tokenizer_3" in parts else [])

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
        return list(denoiser.transformer_blocks)

    def denoise(self, denoiser, noisy: Tensor, t_B: Tensor, text: Text, crop: Crop) -> Tensor:
        return denoiser(
            hidden_states=noisy,
            timestep=STEPS * t_B.float(),
            encoder_hidden_states=text.tokens_BLD.to(noisy.dtype),
            pooled_projections=text.pooled_BD.to(noisy.dtype),
            return_dict=False,
        )[0]

    def published(self, denoiser_config: Mapping[str, Any]) -> str:
        if denoiser_config.get("dual_attention_layers"):
            return "sd35_medium"
        return "sd35_large" if denoiser_config["num_layers"] > 24 else "sd3_medium"

    def lora_names(self, denoiser_config: Mapping[str, Any]) -> Mapping[str, Place]:
        return mmdit.sd3(adaptable(self, denoiser_config))

    def lora_targets(self, preset: str, denoiser_config: Mapping[str, Any]) -> list[str]:
        """Without the last block's query of the text, whose answer nothing reads: an adapter there would never learn."""
        if preset not in TARGETS:
            raise ConfigError(f"lora.targets={preset} is unknown for sd3; choose one of {', '.join(TARGETS)}.")
        has_dual = bool(denoiser_config.get("dual_attention_layers"))
        if preset == "attention_dual" and not has_dual:
            raise ConfigError("lora.targets=attention_dual: this base has no second attention (SD3.5 medium has); choose attention.")
        targets = [*TARGETS[preset], *(DUAL if preset == "all" and has_dual else [])]
        blocks = range(denoiser_config["num_layers"] - 1)
        return [path for t in targets for path in ([f"transformer_blocks.{i}.{t}" for i in blocks] if t == "attn.add_q_proj" else [t])]

    def tiny(self, seed: int = 0) -> Components:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        from charforgex.families.loading import finish
        from charforgex.families.tiny import clip_text_config, clip_tokenizer, flow_vae, t5_encoder, t5_tokenizer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                "transformer": SD3Transformer2DModel(
                    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                    num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
                    pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
                ),
                "vae": flow_vae(),
                "text_encoder": CLIPTextModelWithProjection(clip_text_config()),
                "text_encoder_2": CLIPTextModelWithProjection(clip_text_config()),
                "text_encoder_3": t5_encoder(64),
            }  # fmt: skip
        modules["tokenizer"], modules["tokenizer_2"], modules["tokenizer_3"] = clip_tokenizer(), clip_tokenizer("!"), t5_tokenizer()
        modules["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        facts = self.facts({name: modules[name].config for name in ("transformer", "vae")})
        return finish(Components("tiny", self.denoiser_name, modules, facts))
