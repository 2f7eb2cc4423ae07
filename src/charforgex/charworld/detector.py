"""Finds the faces of drawn characters: a small fully convolutional network that marks each face's middle on a map, and there says
how large the face is and where its eyes, nose and mouth are. As CenterNet does (Zhou et al. 2019, "Objects as Points").

Shapes: B pictures, H and W pixels (multiples of 32), h = H / 4 and w = W / 4 cells.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4
DEEPEST = 32
UNIT = 16.0  # pixels: sizes are learnt as logarithms of multiples of this
SIDES = (128, 192, 320)  # the long side at which a picture is looked at: near faces, and small ones
SMALLEST = 6.0  # pixels, at such a side, of what may be a face: it learns on 8 and more


class Norm(nn.Module):
    """Layer norm over each place's channels (Ba et al. 2016). Nothing is shared between places, so pictures of any size will do."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.layer_norm(x_BChw.permute(0, 2, 3, 1), self.weight.shape, self.weight).permute(0, 3, 1, 2)


def step(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), Norm(outputs), nn.SiLU())


class Faces(NamedTuple):
    """Boxes (N, 4), scores (N,) in [0, 1], and landmarks (N, 5, 2), in pixels, best first."""

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor


class Detector(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] to a map (B, 15, h, w): a logit of a face's middle, its place in the cell, log sizes, landmarks."""

    def __init__(self, widths=(16, 24, 40, 64, 80)):
        super().__init__()
        self.stem = step(3, widths[0], 2)
        self.down = nn.ModuleList(nn.Sequential(step(a, b, 2), step(b, b)) for a, b in pairwise(widths))  # to strides 4, 8, 16, 32
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths[1:]))
        self.merge = nn.ModuleList(step(a, a) for a in widths[1:-1])
        self.head = nn.Sequential(step(widths[1], 48), nn.Conv2d(48, 15, 1))
        nn.init.constant_(self.head[-1].bias[:1], -4.6)  # a face's middle is rare: Lin et al. 2017 start at a probability of 0.01

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x, levels = self.stem(pixels_B3HW), []
        for down in self.down:
            x = down(x)
            levels.append(x)
        for k in reversed(range(len(self.up))):
            x = self.merge[k](levels[k] + F.interpolate(self.up[k](x), scale_factor=2, mode="nearest"))
        return self.head(x)

    @torch.no_grad()
    def find(self, pixels_3HW: Tensor, threshold: float = 0.4, sides: tuple[int, ...] = SIDES, most: int = 64) -> Faces:
        """Faces of one picture of any size whose score is at least `threshold`, each once, looked for at every size of `sides`.

        But not at much larger ones than its own: there is nothing more to see.
        """
        long = max(pixels_3HW.shape[1:])
        found = [self._find_at(pixels_3HW, side, threshold, most) for side in sides if side == sides[0] or side <= 1.5 * long]
        boxes, scores, landmarks = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = scores.argsort(descending=True)
        kept: list[int] = []
        for i in order.tolist():
            if all(overlap(boxes[i], boxes[k]) < 0.4 for k in kept):
                kept.append(i)
        return Faces(boxes[kept], scores[kept], landmarks[kept])

    def _find_at(self, pixels_3HW: Tensor, side: int, threshold: float, most: int) -> Faces:
        height, width = pixels_3HW.shape[1:]
        scale = side / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = F.interpolate(pixels_3HW[None], size, mode="bilinear", antialias=scale < 1)
        padding = (0, -size[1] % DEEPEST, 0, -size[0] % DEEPEST)
        boxes, scores, landmarks = decode(self(F.pad(small, padding))[0], threshold, most)
        shrunk = torch.tensor([width / size[1], height / size[0]])
        return Faces(boxes * shrunk.repeat(2), scores, landmarks * shrunk)


def decode(map_15hw: Tensor, threshold: float, most: int) -> Faces:
    """The faces whose middles are peaks of the map, in the pixels that the network saw."""
    score = map_15hw[0].sigmoid()
    peaks = (score == F.max_pool2d(score[None], 3, 1, 1)[0]) & (score >= threshold)
    peaks &= map_15hw[3:5].amin(0).exp() * UNIT >= SMALLEST
    rows, columns = peaks.nonzero(as_tuple=True)
    best = score[rows, columns].argsort(descending=True)[:most]
    rows, columns = rows[best], columns[best]
    values = map_15hw[:, rows, columns].T
    middle = (torch.stack([columns, rows], 1) + values[:, 1:3]) * STRIDE
    size = values[:, 3:5].clamp(-3, 5).exp() * UNIT
    landmarks = middle[:, None] + values[:, 5:].view(-1, 5, 2) * size[:, None]
    return Faces(torch.cat([middle - size / 2, middle + size / 2], 1), score[rows, columns], landmarks)


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    inside = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return float(inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside))


def target_of(boxes_N4: Tensor, landmarks_N52: Tensor, unclear_N: Tensor, size: int) -> Tensor:
    """What the map of a picture of `size` x `size` should be, (17, h, w): heat in place of the logit, then where the other 14
    channels count, and where the heat does not.
    """
    side = size // STRIDE
    target = torch.zeros(17, side, side)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for box, points, unclear in zip(boxes_N4, landmarks_N52, unclear_N, strict=True):
        middle, extent = (box[:2] + box[2:]) / 2 / STRIDE, box[2:] - box[:2]
        if unclear:
            left, top, right, bottom = (box / STRIDE).tolist()
            target[16][(x >= left - 1) & (x <= right) & (y >= top - 1) & (y <= bottom)] = 1
            continue
        column, row = middle.floor().clamp(0, side - 1).int().tolist()
        sigma = (extent / STRIDE / 7).clamp(min=0.5)
        heat = torch.exp(-(((x - column) / sigma[0]).square() + ((y - row) / sigma[1]).square()) / 2)
        target[0] = torch.maximum(target[0], heat)
        near = (x - column).abs().le(1) & (y - row).abs().le(1)
        offset = middle[:, None] - torch.stack([x[near], y[near]])
        learnt = torch.cat([offset, (extent / UNIT).log()[:, None].expand(2, offset.shape[1])])
        marks = ((points / STRIDE - middle) / (extent / STRIDE)).flatten()[:, None].expand(10, offset.shape[1])
        target[1:15, near] = torch.cat([learnt, marks])
        target[15, near] = heat[near]
    return target


def loss(map_B15hw: Tensor, target_B17hw: Tensor) -> Tensor:
    """(B,): the penalty-reduced focal loss of Law & Deng (2018) on the heat, and absolute errors where the faces are."""
    heat, weight, counts = target_B17hw[:, 0], target_B17hw[:, 15], 1 - target_B17hw[:, 16]
    logit = map_B15hw[:, 0]
    score = logit.sigmoid().clamp(1e-5, 1 - 1e-5)
    here = (heat == 1).float()
    focal = here * (1 - score).square() * score.log() + (1 - here) * (1 - heat) ** 4 * score.square() * (1 - score).log()
    faces = here.sum((1, 2)).clamp(min=1)
    error = (map_B15hw[:, 1:] - target_B17hw[:, 1:15]).abs().sum(1)
    places = (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
    return -(focal * counts).sum((1, 2)) / faces + places
