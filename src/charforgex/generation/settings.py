"""The schema of generate.yaml: what each setting may be. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from charforgex.config import Range
from charforgex.errors import ConfigError
from charforgex.families.settings import FamilySettings, Positive, Recipe
from charforgex.generation.schedulers import DEFAULT, check_scheduler_name
from charforgex.generation.video_settings import VideoSettings

Scale = Annotated[float, Range(at_least=-10, at_most=10)]


@dataclass(frozen=True)
class LoggerSettings:
    tensorboard: bool = False
    wandb: bool = False
    project: str = "charforgex"
    offline: bool = False

    def __post_init__(self):
        if self.offline and not self.wandb:
            raise ConfigError("logger.offline=true has no effect with logger.wandb=false; say logger=wandb.")


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are sampled, here and in the previews of a training. What is None is as the family's recipe has it."""

    steps: Positive | None = None
    guidance: Annotated[float, Range(at_least=0, at_most=50)] | None = None
    true_guidance: Annotated[float, Range(at_least=1, at_most=50)] | None = None
    scheduler: str = DEFAULT
    negative: str = ""
    batch_size: Positive = 8

    def __post_init__(self):
        check_scheduler_name(self.scheduler)

    def filled(self, recipe: Recipe):
        own = {"steps": recipe.sampling_steps, "guidance": recipe.guidance, "true_guidance": recipe.true_guidance}
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class Settings(SamplingSettings, VideoSettings):
    """Raises ConfigError for values that contradict each other or would have no effect."""

    mode: Literal["picture", "video"] = "picture"
    lora: str | list[str] | None = None
    scale: Scale | list[Scale] | None = None
    scales: list[Scale | list[Scale]] | None = None
    trigger: str | None = None
    base: str | None = None
    family: FamilySettings | None = None
    tokenizer: str | None = None
    prompt: str | list[str] | None = None
    prompt_file: Path | None = None
    wildcard_dir: Path | None = None
    seed: int = 0
    count: Positive = 4
    seeds: list[int] | None = None
    guidance_rescale: Annotated[float, Range(at_least=0, at_most=1)] = 0.0
    width: Positive | None = None
    height: Positive | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    out: Path | None = None
    overwrite: bool = False
    sheet: bool = True
    logger: LoggerSettings = field(default_factory=LoggerSettings)

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "video":
            self.check_used()
        else:
            self.check_unused()
        if self.mode == "video" and self.guidance_rescale:
            raise ConfigError(f"guidance_rescale={self.guidance_rescale:g} is for pictures; leave it out with mode=video.")
        if self.seeds is not None and not self.seeds:
            raise ConfigError("seeds=[] is an empty list; name seeds, or leave it out and say count=4.")
        if self.wildcard_dir is not None and not self.wildcard_dir.is_dir():
            raise ConfigError(f"wildcard_dir={self.wildcard_dir} is not a folder.")
        if not self.lora:
            for name in ("scale", "scales"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} has no effect without a LoRA; say lora=<file.safetensors>.")
        self.combinations()

    @property
    def tokenizers(self) -> str | None:
        """The folder of tokenizers: this setting's, else the family's."""
        return self.tokenizer or (self.family.tokenizer if self.family is not None else None)

    def lora_paths(self) -> list[Path]:
        paths = [self.lora] if isinstance(self.lora, str) else self.lora or []
        return [Path(path).expanduser() for path in paths]

    def combinations(self) -> list[tuple[float, ...]]:
        """Every set of strengths to make pictures with, one strength for each LoRA. Raises ConfigError."""
        if self.scale is not None and self.scales is not None:
            raise ConfigError("scale and scales are both given; keep scale for one strength, scales to compare several.")
        if self.scales is not None and not self.scales:
            raise ConfigError("scales=[] is an empty list; name strengths such as scales=[0,0.5,1].")
        number = len(self.lora_paths())
        wanted = [1.0 if self.scale is None else self.scale] if self.scales is None else self.scales
        found = []
        for strengths in wanted:
            strengths = strengths if isinstance(strengths, list) else [strengths] * number
            if len(strengths) != number:
                name = "scale" if self.scales is None else "scales"
                raise ConfigError(
                    f"{name}={strengths} has {len(strengths)} strengths for {number} LoRAs; give one for each, or a single number."
                )
            found.append(tuple(strengths))
        return list(dict.fromkeys(found))

    def all_seeds(self) -> list[int]:
        return list(dict.fromkeys(self.seeds)) if self.seeds is not None else list(range(self.seed, self.seed + self.count))
