"""What a motion's loss looks at besides the noise itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def without_appearance(clip_BCThw: Tensor, anchor_B: Tensor, strength: float = 1.0) -> Tensor:
    """Predictions or targets of a clip with what all frames share made small: appearance debiasing (Zhao et al. 2023, MotionDirector).

    sqrt(b^2 + 1) e_i - b e_anchor for frame i, with b = `strength`. For independent frames of unit variance each other frame then has the
    variance 2 b^2 + 1. What is the same in all frames is left with the factor sqrt(b^2 + 1) - b: 0.41421 at b = 1, and all of it at 0.
    `anchor_B` are the indices of the anchor frames, the same ones for prediction and target.
    """
    anchor = clip_BCThw[torch.arange(len(clip_BCThw), device=clip_BCThw.device), :, anchor_B].unsqueeze(2)
    return math.sqrt(strength**2 + 1) * clip_BCThw - strength * anchor
