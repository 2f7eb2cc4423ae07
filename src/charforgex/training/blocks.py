"""The denoiser's blocks: compiled, which makes a step faster, or computed twice, which makes it smaller. Neither changes what is learnt."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from charforgex.errors import ConfigError
from charforgex.types import Batch

GRAPHS = 4  # of one block at most: for two sizes, with the adapter and, where the class is held still, without it


def checkpoint_blocks(denoiser: nn.Module, blocks: Sequence[nn.Module], chosen: bool | int) -> None:
    """Keeps a block's inputs alone and computes the rest again in the backward pass, for all `blocks` or the first `chosen` of them.

    The first, because their turn in the backward pass is last: when they are computed again, what the others kept is gone.
    Raises ConfigError if there are fewer blocks.
    """
    if chosen is not True and chosen > len(blocks):
        raise ConfigError(
            f"trainer.gradient_checkpointing={chosen}: this {type(denoiser).__name__} has {len(blocks)} blocks; use true for all of them."
        )
    inside = {module for block in (blocks if chosen is True else blocks[:chosen]) for module in block.modules()}

    def run(module: nn.Module, *inputs):  # diffusers hands over a transformer's blocks, and a UNet block's parts
        return checkpoint(module, *inputs, use_reentrant=False) if module in inside else module(*inputs)

    denoiser.enable_gradient_checkpointing(run)


def check_compiler(device: str) -> None:
    """Raises ConfigError if torch.compile could not work here. It writes C++ for a CPU, and for CUDA Triton, which compiles C itself."""
    if device == "mps":
        raise ConfigError("trainer.compile=true has no use on mps; set trainer.compile=false.")
    if device == "cuda":
        wanted, choices = "C", [os.environ.get("CC"), "gcc", "clang"]
    else:
        wanted, choices = "C++", [os.environ.get("CXX"), *(["cl"] if platform.system() == "Windows" else ["g++", "clang++"])]
    if not any(shutil.which(name) for name in choices if name):
        named = ", ".join(name for name in choices if name)
        raise ConfigError(f"trainer.compile=true needs a {wanted} compiler, and there is none of {named}; install one, or leave it off.")


def compile_blocks(denoiser: nn.Module, blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compiles the repeated blocks, each kind once for all of them: diffusers' choice for this network, or else the kinds of `blocks`.

    A kind's first size becomes a graph for this size, the second one a graph for all. Which come first is for `warm_up` to say.
    """
    if not denoiser._repeated_blocks:  # diffusers names none for SD3
        denoiser._repeated_blocks = sorted({type(block).__name__ for block in blocks})
    denoiser.compile_repeated_blocks(backend=backend, recompile_limit=GRAPHS * len(blocks))


def uncompiled(measure: Callable) -> Callable:
    """Decorates what measures: compiled blocks run there as written, which needs no more graphs and compares with any run."""

    @wraps(measure)
    def run(*args, **kwargs):
        with torch.compiler.set_stance("force_eager"):
            return measure(*args, **kwargs)

    return run


def first_grids(grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest and the largest of the latent grids that come, one where they are equally large: they see the same two graphs."""
    ordered = sorted(set(grids), key=lambda grid: (grid[0] * grid[1], grid))
    return [ordered[0], ordered[-1]] if ordered[0][0] * ordered[0][1] < ordered[-1][0] * ordered[-1][1] else ordered[:1]


def resized(batch: Batch, grid: tuple[int, int]) -> Batch:
    """The batch on another latent grid."""
    mask = None if batch.mask_B1hw is None else F.interpolate(batch.mask_B1hw, grid)
    return replace(batch, mean_BChw=F.interpolate(batch.mean_BChw, grid), std_BChw=F.interpolate(batch.std_BChw, grid), mask_B1hw=mask)
