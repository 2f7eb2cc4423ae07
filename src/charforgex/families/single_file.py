"""Parts of a base model from one `.safetensors` or `.gguf` file, offline: configs are ours, every key is accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from charforgex.errors import ModelError
from charforgex.families import layouts
from charforgex.families.files import span_hash, stamp
from charforgex.families.originals import Original
from charforgex.families.parts import build, library, read_config
from charforgex.families.sources import read_json

if TYPE_CHECKING:
    from charforgex.families.base import Family

# What checkpoints also hold and no network needs: schedules, training state, EMA copies, buffers that newer classes compute.
IGNORED = (
    "model_ema.", "denoiser.", "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "posterior_", "sqrt_", "v_pred", "ztsnr",
    "global_step", "first_stage_model.loss.", "first_stage_model.model_ema.", "loss.", "model.model_sampling.",
)  # fmt: skip
IGNORED_ENDS = ("logit_scale", "position_ids")
NAMED = 6  # how many keys an error spells out

Table = Mapping[str, tuple[Original, tuple[int, ...]]]  # our tensor's name -> where it stands in a file, and its shape in our module


def spell(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(sorted(keys)[:NAMED]) + more


def own_config(family: Family, name: str, variant: str = "") -> dict[str, Any]:
    """The config that single files of a variant are read with: its own, else the one that all variants share."""
    home = family.configs / variant
    return read_config(home if (home / name).is_dir() else family.configs, name)


def empty(family: Family, name: str, config: Mapping[str, Any]) -> nn.Module:
    """The network of a config, with no memory behind its weights."""
    from accelerate import init_empty_weights

    # transformers' buffers are in no file: they stay real. diffusers' are in the file, and SD3's takes half a minute to compute
    with init_empty_weights() if library(family, name) == "transformers" else torch.device("meta"):
        return build(family, name, config)


@cache
def tables(family: type[Family], name: str, variant: str) -> list[tuple[str, frozenset[str], Table]]:
    """Each way in which a file may spell a component: the prefix of its keys, what keys may be besides, and where the tensors stand."""
    config = own_config(family(), name, variant)
    shapes = {key: tuple(tensor.shape) for key, tensor in empty(family(), name, config).state_dict().items()}
    found = []
    for spelling in family.original[name]:
        names = spelling.names(shapes, config)
        for prefix in spelling.prefixes:
            table = {key: (original.behind(prefix), shapes[key]) for key, original in names.items()}
            found.append((prefix, frozenset(prefix + key for key in spelling.besides), table))
    return found


class Checkpoint:
    """One file, recognised and checked against the family's full list of keys before a weight is read.

    `held` has the components that it holds. Raises ModelError for a file of another family or size, and for keys that are missing,
    left over or of another shape.
    """

    def __init__(self, family: Family, path: Path):
        self.family, self.path, self.header = family, path, layouts.read_header(path)
        layouts.require(self.header, family.name)
        self.variant = max(family.variants, key=self._likeness)
        self.tables: dict[str, Table] = {}
        accounted: set[str] = set()
        for name in family.original:
            count, besides, table = self._closest(name)
            if 2 * count > len(table):
                self.tables[name] = table
                accounted |= besides | {original.key for original, _ in table.values()}
        self.held = frozenset(self.tables)
        self._check(accounted)

    def _closest(self, name: str, variant: str | None = None) -> tuple[int, frozenset[str], Table]:
        """The spelling in which the file holds most tensors of a component, with their number."""
        found = tables(type(self.family), name, self.variant if variant is None else variant)
        counted = [
            (sum(self.header.shapes.get(o.key) == o.shape(shape) for o, shape in table.values()), besides, table)
            for _, besides, table in found
        ]
        return max(counted, key=lambda found: found[0])

    def _likeness(self, variant: str) -> int:
        """Tensors of the denoiser that fit, less those that are missing or have no place."""
        fitting, _, table = self._closest(self.family.denoiser_name, variant)
        known = {original.key for original, _ in table.values()}
        return fitting - len(known - self.header.shapes.keys()) - len(self.header.shapes.keys() - known)

    def _check(self, accounted: Collection[str]) -> None:
        stored = self.header.shapes
        for name, table in self.tables.items():
            missing = {o.key for key, (o, shape) in table.items() if o.key not in stored and self.family.stand_in(name, key, shape) is None}
            if missing:
                raise ModelError(f"{self.path} lacks weights of {name}: {spell(list(missing))}.")
            self._refuse_sizes(table)
        name = self.family.denoiser_name
        if name not in self.held and layouts.identify(self.header) == self.family.name:
            by_name = max((table for _, _, table in tables(type(self.family), name, self.variant)), key=self._named)
            self._refuse_sizes(by_name)
        left_over = [key for key in stored if key not in accounted and not key.startswith(IGNORED) and not key.endswith(IGNORED_ENDS)]
        if left_over:
            raise ModelError(f"{self.path} holds keys that {self.family.name} has no place for: {spell(left_over)}.")

    def _named(self, table: Table) -> int:
        return sum(original.key in self.header for original, _ in table.values())

    def _refuse_sizes(self, table: Table) -> None:
        stored = self.header.shapes
        wrong = {
            f"{original.key} {stored[original.key]} instead of {original.shape(shape)}"
            for original, shape in table.values()
            if original.key in stored and stored[original.key] != original.shape(shape)
        }
        if wrong:
            raise ModelError(f"{self.path} is not a {self.family.name} of the usual size: {spell(list(wrong))}.")

    def check(self, name: str) -> None:
        """All of a file is checked when it is opened."""

    def config(self, name: str) -> dict[str, Any]:
        return own_config(self.family, name, self.variant)

    def index(self) -> dict[str, Any]:
        return read_json(self.family.configs / "model_index.json")

    def scheduler_config(self) -> dict[str, Any]:
        """The family's own, with what the file says of itself: v-prediction and zero terminal SNR are marked by empty tensors."""
        config = self.config("scheduler")
        if "prediction_type" not in config:
            return config
        told = self.header.metadata.get("modelspec.prediction_type", "").lower()
        if "v_pred" in self.header or told in ("v", "v_prediction"):
            config["prediction_type"] = "v_prediction"
        if "ztsnr" in self.header:
            if config["prediction_type"] != "v_prediction":
                raise ModelError(f"{self.path} is marked `ztsnr` but not `v_pred`: zero terminal SNR needs v-prediction.")
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        """One of the networks that are held. Each tensor is read for itself, so that memory holds the network once."""
        network = empty(self.family, name, self.config(name))
        state = dict(self._tensors(name, dtype, network))
        for key, tensor in network.state_dict().items():
            if key not in state:
                state[key] = self.family.stand_in(name, key, tuple(tensor.shape)).to(dtype)
        network.load_state_dict(state, strict=True, assign=True)
        if library(self.family, name) == "transformers":
            network.tie_weights()
        return network

    def _tensors(self, name: str, dtype: torch.dtype, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        there = {key: original for key, (original, _) in self.tables[name].items() if original.key in self.header}
        if self.path.suffix == layouts.GGUF:
            from charforgex.families.gguf_files import read_tensors

            yield from read_tensors(self.path, there, dtype, network)
            return
        from safetensors import safe_open

        read: dict[Original, Tensor] = {}
        with safe_open(self.path, framework="pt") as file:
            for key, original in there.items():
                if original not in read:  # tied weights are one tensor
                    read[original] = _read(file, original).to(dtype).contiguous()
                yield key, read[original]

    def digest(self, name: str) -> str:
        """What identifies a component: its own bytes and config. Two checkpoints that share a VAE have the same one."""
        digest, known, header = hashlib.sha256(), stamp(self.path), self.header
        for key, (original, _) in sorted(self.tables[name].items()):  # by our names: the prefix in the file does not matter
            if original.key in header:
                stored = original.key
                digest.update(f"{key} {original.rows} {header.dtypes[stored]} {span_hash(known, *header.offsets[stored])}".encode())
        digest.update(json.dumps(self.config(name), sort_keys=True).encode())
        return digest.hexdigest()


def _read(file, original: Original) -> Tensor:
    if original.rows is None:
        return original.read(file.get_tensor(original.key))
    stored = file.get_slice(original.key)
    # parts of one storage could not be saved again, and would keep all of it in memory
    return original.read(stored[original.span(stored.get_shape()[0])]).clone()
