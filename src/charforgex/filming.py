"""Videos written, a frame at a time: memory does not depend on how long they are. Needs PyAV, the extra `video`.

Pixels are uint8 RGB (H, W, 3); times are seconds from the first frame on, as fractions, because 1001/30000 is no float.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from charforgex.errors import ConfigError
from charforgex.gifs import Spool
from charforgex.runs import TEMPORARY, fsync_folder, replace_atomic
from charforgex.videos import Unreadable, check_pyav, mend, opened, pictures, start

if TYPE_CHECKING:
    import av
    import numpy as np

Codec = Literal["h264", "h265", "av1", "vp9", "ffv1"]
ENCODERS = {  # the first that this PyAV has; and the quality at which people see no difference, None: it keeps every pixel as it is
    "h264": (("libx264", "libopenh264"), 18), "h265": (("libx265",), 20),
    "av1": (("libsvtav1", "libaom-av1"), 25), "vp9": (("libvpx-vp9",), 24), "ffv1": (("ffv1",), None),
}  # fmt: skip
HOLDS = {  # what a file may hold by its suffix; its first codec where nobody chooses one
    ".mp4": ("h264", "h265", "av1"), ".mov": ("h264", "h265"), ".mkv": ("h264", "h265", "av1", "vp9", "ffv1"), ".webm": ("vp9", "av1"),
    ".gif": (), ".apng": (), "": (),
}  # fmt: skip
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}  # which have sound


@dataclass(frozen=True)
class Output:
    """`clock` ticks a second: every frame's time is a multiple of 1 / clock, as far as the format allows (GIF 1/100, Matroska 1/1000).

    `rate` is what players are told, frames a second. `sound` is a video whose sound is taken over as it is, in sync: its times count from
    that video's first frame, and it ends with it, or after `seconds`. `comment` goes into the file, and `comment_of` reads it.
    """

    path: Path
    rate: Fraction
    clock: int
    codec: Codec | None = None
    crf: int | None = None
    sound: Path | None = None
    seconds: Fraction | None = None
    comment: str = ""


def check_output(path: Path, codec: Codec | None) -> Codec | None:
    """The codec for a file of that suffix; None for GIF, APNG and folders. Raises ConfigError, before anything is computed."""
    check_pyav()
    suffix = path.suffix.lower()
    if suffix not in HOLDS:
        known = ", ".join(suffix for suffix in HOLDS if suffix)
        raise ConfigError(f"{path}: a video ends in one of {known}, and a folder of frames has no suffix.")
    if codec is None and HOLDS[suffix]:
        codec = next((codec for codec in HOLDS[suffix] if encoder(codec)), None)
        if codec is None:
            raise ConfigError(
                f"{path}: this PyAV has no encoder for {suffix}; .gif, .apng and folders need none. Or: pip install --upgrade av"
            )
        return codec
    if codec is not None and codec not in HOLDS[suffix]:
        said = f"holds {', '.join(HOLDS[suffix])}" if HOLDS[suffix] else "has no choice of codecs"
        raise ConfigError(f"codec={codec}: {path.name} {said}; leave codec out, or take another suffix.")
    if codec is not None and encoder(codec) is None:
        raise ConfigError(f"codec={codec}: this PyAV has no encoder for it; leave codec out, or: pip install --upgrade av")
    return codec


def encoder(codec: Codec) -> str | None:
    """FFmpeg's name of the first encoder for it that this PyAV has."""
    import av

    for name in ENCODERS[codec][0]:
        try:
            av.codec.Codec(name, "w")
            return name
        except (av.codec.codec.UnknownCodecError, ValueError):
            continue
    return None


def check_sound(path: Path, source: Path) -> None:
    """Raises ConfigError if a file of that suffix cannot hold the sound of `source`, DataError if that is no video."""
    import av

    with opened(source) as container:
        if not container.streams.audio:
            return
        context = container.streams.audio[0].codec_context
        with av.open(io.BytesIO(), "w", format=FORMATS[path.suffix.lower()]) as out:
            if context is None or context.name not in out.supported_codecs:
                name = context.name if context else "unknown"
                raise ConfigError(f"{path.name} cannot hold the sound of {source.name} ({name}); choose .mkv, or say sound=false.")


@contextmanager
def writing(output: Output) -> Iterator[Writer | Folder]:
    """Where frames go, in order. When the block ends well, the whole video is at `output.path`; else all is as it was.

    Raises ConfigError for a suffix, codec or sound that do not go together, DataError for sound that is damaged.
    """
    codec = check_output(output.path, output.codec)
    if output.sound is not None:
        check_sound(output.path, output.sound)
    if output.path.suffix == "":
        yield from _folder(output)
        return
    with replace_atomic(output.path) as temporary, ExitStack() as stack:
        writer = Writer(output, codec, temporary, stack)
        yield writer
        writer.finish()


@dataclass
class Writer:
    output: Output
    codec: Codec | None
    temporary: Path
    stack: ExitStack
    lengths: dict[int, int] = field(default_factory=dict)  # of frames that the encoder holds, by their time; it forgets them
    packets: Iterator[av.Packet] = field(default_factory=lambda: iter(()))
    waiting: av.Packet | None = None  # the sound's next packet, of a time that no frame has reached

    def __post_init__(self):
        import av

        suffix = self.output.path.suffix.lower()
        options = {"movflags": "+faststart"} if suffix in (".mp4", ".mov") else {}
        options |= {".gif": {"loop": "0"}, ".apng": {"plays": "0"}}.get(suffix, {})
        options |= {"fflags": "bitexact"} if self.codec == "ffv1" else {}  # else no two files are equal: Matroska numbers each at random
        self.container = self.stack.enter_context(av.open(str(self.temporary), "w", container_options=options))
        if self.output.comment:
            self.container.metadata["comment"] = self.output.comment
        self.clock = 100 if suffix == ".gif" else self.output.clock
        os.environ.setdefault("SVT_LOG", "1")  # that encoder else writes a page about itself
        name = encoder(self.codec) if self.codec else suffix[1:]
        crf = self.output.crf if self.output.crf is not None else ENCODERS[self.codec][1] if self.codec else None
        options = {"crf": str(crf)} if crf is not None else {}
        options |= {"libx265": {"x265-params": "log-level=error"}, "libvpx-vp9": {"b": "0", "row-mt": "1"}}.get(name, {})
        options |= {"level": "3", "g": "1"} if name == "ffv1" else {}  # every frame by itself, with a checksum
        self.stream = self.container.add_stream(name, rate=self.output.rate, options=options)
        self.pads = self.codec is not None and name != "ffv1"
        self.stream.pix_fmt = "yuv420p" if self.pads else {".gif": "pal8", ".apng": "rgb24", ".mkv": "bgr0"}[suffix]
        self.stream.codec_context.time_base = Fraction(1, self.clock)
        if self.codec == "h265" and suffix != ".mkv":
            self.stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other
        self.began = False
        self.spool = Spool() if suffix == ".gif" else None
        if self.spool is not None:
            self.stack.callback(self.spool.close)
        if self.output.sound is not None:
            self._open_sound(self.output.sound)

    def _open_sound(self, path: Path) -> None:
        source = self.stack.enter_context(opened(path))
        if not source.streams.audio:
            return
        stream = source.streams.audio[0]
        self.sound = self.container.add_stream_from_template(stream)
        self.packets = _packets(source, stream, path, inf if self.output.seconds is None else self.output.seconds)
        self.waiting = next(self.packets, None)

    def write(self, pixels: np.ndarray, time: Fraction, lasts: Fraction) -> None:
        """A frame of the first one's size. Lossy videos have even sizes: the last row and column of odd ones is there twice."""
        import av
        import numpy as np

        if not self.began:
            height, width = pixels.shape[:2]
            self.stream.width, self.stream.height = (width + width % 2, height + height % 2) if self.pads else (width, height)
            self.began = True
        if self.spool is not None:
            self.spool.add(pixels, time, lasts)
            return
        frame = self._yuv(pixels) if self.pads else av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if self.stream.pix_fmt == "bgr0":
            frame = frame.reformat(format="bgr0")
        self._timed(frame, time, lasts)

    def _timed(self, frame: av.VideoFrame, time: Fraction, lasts: Fraction) -> None:
        frame.pts, frame.time_base = round(time * self.clock), Fraction(1, self.clock)
        frame.duration = max(1, round((time + lasts) * self.clock) - frame.pts)
        self.lengths[frame.pts] = frame.duration
        self._encode(frame)
        self._mux_sound(time)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        for packet in self.stream.encode(frame):
            packet.duration = self.lengths.pop(packet.pts, packet.duration)
            self.container.mux(packet)

    def _yuv(self, pixels: np.ndarray) -> av.VideoFrame:
        """BT.709, limited range, and it says so."""
        import av
        import numpy as np
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        how = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=how, threads=1
        )
        context = self.stream.codec_context
        for name, value in {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}.items():
            if not context.is_open:
                setattr(context, name, value)
            setattr(frame, name, value)
        return frame

    def _mux_sound(self, until: Fraction | float) -> None:
        import av

        while self.waiting is not None and self.waiting.dts * self.waiting.time_base <= until:
            self.waiting.stream = self.sound
            try:
                self.container.mux(self.waiting)
            except av.error.ArgumentError as error:  # of times that run backwards, not of a disk that is full
                raise _unsound(self.output.sound, error) from error
            self.waiting = next(self.packets, None)

    def finish(self) -> None:
        assert self.began, "a video has at least one frame"
        if self.spool is not None:
            palette = self.spool.palette()
            for pixels, time, lasts in self.spool.frames():
                self._timed(palette.frame(pixels), time, lasts)
        self._encode(None)
        self._mux_sound(inf)
        self.container.close()
        if self.output.comment and self.codec is None:
            add_comment(self.temporary, self.output.comment)


def _packets(source: av.container.InputContainer, stream: av.AudioStream, path: Path, until: Fraction | float) -> Iterator[av.Packet]:
    """Of the sound, by the clock of the pictures, those that begin before `until`. Raises Unreadable."""
    import av

    shift = round(start(pictures(source)) / stream.time_base)
    packets = source.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            raise _unsound(path, error) from error
        if packet is None:
            return
        if packet.dts is None:  # the last one, which is empty
            continue
        packet.pts, packet.dts = (None if stamp is None else stamp - shift for stamp in (packet.pts, packet.dts))
        if packet.dts * packet.time_base >= until:
            return
        yield packet


def _unsound(path: Path, error: av.FFmpegError) -> Unreadable:
    return Unreadable(path, "corrupt", f"its sound is damaged: {error.strerror}; say sound=false, or {mend(path)}")


def add_comment(path: Path, comment: str) -> None:
    """Into a GIF or APNG that is finished: their muxers have no way to."""
    data, text = path.read_bytes(), comment.encode()
    if path.suffix.lower() == ".gif":
        place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)  # after the header and its table of colours
        pieces = [text[start : start + 255] for start in range(0, len(text), 255)]
        block = b"\x21\xfe" + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\x00"
    else:
        place = 33  # after the signature and IHDR
        body = b"iTXt" + b"comment\x00\x00\x00\x00\x00" + text
        block = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:place] + block + data[place:])


def comment_of(path: Path) -> str | None:
    """What a video, a picture or a folder of frames says of itself, as it was written here. Raises Unreadable for a damaged video."""
    from PIL import Image

    if path.is_dir():
        told = path / "frames.json"
        return (json.loads(told.read_text()).get("comment") if told.is_file() else None) or None
    if not HOLDS.get(path.suffix.lower()):
        with Image.open(path) as picture:
            said = picture.info.get("comment")
        return said.decode(errors="replace") if isinstance(said, bytes) else said
    with opened(path) as container:
        return next((value for name, value in container.metadata.items() if name.lower() == "comment"), None)


@dataclass
class Folder:
    """Frames as PNG, 000001.png and so on, with the comment; frames.json has it, too, and their times in seconds."""

    folder: Path
    comment: str = ""
    times: list[float] = field(default_factory=list)

    def write(self, pixels: np.ndarray, time: Fraction, lasts: Fraction) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        self.times.append(float(time))
        info = PngInfo()
        if self.comment:
            info.add_itxt("comment", self.comment)
        with (self.folder / f"{len(self.times):06d}.png").open("wb") as file:
            Image.fromarray(pixels).save(file, "PNG", compress_level=1, pnginfo=info)
            file.flush()
            os.fsync(file.fileno())


def _folder(output: Output) -> Iterator[Folder]:
    """A new folder, or none. Raises ConfigError if it is there and holds something."""
    path = output.path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists; name a new folder for the frames, or a file with a suffix such as .mp4.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    temporary.mkdir()
    try:
        folder = Folder(temporary, output.comment)
        yield folder
        told = {"comment": output.comment, "rate": float(output.rate), "times": folder.times}
        (temporary / "frames.json").write_text(json.dumps(told) + "\n")
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)
