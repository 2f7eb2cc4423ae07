"""A video as windows: as many frames as a clip has, at its rate, none across a cut. One pass, and in memory one window at a time.

Times are seconds from the video's first frame on, as fractions. Needs PyAV, the extra `video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from charforgex import videos
from charforgex.curation.clips.dissolves import Dissolves
from charforgex.curation.clips.settings import WindowSettings
from charforgex.curation.videos import SMALL, View, fitted
from charforgex.videos import Decoded, Problem, upright

if TYPE_CHECKING:
    from PIL import Image

SMALLER = 192  # pixels of the longer side at which motion is measured
NUM_LOOKS = 4  # frames of a window that are looked at whole: for faces, sharpness and light


class Moment(NamedTuple):
    """A frame in a window: its number in the video, its time, and the frame itself until `Window.closed` makes pictures of it."""

    index: int
    time: Fraction
    decoded: Decoded | None = None
    small: np.ndarray | None = None


@dataclass
class Window:
    """The wanted times are `start`, `start` + 1 / `rate`, ...; each gets the frame that is nearest to it, and no frame serves two."""

    shot: int
    start: Fraction
    rate: Fraction
    num_frames: int
    moments: dict[int, Moment] = field(default_factory=dict)
    looks: dict[int, Image.Image] = field(default_factory=dict)  # whole pictures, by their places

    def __post_init__(self):
        self.looked_at = {round(k * (self.num_frames - 1) / (NUM_LOOKS - 1)) for k in range(NUM_LOOKS)}

    def offer(self, moment: Moment) -> bool:
        """Takes a frame if none before it is nearer to the same wanted time. False from the frame on that comes too late for the last."""
        place = round((moment.time - self.start) * self.rate)
        if place >= self.num_frames:
            return False
        held = self.moments.get(place)
        if held is None:
            self._settle()
        if held is None or abs(moment.time - self.due(place)) < abs(held.time - self.due(place)):
            self.moments[place] = moment
        return True

    def due(self, place: int) -> Fraction:
        return self.start + place / self.rate

    def _settle(self) -> None:
        """Makes pictures of the last frame that was taken; no other can take its place now."""
        if not self.moments:
            return
        place = max(self.moments)
        moment = self.moments[place]
        _, frame, aspect, _ = moment.decoded
        if place in self.looked_at:
            self.looks[place] = upright(frame, aspect)
        self.moments[place] = moment._replace(decoded=None, small=np.asarray(upright(frame, aspect, SMALLER)))

    @property
    def reaches_its_end(self) -> bool:
        return self.num_frames - 1 in self.moments

    @property
    def num_missing(self) -> int:
        """Wanted times that have no frame of their own."""
        return self.num_frames - len(self.moments)

    def closed(self) -> Window:
        self._settle()
        return self

    @property
    def small(self) -> np.ndarray:
        """uint8 (T, h, w, 3), at most `SMALLER` pixels a side, of the moments that there are."""
        return np.stack([self.moments[place].small for place in sorted(self.moments)])


class Short(NamedTuple):
    """A shot that no window fits into."""

    shot: int
    start: Fraction
    seconds: Fraction


def windows(path: Path, settings: WindowSettings, problems: list[Problem], dissolves: Dissolves) -> Iterator[Window | Short]:
    """The windows of each shot one after the other, `gap` seconds apart, in time; what is left at a shot's end is in none.

    What goes wrong on the way is added to `problems`, where a shot goes over into another to `dissolves`. Raises `videos.Unreadable` if
    there is nothing to decode.
    """
    shot = Shot(0, Fraction(0), settings)
    for index, decoded, is_new in shots(path, settings, problems, dissolves):
        if is_new and index:
            yield from shot.ended()
            shot = Shot(shot.number + 1, decoded.time, settings)
        yield from shot.windows(Moment(index, decoded.time, decoded), decoded.time + decoded.lasts)
    yield from shot.ended()


class Shot:
    """What lies between two cuts."""

    def __init__(self, number: int, start: Fraction, settings: WindowSettings):
        self.number, self.start, self.settings = number, start, settings
        self.next_start, self.count, self.end = start, 0, start
        self.window: Window | None = None

    def windows(self, moment: Moment, end: Fraction) -> Iterator[Window]:
        """Takes the next frame, which is shown until `end`; gives the window that is whole with the one before it."""
        self.end = end
        if self.window is not None and not self.window.offer(moment):
            self.next_start = self.window.start + self.settings.seconds + Fraction(str(self.settings.gap))
            yield self._counted()
        if self.window is None and moment.time >= self.next_start:
            self.window = Window(self.number, moment.time, self.settings.rate, self.settings.frames)
            self.window.offer(moment)

    def ended(self) -> Iterator[Window | Short]:
        if self.window is not None and self.window.reaches_its_end:
            yield self._counted()
        if not self.count and self.end > self.start:
            yield Short(self.number, self.start, self.end - self.start)

    def _counted(self) -> Window:
        window, self.window, self.count = self.window, None, self.count + 1
        return window.closed()


def shots(path: Path, settings: WindowSettings, problems: list[Problem], dissolves: Dissolves) -> Iterator[tuple[int, Decoded, bool]]:
    """(number, frame, whether a shot begins with it) of the frames in time. A cut is where a frame looks unlike the one before, has another
    size, or its time runs backwards."""
    from av.video.reformatter import VideoReformatter

    reduce = VideoReformatter()
    before: tuple[Decoded, View] | None = None
    for index, decoded in enumerate(whole(path, settings, problems)):
        pixels = reduce.reformat(decoded.frame, *fitted(decoded.frame, SMALL), format="rgb24", threads=1).to_ndarray()
        view = View.of(pixels)
        if before is not None and decoded.time == before[0].time:  # a broken clock: nobody sees this frame
            continue
        is_new = before is None or decoded.time < before[0].time or _size(decoded) != _size(before[0])
        is_new = is_new or view.differs(before[1]) > settings.scene
        if is_new:
            dissolves.cut()
        dissolves.look(pixels, decoded.time)
        yield index, decoded, is_new
        before = decoded, view


def _size(decoded: Decoded) -> tuple[int, int]:
    return decoded.frame.width, decoded.frame.height


def whole(path: Path, settings: WindowSettings, problems: list[Problem]) -> Iterator[Decoded]:
    """The frames in their order, without the last one of a video that breaks off: it may be half a picture."""
    before = None
    for decoded in videos.decoded(path, settings.max_pixels, settings.max_minutes, problems):
        if before is not None:
            yield before
        before = decoded
    if before is not None and not any(problem.kind == "corrupt" for problem in problems):
        yield before
