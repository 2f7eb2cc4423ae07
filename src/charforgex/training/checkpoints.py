"""Checkpoints that survive a kill at any instant: safetensors and JSON, a manifest of hashes written last, then one rename.

checkpoints/step-00000400/{tensors.safetensors, state.json, manifest.json}. Lightning's own save is not atomic when the
temporary folder is on another filesystem, and it pickles; this `CheckpointIO` does neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO
from safetensors.torch import save

from charforgex.errors import CheckpointError
from charforgex.lora.checkpoints import MANIFEST, STATE, TENSORS, read_checkpoint, saved_steps, step_of
from charforgex.runs import TEMPORARY, fsync_folder


def _write(path: Path, data: bytes) -> str:
    """Writes, flushes to the disk, and returns the SHA-256."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


class SafeCheckpointIO(CheckpointIO):
    """Saves and loads {"tensors": {name: Tensor}, **plain values}."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None) -> None:
        path = Path(path)
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in checkpoint["tensors"].items()}
        plain = {key: value for key, value in checkpoint.items() if key != "tensors"}
        hashes = {
            TENSORS: _write(temporary / TENSORS, save(tensors)),
            STATE: _write(temporary / STATE, json.dumps(plain, indent=1).encode()),
        }
        _write(temporary / MANIFEST, json.dumps(hashes, indent=1).encode())
        fsync_folder(temporary)
        if path.exists():  # the same step again, after a resume: both are whole, the new one wins
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync_folder(path.parent)

    def load_checkpoint(self, path: str | os.PathLike, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        shutil.rmtree(path)


def load_last_good(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, or None if there is none at all, and what was wrong with newer ones.

    Raises CheckpointError if there are checkpoints and none is whole.
    """
    problems = []
    for path in saved_steps(folder):
        try:
            return read_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"No checkpoint in {folder} is whole. {problems[0]} Start afresh with fresh=true.")
    return None, problems


def prune(folder: Path, keep: int, always: set[int]) -> None:
    """Removes all but the `keep` newest checkpoints and those of the steps in `always`."""
    for path in saved_steps(folder)[keep:]:
        if step_of(path) not in always:
            shutil.rmtree(path)
