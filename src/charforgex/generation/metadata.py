"""What a picture or a clip says about itself: the text that A1111, Forge, ComfyUI and Civitai read, and our whole recipe as JSON.

Nothing here reads a clock or names a folder: the same recipe gives the same bytes wherever it is made.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from charforgex import filming
from charforgex.generation.schedulers import FLOW_SAMPLERS, SAMPLERS
from charforgex.runs import replace_atomic


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a picture. `autov3` is the hash that A1111 and Civitai know it by."""

    name: str
    sha256: str
    autov3: str
    scale: float


@dataclass(frozen=True)
class ClipRecipe:
    """What decides a clip besides; `travel` and `init` are None where there are none."""

    frames: int
    fps: float  # of what was made; `interpolate` puts so many frames for each of them
    loop: bool
    window: int
    overlap: int
    blend: str
    noise: str
    travel: dict[str, str] | None  # by the frame's number
    init: str | None  # a name, not a path
    init_sha256: str | None
    strength: float | None
    keep_first: bool
    interpolate: int | None


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture, up to rounding on other hardware."""

    prompt: str
    template: str  # the prompt as it was written, before wildcards
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    guidance_rescale: float
    scheduler: str  # as it was asked for
    scheduler_class: str
    schedule_type: str | None  # A1111's name of an uncommon spacing of the steps
    family: str
    base: str  # a name, not a path
    base_sha256: str  # of the single file, else of the denoiser's weights and configs
    base_is_file: bool
    dtype: str
    loras: tuple[LoraUse, ...]
    versions: dict[str, str | None]
    true_guidance: float | None = None  # where guidance is a vector (Flux): classifier-free guidance besides
    clip: ClipRecipe | None = None


def parameters(recipe: Recipe) -> str:
    """The text that A1111 writes under its pictures: prompt, negative prompt, and one line of "Name: value".

    LoRAs appear as `<lora:name:scale>` behind the prompt, as their users type them, so that pasting it into A1111 loads them.
    """
    tags = "".join(f" <lora:{lora.name}:{lora.scale:g}>" for lora in recipe.loras)
    lines = [_literal(recipe.prompt) + tags]
    if recipe.negative:
        lines.append(f"Negative prompt: {_literal(recipe.negative)}")
    labels = {sampler.cls: sampler.label for sampler in (*SAMPLERS.values(), *FLOW_SAMPLERS.values())}
    distilled = recipe.true_guidance is not None
    values = {
        "Steps": recipe.steps,
        "Sampler": labels.get(recipe.scheduler_class, recipe.scheduler_class),
        "Schedule type": recipe.schedule_type,
        "CFG scale": f"{recipe.true_guidance if distilled else recipe.guidance:g}",
        "Distilled CFG Scale": f"{recipe.guidance:g}" if distilled else None,  # Forge's name of Flux's guidance
        "CFG Rescale phi": f"{recipe.guidance_rescale:g}" if recipe.guidance_rescale else None,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Frames": recipe.clip.frames if recipe.clip else None,
        "FPS": f"{recipe.clip.fps:g}" if recipe.clip else None,
        "Model hash": recipe.base_sha256[:10] if recipe.base_is_file else None,
        "Model": Path(recipe.base).stem if recipe.base_is_file else recipe.base,
        "Lora hashes": ", ".join(f"{lora.name}: {lora.autov3}" for lora in recipe.loras) or None,
        "Version": f"charforgex {recipe.versions['charforgex']}",
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines)


def _literal(prompt: str) -> str:
    """A1111 takes bare brackets for emphasis; ours are letters."""
    return re.sub(r"([()\[\]\\])", r"\\\1", prompt)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """For JSON; a picture has no word about clips."""
    return {name: value for name, value in asdict(recipe).items() if name != "clip" or value is not None}


def comment(recipe: Recipe) -> str:
    """What a video has for `parameters` and `charforgex` of a PNG: one JSON text."""
    return json.dumps({"parameters": parameters(recipe), "charforgex": as_dict(recipe)}, ensure_ascii=False, sort_keys=True)


def save_png(picture: Image.Image, path: str | Path, recipe: Recipe) -> Path:
    """Writes the picture with `parameters` and `charforgex` (JSON) in its PNG text, whole or not at all."""
    info = PngInfo()
    info.add_text("parameters", parameters(recipe))
    info.add_text("charforgex", json.dumps(as_dict(recipe), ensure_ascii=False, sort_keys=True))
    with replace_atomic(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info, compress_level=6)
    return Path(path)


def read_recipe(path: str | Path) -> Recipe | None:
    """The recipe in a picture, a clip or a folder of frames, None where there is none."""
    values = _own_text(Path(path)) or _commented(Path(path))
    if values is None:
        return None
    clip = values.get("clip")
    loras = tuple(LoraUse(**lora) for lora in values["loras"])
    return Recipe(**values | {"loras": loras, "clip": ClipRecipe(**clip) if clip else None})


def _own_text(path: Path) -> dict[str, Any] | None:
    if path.suffix.lower() != ".png":
        return None
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get("charforgex")
    return json.loads(text) if text is not None else None


def _commented(path: Path) -> dict[str, Any] | None:
    said = filming.comment_of(path) or ""
    return json.loads(said).get("charforgex") if said.startswith('{"charforgex"') else None
