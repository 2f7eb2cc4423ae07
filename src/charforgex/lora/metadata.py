"""What a LoRA file says about itself, in the words that other tools read, and the hashes by which they know it.

modelspec.*   Stability's model metadata standard 1.0.0: SwarmUI, Forge, ComfyUI's browsers
ss_*          kohya's: A1111 and Forge take the base model, the tags and the name from them
charforgex.*  where it came from

Nothing here reads a clock or a machine's name: equal runs write equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from charforgex.lora.state import Lora


class Described(Protocol):
    """What a Family tells about its base models, in the words of the metadata."""

    name: str
    lora_labels: Mapping[str, str]


def build(
    lora: Lora, family: Described, *, title: str, base: str, trigger: str = "", tags: Mapping[str, int] | None = None,
    resolution: tuple[int, int] | None = None, prediction: str = "epsilon", steps: int | None = None, epochs: int | None = None,
    learning_rate: float | None = None, batch_size: int | None = None, pictures: int | None = None, seed: int | None = None,
    min_snr_gamma: float | None = None, noise_offset: float | None = None, config_sha256: str = "", dataset_sha256: str = "",
    description: str = "", author: str = "", license: str = "", date: str = "",
) -> dict[str, str]:  # fmt: skip
    """Metadata for the file's header; all values are strings, and what is not known is not there.

    `title` is also the name by which prompts call the LoRA (`<lora:title:1>`). `base` is the base model's name, `tags` the captions'
    tags with their counts (the trigger is added), `resolution` (width, height) in pixels, `prediction` "epsilon", "v_prediction" or
    "velocity", `date` ISO 8601 and only what the caller passes. `write` adds the hashes of the weights.
    """
    tags = dict(tags or {})
    if trigger:
        tags.setdefault(trigger, pictures or 1)
    size = f"{resolution[0]}x{resolution[1]}" if resolution else None
    modelspec = {
        "sai_model_spec": "1.0.0",
        "title": title,
        "description": description,
        "author": author,
        "date": date,
        "license": license,
        "trigger_phrase": trigger,
        "resolution": size,
        "prediction_type": {"epsilon": "epsilon", "v_prediction": "v", "velocity": None}[prediction],
        "tags": ", ".join(tags),
    }
    kohya = {
        "output_name": title,
        "sd_model_name": base,
        "v2": False,
        "v_parameterization": prediction == "v_prediction",
        "network_module": "networks.lora" if lora.kinds() == ["lora"] else "lycoris.kohya",
        "network_args": _network_args(lora),
        "network_dim": _one(lora.ranks()),
        "network_alpha": _one(lora.alphas()),
        "resolution": str(tuple(resolution)) if resolution else None,
        "steps": steps,
        "num_epochs": epochs,
        "learning_rate": learning_rate,
        "total_batch_size": batch_size,
        "num_train_images": pictures,
        "seed": seed,
        "min_snr_gamma": min_snr_gamma,
        "noise_offset": noise_offset,
        "tag_frequency": json.dumps({title: tags}, ensure_ascii=False) if tags else None,
    }
    ours = {
        "version": version("charforgex"),
        "family": family.name,
        "base": base,
        "trigger": trigger,
        "adapter_sha256": lora.sha256(),
        "config_sha256": config_sha256,
        "dataset_sha256": dataset_sha256,
    }
    groups = {"modelspec.": modelspec, "ss_": kohya, "charforgex.": ours}
    known = {start + key: str(value) for start, group in groups.items() for key, value in group.items() if value not in (None, "")}
    return {**family.lora_labels, **known}


def _network_args(lora: Lora) -> str | None:
    """LyCORIS' name of the adapter's kind."""
    kinds = [kind for kind in lora.kinds() if kind != "lora"]
    if not kinds:
        return None
    return json.dumps({"algo": "lora", "dora_wd": True, "wd_on_output": True} if kinds == ["dora"] else {"algo": kinds[0]})


def _one(values: list[float]) -> str:
    """A value that all layers share, or kohya's word for several."""
    if len(values) != 1:
        return "Dynamic"
    return f"{values[0]:g}"


def hashes(path: str | Path) -> dict[str, str]:
    """`sha256` of a safetensors file, and Civitai's short forms of it: `autov2`, the first 10 digits, and `autov3`, the first 12 of
    the tensors' hash without the header. A1111 writes autov3 into pictures as "Lora hashes".
    """
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with Path(path).open("rb") as file:
        size = file.read(8)
        whole.update(size)
        whole.update(file.read(int.from_bytes(size, "little")))
        while block := file.read(1 << 20):
            whole.update(block)
            tensors.update(block)
    return {"sha256": whole.hexdigest(), "autov2": whole.hexdigest()[:10], "autov3": tensors.hexdigest()[:12]}
