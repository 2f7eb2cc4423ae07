"""Clips that are longer than a network knows at once: overlapping windows of frames, averaged at every denoising step.

Any network of video may be run so, `in_windows` asks for nothing but its prediction. T frames, W windows of L frames; frames of a tensor
are along dimension 2, as in (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from charforgex.draws import torch_generator

Predict = Callable[[Tensor, Tensor], Tensor]  # clips (N, C, L, h, w) and which frames they are (N, L) to predictions


@dataclass(frozen=True)
class Windowing:
    """Windows of `length` frames, of which neighbours share `overlap`.

    `blend` weighs a window's frames: pyramid trusts its middle most, so that no edge shows; uniform trusts all alike. With `loop` windows
    reach over the end to the beginning, also where one window would hold all frames. `noise` is of frames beyond the first window:
    shuffled is that of the first one in another order (FreeNoise, Qiu et al. 2023), which keeps the whole clip alike; own is new.
    """

    length: int
    overlap: int
    blend: Literal["pyramid", "uniform"] = "pyramid"
    loop: bool = False
    noise: Literal["shuffled", "own"] = "shuffled"

    def __post_init__(self):
        assert 0 <= self.overlap < self.length, f"windows of {self.length} frames cannot share {self.overlap}"

    @property
    def stride(self) -> int:
        return self.length - self.overlap


@dataclass(frozen=True)
class Windows:
    """`frames` are int64, in the order in which the network sees them; `weights` float32, those of one frame in all windows sum to 1."""

    frames_WL: Tensor
    weights_WL: Tensor


def windows(count: int, how: Windowing) -> Windows:
    """Of a clip of `count` frames; one window where that is enough. The last window of a clip that does not loop ends with it."""
    length = min(how.length, count)
    if how.loop:
        starts = list(range(0, count, how.stride))
        starts = starts if len(starts) > 1 or count == 1 else [0, count // 2]
    else:
        starts = [*range(0, count - length, how.stride), count - length]
    frames = (torch.tensor(starts)[:, None] + torch.arange(length)) % count
    place = torch.arange(length)
    shape = torch.minimum(place + 1, length - place).float() if how.blend == "pyramid" else torch.ones(length)
    weights = shape.expand(len(starts), length)
    totals = torch.zeros(count).index_add_(0, frames.flatten(), weights.flatten())
    return Windows(frames, weights / totals[frames])


def in_windows(predict: Predict, noisy_BCThw: Tensor, parts: Windows, at_once: int) -> Tensor:
    """The network's prediction of whole clips, float32. `predict` is given windows of all clips, `at_once` of them of each at a time."""
    out = torch.zeros_like(noisy_BCThw, dtype=torch.float32)
    batch = len(noisy_BCThw)
    for start in range(0, len(parts.frames_WL), at_once):
        frames, weights = parts.frames_WL[start : start + at_once], parts.weights_WL[start : start + at_once].to(out.device)
        some = noisy_BCThw[:, :, frames].transpose(1, 2).flatten(0, 1)  # (B * W, C, L, h, w)
        found = predict(some, frames.repeat(batch, 1)).float().unflatten(0, (batch, -1))
        # one by one: adding at once has no fixed order on GPUs
        for number, (places, weight) in enumerate(zip(frames, weights, strict=True)):
            out[:, :, places] += found[:, number] * weight[:, None, None]
    return out


def noise_order(count: int, how: Windowing, seed: int) -> list[int]:
    """Which frame's noise each of `count` frames has.

    Shuffled: the next `stride` frames have that of the `stride` frames one window before them, in another order (Qiu et al. 2023, eq. 7).
    Every window that begins at a multiple of the stride thus sees the noise of each frame of the first window once.
    """
    if how.noise == "own":
        return list(range(count))
    order = list(range(min(count, how.length)))
    while len(order) < count:
        before = order[len(order) - how.length :][: how.stride]
        shuffle = torch.randperm(len(before), generator=torch_generator("noise order", seed, len(order)))
        order += [before[i] for i in shuffle]
    return order[:count]
