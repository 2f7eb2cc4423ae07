"""Parts of a base model from a diffusers folder, local or a hub snapshot."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from charforgex.errors import ModelError
from charforgex.families import layouts
from charforgex.families.files import file_hash, stamp
from charforgex.families.parts import component_class, library, read_config
from charforgex.families.single_file import spell
from charforgex.families.sources import Source, component_weights, read_json
from charforgex.quiet import quiet

if TYPE_CHECKING:
    from charforgex.families.base import Family

VOCABULARIES = ("tokenizer.json", "vocab.json")  # spiece.model alone needs a library that nothing else does
UNACCOUNTED = {
    "missing_keys": "lacks the weights",
    "unexpected_keys": "has no place for the weights",
    "mismatched_keys": "has other shapes for the weights",
}


class Folder:
    """`held` has the components that its model_index.json does not call absent. Raises ModelError if it is of another family."""

    def __init__(self, family: Family, source: Source):
        self.family, self.source, self.path = family, source, source.path
        self._index = read_json(self.path / "model_index.json")
        pipeline = self._index.get("_class_name")
        if pipeline not in family.pipelines:
            raise ModelError(f"{self.path} holds a {pipeline}, not a base of family {family.name} ({' or '.join(family.pipelines)}).")
        names = [name for group in family.components.values() for name in group]
        self.held = frozenset(name for name in names if any(self._index.get(name, (True,)) or ()))

    def index(self) -> dict[str, Any]:
        return self._index

    def config(self, name: str) -> dict[str, Any]:
        self._folder(name)
        return read_config(self.path, name)

    def check(self, name: str) -> None:
        """Raises ModelError if files of a component are not there; of a hub repository, those that were not asked for may be elsewhere."""
        if self.source.is_local or (self.path / name).is_dir():
            folder = self._folder(name)
            if name.startswith("tokenizer"):
                self._check_vocabulary(folder)
            else:
                component_weights(folder, self.source.variants)

    def scheduler_config(self) -> dict[str, Any]:
        return self.config("scheduler")

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if not folder.is_dir():
            raise ModelError(f"{self.path} has no folder {name}, which {self.family.name} needs; the download or copy is incomplete.")
        return folder

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        folder = self._folder(name)
        weights, files = component_weights(folder, self.source.variants)
        for file in files[weights.is_sharded :]:
            layouts.read_header(file)
        options = {"diffusers": {"low_cpu_mem_usage": True}, "transformers": {}}[library(self.family, name)]
        try:
            with quiet():
                network, account = component_class(self.family, name).from_pretrained(
                    folder, variant=weights.variant, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=dtype,
                    **options,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ModelError(f"{name} of {self.path} cannot be loaded: {error}") from error
        for kind, what in UNACCOUNTED.items():
            if account.get(kind):
                raise ModelError(f"{name} of {self.path} {what} {spell([str(key) for key in account[kind]])}.")
        return network

    def tokenizer(self, name: str):
        folder = self._folder(name)
        self._check_vocabulary(folder)
        try:
            return component_class(self.family, name).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error

    @staticmethod
    def _check_vocabulary(folder: Path) -> None:
        if not any((folder / file).is_file() for file in VOCABULARIES):  # transformers would make an empty one
            raise ModelError(f"{folder} holds no vocabulary ({' or '.join(VOCABULARIES)}); the download or copy is incomplete.")

    def digest(self, name: str) -> str:
        """What identifies a component: its configs, vocabularies and weights."""
        folder = self._folder(name)
        files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt", ".model") and ".index." not in file.name]
        if not name.startswith("tokenizer"):
            files += component_weights(folder, self.source.variants)[1]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file_hash(stamp(file))}".encode())
        return digest.hexdigest()
