"""Frames of videos: the sharpest of each scene, some seconds apart.

A video is decoded twice: first its frames are scored and forgotten, then the chosen ones are turned into pictures, one at a time. One
thread does it, so that the same file always gives the same frames. Needs PyAV, the extra `video`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from charforgex import videos
from charforgex.binding import Range
from charforgex.curation.items import Item, Verdict
from charforgex.curation.pictures import Unusable, verdict_of
from charforgex.videos import Problem, upright

if TYPE_CHECKING:
    import av
    import numpy as np

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".3gp", ".mts", ".m2ts", ".ogv")
LOOKS = 12  # frames per second that are judged: between two of them little changes
LOOK = 640  # pixels of the longer side at which sharpness is judged
SMALL = 96  # the same, for scenes
SHORTEST = 0.3  # seconds of a scene, at least: a flicker is no row of scenes


@dataclass(frozen=True)
class VideoSettings:
    gap: Annotated[float, Range(at_least=0.01)] = 1.0
    per_scene: Annotated[int, Range(at_least=1)] = 3
    max_frames: Annotated[int, Range(at_least=1)] = 200
    scene: Annotated[float, Range(above=0, below=1)] = 0.4
    max_minutes: Annotated[float, Range(above=0)] = 120.0


def is_video(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def items(path: Path, name: str, settings: VideoSettings, max_pixels: int) -> Iterator[Item]:
    """An item for each chosen frame, named by its time, then one for the video. Never raises for what is in the file."""
    try:
        import av  # noqa: F401
    except ImportError:
        reason = "reading videos needs PyAV: pip install 'charforgex[video]'"
        yield Item(name, verdict=Verdict("unsupported", reason))
        return
    seen = Scores()
    try:
        for time, frame, _ in decoded(path, settings, max_pixels, seen.problems):
            seen.look(time, frame, settings.scene)
    except Unusable as error:
        yield Item(name, verdict=verdict_of(error))
        return
    # What was being decoded when the file broke off may be half a picture.
    whole = len(seen.times) - any(problem.kind == "corrupt" for problem in seen.problems)
    best = choose(seen.times[:whole], seen.sharpness[:whole], seen.scenes[:whole], settings)
    chosen = {seen.indices[place] for place in best}
    last, end = -1.0, max(chosen, default=-1)
    for index, (time, frame, aspect) in enumerate(decoded(path, settings, max_pixels, []) if chosen else ()):
        if index in chosen:
            last = max(time, last + 0.001)  # names are unique also where a broken clock runs backwards
            yield Item(f"{name}!/{last:010.3f}s", picture=upright(frame, aspect))
        if index == end:
            break
    yield Item(name, verdict=seen.verdict(len(chosen)))


def decoded(path: Path, settings: VideoSettings, max_pixels: int, problems: list[Problem]) -> Iterator[tuple[float, av.VideoFrame, float]]:
    """Time in seconds, frame and aspect, as `videos.decoded`. Raises Unusable if there is nothing to decode."""
    try:
        for found in videos.decoded(path, max_pixels, settings.max_minutes, problems):
            yield float(found.time), found.frame, found.aspect
    except videos.Unreadable as error:
        raise Unusable(error.kind, error.reason) from error


# ---- scores ----


@dataclass
class Scores:
    """A few numbers of each frame that is looked at, and what is needed of the ones before to tell where a scene ends."""

    count: int = 0
    indices: array = field(default_factory=lambda: array("l"))
    times: array = field(default_factory=lambda: array("d"))
    sharpness: array = field(default_factory=lambda: array("d"))
    scenes: array = field(default_factory=lambda: array("l"))
    problems: list[Problem] = field(default_factory=list)
    began: float = 0.0

    def __post_init__(self):
        from av.video.reformatter import VideoReformatter

        self.small, self.large = VideoReformatter(), VideoReformatter()
        self.before: View | None = None
        self.first: View | None = None

    def look(self, time: float, frame: av.VideoFrame, threshold: float) -> None:
        import cv2

        self.count += 1
        if self.times and 0 <= time - self.times[-1] < 1 / LOOKS - 0.001:
            return
        grey = self.large.reformat(frame, *fitted(frame, LOOK), format="gray", threads=1).to_ndarray()
        view = View.of(self.small.reformat(frame, *fitted(frame, SMALL), format="rgb24", threads=1).to_ndarray())
        scene = self.scenes[-1] if self.scenes else 0
        if self.before is None:
            self.first = view
        elif time - self.began >= SHORTEST and (view.differs(self.before) > threshold or view.drifted(self.first) > threshold + 0.2):
            scene, self.first, self.began = scene + 1, view, time
        self.before = view
        self.indices.append(self.count - 1)
        self.times.append(time)
        self.sharpness.append(cv2.Laplacian(grey, cv2.CV_32F).var())
        self.scenes.append(scene)

    def verdict(self, chosen: int) -> Verdict:
        if not self.times:
            problem = self.problems[0] if self.problems else Problem("corrupt", "no picture in it can be decoded")
            return Verdict(*problem)
        used = f"{chosen} of {self.count} frames are used, scenes: {self.scenes[-1] + 1}"
        return Verdict(self.problems[0].kind, f"{self.problems[0].reason}; {used}") if self.problems else Verdict("container", used)


def fitted(frame: av.VideoFrame, side: int) -> tuple[int, int]:
    """The stored frame's width and height, reduced to at most `side` pixels."""
    scale = min(1.0, side / max(frame.width, frame.height))
    return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


class View(NamedTuple):
    """What a small frame looks like: histograms of 8 x 8 x 8 colours of its quarters, that add up to 1, and its edges."""

    colours: np.ndarray
    edges: np.ndarray
    around: np.ndarray  # the edges, five pixels wide

    @staticmethod
    def of(pixels: np.ndarray) -> View:
        import cv2
        import numpy as np

        quarters = [part for half in np.array_split(pixels, 2) for part in np.array_split(half, 2, axis=1)]
        counts = [
            cv2.calcHist([np.ascontiguousarray(part)], [0, 1, 2], None, [8] * 3, [0, 256] * 3).ravel() if part.size else np.zeros(512)
            for part in quarters
        ]
        colours = np.concatenate(counts) / (pixels.shape[0] * pixels.shape[1])
        edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 60, 160) > 0
        return View(colours, edges, cv2.dilate(edges.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)

    def drifted(self, other: View) -> float:
        """Share of the pixels whose colour is another now, or in another quarter."""
        import numpy as np

        return float(1 - np.minimum(self.colours, other.colours).sum())

    def differs(self, other: View) -> float:
        """Mean of `drifted` and the edge change ratio of Zabih et al. (1995): the share of edges that came, or that went.

        The smaller of the two, unlike there: at a cut both are large, and between a shaken and a still frame only one is.
        """
        if self.edges.shape != other.edges.shape:
            return 1.0
        came, went = (1 - (a.edges & b.around).sum() / max(1, a.edges.sum()) for a, b in ((self, other), (other, self)))
        few = min(self.edges.sum(), other.edges.sum()) < 0.01 * self.edges.size
        return (self.drifted(other) + (0.0 if few else float(min(came, went)))) / 2


def choose(times: Sequence[float], sharpness: Sequence[float], scenes: Sequence[int], settings: VideoSettings) -> set[int]:
    """Indices of the sharpest frames of each scene, `gap` seconds apart; of too many, each scene's best come first."""
    taken: dict[int, list[int]] = {}
    for index in sorted(range(len(times)), key=lambda i: (-sharpness[i], i)):
        best = taken.setdefault(scenes[index], [])
        if len(best) < settings.per_scene and all(abs(times[index] - times[other]) >= settings.gap for other in best):
            best.append(index)
    ranked = sorted((rank, -sharpness[index], index) for best in taken.values() for rank, index in enumerate(best))
    return {index for _, _, index in ranked[: settings.max_frames]}
