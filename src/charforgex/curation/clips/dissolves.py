"""Where one shot goes over into another little by little: dissolves, and fades to or from one colour.

In a dissolve from A to B every frame is nearly (1 - x) A + x B, where x grows from 0 to 1 and A and B have little in common. What moves is
no blend of where it was and where it will be. Frames are compared without their mean brightness, and what they have of A and of B is
measured by itself and has to add up to 1, so that a light that goes on or off is no dissolve.
"""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

RATE = 20  # frames a second that are looked at, at most
SIDE, BLUR = 32, 1.0  # pixels a side of what is compared, and of its blur: what moves little counts little
SPANS = (4, 6, 8, 12, 18, 26, 36)  # frames looked at from A to B: a fifth of a second to three seconds
UNLIKE = 0.6  # most that A and B may correlate
FLAT, FULL = 4.0, 8.0  # grey levels over which a frame of one colour varies at most, and one that shows something at least
LEFT = 0.07  # most that no blend explains of a frame, as a share of what A and B do not have in common
SUM = 0.15  # most by which the shares of A and B may miss 1
EARLY, LATE = 0.15, 0.85  # shares of B between which two frames at least must be,
STEP, BACK = 0.5, 0.05  # none of which has so much more than the one before, or so much less


class Look(NamedTuple):
    time: Fraction
    pixels: np.ndarray  # float32 (SIDE * SIDE * 3), of mean 0 and the length of its standard deviation


class Dissolves:
    """Takes the frames of a video in time; `found` are its dissolves, (start, end) in seconds, none of which overlap in one shot."""

    def __init__(self):
        self.looks: deque[Look] = deque(maxlen=SPANS[-1] + 1)
        self.found: list[tuple[float, float]] = []
        self.before = 0  # that were found in the shots before this one

    def cut(self) -> None:
        """What follows is another shot."""
        self.looks.clear()
        self.before = len(self.found)

    def look(self, pixels: np.ndarray, time: Fraction) -> None:
        """uint8 RGB (h, w, 3), small."""
        if self.looks and time - self.looks[-1].time < Fraction(1, RATE):
            return
        small = cv2.GaussianBlur(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32), (0, 0), BLUR)
        small = (small - small.mean()).ravel() / np.sqrt(small.size)
        self.looks.append(Look(time, small))
        all_looks = np.stack([look.pixels for look in self.looks])
        products = all_looks @ all_looks.T
        for span in SPANS:
            if span < len(self.looks) and (places := blend(products[-span - 1 :, -span - 1 :])) is not None:
                first, last = (self.looks[len(self.looks) - span - 1 + place].time for place in places)
                self._add(float(first), float(last))

    def _add(self, start: float, end: float) -> None:
        while len(self.found) > self.before and self.found[-1][1] >= start:
            other = self.found.pop()
            start, end = min(start, other[0]), max(end, other[1])
        self.found.append((start, end))


def blend(products_TT: np.ndarray) -> tuple[int, int] | None:
    """Of frames whose inner products these are: between which two of them the first goes over into the last, if it does."""
    first, last, own = products_TT[0], products_TT[-1], np.diag(products_TT)
    low, high = sorted((own[0], own[-1]))
    if high < FULL**2:
        return None
    if low < FLAT**2:  # a fade
        other = first if own[0] == high else last
        share = other / high
        left, total = (own - share * other) / high, np.ones_like(own)
        share = 1 - share if own[0] == high else share
    else:
        common = first[-1]
        if common > UNLIKE * np.sqrt(low * high):
            return None
        apart = low * high - common**2
        of_first, of_last = (first * own[-1] - last * common) / apart, (last * own[0] - first * common) / apart
        left = (own - of_first * first - of_last * last) * high / apart  # of what the fainter one has alone
        total = of_first + of_last
        share = of_last / np.maximum(total, 1e-3)
    steps = np.diff(share)
    inner = 1 + np.flatnonzero((share[1:-1] > EARLY) & (share[1:-1] < LATE))
    if len(inner) < 2 or left.max() > LEFT or np.abs(total[inner] - 1).max() > SUM or steps.max() > STEP or steps.min() < -BACK:
        return None
    return int(inner[0]) - 1, int(inner[-1]) + 1
