"""Which frames of a video are a clip: windows of so many frames at so many a second, one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from charforgex import videos
from charforgex.data.buckets import Cut
from charforgex.errors import DataError

FORGIVEN = Fraction(1, 1000)  # seconds: Matroska rounds its times to that
Window = tuple[int, ...]  # the frames of a clip, counted from the video's first; one may come several times


class Timeline(NamedTuple):
    """Of a video: its frames' (height, width), when each is shown, and when the last is over; in seconds from the first one on."""

    size: tuple[int, int]
    times: tuple[Fraction, ...]
    end: Fraction


def measure(path: Path) -> Timeline:
    """Decodes the whole video. Raises DataError for what is no video, is damaged, or changes its size."""
    size, times, end = None, [], Fraction(0)
    for frame in videos.frames(path):
        found = frame.pixels.shape[:2]
        if size not in (None, found):
            raise videos.Unreadable(path, "unsupported", f"its frames have several sizes, {_shown(size)} and {_shown(found)}")
        size, end = found, frame.time + frame.lasts
        times.append(frame.time)
    return Timeline(size, tuple(times), end)


def windows(timeline: Timeline, frames: int, fps: Fraction) -> list[Window]:
    """What is shown at 0, 1 / fps, 2 / fps, ... cut into windows; what is left at the end is in none."""
    count = ceil((timeline.end - FORGIVEN) * fps)
    indices = [max(0, bisect_right(timeline.times, k / fps + FORGIVEN) - 1) for k in range(count)]
    return [tuple(indices[start : start + frames]) for start in range(0, count - frames + 1, frames)]


def read_windows(path: Path, size: tuple[int, int], cuts: Mapping[Window, Sequence[Cut]]) -> Iterator[tuple[Window, Cut, np.ndarray]]:
    """Each window at each of its cuts, uint8 (T, H, W, 3), in the order of their last frames. One pass; what is held is one clip, cut.

    Raises DataError if the video's frames are not of `size`, or fewer than the windows take.
    """
    users: dict[int, list[Window]] = defaultdict(list)
    for window in cuts:
        for index in dict.fromkeys(window):
            users[index].append(window)
    gathered: dict[Window, dict[int, list[np.ndarray]]] = defaultdict(dict)
    for index, frame in enumerate(videos.frames(path)):
        if frame.pixels.shape[:2] != size:
            raise DataError(f"{path} is {_shown(frame.pixels.shape[:2])} pixels, not {_shown(size)} as it is said to be; describe it anew.")
        for window in users.pop(index, ()):
            gathered[window][index] = [np.asarray(cut.picture(Image.fromarray(frame.pixels))) for cut in cuts[window]]
            if index == window[-1]:
                found = gathered.pop(window)
                for place, cut in enumerate(cuts[window]):
                    yield window, cut, np.stack([found[number][place] for number in window])
        if not users:
            return
    raise DataError(f"{path} has fewer frames than it is said to have, {max(users) + 1}; describe it anew.")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
