"""What a checkpoint file is, told from its keys and shapes, so that nothing is ever taken for something else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from charforgex.errors import ModelError

GGUF = ".gguf"
MAX_HEADER = 100_000_000  # bytes, as safetensors itself has it


@dataclass(frozen=True)
class Header:
    """A safetensors or GGUF file's table of contents."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    offsets: dict[str, tuple[int, int]]  # bytes from the start of the file
    metadata: dict[str, str]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes


def read_header(path: Path) -> Header:
    """Raises ModelError for a file that is cut off or neither of the two."""
    if path.suffix == GGUF:
        from charforgex.families.gguf_files import read_gguf_header

        return read_gguf_header(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length) if length <= MAX_HEADER else b"")
        metadata, start = table.pop("__metadata__", {}), 8 + length
        spans = {key: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for key, entry in table.items()}
        end = max((end for _, end in spans.values()), default=start)
        if end != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size} bytes instead of {end}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}); download or copy it again.") from error
    return Header(
        path,
        {key: tuple(entry["shape"]) for key, entry in table.items()},
        {key: entry["dtype"] for key, entry in table.items()},
        spans,
        metadata,
    )


# What a file may be besides a base: how its keys look -> what it is, and what to do instead
LORA_KEY = re.compile(r"(lora_|\.lora\.|\.hada_|\.lokr_|\.dora_scale$)")
WEIGHTS = "take the bf16 or fp16 file, a plain fp8 one, or a GGUF of Q8_0 to Q4_K"
OTHERS = {
    r"\.(absmax|quant_map|quant_state\.bitsandbytes__\w+)$": ("quantised by bitsandbytes (NF4, as Forge has it)", WEIGHTS),
    r"\.(qweight|wscales|smooth_factor)$": ("quantised for nunchaku (SVDQuant)", WEIGHTS),
    r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|weight_scale_2|input_scale|comfy_quant)$": (
        "in ComfyUI's scaled fp8", f"the scales beside its weights are not read; {WEIGHTS}",
    ),
    r"^enc\.blk\.\d+\.": ("a T5 in llama.cpp's spelling", "take t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn.safetensors"),
    r"^(controlnet_blocks|controlnet_x_embedder|control_model|input_hint_block|controlnet_cond_embedding)\b": (
        "a ControlNet", "it steers a base, and is none",
    ),
    r"^(image_proj|ip_adapter|ip_adapter_proj_model)\.": ("an IP-Adapter", "it steers a base, and is none"),
    r"^redux_(up|down)\.": ("FLUX.1 Redux, an adapter for pictures as prompts", "it steers a base, and is none"),
}  # fmt: skip
SD1, MOTION, MOTION_SDXL = "Stable Diffusion 1", "an AnimateDiff motion module", "an AnimateDiff motion module for SDXL"
IN_DIFFUSERS_SPELLING = "a denoiser in diffusers' spelling without the other parts"
ADVICE = {what: advice for what, advice in OTHERS.values()} | {
    "a LoRA": "it is not a base model; give it as lora=, and the base as source=",
    "a UNet without its text encoders": "give a full checkpoint, or a diffusers folder that has all parts",
    IN_DIFFUSERS_SPELLING: "give a checkpoint in the original spelling, or the diffusers folder that it comes from",
}

# By diffusers' names for what it can tell apart
KNOWN = {
    "flux-dev": "flux",
    "flux-schnell": "flux",
    "flux-fill": "FLUX.1 Fill (inpainting)",
    "flux-depth": "FLUX.1 Canny or Depth (control)",
    "sd3": "sd3",
    "sd35_medium": "sd3",
    "sd35_large": "sd3",
}
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
CLIP_G_IN_BASE = "conditioner.embedders.1.model.token_embedding.weight"
PART_ENDS = {  # of files that hold one part
    "relative_attention_bias.weight": "a T5 text encoder",
    "text_model.embeddings.token_embedding.weight": "a CLIP text encoder",
    "transformer.resblocks.0.attn.in_proj_weight": "a CLIP text encoder",
    "decoder.conv_in.weight": "a VAE",
}


def identify(header: Header) -> str | None:
    """The name of what the file holds ("sdxl", "Stable Diffusion 1", "a LoRA", ...), None if nothing we know has such keys.

    Only "sdxl", "flux" and "sd3" are names of families, and those of PART_ENDS of their parts; the others are for the message
    that refuses them.
    """
    shapes = header.shapes
    if (other := _other(header)) is not None:
        return other
    if CLIP_G_IN_BASE in shapes and UNET_IN in shapes:
        if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
            return "SDXL trained in EDM's formulation (such as Playground 2.5)"
        channels = shapes[UNET_IN][1]
        return {9: "SDXL inpainting", 8: "SDXL InstructPix2Pix"}.get(channels, "sdxl")
    if any(key.startswith("cond_stage_model.transformer.text_model.") for key in shapes) and UNET_IN in shapes:
        return SD1
    if any(key.startswith("cond_stage_model.model.transformer.resblocks.") for key in shapes) and UNET_IN in shapes:
        return "Stable Diffusion 2"
    if UNET_IN in shapes and not any(key.startswith(("conditioner.", "cond_stage_model.")) for key in shapes):
        return "a UNet without its text encoders"
    if "conv_in.weight" not in shapes and any(key.startswith("down_blocks.0.motion_modules.0.") for key in shapes):
        return motion_of(len({key.split(".")[1] for key in shapes if key.startswith("down_blocks.")}))
    if "conv_in.weight" in shapes and "down_blocks.0.resnets.0.norm1.weight" in shapes:
        return IN_DIFFUSERS_SPELLING
    if "transformer_blocks.0.attn.add_q_proj.weight" in shapes and "proj_out.weight" in shapes:
        return IN_DIFFUSERS_SPELLING
    if "kontext" in header.metadata.get("modelspec.architecture", "").lower():
        return "FLUX.1 Kontext"  # of the very shape of dev: only a file that says so is known
    bare = {key.removeprefix("model.diffusion_model."): shape for key, shape in shapes.items()}
    found = _by_diffusers(bare)
    if found is None and "pos_embed" in bare and "joint_blocks.0.context_block.adaLN_modulation.1.bias" in bare:
        return "sd3"  # of any size
    return found or next((what for end, what in PART_ENDS.items() if any(key.endswith(end) for key in shapes)), None)


def motion_of(blocks: int) -> str:
    """What motion modules are made for, by their blocks on the way down: SDXL's network has three, Stable Diffusion 1's four."""
    return MOTION_SDXL if blocks == 3 else MOTION


def _other(header: Header) -> str | None:
    """What is told by the way its keys look, and is no base whose weights can be read."""
    shapes = header.shapes
    if shapes and sum(bool(LORA_KEY.search(key)) for key in shapes) > len(shapes) / 2:
        return "a LoRA"
    return next((what for pattern, (what, _) in OTHERS.items() if any(re.search(pattern, key) for key in shapes)), None)


def refuse_others(header: Header) -> None:
    """Raises ModelError for a file whose keys say that its weights cannot be read as they lie: adapters, quantised ones."""
    if (found := _other(header)) is not None:
        raise ModelError(f"{header.path} is {found}: {ADVICE[found]}.")


def _by_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """diffusers' own guess. It says "v1" for whatever it does not know, so that answer counts for nothing."""
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        guess = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    except (IndexError, KeyError, UnboundLocalError):  # it takes for granted what comes with a key that it knows
        return None
    return None if guess == "v1" else KNOWN.get(guess, f"a checkpoint that diffusers calls {guess}")


def require(header: Header, family_name: str) -> None:
    """Raises ModelError unless the file is of this family, or may be one of its parts."""
    found = identify(header)
    if found == family_name or found in PART_ENDS.values():
        return
    if found is None:
        some = ", ".join(sorted(header.shapes)[:3]) or "no tensors"
        raise ModelError(f"{header.path} has a layout that is not recognised (it holds {some}, ...); {family_name} was expected.")
    if found in ADVICE:
        raise ModelError(f"{header.path} is {found}: {ADVICE[found]}.")
    raise ModelError(f"{header.path} is {found}, not {family_name}.")
