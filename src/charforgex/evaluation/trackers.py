"""An evaluation's numbers and pictures in TensorBoard and W&B, under the names that training logs: `<metric>/<who>` at a checkpoint's step.

Who is `lora` (with its strength where there are several), `base`, `floor` or `ceiling`, so that evaluating a run's checkpoints continues
the curves that the run drew itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.evaluation import reading
from charforgex.evaluation.gallery import Shot
from charforgex.evaluation.page import arranged
from charforgex.runs import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from charforgex.generation.settings import LoggerSettings

# Metrics that training has another word for: its follower is charworld's judge, and a CLIP where there is one
LOGGED = {"attributes": "prompt_following", "prompt_following": "clip_score", "pairwise": "diversity"}
PARTS = {"memorisation": {"nearest": "nearest_training_picture"}}  # parts of metrics that training has a name for
SIDE = 256  # pixels of a picture in a contact sheet


def as_metrics(result: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Step -> name -> number, in the order of steps. What has no step, such as the base, stands at each; without any step all are at 0."""
    who = _who(result["contestants"])
    steps = sorted({one["step"] for one in result["contestants"] if one["step"] is not None}) or [0]
    found: dict[int, dict[str, float]] = {step: {} for step in steps}
    for name, metric in result["metrics"].items():
        logged, known = LOGGED.get(name, name), reading.measured(metric)
        for one in result["contestants"]:
            value = known.get(one["name"])
            numbers = {logged: value["estimate"]} if value else {}
            numbers |= {
                PARTS[name][part]: number for part, number in (value["parts"] if value else {}).items() if part in PARTS.get(name, {})
            }
            for step in steps if one["step"] is None else [one["step"]]:
                found[step] |= {f"{word}/{who[one['name']]}": number for word, number in numbers.items() if number is not None}
        for end in ("floor", "ceiling"):
            if metric[end] is not None:
                for step in steps:
                    found[step][f"{logged}/{end}"] = metric[end]
    return found


def _who(contestants: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Contestant -> its name in a log: as short as it may be where others stand at the same step."""
    found = {}
    for one in contestants:
        rivals = [other for other in contestants if other["kind"] in ("lora", "checkpoint") and other["step"] == one["step"]]
        if one["kind"] not in ("lora", "checkpoint"):
            found[one["name"]] = one["name"]
        elif len(rivals) == 1:
            found[one["name"]] = "lora"
        elif len({other["scale"] for other in rivals}) == len(rivals) and one["step"] is not None:
            found[one["name"]] = f"lora x{one['scale']:g}"
        else:
            found[one["name"]] = one["name"]
    return found


def numbers(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of a table of all values."""
    heads = ["metric", "contestant", "estimate", "low", "high", "pictures", "floor", "ceiling", "better", "notes"]
    rows = []
    for name, metric in result["metrics"].items():
        for contestant, value in metric["values"].items():
            told = [value["why"]] if "why" in value else value["notes"]
            found = [value.get(key) for key in ("estimate", "low", "high", "count")]
            rows.append([name, contestant, *found, metric["floor"], metric["ceiling"], metric["card"]["better"], "; ".join(told)])
    return heads, rows


def contact_sheets(result: Mapping[str, Any], shots: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[tuple[str, Image]]:
    """For each pack of prompts its pictures as the page shows them, one sheet in memory at a time. Files are relative to `folder`."""
    from charforgex.generation.sheets import contact_sheet

    heads, packs, _ = arranged([one["name"] for one in result["contestants"]], shots)
    for pack, rows in packs.items():
        cells = [[None if file is None else _small(folder / file) for file in files] for *_, files in rows]
        labels = [prompt if seed is None else f"{prompt}\nseed {seed}" for prompt, seed, _ in rows]
        yield pack or "prompts", contact_sheet(cells, labels, heads, pack)


def _small(path: Path) -> Image:
    picture = Shot(path).open()
    picture.thumbnail((SIDE, SIDE))
    return picture


def write_tensorboard(result: Mapping[str, Any], shots: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Scalars by step, and a contact sheet for each pack, into `folder`/tensorboard."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    result = plain(result)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, found in as_metrics(result).items():
            for name, number in found.items():
                writer.add_scalar(name, number, step)
        for pack, sheet in contact_sheets(result, shots, folder):
            writer.add_image(f"pictures/{pack}", np.asarray(sheet), dataformats="HWC")


def start(logger: LoggerSettings, folder: Path) -> Any | None:
    """The W&B run, begun before anything is drawn so that a missing login stops at once; None where none is wanted. Raises ConfigError."""
    from charforgex.generation.report import start_wandb

    return start_wandb(logger, folder, "evaluate") if logger.wandb else None


def finish_wandb(run: Any, result: Mapping[str, Any], shots: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Scalars by step, a table of all values, and for each pack a table with the same prompt and seed side by side; ends the run."""
    import wandb

    result = plain(result)
    run.config.update(result["settings"])
    for step, found in as_metrics(result).items():
        run.log(found, step=step)
    heads, rows = numbers(result)
    logged: dict[str, Any] = {"numbers": wandb.Table(columns=heads, data=rows)}
    names, packs, _ = arranged([one["name"] for one in result["contestants"]], shots)
    for pack, asked in packs.items():
        data = [
            [prompt, seed, *(None if file is None else wandb.Image(_small(folder / file)) for file in files)]
            for prompt, seed, files in asked
        ]
        logged[f"pictures/{pack or 'prompts'}"] = wandb.Table(columns=["prompt", "seed", *names], data=data)
    run.log(logged)
    if result["recommended"]:
        run.summary["recommended"] = result["recommended"]["contestant"]
    run.finish()
