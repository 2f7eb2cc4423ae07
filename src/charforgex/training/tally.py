"""What work costs: bytes alive at once, multiplications, bytes read and written, calls. On real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tally(TorchDispatchMode):
    """Counts while it is entered. Storages that were there before are not among the bytes; what they come to is `held_bytes`.

    `peak_bytes` are the most that were alive at once of what was made inside; `flops` two for each multiplication with an addition;
    `moved_bytes` those that calls without such multiplications read and wrote.
    """

    def __init__(self):
        super().__init__()
        self.alive_bytes = self.peak_bytes = self.flops = self.moved_bytes = self.calls = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Storages that do not count."""
        for tensor in tensors:
            self._know(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), out))
        self.leave_out(given)
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                self._know(storage, storage.nbytes())
        moves = bool(made) and not func.is_view and func is not torch.ops.aten.detach.default  # fake tensors are asked for sizes as well
        self.calls += moves
        packet = func._overloadpacket
        if packet in (ATTENTION, ATTENTION_BACK):
            back = packet is ATTENTION_BACK
            shapes = [tensor.shape for tensor in args[: 3 + back]]
            self.flops += sdpa_backward_flop_count(*shapes) if back else sdpa_flop_count(*shapes)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif moves:
            self.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return out

    def _know(self, storage: Any, size: int = 0) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive_bytes -= size


def held_bytes(network: nn.Module) -> int:
    """Of a network's weights and buffers, shared ones once."""
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())}
    return sum(storage.nbytes() for storage in storages.values())
