"""The stage `flow` of pre-training: the network that makes frames between frames, from what the optical flow knows of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charforgex.charworld import moving
from charforgex.charworld.crowds import Cast
from charforgex.generation.between import by_network, dis, started
from charforgex.generation.ifnet import IFNet, Layout
from charforgex.training.stages import Pretraining

LAYOUT = Layout((48, 32), None, 0, given=True)
SIZE = 96  # of scenes; at 128 they are measured
EARLIER = 0.6  # what a block's error counts of the next one's
LEVELS = 3  # of the Laplacian pyramid
SMALL = 0.01  # errors of the picture, of 1, below which it matters less and less that they get smaller
FLOW = 0.05  # what a pixel of error in a known flow counts, of an error of 1 in brightness


class Example(NamedTuple):
    """Three frames uint8 (3, H, W), the time of the second, its true flow (4, H, W), NaN where it is not known, and what `between.started`
    found (5, H, W), both float16.
    """

    first: Tensor
    truth: Tensor
    second: Tensor
    time: float
    flow: Tensor
    begun: Tensor


class Moves:
    """`count` examples, each drawn once when it is first needed. `held_out` ones have characters that no other has."""

    def __init__(self, count: int, seed: int, held_out: bool = False):
        self.count, self.seed, self.cast = count, seed, Cast(count, seed, held_out)
        self.example = cache(self._example)

    def __len__(self) -> int:
        return self.count

    def _example(self, index: int) -> Example:
        rng = random.Random(f"moves/{self.seed}/{index}")
        scene, time = moving.scene(rng, self.cast, SIZE), rng.uniform(0.03, 0.97)
        first, truth, second = (scene.frame(moment) for moment in (0, time, 1))
        flow, begun = torch.from_numpy(scene.flow(time)).permute(2, 0, 1), torch.from_numpy(started(first, second, [time])[0])
        pixels = (torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in (first, truth, second))
        return Example(*pixels, time, flow.half(), begun.half())


def turned(example: Example, rng: random.Random) -> Example:
    """The same with its sides, directions, colours and time exchanged by lot: 96 examples of one."""
    first, truth, second, time, *flows = example
    frames = [first, truth, second]
    for axis in (0, 1):
        if rng.random() < 0.5:
            frames, flows = ([one.flip(2 - axis) for one in part] for part in (frames, flows))
            sign = torch.tensor([-1 if place % 2 == axis and place < 4 else 1 for place in range(5)]).view(5, 1, 1)
            flows = [flow * sign[: len(flow)] for flow in flows]
    if rng.random() < 0.5:
        frames, flows = [one.mT for one in frames], [flow[[1, 0, 3, 2, 4][: len(flow)]].mT for flow in flows]
    order = rng.sample(range(3), 3)
    first, truth, second = (one[order] for one in frames)
    if rng.random() < 0.5:
        first, second, time = second, first, 1 - time
        flows = [flow[[2, 3, 0, 1, 4][: len(flow)]] for flow in flows]
        flows[1] = torch.cat([flows[1][:4], -flows[1][4:]])
    return Example(first, truth, second, time, *flows)


class FlowModule(Pretraining):
    """A micro-batch is the parts of its examples: frames (B, 3, H, W) in [0, 1], the times (B,), the flows in float32, and what the
    network begins with (B, 5, H, W).
    """

    def __init__(self, **settings):
        network = IFNet(LAYOUT)
        for place in range(len(LAYOUT.widths)):  # at first it leaves what it is given
            last = getattr(network, f"block{place}").lastconv[0]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(network, **settings)

    @staticmethod
    def batch(moves: Moves, indices: Sequence[int], rng: random.Random) -> tuple[Tensor, ...]:
        *frames, times, flow, begun = zip(*(turned(moves.example(index), rng) for index in indices), strict=True)
        pixels = (torch.stack(part).float() / 255 for part in frames)
        return *pixels, torch.tensor(times), torch.stack(flow).float(), torch.stack(begun).float()

    def losses(self, micro, key: tuple) -> Tensor:
        """Of every block, the last ones most: RIFE's error of the picture and, where it is known, of the flow."""
        first, truth, second, time, flow, begun = micro
        known, flow = flow.isfinite(), flow.nan_to_num()
        total, count = torch.zeros(len(first)), len(LAYOUT.widths)
        for place, (found, _, between) in enumerate(self.network.refined(first, second, time, begun)):
            astray = torch.where(known, found - flow, 0).abs().flatten(1).mean(1)
            total = total + EARLIER ** (count - 1 - place) * (laplacian(between - truth) + FLOW * astray)
        return total

    @torch.no_grad()
    def measure(self, moves: Moves, count: int = 24) -> dict[str, float]:
        """PSNR in dB at 1/4, 1/2 and 3/4 of `count` new scenes with textures of another kind: the network's and `by=dis`."""
        found: dict[str, list[float]] = {"psnr": [], "psnr_dis": []}
        for number in range(count):
            scene, times = moving.scene(random.Random(f"measure/{number}"), moves.cast, 128, strange=True), (0.25, 0.5, 0.75)
            first, second, *truths = (scene.frame(time) for time in (0, 1, *times))
            for name, method in (("psnr", by_network(self.network, 3, None)), ("psnr_dis", dis)):
                for made, truth in zip(method(first, second, times), truths, strict=True):
                    found[name].append(10 * np.log10(255**2 / max(0.01, ((made.astype(float) - truth) ** 2).mean())))
        return {name: float(np.mean(values)) for name, values in found.items()}


def laplacian(error_BChw: Tensor) -> Tensor:
    """(B,): the mean amplitude of an error at each level of its Laplacian pyramid (Bojanowski et al. 2018), all added up."""
    total = torch.zeros(len(error_BChw))
    for level in range(LEVELS):
        if level + 1 < LEVELS:
            smaller = F.avg_pool2d(error_BChw, 2)
            rest = error_BChw - F.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False)
        else:
            smaller, rest = None, error_BChw
        total = total + ((rest.square() + SMALL**2).sqrt() - SMALL).flatten(1).mean(1)
        error_BChw = smaller
    return total
