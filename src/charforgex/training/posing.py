"""The stage `pose` of pre-training: the reader of poses, on frames drawn anew for every step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from charforgex.charworld import clips, poses, world
from charforgex.draws import torch_generator
from charforgex.training.stages import Pretraining


class PoseModule(Pretraining):
    """A micro-batch is pixels (B, 3, 64, 64) in [-1, 1], some soft or noisy as generated ones are, and poses (B, P) in their units."""

    def __init__(self, **settings):
        super().__init__(poses.PoseReader(), **settings)

    @staticmethod
    def batch(moments: poses.Moments, indices: Sequence[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        pixels = poses.pixels_of(np.stack([moments.picture(index) for index in indices]))
        soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
        share = torch.tensor([rng.choice((0, rng.random())) for _ in indices])[:, None, None, None]
        gain = torch.tensor([[rng.uniform(0.9, 1.1) for _ in range(3)] for _ in indices])[:, :, None, None]
        noise = torch.tensor([rng.uniform(0, 0.08) for _ in indices])[:, None, None, None]
        pixels = (pixels + share * (soft - pixels)) * gain + noise * torch.randn(pixels.shape, generator=torch_generator(rng.random()))
        wanted = np.stack([poses.pose_of(moments.scene(index)[1]) for index in indices]) / poses.UNITS
        return pixels, torch.from_numpy(wanted)

    def losses(self, micro, key: tuple) -> Tensor:
        pixels, wanted = micro
        # squares up to a whole unit: by absolute errors no arm is ever raised, since most are not
        return F.smooth_l1_loss(self.network(pixels), wanted, reduction="none").mean(1)

    @torch.no_grad()
    def measure(self, moments: poses.Moments, count: int = 2) -> dict[str, float]:
        """Root mean square errors of every number on frames of other characters, in units; and of `count` clips of every motion by
        characters with hair that no frame showed, the share whose motion is told right."""
        frames = range(1, len(moments), 2)  # of motions
        found = self.network(poses.pixels_of(np.stack([moments.picture(index) for index in frames])))
        wanted = np.stack([poses.pose_of(moments.scene(index)[1]) for index in frames]) / poses.UNITS
        errors = np.sqrt(np.square(found.numpy() - wanted).mean(0))
        told = {name: right_share(self.network, name, count) for name in poses.KNOWN}
        return {
            "motions": float(np.mean(list(told.values()))), "error": float(np.sqrt(np.square(errors).mean())),
            **{f"error/{name}": float(error) for name, error in zip(poses.POSE, errors, strict=True)},
            **{f"motions/{name}": share for name, share in told.items()},
        }  # fmt: skip


def right_share(reader: poses.PoseReader, name: str, count: int) -> float:
    """Of rendered clips of that motion by held-out characters, those in which it is recognised."""
    right = 0
    for number in range(count):
        rng = random.Random(f"recognised/{name}/{number}")
        who, setting = world.draw_identity(rng, held_out=True), clips.draw_setting(rng)
        right += poses.recognise(reader.read(clips.draw_clip(who, setting, clips.draw_motion(rng, name)))) == name
    return right / count
