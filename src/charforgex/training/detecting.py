"""The stage `faces` of pre-training: the detector of drawn characters' faces, on pictures composed anew for every step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from charforgex.charworld import crowds
from charforgex.charworld.detector import Detector, loss, overlap, target_of
from charforgex.training.stages import Pretraining

THRESHOLD = 0.4
SAME = 0.5  # intersection over union of a box that counts as found


class FacesModule(Pretraining):
    """A micro-batch is pixels (B, 3, 128, 128) in [-1, 1] and the maps that the network should give."""

    def __init__(self, **settings):
        super().__init__(Detector(), **settings)

    @staticmethod
    def batch(cast: crowds.Cast, indices: Sequence[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        crowd = [crowds.compose(cast, rng) for _ in indices]
        targets = [target_of(*(torch.from_numpy(part) for part in (c.boxes, c.landmarks, c.unclear)), crowds.SIZE) for c in crowd]
        return torch.stack([_pixels(c.picture) for c in crowd]), torch.stack(targets)

    def losses(self, micro, key: tuple) -> Tensor:
        pixels, target = micro
        return loss(self.network(pixels), target)

    @torch.no_grad()
    def measure(self, cast: crowds.Cast, count: int = 120) -> dict[str, float]:
        """Recall and precision of boxes on `count` new pictures at an overlap of 0.5, and the landmarks' mean error in face widths."""
        right = wanted = given = 0
        errors = []
        for number in range(count):
            crowd = crowds.compose(cast, random.Random(f"measure/{number}"), people=number % 4)
            found = self.network.find(_pixels(crowd.picture), THRESHOLD)
            matched = match(found.boxes, torch.from_numpy(crowd.boxes).float())
            clear = [k for k, unclear in enumerate(crowd.unclear) if not unclear]
            right += sum(k in matched for k in clear)
            wanted += len(clear)
            given += len(found.boxes) - sum(k in matched for k in range(len(crowd.boxes)) if k not in clear)
            for k in clear:
                if k in matched:
                    distance = np.linalg.norm(found.landmarks[matched[k]].numpy() - crowd.landmarks[k], axis=1).mean()
                    errors.append(distance / (crowd.boxes[k, 2] - crowd.boxes[k, 0]))
        landmark_error = float(np.mean(errors)) if errors else 1.0
        return {"recall": right / max(1, wanted), "precision": right / max(1, given), "landmark_error": landmark_error}


def match(found_N4: Tensor, true_M4: Tensor) -> dict[int, int]:
    """True box -> found box, best found first, each once, where they overlap enough."""
    matched: dict[int, int] = {}
    for index, box in enumerate(found_N4):
        overlaps = [(overlap(box, truth), k) for k, truth in enumerate(true_M4) if k not in matched]
        if overlaps and max(overlaps)[0] >= SAME:
            matched[max(overlaps)[1]] = index
    return matched


def _pixels(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
