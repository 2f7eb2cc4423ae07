"""`charforgex interpolate in.mp4 out.mp4 factor=4`: frames between the frames of a video, so that it moves more smoothly at the same speed;
or with `a.png b.png c.png out.mp4 seconds=1` from each of several pictures to the next.

Two frames are held at a time, whatever the length. What follows a cut is never blended with what came before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from charforgex import filming, videos
from charforgex.config import Range, bind
from charforgex.errors import ConfigError, DataError
from charforgex.filming import Codec, Output
from charforgex.videos import Frame

if TYPE_CHECKING:
    from charforgex.generation.between import Method

FINEST = 1 << 31  # ticks a second that files can count
NETWORK = ("weights", "batch", "tile")  # settings of by=rife alone
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SCENE, SECONDS, FPS = 0.2, 1.0, 25.0  # where nothing is said, of videos and of pictures

Moments = Callable[[Fraction, Fraction], list[tuple[Fraction, Fraction]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`files`: the video, or two pictures and more, and what becomes of it. `factor`: frames for each frame of a video; or `fps`, frames a
    second, at even times; neither is factor=2. `scene`: the share of a frame, of 1, from which on it is a cut if nothing in the frame
    before explains it. `seconds` from each picture to the next.
    """

    files: Path | list[Path]
    factor: Annotated[int, Range(at_least=2, at_most=64)] | None = None
    fps: Annotated[float, Range(above=0, at_most=1000)] | None = None
    seconds: Annotated[float, Range(at_least=0.01, at_most=3600)] | None = None
    by: Literal["dis", "linear", "rife"] = "dis"
    weights: Path | None = None
    batch: Annotated[int, Range(at_least=1)] | None = None
    tile: Annotated[int, Range(at_least=256)] | None = None
    device: str = "auto"
    scene: Annotated[float, Range(above=0, at_most=1)] | None = None
    sound: bool = True
    codec: Codec | None = None
    crf: Annotated[int, Range(at_least=0, at_most=63)] | None = None
    overwrite: bool = False

    def __post_init__(self):
        named = [self.files] if isinstance(self.files, Path) else self.files
        if len(named) < 2 or (len(named) == 2 and self.pictures):
            said = [str(path) for path in named]
            raise ConfigError(f"files={said}: name a video and what becomes of it: in.mp4 out.mp4; or pictures: a.png b.png out.mp4")
        if len(named) > 2 and not self.pictures:
            odd = next(path for path in named[:-1] if path.suffix.lower() not in PICTURES)
            raise ConfigError(f"files: {odd} is none of {', '.join(PICTURES)}, and only pictures can be several; name one video.")
        for name in ("factor", "scene") if self.pictures else ("seconds",):
            if (value := getattr(self, name)) is not None:
                way = "of pictures; say seconds= and fps=" if self.pictures else "of a video, which has its times; say factor= or fps="
                raise ConfigError(f"{name}={value:g} would have no effect: the files are {way}.")
        if self.factor is not None and self.fps is not None:
            raise ConfigError(f"factor={self.factor} and fps={self.fps:g} both say how many frames there are; leave one out.")
        if self.by == "rife" and self.weights is None:
            raise ConfigError("by=rife needs weights=<flownet.safetensors>; none are built in. by=dis needs none.")
        idle = [name for name in NETWORK if getattr(self, name) is not None] + ["device"] * (self.device != "auto")
        if self.by != "rife" and idle:
            raise ConfigError(f"{' and '.join(idle)} would have no effect with by={self.by}; leave it out, or say by=rife.")

    @property
    def pictures(self) -> list[Path]:
        """All files but the last, if they are pictures; empty for a video."""
        named = [] if isinstance(self.files, Path) else self.files[:-1]
        return named if all(path.suffix.lower() in PICTURES for path in named) else []

    @property
    def source(self) -> Path:
        return self.files[0]

    @property
    def out(self) -> Path:
        return self.files[-1]

    def check(self) -> None:
        """What can be known before a frame is read. Raises ConfigError."""
        codec = filming.check_output(self.out, self.codec)
        if self.crf is not None and (codec is None or filming.ENCODERS[codec][1] is None):
            raise ConfigError(f"crf={self.crf} would have no effect: {self.out.name} keeps all that its format can; leave it out.")
        if self.out.resolve() in [path.resolve() for path in self.files[:-1]]:
            raise ConfigError(f"{self.out} is what is read, which stays as it is; name another file.")
        if self.out.is_file() and not self.overwrite:
            raise ConfigError(f"{self.out} exists; say overwrite=true to replace it, or name another file.")


def interpolate(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the video and tells what was done. Raises a CharForgeError; then nothing is written."""
    settings = bind(Settings, cfg, "")
    settings.check()
    if settings.pictures:
        source, clock = shown(settings.pictures, Fraction(str(settings.seconds or SECONDS)), 1 / as_rate(settings.fps or FPS)), None
    else:
        source, clock = videos.frames(settings.source), videos.clock(settings.source)
    output, moments = planned(settings, clock)
    method = method_of(settings)
    scene = 1.0 if settings.pictures else settings.scene or SCENE  # no two pictures are too different
    told = {"out": str(settings.out), "by": settings.by, "frames": 0, "frames_before": 0, "cuts": []}

    def counted(frames: Iterable[Frame]) -> Iterator[Frame]:
        for frame in frames:
            told["frames_before"] += 1
            yield frame

    with filming.writing(output) as out:
        for pixels, time, lasts in smooth(counted(source), method, moments, scene, told["cuts"]):
            out.write(pixels, time, lasts)
            told["frames"] += 1
    told["cuts"] = [round(float(time), 3) for time in told["cuts"]]
    told["rate"] = float(output.rate)
    print(f"{told['frames']} frames at {told['rate']:.4g} a second, of {told['frames_before']}; cuts: {len(told['cuts'])}.")
    print(f"Wrote {settings.out}.")
    return told


def shown(paths: list[Path], seconds: Fraction, lasts: Fraction) -> Iterator[Frame]:
    """The pictures at even times; one is opened at a time, and the last one lasts so long. Raises DataError, before the first, for damaged
    ones and other sizes.
    """
    from charforgex.generation.beginnings import picture

    sizes = [picture(path, "files").shape[1::-1] for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            first, other = ("{} x {}".format(*one) for one in (sizes[0], size))
            raise DataError(f"files={path} is {other}, and {paths[0].name} is {first}; resize or cut one of them to the other's size.")
    return (Frame(picture(path, "files"), place * seconds, lasts) for place, path in enumerate(paths))


def planned(settings: Settings, clock: videos.Clock | None) -> tuple[Output, Moments]:
    """Where the frames go, and at which times they are; without a `clock` those of pictures."""
    holds = settings.out.suffix.lower() in filming.FORMATS
    sound = settings.source if settings.sound and holds and clock else None
    fps = settings.fps if clock else settings.fps or FPS
    how = f"fps={fps:g}" if fps else f"factor={settings.factor or 2}"
    comment = f"charforgex {version('charforgex')} interpolate {how} by={settings.by}"
    if fps is not None:
        rate = as_rate(fps)
        return Output(settings.out, rate, rate.numerator, settings.codec, settings.crf, sound, comment=comment), evenly(rate)
    factor = settings.factor or 2
    ticks = clock.tick.denominator * factor
    ticks = ticks if ticks < FINEST else 90_000
    output = Output(settings.out, clock.rate * factor, ticks, settings.codec, settings.crf, sound, comment=comment)
    return output, divided(factor)


def method_of(settings: Settings) -> Method:
    """Raises ModelError for weights that cannot be read."""
    from charforgex.generation import between

    if settings.by != "rife":
        return {"dis": between.dis, "linear": between.linear}[settings.by]
    from charforgex.generation.ifnet import load
    from charforgex.generation.run import device_of

    return between.by_network(load(settings.weights, device_of(settings)), settings.batch or 1, settings.tile)


# ---- when ----


def as_rate(fps: float) -> Fraction:
    """29.97 and its like are meant as television has them: 30000/1001."""
    television = Fraction(round(fps * 1.001) * 1000, 1001)
    return television if fps % 1 and abs(fps - television) < 0.005 else Fraction(fps).limit_denominator(1000)


def divided(factor: int) -> Moments:
    """`factor` frames for each one, evenly over the time until the next."""

    def moments(start: Fraction, end: Fraction) -> list[tuple[Fraction, Fraction]]:
        step = (end - start) / factor
        return [(start + step * place, step) for place in range(factor)]

    return moments


def evenly(rate: Fraction) -> Moments:
    """Frames at multiples of 1 / rate, whenever those of the video are."""

    def moments(start: Fraction, end: Fraction) -> list[tuple[Fraction, Fraction]]:
        return [(place / rate, 1 / rate) for place in range(math.ceil(start * rate), math.ceil(end * rate))]

    return moments


# ---- what ----


def smooth(frames: Iterable[Frame], method: Method, moments: Moments, scene: float, cuts: list[Fraction]) -> Iterator[Frame]:
    """The frames at the moments that there are between each frame and the next. The last frame stays for as long as it lasted.

    Before a cut the last frame of the scene stays, and the time of the cut is added to `cuts`. Raises DataError if the size changes.
    """
    from charforgex.generation.between import small, strange

    before, seen = None, None
    for frame in frames:
        view = small(frame.pixels)
        if before is not None:
            if frame.pixels.shape != before.pixels.shape:
                raise DataError(f"the size of the video's frames changes at {float(frame.time):.3f} seconds; cut it there.")
            cut = strange(seen, view) > scene
            if cut:
                cuts.append(frame.time)
            yield from _between(before, frame, method, moments, cut)
        before, seen = frame, view
    if before is not None:
        yield from (Frame(before.pixels, time, lasts) for time, lasts in moments(before.time, before.time + before.lasts))


def _between(first: Frame, second: Frame, method: Method, moments: Moments, cut: bool) -> Iterator[Frame]:
    wanted = moments(first.time, second.time)
    shares = [float((time - first.time) / (second.time - first.time)) for time, _ in wanted]
    moving = [] if cut else [share for share in shares if share > 0]
    made = iter(method(first.pixels, second.pixels, moving) if moving else [])
    for share, (time, lasts) in zip(shares, wanted, strict=True):
        yield Frame(first.pixels if cut or share == 0 else next(made), time, lasts)
