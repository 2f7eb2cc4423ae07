"""The schema of evaluate.yaml but for `metrics`, whose own it is. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from charforgex.config import Range
from charforgex.errors import ConfigError
from charforgex.evaluation.packs import Pack
from charforgex.families.settings import FamilySettings, Positive
from charforgex.generation.settings import LoggerSettings, SamplingSettings, Scale


@dataclass(frozen=True)
class Settings(SamplingSettings):
    """Raises ConfigError for values that contradict each other or would have no effect."""

    lora: str | list[str | list[str]] | None = None
    scales: list[Scale] = field(default_factory=lambda: [1.0])
    pictures: str | list[str] | None = None
    base: str | None = None
    family: FamilySettings | None = None
    with_base: bool = True
    tokenizer: str | None = None
    references: str | None = None
    training: str | None = None
    others: str | None = None
    packs: dict[str, Pack] = field(default_factory=dict)
    prompt: str | list[str] | None = None
    prompt_file: Path | None = None
    trigger: str | None = None
    class_word: str | None = None
    seed: Annotated[int, Range(at_least=0)] = 0
    count: Positive = 2
    width: Positive | None = None
    height: Positive | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    out: Path | None = None
    overwrite: bool = False
    objective: str | list[str] = "value"
    cache_dir: Path = Path("runs/cache")
    dry_run: bool = False
    logger: LoggerSettings = field(default_factory=LoggerSettings)

    def __post_init__(self):
        super().__post_init__()
        if not self.scales:
            raise ConfigError("scales=[] is an empty list; name strengths such as scales=[0.6,0.8,1].")
        if not self.lora and self.scales != [1.0]:
            raise ConfigError(f"scales={self.scales} has no effect without a LoRA; say lora=<file or run>.")
        if self.lora == [] or (isinstance(self.lora, list) and [] in self.lora):
            raise ConfigError("lora=[] names no LoRA; name files or runs, or leave it out to evaluate the base model.")
        if not self.with_base and not self.lora and not self.pictures:
            raise ConfigError("with_base=false leaves nothing to evaluate; say lora=<file or run>, or pictures=<folder>.")
        if self.overwrite and self.out is None:
            raise ConfigError("overwrite=true has no effect without out=<folder>: each evaluation has a folder of its own.")
        if not self.objectives:
            raise ConfigError("objective=[] names no number; say objective=value, or several such as objective=[identity,diversity].")

    @property
    def draws(self) -> bool:
        """Whether there are contestants whose pictures are to be made, and not only finished ones."""
        return bool(self.lora or self.base or self.family or not self.pictures)

    @property
    def entries(self) -> list[str | list[str]]:
        """What `lora` names: one file or folder each, or files that act together."""
        return [self.lora] if isinstance(self.lora, str) else list(self.lora or [])

    @property
    def folders(self) -> list[Path]:
        """Of finished pictures."""
        names = [self.pictures] if isinstance(self.pictures, str) else self.pictures or []
        return [Path(name).expanduser() for name in names]

    @property
    def objectives(self) -> list[str]:
        return [self.objective] if isinstance(self.objective, str) else self.objective

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.count))
