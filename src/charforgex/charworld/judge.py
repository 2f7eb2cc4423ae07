"""The judge: who is it, and what does the picture show? For measuring only; no generator ever sees its gradients.

One small convolutional trunk with two readings: an identity embedding (trained against look-alikes that the same words
describe) and every attribute of `world.ATTRIBUTES`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charforgex.charworld.world import ATTRIBUTES

EMBEDDING = 128


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(),
    )  # fmt: skip


class Judge(nn.Module):
    """Pixels (B, 3, 64, 64) in [-1, 1] to identity embeddings (B, 128) of length 1 and attribute logits."""

    def __init__(self, widths=(32, 64, 96, 160)):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1), nn.SiLU(), block(widths[0], widths[1], 1), block(widths[1], widths[2], 2),
            block(widths[2], widths[3], 2), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.sizes = [len(values) for values in ATTRIBUTES.values()]
        self.identity = nn.Linear(16 * widths[-1], EMBEDDING)
        self.attributes = nn.Linear(16 * widths[-1], sum(self.sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.trunk(pixels)
        logits = dict(zip(ATTRIBUTES, self.attributes(features).split(self.sizes, -1), strict=True))
        return F.normalize(self.identity(features), dim=-1), logits

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        return self(pixels)[0]

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[dict[str, str]]:
        """What each picture shows: attribute -> value."""
        best = {name: logits.argmax(-1).tolist() for name, logits in self(pixels)[1].items()}
        return [{name: ATTRIBUTES[name][best[name][i]] for name in ATTRIBUTES} for i in range(len(pixels))]
