"""What a motion's loss looks at: the noise in every frame, and how frames differ from one of them. Zhao et al. 2023, MotionDirector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.training.losses import diffusion_loss


def without_appearance(clip_BCThw: Tensor, anchor_B: Tensor, strength: float = 1.0) -> Tensor:
    """Predictions or targets of a clip with what all frames share made small: appearance debiasing.

    sqrt(b^2 + 1) e_i - b e_anchor for frame i, with b = `strength`. For independent frames of unit variance each other frame then has the
    variance 2 b^2 + 1. What is the same in all frames is left with the factor sqrt(b^2 + 1) - b: 0.41421 at b = 1, and all of it at 0.
    `anchor_B` are the indices of the anchor frames, the same ones for prediction and target.
    """
    return math.sqrt(strength**2 + 1) * clip_BCThw - strength * one_frame(clip_BCThw, anchor_B)


def one_frame(clip_BCThw: Tensor, frame_B: Tensor) -> Tensor:
    """Of each clip the frame of that index, (B, C, 1, h, w): an anchor, or the picture that a spatial adapter learns from."""
    return clip_BCThw[torch.arange(len(clip_BCThw), device=clip_BCThw.device), :, frame_B.to(clip_BCThw.device)].unsqueeze(2)


def frame_indices(count: int, frames: int, *key: object) -> Tensor:
    """For each of so many clips one frame, all equally likely: (count,) integers, a function of `key`."""
    return torch.randint(frames, (count,), generator=torch_generator(*key, "frame"))


def motion_losses(
    prediction: Tensor,
    target: Tensor,
    weight_B: Tensor,
    anchor_B: Tensor,
    strength: float = 1.0,
    kind: str = "mse",
    huber_delta: float = 0.1,
) -> Tensor:
    """Per-clip losses (B,) of a temporal adapter: the plain error, and that without appearance besides, if `strength` is above 0."""
    plain = diffusion_loss(prediction, target, weight_B, kind=kind, huber_delta=huber_delta)
    if strength == 0:
        return plain
    debiased = (without_appearance(clip.float(), anchor_B, strength) for clip in (prediction, target))
    return plain + diffusion_loss(*debiased, weight_B, kind=kind, huber_delta=huber_delta)
