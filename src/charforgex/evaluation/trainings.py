"""Folders that `charforgex train` wrote, read: what was trained on, what was held out, and the LoRA at each checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from charforgex.charworld.demo import DEMO
from charforgex.config import bind
from charforgex.curation.manifest import Manifest, open_manifest
from charforgex.errors import CheckpointError, ConfigError, LoraError
from charforgex.families.settings import FamilySettings


@dataclass(frozen=True)
class Training:
    """One run's folder. Paths in its config count from where it was started, so they may lead nowhere from here."""

    folder: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        from omegaconf import OmegaConf

        return OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """Of a run that was not finished: nothing."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def family(self) -> FamilySettings:
        return bind(FamilySettings, self.config["family"], f"{self.folder}/config.yaml: family")

    @property
    def trigger(self) -> str | None:
        return self.result.get("trigger") or self.config["data"]["trigger"]

    @property
    def lora(self) -> Path | None:
        """The file that the run saved in the end."""
        path = self.folder / Path(self.result["lora"]).name if self.result.get("lora") else None
        return path if path is not None and path.is_file() else None

    @property
    def others(self) -> str | None:
        """Pictures of other people, for `evaluation.others`; the demo brings its own."""
        source = str(self.config["data"]["source"])
        return self.config["evaluation"]["others"] or (source if source.startswith(DEMO) else None)

    def manifest(self) -> Manifest:
        """The pictures that it trained on and held out. Raises DataError if they are not there any more."""
        made, source = self.folder / "dataset" / "pictures" / "manifest.jsonl", str(self.config["data"]["source"])
        if made.is_file():
            return Manifest.read(made)
        place = self.folder / "pictures" if source.startswith(DEMO) else Path(source).expanduser()
        return open_manifest(place, self.config["data"]["val_count"])

    def checkpoints(self, cache: Path) -> tuple[list[tuple[int, Path]], list[str]]:
        """(step, LoRA file) of every checkpoint that can be read, in the order of steps, and why others cannot. Files that are not there
        yet are made in `cache`, with the precision and the metadata of those that training writes."""
        from charforgex.lora.checkpoints import MANIFEST, saved_steps, step_of
        from charforgex.runs import sha256_file

        found, problems = [], []
        for folder in reversed(saved_steps(self.folder / "checkpoints")):
            if step_of(folder) == 0:  # nothing is learnt yet
                continue
            try:
                path = cache / "adapters" / sha256_file(folder / MANIFEST)[:16] / f"{self.config['name']}-{step_of(folder)}.safetensors"
                if not path.is_file():
                    self._save(folder, path)
                found.append((step_of(folder), path))
            except (OSError, CheckpointError, LoraError) as error:
                problems.append(f"{folder.name} of {self.folder} is left out: {error}")
        return found, problems

    def _save(self, folder: Path, path: Path) -> None:
        """A checkpoint's adapter, and its new tokens beside it."""
        from charforgex.families import registry
        from charforgex.families.loading import denoiser_config
        from charforgex.families.tokens import save_tokens
        from charforgex.lora.checkpoints import adapter_of, read_checkpoint, step_of
        from charforgex.lora.metadata import build
        from charforgex.lora.writing import write

        settings = self.family
        family = registry.get(settings.name)
        lora, tokens = adapter_of(read_checkpoint(folder), family.denoiser_name, self.config["lora"])
        metadata = build(
            lora, family, title=path.stem, base=settings.source, trigger=self.trigger or "", steps=step_of(folder), seed=self.config["seed"]
        )
        if tokens:
            told = save_tokens(path.with_name(f"{path.stem}_tokens.safetensors"), family, tokens)
            metadata["charforgex.tokens"] = told.name
        write(lora, path, "kohya", family, denoiser_config(family, settings.source), metadata=metadata)


def training_in(folder: Path) -> Training | None:
    """The run whose folder this is; None if it is none. Raises ConfigError for one that trains base models."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    found = Training(folder)
    if "pretrain" in found.config:
        raise ConfigError(f"{folder} is a run that trains base models and has no LoRA; say base=<the folder of its base>.")
    if "motion" in found.config:
        raise ConfigError(f"{folder} is a training of motion, and pictures are evaluated; its result.json says what its clips do.")
    return found if {"lora", "family", "data", "evaluation"} <= set(found.config) and isinstance(found.config["lora"], dict) else None


def trainings_below(folder: Path) -> list[Training]:
    """The finished runs in a folder of runs, such as runs_dir of a sweep, by name; those of motion are left out."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    of_motion = {path for path in inside if (path / "config.yaml").is_file() and "motion" in Training(path).config}
    found = [training_in(path) for path in inside if path not in of_motion]
    return [training for training in found if training is not None and training.lora is not None]
