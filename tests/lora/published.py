"""The original networks of Flux and SD3 as published, written down by hand: which of diffusers' modules each of their modules is.

And listings (key -> shape, rank 1, no weights) of LoRA files as other tools write them for the real base models.
"""

from __future__ import annotations

FLUX_REAL = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1's
SD3_REAL = {  # SD3 medium; 3.5 medium with dual_attention_layers 0 to 12
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "in_channels": 16, "out_channels": 16,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SWAPPED = "final_layer.adaLN_modulation.1"  # and the modulation of SD3's last context block


def flux(double: int, single: int) -> dict[str, list[str]]:
    """Original module -> ours, in the order of its rows."""
    found = {
        "img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"], SWAPPED: ["norm_out.linear"],
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
        "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
        "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    }  # fmt: skip
    for i in range(double):
        theirs, ours = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        found |= {
            theirs + "img_mod.lin": [ours + "norm1.linear"], theirs + "txt_mod.lin": [ours + "norm1_context.linear"],
            theirs + "img_attn.qkv": [ours + f"attn.to_{x}" for x in "qkv"],
            theirs + "txt_attn.qkv": [ours + f"attn.add_{x}_proj" for x in "qkv"],
            theirs + "img_attn.proj": [ours + "attn.to_out.0"], theirs + "txt_attn.proj": [ours + "attn.to_add_out"],
            theirs + "img_mlp.0": [ours + "ff.net.0.proj"], theirs + "img_mlp.2": [ours + "ff.net.2"],
            theirs + "txt_mlp.0": [ours + "ff_context.net.0.proj"], theirs + "txt_mlp.2": [ours + "ff_context.net.2"],
        }  # fmt: skip
    for i in range(single):
        theirs, ours = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        found |= {
            theirs + "modulation.lin": [ours + "norm.linear"], theirs + "linear2": [ours + "proj_out"],
            theirs + "linear1": [*(ours + f"attn.to_{x}" for x in "qkv"), ours + "proj_mlp"],
        }  # fmt: skip
    return found


def flux_xlabs(double: int, single: int) -> dict[str, list[str]]:
    found = {}
    for i in range(double):
        theirs, ours = f"double_blocks.{i}.processor.", f"transformer_blocks.{i}.attn."
        found |= {
            theirs + "qkv_lora1": [ours + f"to_{x}" for x in "qkv"], theirs + "qkv_lora2": [ours + f"add_{x}_proj" for x in "qkv"],
            theirs + "proj_lora1": [ours + "to_out.0"], theirs + "proj_lora2": [ours + "to_add_out"],
        }  # fmt: skip
    for i in range(single):
        theirs, ours = f"single_blocks.{i}.processor.", f"single_transformer_blocks.{i}."
        found |= {theirs + "qkv_lora": [ours + f"attn.to_{x}" for x in "qkv"], theirs + "proj_lora": [ours + "proj_out"]}
    return found


def sd3(blocks: int, dual: int) -> dict[str, list[str]]:
    found = {
        "x_embedder.proj": ["pos_embed.proj"], "context_embedder": ["context_embedder"], "final_layer.linear": ["proj_out"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
        "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"], "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
        SWAPPED: ["norm_out.linear"],
    }  # fmt: skip
    for i in range(blocks):
        x, c, ours = f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block.", f"transformer_blocks.{i}."
        found |= {
            x + "attn.qkv": [ours + f"attn.to_{n}" for n in "qkv"], c + "attn.qkv": [ours + f"attn.add_{n}_proj" for n in "qkv"],
            x + "attn.proj": [ours + "attn.to_out.0"], x + "mlp.fc1": [ours + "ff.net.0.proj"], x + "mlp.fc2": [ours + "ff.net.2"],
            x + "adaLN_modulation.1": [ours + "norm1.linear"], c + "adaLN_modulation.1": [ours + "norm1_context.linear"],
        }  # fmt: skip
        if i < dual:
            found |= {x + "attn2.qkv": [ours + f"attn2.to_{n}" for n in "qkv"], x + "attn2.proj": [ours + "attn2.to_out.0"]}
        if i < blocks - 1:  # the last one's text only leads to keys and values
            found |= {
                c + "attn.proj": [ours + "attn.to_add_out"], c + "mlp.fc1": [ours + "ff_context.net.0.proj"],
                c + "mlp.fc2": [ours + "ff_context.net.2"],
            }  # fmt: skip
    return found


def is_swapped(theirs: str, last: int | None = None) -> bool:
    return theirs == SWAPPED or theirs == f"joint_blocks.{last}.context_block.adaLN_modulation.1"


def _listed(modules: dict[str, tuple[int, int]], down: str, up: str, alpha: str | None = None) -> dict[str, tuple[int, ...]]:
    """`modules`: name -> (out, in)."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in modules.items():
        found |= {name + down: (1, columns), name + up: (rows, 1)} | ({name + alpha: ()} if alpha else {})
    return found


def _clip(prefix: str, width: int, layers: int, join: str = "_") -> dict[str, tuple[int, int]]:
    found = {}
    for i in range(layers):
        start = f"{prefix}{join}text_model{join}encoder{join}layers{join}{i}{join}"
        found |= {start + f"self_attn{join}{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        found |= {start + f"mlp{join}fc1": (4 * width, width), start + f"mlp{join}fc2": (width, 4 * width)}
    return found


def _t5(prefix: str) -> dict[str, tuple[int, int]]:
    found = {}
    for i in range(24):
        start = f"{prefix}_encoder_block_{i}_layer_"
        found |= {f"{start}0_SelfAttention_{name}": (4096, 4096) for name in "qkvo"}
        found |= {f"{start}1_DenseReluDense_wi_{n}": (10240, 4096) for n in (0, 1)} | {f"{start}1_DenseReluDense_wo": (4096, 10240)}
    return found


def _flux_blocks(d: int = 3072) -> dict[str, tuple[int, int]]:
    found = {}
    for i in range(19):
        for side in ("img", "txt"):
            found |= {
                f"double_blocks.{i}.{side}_mod.lin": (6 * d, d), f"double_blocks.{i}.{side}_attn.qkv": (3 * d, d),
                f"double_blocks.{i}.{side}_attn.proj": (d, d), f"double_blocks.{i}.{side}_mlp.0": (4 * d, d),
                f"double_blocks.{i}.{side}_mlp.2": (d, 4 * d),
            }  # fmt: skip
    for i in range(38):
        found |= {
            f"single_blocks.{i}.modulation.lin": (3 * d, d),
            f"single_blocks.{i}.linear1": (7 * d, d), f"single_blocks.{i}.linear2": (d, 5 * d),
        }  # fmt: skip
    return found


def _flux_split(d: int = 3072) -> dict[str, tuple[int, int]]:
    """The modules that ai-toolkit adapts."""
    found = {}
    for i in range(19):
        start = f"transformer_blocks.{i}."
        names = [*(f"to_{x}" for x in "qkv"), *(f"add_{x}_proj" for x in "qkv"), "to_out.0", "to_add_out"]
        found |= {f"{start}attn.{name}": (d, d) for name in names}
        found |= {f"{start}{ff}.net.0.proj": (4 * d, d) for ff in ("ff", "ff_context")}
        found |= {f"{start}{ff}.net.2": (d, 4 * d) for ff in ("ff", "ff_context")}
        found |= {f"{start}{norm}.linear": (6 * d, d) for norm in ("norm1", "norm1_context")}
    for i in range(38):
        start = f"single_transformer_blocks.{i}."
        found |= {f"{start}attn.to_{x}": (d, d) for x in "qkv"} | {start + "norm.linear": (3 * d, d)}
        found |= {start + "proj_mlp": (4 * d, d), start + "proj_out": (d, 5 * d)}
    return found


def _sd3_blocks(d: int = 1536) -> dict[str, tuple[int, int]]:
    """As sd-scripts names them, for SD3.5 medium."""
    found = {}
    for i in range(24):
        for side in ("x", "context"):
            start, last = f"joint_blocks.{i}.{side}_block.", side == "context" and i == 23
            found |= {
                start + "attn.qkv": (3 * d, d),
                start + "adaLN_modulation.1": (2 * d if last else 9 * d if side == "x" and i < 13 else 6 * d, d),
            }
            if not last:
                found |= {start + "attn.proj": (d, d), start + "mlp.fc1": (4 * d, d), start + "mlp.fc2": (d, 4 * d)}
        if i < 13:
            found |= {f"joint_blocks.{i}.x_block.attn2.qkv": (3 * d, d), f"joint_blocks.{i}.x_block.attn2.proj": (d, d)}
    return found


def _sdxl_attention() -> dict[str, tuple[int, int]]:
    """The attention of SDXL's UNet in kohya's names: blocks of 2 and of 10 layers."""
    blocks = {f"input_blocks_{i}_1": (640, 2) for i in (4, 5)} | {f"output_blocks_{i}_1": (640, 2) for i in (3, 4, 5)}
    blocks |= {
        name: (1280, 10) for name in ("input_blocks_7_1", "input_blocks_8_1", "middle_block_1", *(f"output_blocks_{i}_1" for i in range(3)))
    }
    found = {}
    for block, (width, layers) in blocks.items():
        for i in range(layers):
            start = f"lora_unet_{block}_transformer_blocks_{i}_"
            found |= {f"{start}attn1_to_{name}": (width, width) for name in ("q", "k", "v", "out_0")}
            found |= {f"{start}attn2_to_{name}": (width, 2048 if name in "kv" else width) for name in ("q", "k", "v", "out_0")}
    return found


def _flat(modules: dict[str, tuple[int, int]], prefix: str) -> dict[str, tuple[int, int]]:
    return {f"{prefix}_{name.replace('.', '_')}": shape for name, shape in modules.items()}


def _dotted(modules: dict[str, tuple[int, int]], prefix: str) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{name}": shape for name, shape in modules.items()}


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight")
FLUX_ENDS = {"img_in": (3072, 64), "txt_in": (3072, 4096), "vector_in.in_layer": (3072, 768), "guidance_in.out_layer": (3072, 3072)}
FLUX_ENDS |= {"time_in.in_layer": (3072, 256), "final_layer.adaLN_modulation.1": (6144, 3072), "final_layer.linear": (64, 3072)}
LISTINGS = {  # who writes it -> (format, family, real config, listing, how many layers it is for us)
    "sd-scripts, Flux with CLIP and T5": (
        "kohya", "flux", FLUX_REAL,
        _listed(_flat(_flux_blocks() | FLUX_ENDS, "lora_unet") | _clip("lora_te1", 768, 12) | _t5("lora_te3"), *KOHYA), 494 + 7 + 72 + 168,
    ),
    "ComfyUI, Flux": (
        "comfyui", "flux", FLUX_REAL,
        _listed(_dotted(_flux_blocks(), "diffusion_model") | _clip("text_encoders.clip_l.transformer", 768, 12, "."), *PEFT), 494 + 72,
    ),
    "ai-toolkit, Flux": ("diffusers", "flux", FLUX_REAL, _listed(_dotted(_flux_split(), "transformer"), *PEFT), 494),
    "peft, Flux": ("diffusers", "flux", FLUX_REAL, _listed(_dotted(_flux_split(), "base_model.model"), *PEFT), 494),
    "OneTrainer, Flux": (
        "kohya", "flux", FLUX_REAL,
        _listed(_flat(_flux_split(), "lora_transformer") | _clip("lora_te1", 768, 12) | _t5("lora_te2"), *KOHYA), 494 + 72 + 168,
    ),
    "ComfyUI, Flux in diffusers' names": ("kohya", "flux", FLUX_REAL, _listed(_flat(_flux_split(), "lora_unet"), *KOHYA), 494),
    "XLabs, Flux": (
        "xlabs", "flux", FLUX_REAL,
        _listed(
            {f"double_blocks.{i}.processor.{name}": (rows, 3072) for i in range(19)
             for name, rows in (("qkv_lora1", 9216), ("qkv_lora2", 9216), ("proj_lora1", 3072), ("proj_lora2", 3072))}
            | {f"single_blocks.{i}.processor.qkv_lora": (9216, 3072) for i in range(38)}
            | {f"single_blocks.{i}.processor.proj_lora": (3072, 15360) for i in range(38)}, ".down.weight", ".up.weight",
        ), 19 * 8 + 38 * 4,
    ),
    "sd-scripts, SD3.5 medium": (
        "kohya", "sd3", SD3_REAL,
        _listed(_flat(_sd3_blocks(), "lora_unet") | _clip("lora_te1", 768, 12) | _clip("lora_te2", 1280, 32), *KOHYA),
        24 * 14 - 3 + 13 * 4 + 72 + 192,
    ),
    "ComfyUI, SD3.5 medium": (
        "comfyui", "sd3", SD3_REAL, _listed(_dotted(_sd3_blocks(), "diffusion_model"), *PEFT), 24 * 14 - 3 + 13 * 4,
    ),
    "diffusers, SD3 attention": (
        "diffusers", "sd3", SD3_REAL,
        _listed({f"transformer.transformer_blocks.{i}.attn.{name}": (1536, 1536) for i in range(24)
                 for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")}, *PEFT), 24 * 7,
    ),
    "sd-scripts, SDXL": ("kohya", "sdxl", None, _listed(_sdxl_attention(), *KOHYA), 70 * 8),
}  # fmt: skip
OTHERS = {  # LoRAs of base models that have names like ours
    "Stable Diffusion 2": _listed(
        {f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k": (320, 1024) for i in range(3)}, *KOHYA
    ),
    "HunyuanVideo": _listed({f"lora_unet_double_blocks_{i}_img_attn_qkv": (9216, 3072) for i in range(20)}, *KOHYA),
    "FLUX.2": _listed(
        {"diffusion_model.double_blocks.0.img_attn.qkv": (18432, 6144), "diffusion_model.double_stream_modulation_img.lin": (6, 6144)},
        *PEFT,
    ),
    "Qwen-Image": _listed({f"transformer.transformer_blocks.{i}.attn.add_q_proj": (3072, 3072) for i in range(60)}, *PEFT),
}
