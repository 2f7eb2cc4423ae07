"""A frozen base split among devices: each holds a share of its weights, and a block's are together only while it computes.

FSDP2 (`fully_shard`; Zhao et al. 2023, PyTorch FSDP) without what it does for training: what learns is small beside the base, stays whole
on every device, and its gradients are summed as ever. So checkpoints, optimizers and averages know nothing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from charforgex.errors import ConfigError
from charforgex.families.packed import PackedLinear


def check_splittable(denoiser: nn.Module, source: str) -> None:
    """Raises ConfigError for a base of packed weights, which cannot be split."""
    if any(isinstance(module, PackedLinear) for module in denoiser.modules()):
        raise ConfigError(f"trainer.strategy=fsdp: the weights of {source} are packed, and only plain ones can be split; use strategy=ddp.")


def split(denoiser: nn.Module, blocks: Sequence[nn.Module], learning: Collection[nn.Parameter], device: str, count: int) -> None:
    """Splits all parameters but `learning` among `count` processes, block by block, and moves all to `device`.

    A base that was loaded into the computer's memory never lies on one device as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (count,))
    for parameter in learning:
        parameter.data = parameter.data.to(device)
    whole = set(learning)
    for module in (*blocks, denoiser):  # the last has what lies outside of blocks
        fully_shard(module, mesh=mesh, ignored_params=whole)
