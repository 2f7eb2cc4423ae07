"""Frozen linear layers whose weight lies in memory in fewer bits than it is computed with, and is unpacked when it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Unpacking(torch.autograd.Function):
    """x W^T + b, where backwards unpacks W again: autograd would keep every layer's unpacked weight until then."""

    @staticmethod
    def forward(context, x: Tensor, bias: Tensor | None, unpack: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        context.save_for_backward(*stored)
        context.unpack = unpack
        return F.linear(x, unpack(*stored, dtype=x.dtype), bias)

    @staticmethod
    def backward(context, gradient: Tensor):
        stored = context.saved_tensors  # once: a checkpointed block gives them out once
        return gradient @ context.unpack(*stored, dtype=gradient.dtype), None, None, *[None] * len(stored)


class PackedLinear(nn.Linear):
    """A frozen linear layer. Its `weight` is unpacked for whoever asks, as adapters do that start from it or measure it.

    Subclasses hold the buffers that `stored` names, and `unpack(*buffers, dtype=...)` makes (out, in) of them.
    """

    stored: tuple[str, ...] = ()

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False) if bias else None

    def unpack(self, *stored: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return self.unpack(*(getattr(self, name) for name in self.stored), dtype=self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name for it, which diffusers says
        if torch.is_autocast_enabled(input.device.type):  # it would cast an unpacked weight once more
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _Unpacking.apply(input, self.bias, self.unpack, *(getattr(self, name) for name in self.stored))
