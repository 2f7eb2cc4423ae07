"""Frames between two frames: blended, moved along the optical flow, or by a trained network.

Frames are uint8 RGB (H, W, 3); a time is in (0, 1), from the first frame to the second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from charforgex.generation.ifnet import IFNet

Method = Callable[[np.ndarray, np.ndarray, Sequence[float]], list[np.ndarray]]

SMALLEST = 32  # pixels a side that the optical flow needs
STEPS = 2  # of the search for where a pixel came from; more of them run off at the edges of what moves
APART = 3.0  # of 255: the frames differing so much more along one flow than along the other makes it count less by a factor of e
UNSEEN = 1e-3  # what a frame counts of the other one where it does not show the place
OVERLAP = 128  # pixels of tiles of the network
SMALL = 96  # pixels of the longer side at which cuts are looked for
ANOTHER = 24.0  # of 255: from which difference on a colour is another


def linear(first: np.ndarray, second: np.ndarray, times: Sequence[float]) -> list[np.ndarray]:
    """Each pixel from one colour to the other. What moves is seen twice: the floor that others are measured by."""
    import cv2

    return [cv2.addWeighted(first, 1 - time, second, time, 0) for time in times]


def dis(first: np.ndarray, second: np.ndarray, times: Sequence[float]) -> list[np.ndarray]:
    """Moved along the dense inverse search flow (Kroeger et al. 2016, as OpenCV has it) of both directions.

    Each of the flows says where a pixel of the new frame lies in the two frames; of a frame that does not show the place, nothing is taken.
    The flow along which they agree counts: at the edge of what covers something, or uncovers it, this is one of the two.
    """
    found = []
    for one, other in _ways(first, second, times):
        weight = 1 / (1 + np.exp(np.clip((one.apart - other.apart) / APART, -30, 30)))[..., None]
        found.append(np.clip(weight * one.frame + (1 - weight) * other.frame + 0.5, 0, 255).astype(np.uint8))
    return found


def started(first: np.ndarray, second: np.ndarray, times: Sequence[float]) -> np.ndarray:
    """What `dis` knows of the frames at these times, float32 (T, 5, H, W), for a network to go on from: at each pixel the flow along which
    the two frames agree better, to the first one (x, y) and to the second one, and the logit of the first one's share.
    """
    found = []
    for ways in _ways(first, second, times):
        one, other = (np.dstack([way.flow, np.log(way.share / (1 - way.share))]) for way in ways)
        found.append(np.where((ways[0].apart <= ways[1].apart)[..., None], one, other).transpose(2, 0, 1))
    return np.stack(found)


class Way(NamedTuple):
    """A new frame as one of the flows has it, float32: `flow` (H, W, 4) from its pixels to the first frame (x, y) and to the second one,
    the first one's `share` (H, W) in the `frame` (H, W, 3) that they give together, and how far `apart` (H, W) they are around each pixel.
    """

    flow: np.ndarray
    share: np.ndarray
    frame: np.ndarray
    apart: np.ndarray


def _ways(first: np.ndarray, second: np.ndarray, times: Sequence[float]) -> Iterator[tuple[Way, Way]]:
    """At each time, by the flow from the first frame to the second, and by the flow back."""
    import cv2

    height, width = first.shape[:2]
    below, beside = max(0, SMALLEST - height), max(0, SMALLEST - width)
    if below or beside:
        first, second = (cv2.copyMakeBorder(one, 0, below, 0, beside, cv2.BORDER_REPLICATE) for one in (first, second))
    grey = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (first, second)]
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    there, back = finder.calc(*grey, None), finder.calc(*grey[::-1], None)
    grid = np.stack(np.meshgrid(*(np.arange(side, dtype=np.float32) for side in first.shape[1::-1])), -1)
    for time in times:
        one, other = _moved(first, second, there, grid, time), _moved(second, first, back, grid, 1 - time)
        other = other._replace(flow=np.concatenate([other.flow[..., 2:], other.flow[..., :2]], -1), share=1 - other.share)
        yield tuple(Way(*(part[:height, :width] for part in way)) for way in (one, other))


def _moved(first: np.ndarray, second: np.ndarray, flow: np.ndarray, grid: np.ndarray, time: float) -> Way:
    """The frame at `time` as the flow from `first` to `second` has it."""
    import cv2

    moved = flow
    for _ in range(STEPS):  # what is here now left from where its own flow led here
        moved = _at(flow, grid - time * moved)
    ways = -time * moved, (1 - time) * moved
    one, two = (_at(frame, grid + way, crisp=True).astype(np.float32) for frame, way in zip((first, second), ways, strict=True))
    here, there = (_shown(grid + way) + UNSEEN for way in ways)
    share = (1 - time) * here / ((1 - time) * here + time * there)
    frame = share[..., None] * one + (1 - share[..., None]) * two
    return Way(np.concatenate(ways, -1), share, frame, cv2.blur(np.abs(one - two).mean(-1), (5, 5)))


def _shown(places: np.ndarray) -> np.ndarray:
    """Float32 (H, W): 1 where these places are within a frame, and 0 beyond its edge."""
    height, width = places.shape[:2]
    x, y = places[..., 0], places[..., 1]
    return ((x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)).astype(np.float32)


def small(pixels: np.ndarray) -> np.ndarray:
    """What `strange` compares."""
    import cv2

    scale = SMALL / max(pixels.shape[:2])
    height, width = (max(SMALLEST, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def strange(first: np.ndarray, second: np.ndarray) -> float:
    """Share of two small frames whose colour is another also where the optical flow finds it: little in one scene however fast it moves,
    and most at a cut. Of both directions the one that finds more.
    """
    import cv2

    grid = np.stack(np.meshgrid(*(np.arange(side, dtype=np.float32) for side in first.shape[1::-1])), -1)
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    shares = []
    for one, two in ((first, second), (second, first)):
        flow = finder.calc(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), cv2.cvtColor(two, cv2.COLOR_RGB2GRAY), None)
        shares.append(float((np.abs(_at(two, grid + flow).astype(np.float32) - one).mean(-1) > ANOTHER).mean()))
    return min(shares)


def _at(values: np.ndarray, places: np.ndarray, crisp: bool = False) -> np.ndarray:
    """`values` at (x, y), between pixels bilinearly, or cubically, which keeps outlines `crisp`; beyond the edge, the edge."""
    import cv2

    return cv2.remap(values, places, None, cv2.INTER_CUBIC if crisp else cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def by_network(net: IFNet, batch: int, tile: int | None) -> Method:
    """The network's frames, `batch` times of a pair at once, in tiles of at most `tile` pixels a side."""
    import torch

    device = next(net.parameters()).device

    @torch.inference_mode()
    def between(first: np.ndarray, second: np.ndarray, times: Sequence[float]) -> list[np.ndarray]:
        pair = [torch.tensor(one, device=device).permute(2, 0, 1)[None].float() / 255 for one in (first, second)]
        found: list[np.ndarray] = []
        for start in range(0, len(times), batch):
            some = times[start : start + batch]
            time = torch.tensor(some, dtype=torch.float32, device=device)
            frames = [one.expand(len(time), -1, -1, -1) for one in pair]
            begun = torch.from_numpy(started(first, second, some)).to(device) if net.layout.given else None
            made = net(*frames, time, begun) if tile is None else net.tiled(*frames, time, tile, OVERLAP, begun)
            found += list((made * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        return found

    return between
