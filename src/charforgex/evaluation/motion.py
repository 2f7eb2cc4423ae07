"""How a clip moves, and what should not change while it does. Functions on clips uint8 (T, H, W, 3), T at least 2, and a card for each.

Flows are in pixels a frame, float32 (T - 1, H, W, 2) with x first; a side is sqrt(H W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from charforgex.errors import DataError
from charforgex.evaluation.metric import Card

if TYPE_CHECKING:
    from charforgex.embedders import Embedder

FINE = 256  # pixels of the shorter side up to which frames are enlarged for the flow, whose patches have 8
GRID = 8  # cells a side of what `alike` compares
LEAST = 0.02  # of the background or of what both frames show, to say anything by
LAG = 0.25  # of a clip's length that a motion may come earlier or later

CARDS: dict[str, Card] = {
    "strength": Card(
        title="motion strength",
        meaning="how much moves and how fast: mean length of the optical flow",
        range="[0, ...) sides a second",
        better="neither",
        source="flow magnitude, as the dynamic degree of VBench (Huang et al. 2024); by dense inverse search (Kroeger et al. 2016)",
        lies="flicker and noise move as well; what has no texture does not seem to move",
    ),
    "flicker": Card(
        title="flicker",
        meaning="how much the colour of what stays visible changes from frame to frame: root mean square difference after each next frame "
        "is moved back along the flow",
        range="[0, 1] of the full range",
        better="lower",
        source="root of the warp error of Lai et al. 2018; what is covered, by both flows' consistency (Sundaram et al. 2010, eq. 5)",
        lies="light that changes and cuts count; what is covered or uncovered does not; a still picture has none",
    ),
    "alike": Card(
        title="motion similarity",
        meaning="how alike a clip moves to the nearest of some reference clips: cosine of the flows' histories on a grid of 8 x 8, at the "
        "best shift in time of at most a quarter",
        range="cosine, [-1, 1]",
        better="higher",
        source="this project; between trajectories as the motion fidelity of Yatim et al. 2024",
        lies="the same motion elsewhere in the picture is another one; of many references one is always near: compare equal numbers",
    ),
    "drift": Card(
        title="identity drift",
        meaning="how far the character changes while it moves: 1 - mean cosine of each frame to the first and to the one before",
        range="cosine distance, [0, 2]",
        better="lower",
        source="1 - subject consistency of VBench (Huang et al. 2024), with an embedder of who it is",
        lies="a still clip has none; turned heads and closed eyes count as far as the embedder minds them: read it against real clips",
    ),
    "background": Card(
        title="background change",
        meaning="how much what is behind the character changes from frame to frame once the camera's motion is taken out: mean absolute "
        "difference",
        range="[0, 1] of the full range",
        better="lower",
        source="this project; the camera is a similarity fitted to the background's flow by RANSAC (Fischler & Bolles 1981)",
        lies="what really moves behind the character counts; a background of one colour cannot change in any other way than by its colour",
    ),
}


class Flow(NamedTuple):
    """`there[t]` leads from frame t to t + 1, `back[t]` from t + 1 to t."""

    there: np.ndarray
    back: np.ndarray


def flow_of(clip: np.ndarray) -> Flow:
    """Raises DataError for what is no clip."""
    import cv2

    check(clip)
    height, width = clip.shape[1:3]
    times = max(1.0, FINE / min(height, width))
    size = (round(width * times), round(height * times))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    if times > 1:
        grey = [cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in grey]
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def found(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        flow = finder.calc(one, two, None)
        if times == 1:
            return flow
        shrunk = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA)
        return shrunk * np.float32([width / size[0], height / size[1]])

    pairs = list(pairwise(grey))
    return Flow(np.stack([found(one, two) for one, two in pairs]), np.stack([found(two, one) for one, two in pairs]))


def check(clip: np.ndarray) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
        raise DataError(f"a clip is uint8 (frames, height, width, 3), and this is {clip.dtype} {clip.shape}; convert it")
    if len(clip) < 2:
        raise DataError(f"a clip of {len(clip)} frames does not move; give 2 or more")


def strength(clip: np.ndarray, fps: float, flow: Flow | None = None) -> float:
    """Sides a second. A clip whose pixels all move by k a frame has k / side x fps."""
    there = (flow or flow_of(clip)).there
    return float(np.hypot(there[..., 0], there[..., 1]).mean() / _side(clip) * fps)


def flicker(clip: np.ndarray, flow: Flow | None = None) -> float:
    """Share of the full range. Independent noise of the standard deviation s in each frame of a still clip gives at most sqrt(2) s.

    Pairs of frames that have next to nothing in common do not count. NaN where no others are.
    """
    flow = flow or flow_of(clip)
    found = []
    for t, (there, back) in enumerate(zip(*flow, strict=True)):
        moved, inside = _moved(clip[t + 1], there)
        seen = inside & ~_covered(there, back)
        if seen.mean() >= LEAST:
            found.append(np.square((clip[t] - moved)[seen] / 255).mean())
    return float(np.sqrt(np.mean(found))) if found else float("nan")


def history(clip: np.ndarray, flow: Flow | None = None) -> np.ndarray:
    """What `alike` compares: float32 (T - 1, GRID, GRID, 2), the mean flow of each cell in sides a frame."""
    import cv2

    there = (flow or flow_of(clip)).there / np.float32(_side(clip))
    return np.stack([cv2.resize(step, (GRID, GRID), interpolation=cv2.INTER_AREA) for step in there])


def alike(found: np.ndarray, references: Sequence[np.ndarray]) -> float:
    """Of histories, which all count the same frames a second: the cosine to the nearest reference. What does not move is like none: 0."""
    if not references:
        raise DataError("there is no reference clip to compare the motion with")
    return max(_cosine(found, reference) for reference in references)


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    """At the best lag, of what both clips then have."""
    longest = int(LAG * min(len(one), len(two)))
    best = -1.0
    for lag in range(-longest, longest + 1):
        first, second = one[max(0, lag) :], two[max(0, -lag) :]
        count = min(len(first), len(second))
        first, second = first[:count].ravel(), second[:count].ravel()
        whole = float(np.linalg.norm(first) * np.linalg.norm(second))
        best = max(best, float(first @ second) / whole if whole > 1e-9 else 0.0)
    return best


def drift(clip: np.ndarray, embedder: Embedder) -> float:
    """Cosine distance, by an embedder of `charforgex.embedders`."""
    from PIL import Image

    check(clip)
    vectors = np.asarray(embedder([Image.fromarray(frame) for frame in clip]), np.float64)
    return float(1 - ((vectors[1:] @ vectors[0]).mean() + (vectors[1:] * vectors[:-1]).sum(1).mean()) / 2)


def background(clip: np.ndarray, subject_THW: np.ndarray, flow: Flow | None = None) -> float:
    """Share of the full range. `subject_THW` is true where the character is, at least; NaN where next to nothing else is seen."""
    import cv2

    if subject_THW.shape != clip.shape[:3]:
        raise DataError(f"a mask {subject_THW.shape} does not fit a clip {clip.shape}; it is (frames, height, width)")
    flow = flow or flow_of(clip)
    height, width = clip.shape[1:3]
    places = np.stack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)), -1)
    found = []
    for t, (there, back) in enumerate(zip(*flow, strict=True)):
        behind = ~subject_THW[t]
        known = behind & ~_covered(there, back)
        if known.mean() < LEAST:
            continue
        camera, _ = cv2.estimateAffinePartial2D(places[known], (places + there)[known], method=cv2.RANSAC, ransacReprojThreshold=0.5)
        if camera is None:
            continue
        steady = (places @ camera[:, :2].T + camera[:, 2] - places).astype(np.float32)
        moved, inside = _moved(clip[t + 1], steady)
        hidden, _ = _moved(subject_THW[t + 1].astype(np.uint8), steady)
        seen = behind & inside & (hidden == 0)
        if seen.mean() >= LEAST:
            found.append(np.abs(clip[t] - moved)[seen].mean() / 255)
    return float(np.mean(found)) if found else float("nan")


def table() -> str:
    """The cards as docs/motion.md lists them."""
    head = ("measure", "meaning", "range", "better", "source", "when it lies")
    rows = [head, ("---",) * len(head)]
    rows += [(f"`{name}`", card.meaning, card.range, card.better, card.source, card.lies) for name, card in CARDS.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _side(clip: np.ndarray) -> float:
    return float(np.sqrt(clip.shape[1] * clip.shape[2]))


def _moved(frame: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A next frame as float32 where the flow says that this one's pixels are in it, and which of them are inside of it."""
    import cv2

    height, width = frame.shape[:2]
    x, y = flow[..., 0] + np.arange(width, dtype=np.float32), flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return cv2.remap(frame.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), inside


def _covered(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Where the way back does not lead to where the way there began: |w + w'|^2 > 0.01 (|w|^2 + |w'|^2) + 0.5."""
    returned, _ = _moved(back, there)
    apart = np.square(there + returned).sum(-1)
    return apart > 0.01 * (np.square(there).sum(-1) + np.square(returned).sum(-1)) + 0.5
