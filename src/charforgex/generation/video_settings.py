"""The schema of conf/video: what is asked of clips alone. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from charforgex.binding import show
from charforgex.config import Range
from charforgex.errors import ConfigError
from charforgex.families.settings import Positive
from charforgex.filming import Codec
from charforgex.generation.interpolate import PICTURES

STRENGTH = 0.6  # where nothing is said


@dataclass(frozen=True)
class VideoSettings:
    """Raises ConfigError for what would have no effect."""

    frames: Positive | None = None
    fps: Annotated[float, Range(above=0, at_most=240)] | None = None
    loop: bool = False
    window: Annotated[int, Range(at_least=2)] | None = None
    overlap: Annotated[int, Range(at_least=0)] | None = None
    blend: Literal["pyramid", "uniform"] | None = None
    noise: Literal["shuffled", "own"] | None = None
    travel: dict[int, str] | None = None
    init: Path | None = None
    strength: Annotated[float, Range(above=0, at_most=1)] | None = None
    keep_first: bool | None = None
    sound: bool = True
    format: Literal["mp4", "webm", "mkv", "mov", "gif", "apng", "frames"] = "mp4"
    codec: Codec | None = None
    crf: Annotated[int, Range(at_least=0, at_most=63)] | None = None
    interpolate: Annotated[int, Range(at_least=2, at_most=64)] | None = None

    def check_unused(self) -> None:
        """For mode=picture, which reads none of them."""
        changed = [f"{field.name}={show(getattr(self, field.name))}" for field in fields(VideoSettings) if self._is_changed(field)]
        if changed:
            raise ConfigError(f"{', '.join(changed)}: of no effect with mode=picture; say mode=video.")

    def check_used(self) -> None:
        """For mode=video."""
        for name in ("strength", "keep_first"):
            if self.init is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}={show(getattr(self, name))} has no effect without init=<a picture or a video>.")
        if self.init is not None and not self.init.is_file():
            raise ConfigError(f"init={self.init} is no file; name a picture or a video.")
        if not self.sound and (self.init is None or self.is_from_picture):
            raise ConfigError("sound=false has no effect without init=<a video>.")
        if self.travel is not None:
            self._check_travel()

    def _check_travel(self) -> None:
        keys = list(self.travel)
        if not keys:
            raise ConfigError('travel={} is empty; name prompts by frame: travel={0: "a cat", 8: "a dog"}')
        if keys != sorted(keys) or keys[0] < 0:
            raise ConfigError(f"travel has the frames {keys}; name them in order, from 0 on.")

    def _is_changed(self, field) -> bool:
        return getattr(self, field.name) != field.default

    @property
    def is_from_picture(self) -> bool:
        return self.init is not None and self.init.suffix.lower() in PICTURES
