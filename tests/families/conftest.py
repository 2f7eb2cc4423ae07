"""A base on disk in each form that it comes in, all of the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from charforgex.families.sdxl import Sdxl
from charforgex.types import Components


@pytest.fixture(scope="session")
def tiny_parts() -> Components:
    return Sdxl().tiny(seed=7)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_parts) -> Path:
    """As `save_pretrained` writes it. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-sdxl"
    Sdxl().pipeline(tiny_parts).save_pretrained(folder)
    return folder


def original_tensors(family: Sdxl, parts: Components) -> dict[str, torch.Tensor]:
    """The weights as a single file stores them: the inverse of what loading does."""
    tensors, stacks = {}, {}
    for component, spelling in family.original.items():
        for name, tensor in parts[component].state_dict().items():
            original = spelling(name, parts[component].config if component in ("unet", "vae") else {})
            if original.third is not None:
                stacks.setdefault(original.key, {})[original.third] = tensor
            elif original.transposed:
                tensors[original.key] = tensor.T.contiguous()
            else:
                tensors[original.key] = tensor[..., None, None].contiguous() if original.convolved else tensor.clone()
    return tensors | {key: torch.cat([stack[i] for i in range(3)]) for key, stack in stacks.items()}


@pytest.fixture(scope="session")
def small_family(tiny_folder) -> Sdxl:
    """SDXL whose single files are of the tiny model's size."""
    return type("SmallSdxl", (Sdxl,), {"configs": tiny_folder})()


@pytest.fixture
def checkpoint(tmp_path, small_family, tiny_parts, tiny_folder):
    """Writes a single file with `changes` (key -> tensor, None to leave it out), beside a tokenizer folder. Returns its path."""
    (tmp_path / "tokenizer").symlink_to(tiny_folder / "tokenizer")

    def write(changes=None, metadata=None, name="base.safetensors") -> Path:
        tensors = original_tensors(small_family, tiny_parts) | (changes or {})
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp_path / name, metadata)
        return tmp_path / name

    return write
