"""`charforgex lora inspect`: what a LoRA file is, what it says of itself, and what is wrong with it. Every value is looked at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import LoraError
from charforgex.toolbox.common import Inputs, opened_loras

if TYPE_CHECKING:
    from charforgex.lora.formats import LoraFile

SHOWN = 5  # of the layers that have a problem
# What a file may say of its training -> our word for it
TRAINING = {
    "ss_steps": "steps", "ss_num_epochs": "epochs", "ss_learning_rate": "learning_rate", "ss_unet_lr": "denoiser_lr",
    "ss_text_encoder_lr": "text_encoder_lr", "ss_optimizer": "optimizer", "ss_lr_scheduler": "schedule",
    "ss_total_batch_size": "batch_size", "ss_resolution": "resolution", "ss_num_train_images": "pictures", "ss_seed": "seed",
    "ss_min_snr_gamma": "min_snr_gamma", "ss_noise_offset": "noise_offset", "charforgex.config_sha256": "config_sha256",
    "charforgex.dataset_sha256": "dataset_sha256",
}  # fmt: skip
TITLES = ("modelspec.title", "ss_output_name")
TRIGGERS = ("charforgex.trigger", "modelspec.trigger_phrase")
BASES = ("charforgex.base", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    json: bool = False


def inspect(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`files`: what is known of each. Prints tables, or JSON alone. Raises LoraError for a file that cannot be understood."""
    settings = bind(Settings, cfg, "")
    found = {"files": [inspected(path, settings.base) for path in settings.paths]}
    if settings.json:
        print(json.dumps(found, indent=2))  # in ASCII, which every pipe takes
    else:
        for told in found["files"]:
            _show(told)
    return found


def inspected(path: Path, base: str | None = None) -> dict[str, Any]:
    """What is known of one file. Layers that cannot be read are problems and no errors."""
    from charforgex.lora.identify import half_of
    from charforgex.lora.metadata import hashes
    from charforgex.toolbox.places import in_order, place_of

    with opened_loras(Inputs(lora=str(path), base=base)) as opened:
        file, names = opened.files[0], opened.names
        layers, parameters, broken = {}, 0, []
        for name in names:
            try:
                layer = file.layer(name)
            except LoraError as error:
                broken.append(f"{name}: {str(error).removeprefix(f'{path}: ')}")
                continue
            if layer is not None:
                layers[name] = {"kind": layer.kind, "rank": layer.rank, "alpha": layer.alpha, "zero": layer.is_zero}
                parameters += sum(tensor.numel() for tensor in layer.tensors().values())
        places = [place_of(name) for name in layers]
        blocks = _counted(f"{place.component}.{place.block}" for place in places)
        told = {
            "path": str(path), "bytes": path.stat().st_size, **hashes(path),
            "family": opened.base.family, "base": opened.base.name, "format": opened.format,
            "layers": len(layers), "parameters": parameters, "dtypes": _dtypes(file),
            **{what: _counted(row[key] for row in layers.values()) for what, key in
               (("kinds", "kind"), ("ranks", "rank"), ("alphas", "alpha"))},
            "components": _counted(place.component for place in places),
            "parts": _counted(map(half_of, layers)) if opened.base.spelling.pictures else {},
            "blocks": {block: blocks[block] for block in in_order(blocks)},
            **_said(file.metadata),
        }  # fmt: skip
        return told | {"problems": broken[:SHOWN] + _problems(told, layers, len(broken), file)}


def _counted(values) -> dict[Any, int]:
    return dict(Counter(values))


def _dtypes(file: LoraFile) -> dict[str, int]:
    """Stored factors by dtype."""
    factors = (dtype for key, dtype in file.dtypes.items() if not key.endswith(".alpha"))
    return _counted(str(dtype).removeprefix("torch.") for dtype in factors)


def _said(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header says: title, trigger, base, training and parents. None and {} where it says nothing."""
    from charforgex.toolbox.common import parsed

    first = {what: next((metadata[key] for key in keys if metadata.get(key)), None) for what, keys in
             (("title", TITLES), ("trigger", TRIGGERS), ("trained_on", BASES))}  # fmt: skip
    return first | {
        "training": {word: metadata[key] for key, word in TRAINING.items() if metadata.get(key) not in (None, "", "None")},
        "lineage": parsed(metadata, "charforgex.lineage"),
        "tags": _tags(parsed(metadata, "ss_tag_frequency")),
        "metadata": dict(metadata),
    }


def _tags(folders: Any) -> dict[str, int]:
    """The captions' twenty most frequent tags, as kohya counts them by folder."""
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({tag: count for tag, count in tags.items() if isinstance(count, int)})
    return dict(counts.most_common(20))


def _problems(told: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], broken: int, file: LoraFile) -> list[str]:
    from charforgex.lora.formats import ADAPTER_METADATA
    from charforgex.lora.state import some

    found = [f"{broken} layers cannot be read."] if broken > SHOWN else []
    if zero := [name for name, row in layers.items() if row["zero"]]:
        found.append(f"{len(zero)} of {len(layers)} layers change nothing: {some(zero)}.")
    if len(told["kinds"]) > 1:
        found.append(f"It mixes kinds: {', '.join(told['kinds'])}.")
    if len({name for name in told["dtypes"]} - {"float32"}) > 1:
        found.append(f"It mixes dtypes: {', '.join(told['dtypes'])}.")
    if not any(key.endswith(".alpha") for key in file.shapes) and ADAPTER_METADATA not in file.metadata:
        found.append("It has no alphas: its ranks are taken for them, as all tools do.")
    said = file.metadata.get("sshs_model_hash", "")
    if said and not said.startswith(told["autov3"]):
        found.append("Its sshs_model_hash is of other tensors: the file was changed after it was saved.")
    return found


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from charforgex.lora.state import shown

    table = Table(show_header=False, title=Text(Path(told["path"]).name))
    table.add_column()
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        if value not in (None, "", {}, []):
            table.add_row(name, Text(shown(str(value))))

    row("base", f"{told['base']} ({told['family']})")
    row("format", told["format"])
    for name in ("kinds", "ranks", "alphas", "dtypes", "components"):
        row(name, ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in told[name]))
    row("parts", ", ".join(f"{part} {count}" for part, count in told["parts"].items()))
    row("layers", f"{told['layers']}, {told['parameters']:,} values, {told['bytes']:,} bytes")
    for block, count in runs(told["blocks"]).items():
        row("", f"{block}: {count}")
    for name in ("title", "trigger", "trained_on"):
        row(name.replace("_", " "), told[name])
    row("training", ", ".join(f"{word} {value}" for word, value in told["training"].items()))
    row("tags", ", ".join(told["tags"]))
    parents = told["lineage"].get("parents") if isinstance(told["lineage"], dict) else None
    row("made from", ", ".join(str(one.get("name")) for one in parents or () if isinstance(one, dict)))
    for name in ("sha256", "autov2", "autov3"):
        row(name, told[name])
    for problem in told["problems"]:
        table.add_row("[red]problem", Text(problem))
    Console().print(table)


def runs(blocks: Mapping[str, int]) -> dict[str, str]:
    """Blocks that are numbered through and have equally many layers in one line: transformer_blocks.0-18 -> "14 each"."""
    found: list[tuple[str, int, int, int]] = []  # stem, first, last, count
    for block, count in blocks.items():
        stem, _, number = block.rpartition(".")
        if not number.isdigit():
            found.append((block, -1, -1, count))
        elif found and found[-1][0] == stem and found[-1][2] == int(number) - 1 and found[-1][3] == count:
            found[-1] = stem, found[-1][1], int(number), count
        else:
            found.append((stem, int(number), int(number), count))
    return {
        stem if first < 0 else f"{stem}.{first}" if first == last else f"{stem}.{first}-{last}": f"{count}" + " each" * (first != last)
        for stem, first, last, count in found
    }
