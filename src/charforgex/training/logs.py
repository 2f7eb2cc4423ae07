"""metrics.csv: every step's numbers, as an append-only log that a resume cuts back to its checkpoint.

Lightning's own CSV logger writes at intervals and starts afresh in a folder that has a log already; this one loses nothing
in a kill, and a resumed run's log is the uninterrupted run's.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from charforgex.runs import write_atomic


class StepLog(Logger):
    """Rows "step,name,value", values with all their digits."""

    HEADER = "step,name,value\n"

    def __init__(self, path: Path, first_step: int = 0):
        super().__init__()
        self.path, self.file = path, None
        self.rewind(first_step)

    def rewind(self, step: int) -> None:
        """Drops all rows after `step`; the log goes on from there."""
        if self.file is not None:
            self.file.close()
        kept = self.HEADER
        if step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            kept += "".join(line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step)
        write_atomic(self.path, kept)
        self.file = self.path.open("a", encoding="utf-8")

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The resolved config lies beside the log."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.file.closed:  # Lightning finalizes its loggers after every fit, and a roll-back fits again
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write("".join(f"{step},{name},{value!r}\n" for name, value in metrics.items()))
        self.file.flush()

    def save(self) -> None:
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())

    def finalize(self, status: str) -> None:
        self.file.close()


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> [(step, value), ...]."""
    series: dict[str, list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return series


def show_picture(logger: Logger, name: str, path: Path, step: int) -> None:
    """In TensorBoard and W&B, under the same name; of a GIF TensorBoard has the first frame."""
    if isinstance(logger, TensorBoardLogger):
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            logger.experiment.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [str(path)], step=step)
