"""Videos read, a frame at a time: memory does not depend on how long they are. Needs PyAV, the extra `video`.

Pixels are uint8 RGB (H, W, 3), upright and square; times are seconds from the first frame on, as fractions, because 1001/30000 is no float.
One thread decodes, so that the same file always gives the same frames.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from charforgex.errors import ConfigError, DataError

if TYPE_CHECKING:
    import av
    import numpy as np
    from PIL import Image

# Playlists and concatenations are formats to FFmpeg too, and open other files and addresses. Only these are tried, whatever the name says.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif,apng",
    "protocol_whitelist": "file",
}
TIMEOUT = 30.0  # seconds for the file system to answer
FASTEST = 240  # frames per second of the longest video: bounds files whose clock stands still
MAX_PIXELS = 1 << 26  # of a frame; 8K has half as many
SAID = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")  # how Matroska says of a stream when it ends
NEEDS = "reading and writing videos needs PyAV: pip install 'charforgex[video]'"


class Problem(NamedTuple):
    kind: str
    reason: str


class Unreadable(DataError):
    """`kind` is a word for statistics, `reason` a sentence."""

    def __init__(self, path: Path, kind: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.kind, self.reason = kind, reason


def check_pyav() -> None:
    """Raises ConfigError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ConfigError(NEEDS) from error


class Decoded(NamedTuple):
    """`aspect` is a stored pixel's width over its height; `lasts` how long the frame is shown, as far as the file says."""

    time: Fraction
    frame: av.VideoFrame
    aspect: float
    lasts: Fraction


class Frame(NamedTuple):
    pixels: np.ndarray
    time: Fraction
    lasts: Fraction


def frames(path: Path) -> Iterator[Frame]:
    """All of a video, as players show it. Raises DataError for what is no video, and where it is damaged or breaks off."""
    import numpy as np

    clock(path)
    problems: list[Problem] = []
    before: Frame | None = None  # what a file says of a frame's length is wrong where frames are stored in another order
    for time, frame, aspect, lasts in decoded(path, MAX_PIXELS, inf, problems):
        if before is not None:
            if time <= before.time:
                raise Unreadable(path, "corrupt", f"its clock stands still or runs backwards at {float(time):.3f} seconds; {mend(path)}")
            yield before._replace(lasts=time - before.time)
        before = Frame(np.asarray(upright(frame, aspect)), time, lasts)
    if problems:
        raise Unreadable(path, problems[0].kind, f"{problems[0].reason}; {mend(path)}")
    if before is None:
        raise Unreadable(path, "corrupt", "no picture in it can be decoded; name another video")
    yield before


class Clock(NamedTuple):
    """Of a video: frames a second on average, and the seconds of which all times are multiples."""

    rate: Fraction
    tick: Fraction


def clock(path: Path) -> Clock:
    """Raises DataError for what is no video."""
    check_pyav()
    if not path.is_file():
        raise DataError(f"{path} is no file; name a video.")
    with opened(path) as container:
        stream = pictures(container)
        return Clock(Fraction(stream.average_rate or 25), Fraction(stream.time_base))


def mend(path: Path) -> str:
    """The way out for a file that is damaged."""
    return f"write what is left of it anew: ffmpeg -i {path.name} -fps_mode cfr mended.mp4"


def decoded(path: Path, max_pixels: int, max_minutes: float, problems: list[Problem]) -> Iterator[Decoded]:
    """All frames that are whole. What goes wrong on the way is added to `problems`. Raises Unreadable if there is nothing to decode."""
    with opened(path) as container:
        stream = pictures(container)
        context = stream.codec_context
        if context is None:
            raise Unreadable(path, "unsupported", "its codec is not known")
        if context.width * context.height > max_pixels:
            size = f"{context.width} x {context.height}"
            raise Unreadable(path, "too_large", f"its size is {size}, more than {max_pixels / 1e6:g} megapixels")
        stream.thread_type = "NONE"
        context.thread_count = 1
        context.options = {"max_pixels": str(max_pixels)}  # frames may be larger than the header says
        yield from _decoded(container, stream, max_minutes, problems)


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file with at least one stream of pictures. Raises Unreadable."""
    import av

    try:
        container = av.open(str(path.resolve()), options=OPTIONS, timeout=TIMEOUT)
    except Exception as error:  # like Pillow's, these are of nearly every type
        raise Unreadable(path, "corrupt", f"it is damaged, incomplete, or no video: {_said(error)}") from error
    with container:
        if pictures(container) is None:
            raise Unreadable(path, "unsupported", "it has no moving pictures, only sound or data")
        yield container


def pictures(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first stream of pictures that is not a record's cover."""
    from av.stream import Disposition

    return next((stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic), None)


def start(stream: av.VideoStream) -> Fraction:
    """The first picture's time by the file's own clock, in seconds."""
    return (stream.start_time or 0) * stream.time_base


def said_end(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float, bool]:
    """When the file says that it ends, in seconds by its own clock, 0 if it does not; and whether it says so of the pictures alone.

    Only of AVI the number of frames counts: MP4 that was cut without being encoded anew holds more of them than it shows.
    """
    import av

    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(start(stream) + stream.frames / stream.average_rate), True
    if stream.duration:
        return float(start(stream) + stream.duration * stream.time_base), True
    if found := SAID.match(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, found.groups())
        return 3600 * hours + 60 * minutes + seconds, True
    return (container.duration or 0) / av.time_base, False


def _decoded(container, stream, max_minutes: float, problems: list[Problem]) -> Iterator[Decoded]:
    import av

    aspect = float(stream.sample_aspect_ratio or 1)
    aspect = aspect if 0.25 <= aspect <= 4 else 1.0
    began, step = start(stream), 1 / Fraction(stream.average_rate or 25)
    time, lasts, count, damaged, clean = -step, step, 0, 0, True
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            found = packet.decode() if packet is not None else []
        except (av.FFmpegError, ValueError, IndexError, OverflowError) as error:
            damaged, clean = damaged + 1, False
            if damaged > FASTEST or not isinstance(error, av.error.InvalidDataError):
                problems.append(Problem("corrupt", f"it cannot be read on: {_said(error)}"))
                return
            continue
        if packet is None:
            break
        for frame in found:
            clean = clean or frame.key_frame  # what follows a damaged frame builds on it, up to the next whole one
            time = frame.pts * frame.time_base - began if frame.pts is not None and frame.time_base else time + step
            lasts = frame.duration * frame.time_base if frame.duration and frame.time_base else step
            if count >= max_minutes * 60 * FASTEST or time > max_minutes * 60:
                problems.append(Problem("too_large", f"it is longer than {max_minutes:g} minutes; the rest is not looked at"))
                return
            if clean and not frame.is_corrupt:
                count += 1
                yield Decoded(max(Fraction(0), time), frame, aspect, lasts)
    said, of_pictures = said_end(container, stream)
    missing, seconds = said - float(began + time + max(lasts, step)), said - float(began)
    if damaged:
        problems.append(Problem("corrupt", f"damaged places in it: {damaged}"))
    elif missing > max(1.0, 0.1 * seconds) or (of_pictures and missing > float(2 * step) + 0.1):
        problems.append(Problem("corrupt", f"it breaks off after {float(time + step):.1f} of {seconds:.1f} seconds"))


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def upright(frame: av.VideoFrame, aspect: float, longest: int | None = None) -> Image.Image:
    """RGB as players show it: the colours of its standard, on white, square pixels, turned by its display matrix. At most `longest` pixels
    a side."""
    from av.video.reformatter import Colorspace, Interpolation
    from PIL import Image

    # A frame that does not say is of BT.709 from 720 lines on, as players assume, and else of BT.601.
    unsaid = int(frame.colorspace) == 2
    source = (Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if unsaid else None
    how = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    size = (round(frame.width * max(1.0, aspect)), round(frame.height / min(1.0, aspect)))
    stored = (frame.width, frame.height)
    if longest is not None and max(size) > longest:
        size = stored = tuple(max(1, round(side * longest / max(size))) for side in size)
    clear = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    layout = "rgba" if clear else "rgb24"
    picture = Image.fromarray(frame.reformat(*stored, format=layout, src_colorspace=source, interpolation=how, threads=1).to_ndarray())
    if clear:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    turn = _turn(frame)
    return picture.transpose(turn) if turn is not None else picture


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """How to turn the stored picture by FFmpeg's display matrix (libavutil/display.h): a point (x, y) goes to (ax + cy, bx + dy)."""
    from PIL.Image import Transpose

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = struct.unpack("<5i", bytes(matrix)[:20])
    signs = tuple((value > 0) - (value < 0) if abs(value) > 2**15 else 0 for value in (a, b, c, d))
    return {
        (-1, 0, 0, -1): Transpose.ROTATE_180,
        (0, 1, -1, 0): Transpose.ROTATE_270,
        (0, -1, 1, 0): Transpose.ROTATE_90,
        (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
        (0, 1, 1, 0): Transpose.TRANSPOSE,
        (0, -1, -1, 0): Transpose.TRANSVERSE,
    }.get(signs)
