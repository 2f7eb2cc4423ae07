"""What a run of generate.py shows: a progress bar, contact sheets, W&B and TensorBoard, and a summary with the paths."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.errors import ConfigError
from charforgex.runs import replace_atomic, write_result

if TYPE_CHECKING:
    from PIL.Image import Image

    from charforgex.generation.settings import LoggerSettings

MOST_COLUMNS, PAGE_HEIGHT = 8, 8000  # of a sheet; pixels


class Bar:
    """Progress in pictures or clips; a denoising step is its share of one."""

    def __init__(self, progress, number: int):
        self._progress = progress
        self._task = progress.add_task("", total=number)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def step(self, pictures: float, text: str = "sampling") -> None:
        self._progress.update(self._task, advance=pictures, description=text)


@contextmanager
def progress(number: int) -> Iterator[Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as shown:
        yield Bar(shown, number)


# ---- sheets ----


def write_sheets(out: Path, pictures: list[dict[str, Any]], base: str, settings: dict[str, Any]) -> list[Path]:
    """sheet.png, or sheet_1.png, sheet_2.png, ... where one would be too tall. Pictures are read back a page at a time."""
    from PIL import Image

    from charforgex.generation.sheets import cell_scale, contact_sheet

    columns, rows = _layout(pictures)
    height = settings["height"] * cell_scale(max(settings["height"], settings["width"]))
    page = max(1, int(PAGE_HEIGHT // height))
    pages = [rows[i : i + page] for i in range(0, len(rows), page)]
    names = list(pictures[0]["scales"])
    strengths = _strengths(pictures)
    title = (strengths[0] if len(strengths) == 1 else " + ".join(names)) or base
    facts = [base] * bool(names) + [
        settings["scheduler_class"].removesuffix("Scheduler").removesuffix("Discrete"),
        f"{settings['steps']} steps",
        f"guidance {settings['guidance']:g}",
        *([f"true guidance {settings['true_guidance']:g}"] if (settings["true_guidance"] or 1) > 1 else []),
        f"{settings['width']} x {settings['height']}",
    ]
    paths = []
    for number, rows_here in enumerate(pages, 1):
        cells: list[list[Image | None]] = []
        for _, files in rows_here:
            cells.append([None if file is None else Image.open(file).convert("RGB") for file in files])
        sheet = contact_sheet(cells, [label for label, _ in rows_here], columns, title, " · ".join(facts))
        path = out / ("sheet.png" if len(pages) == 1 else f"sheet_{number}.png")
        with replace_atomic(path) as temporary:
            sheet.save(temporary, "PNG")
        paths.append(path)
    return paths


def _layout(pictures: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str | None]]]]:
    """Column labels, and rows of a label and files: strengths side by side where there are several, else seeds."""
    strengths = _strengths(pictures)
    each = len(strengths) * len({picture["seed"] for picture in pictures})  # pictures of one prompt, which come one after another
    groups = [pictures[i : i + each] for i in range(0, len(pictures), each)]
    rows: list[tuple[str, list[str | None]]] = []
    if len(strengths) > 1:
        for group in groups:
            for start in range(0, len(group), len(strengths)):
                one = group[start : start + len(strengths)]
                rows.append((f"{_said(one)}\nseed {one[0]['seed']}", [picture["file"] for picture in one]))
        return strengths, rows
    seeds = [picture["seed"] for picture in groups[0]]
    for group in groups:
        for start in range(0, len(group), MOST_COLUMNS):
            part = group[start : start + MOST_COLUMNS]
            label = _said(group)
            if len(seeds) > MOST_COLUMNS:
                label += f"\nseeds {part[0]['seed']} to {part[-1]['seed']}"
            files: list[str | None] = [picture["file"] for picture in part]
            rows.append((label, files + [None] * (min(MOST_COLUMNS, len(seeds)) - len(files))))
    return [] if len(seeds) > MOST_COLUMNS else [f"seed {seed}" for seed in seeds], rows


def _said(group: list[dict[str, Any]]) -> str:
    """The prompt where all pictures have the same, else the template with its wildcards."""
    prompts = {picture["prompt"] for picture in group}
    return prompts.pop() if len(prompts) == 1 else group[0]["template"]


def _strengths(pictures: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(" + ".join(f"{name} {scale:g}" for name, scale in picture["scales"].items()) for picture in pictures))


# ---- loggers ----


def start_wandb(logger: LoggerSettings, out: Path, job_type: str = "generate"):
    """A W&B run, begun before any work is done so that a missing login stops at once. Raises ConfigError."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError('logger=wandb needs the package wandb; install it with: pip install "charforgex[wandb]"')
    import wandb

    try:
        mode = "offline" if logger.offline else None
        return wandb.init(project=logger.project, job_type=job_type, mode=mode, dir=out)
    except wandb.errors.Error as error:
        raise ConfigError(f"logger=wandb cannot start: {error} Run `wandb login`, or say logger.offline=true.") from error


def finish_wandb(run, result: dict[str, Any]) -> None:
    import wandb

    run.config.update({"base": result["base"], "loras": result["loras"], **result["settings"]})
    pictures = [(picture["file"], picture["prompt"]) for picture in result.get("pictures", [])]
    pictures += [(clip["preview"], " / ".join(clip["prompts"])) for clip in result.get("clips", [])]
    run.log(
        {
            "pictures": [wandb.Image(path, caption=prompt) for path, prompt in pictures],
            "sheets": [wandb.Image(path) for path in _sheets(result)],
        }
    )
    run.finish()


def write_tensorboard(out: Path, result: dict[str, Any]) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        alone = [clip["preview"] for clip in result.get("clips", [])] or [picture["file"] for picture in result.get("pictures", [])]
        for step, path in enumerate(_sheets(result) or alone):
            writer.add_image("pictures", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")


def _sheets(result: dict[str, Any]) -> list[str]:
    """Of pictures, or each clip's strip."""
    return result.get("sheets") or [clip["strip"] for clip in result.get("clips", []) if clip["strip"]]


# ---- the last words ----


def finish(out: Path, result: dict[str, Any], logger: LoggerSettings, tracker: Any) -> None:
    """result.json, the trackers that were asked for (`tracker` is W&B's run or None), and the summary."""
    write_result(out, result)
    if logger.tensorboard:
        write_tensorboard(out, result)
    if tracker is not None:
        finish_wandb(tracker, result)
    summary(result)


def summary(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    kind = "clip" if "clips" in result else "picture"
    made, seconds = result[f"{kind}s"], result["seconds"]
    number = len(made)
    who = " + ".join(lora["name"] for lora in result["loras"])
    console.print(
        f"[bold]{number} {kind}{'s' * (number > 1)}[/bold] in {seconds['total']:.1f} s "
        f"({seconds['sample'] / number:.2f} s each) with {escape(result['base'])}{' and ' + escape(who) if who else ''}",
        soft_wrap=True,
    )
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/yellow]")
    for cut in result["truncated"]:
        end = escape(cut["seen"][-60:])
        console.print(f"[yellow]{cut['tokens_cut']} tokens at the end of a prompt are not seen; the model reads up to: …{end}[/yellow]")
    for path in result.get("sheets", []):
        console.print(f"sheet     {escape(path)}", soft_wrap=True)
    console.print(f"{f'{kind}s':<8}  {escape(made[0]['file'])}{f' and {number - 1} more' if number > 1 else ''}", soft_wrap=True)
