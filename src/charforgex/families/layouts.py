"""What a single `.safetensors` file is, told from its keys and shapes, so that nothing is ever taken for something else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from charforgex.errors import ModelError

LORA_KEY = re.compile(r"(lora_|\.lora\.|\.hada_|\.lokr_|\.dora_scale$)")


@dataclass(frozen=True)
class Header:
    """A safetensors file's table of contents."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    offsets: dict[str, tuple[int, int]]  # bytes from the start of the file
    metadata: dict[str, str]

    def __contains__(self, key: str) -> bool:
        return key in self.shapes


def read_header(path: Path) -> Header:
    """Raises ModelError for a file that is cut off or no safetensors at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks that the table fits the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}); download or copy it again.") from error
    metadata = table.pop("__metadata__", {})
    start = 8 + length
    return Header(
        path,
        {key: tuple(entry["shape"]) for key, entry in table.items()},
        {key: entry["dtype"] for key, entry in table.items()},
        {key: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for key, entry in table.items()},
        metadata,
    )


FAMILY_OF = {"flux-dev": "flux", "flux-schnell": "flux", "sd3": "sd3", "sd35_medium": "sd3", "sd35_large": "sd3"}
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
CLIP_G_IN_BASE = "conditioner.embedders.1.model.token_embedding.weight"


def identify(header: Header) -> str | None:
    """The name of what the file holds ("sdxl", "SD 1.5", "a LoRA", ...), None if nothing we know has such keys.

    Only "sdxl", "flux" and "sd3" are names of families; the others are for the message that refuses them.
    """
    shapes = header.shapes
    if shapes and sum(bool(LORA_KEY.search(key)) for key in shapes) > len(shapes) / 2:
        return "a LoRA"
    if CLIP_G_IN_BASE in shapes and UNET_IN in shapes:
        if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
            return "SDXL trained in EDM's formulation (such as Playground 2.5)"
        channels = shapes[UNET_IN][1]
        return {9: "SDXL inpainting", 8: "SDXL InstructPix2Pix"}.get(channels, "sdxl")
    if any(key.startswith("cond_stage_model.transformer.text_model.") for key in shapes) and UNET_IN in shapes:
        return "Stable Diffusion 1"
    if any(key.startswith("cond_stage_model.model.transformer.resblocks.") for key in shapes) and UNET_IN in shapes:
        return "Stable Diffusion 2"
    if UNET_IN in shapes and not any(key.startswith(("conditioner.", "cond_stage_model.")) for key in shapes):
        return "a UNet without its text encoders"
    if "conv_in.weight" in shapes and "down_blocks.0.resnets.0.norm1.weight" in shapes:
        return "a UNet in diffusers' spelling without the other parts"
    return _by_diffusers(shapes)


def _by_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """diffusers' own guess. It says "v1" for whatever it does not know, so that answer counts for nothing."""
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        guess = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    except (IndexError, KeyError):  # it takes for granted what comes with a key that it knows
        return None
    return None if guess == "v1" else FAMILY_OF.get(guess, f"a checkpoint that diffusers calls {guess}")


def require(header: Header, family_name: str) -> None:
    """Raises ModelError unless the file is a checkpoint of this family."""
    found = identify(header)
    if found == family_name:
        return
    if found is None:
        some = ", ".join(sorted(header.shapes)[:3]) or "no tensors"
        raise ModelError(f"{header.path} has a layout that is not recognised (it holds {some}, ...); {family_name} was expected.")
    if found == "a LoRA":
        raise ModelError(f"{header.path} is a LoRA, not a base model; give it as lora=, and the base as source=.")
    if found.startswith("a UNet"):
        raise ModelError(f"{header.path} holds {found}; give a full checkpoint, or a diffusers folder that has all parts.")
    raise ModelError(f"{header.path} is {found}, not {family_name}.")
