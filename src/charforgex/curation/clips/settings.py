"""The schema of `conf/curate_clips.yaml`. No torch here, so that a bad setting stops in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from charforgex.binding import Range
from charforgex.curation.captions.rules import CaptionRules
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.curation.crops import Framing, Margin
from charforgex.curation.executors import ExecutorSettings
from charforgex.curation.faces import FaceSettings
from charforgex.curation.pictures import MAX_PIXELS
from charforgex.curation.quality import Grey, Share
from charforgex.curation.split import SplitSettings

Count = Annotated[int, Range(at_least=1)]
MULTIPLE = 8  # of which the sides of clips are: what a VAE makes one latent of


@dataclass(frozen=True)
class WindowSettings:
    """Which frames are a clip: `frames` of them, `fps` a second."""

    frames: Annotated[int, Range(at_least=2, at_most=512)] = 16
    fps: Annotated[float, Range(above=0, at_most=240)] = 8.0
    gap: Annotated[float, Range(at_least=0)] = 0.0
    scene: Annotated[float, Range(above=0, below=1)] = 0.4
    max_minutes: Annotated[float, Range(above=0)] = 120.0
    max_pixels: Count = MAX_PIXELS

    @property
    def rate(self) -> Fraction:
        return Fraction(str(self.fps))

    @property
    def seconds(self) -> Fraction:
        return self.frames / self.rate


@dataclass(frozen=True)
class FrameSettings:
    """What of the frames is shown, the same in all of a clip."""

    framing: Framing = "upper"
    ratio: Annotated[float, Range(at_least=0.25, at_most=4)] = 1.0
    head_margin: Margin = 1.0
    without_face: Literal["centre", "whole", "aside"] = "centre"
    max_side: Annotated[int, Range(at_least=MULTIPLE)] = 768


@dataclass(frozen=True)
class LimitSettings:
    """What is good enough. None switches a limit off."""

    min_side: Count | None = 256
    min_high: Grey | None = 50.0
    max_low: Grey | None = 190.0
    min_sharpness: Share | None = 0.36
    min_motion: Grey | None = 6.0
    max_jump: Annotated[float, Range(at_least=1)] | None = 3.0
    dissolves: bool = False
    difference: Annotated[float, Range(above=0, at_most=255)] | None = 8.0
    max_clips: Count | None = None


@dataclass(frozen=True)
class ScanSettings:
    """What shapes the findings of a video; every other setting can change without a video being measured again."""

    windows: WindowSettings = field(default_factory=WindowSettings)
    crop: FrameSettings = field(default_factory=FrameSettings)
    faces: FaceSettings = field(default_factory=FaceSettings)


@dataclass(frozen=True)
class ClipSettings:
    windows: WindowSettings = field(default_factory=WindowSettings)
    crop: FrameSettings = field(default_factory=FrameSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    faces: FaceSettings = field(default_factory=FaceSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    rules: CaptionRules = field(default_factory=CaptionRules)
    split: SplitSettings = field(default_factory=SplitSettings)
    recaption: bool = False
    rewrite: bool = True
    executor: Literal["local", "ray", "slurm"] = "local"
    workers: Count | None = None
    address: str | None = None
    sbatch: tuple[str, ...] = ()

    def scan(self) -> ScanSettings:
        return ScanSettings(self.windows, self.crop, self.faces)

    def where(self, folder: Path) -> ExecutorSettings:
        return ExecutorSettings(self.executor, self.workers, self.address, self.sbatch, folder)
