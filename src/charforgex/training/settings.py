"""The schema of `train.yaml`'s groups: what each setting may be. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.config import Range
from charforgex.errors import ConfigError
from charforgex.lora.targets import check_patterns

Positive = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class RunSettings:
    """The keys at the root."""

    name: str
    seed: Annotated[int, Range(at_least=0)]
    runs_dir: Path
    cache_dir: Path
    run_dir: Path | None = None
    resume: Path | None = None
    fresh: bool = False

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"name={self.name} names files; use letters, digits, dots, - and _.")


@dataclass(frozen=True)
class LoraSettings:
    rank: Positive = 16
    alpha: Annotated[float, Range(above=0)] = 16.0
    targets: str | list[str] = "attention"  # a preset of the family, or patterns as `lora.targets` has them
    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    init: Literal["zero", "pissa"] = "zero"
    rslora: bool = False
    up_ratio: Annotated[float, Range(above=0)] = 1.0
    factor: Annotated[int, Range(at_least=2)] | None = None
    ranks: dict[str, Positive] | None = None
    alphas: dict[str, Annotated[float, Range(above=0)]] | None = None

    def __post_init__(self):
        pair = self.kind in ("lora", "dora")  # a down and an up
        if self.factor is not None and self.kind != "lokr":
            raise ConfigError(f"lora.factor={self.factor} has an effect in lokr only, and lora.kind is {self.kind}; leave it null.")
        if self.init == "pissa" and self.kind != "lora":
            raise ConfigError(
                f"lora.init=pissa begins with the weight as a product of two factors; lora.kind={self.kind} is none, use lora."
            )
        if self.rslora and not pair:
            raise ConfigError(f"lora.rslora=true is made for a product of two factors; lora.kind={self.kind} is none, use lora or dora.")
        if self.up_ratio != 1 and not pair:
            raise ConfigError(
                f"lora.up_ratio={self.up_ratio:g} has no effect with lora.kind={self.kind}, which has no up; use lora or dora."
            )
        for name, patterns in (("targets", self.targets), ("ranks", self.ranks), ("alphas", self.alphas)):
            check_patterns(f"lora.{name}", [] if isinstance(patterns, str) else patterns or [])

    def how(self) -> dict[str, Any]:
        """The options of `inject` that hold for every network."""
        return {"kind": self.kind, "init": self.init, "rslora": self.rslora, "factor": self.factor}


@dataclass(frozen=True)
class TextEncoderSettings:
    lr: Annotated[float, Range(above=0)] | None = None  # None: no LoRA in them
    tokens: Annotated[int, Range(at_least=0, at_most=32)] = 0
    tokens_init: str | None = None
    tokens_lr: Annotated[float, Range(above=0)] = 1e-3

    def __post_init__(self):
        for name in ("tokens_init", "tokens_lr"):
            if not self.tokens and getattr(self, name) != getattr(TextEncoderSettings, name):
                raise ConfigError(f"text_encoder.{name}={getattr(self, name)} has no effect with text_encoder.tokens=0; set it to 2, say.")

    @property
    def learns(self) -> bool:
        return self.lr is not None or self.tokens > 0


@dataclass(frozen=True)
class OptimizerSettings:
    name: Literal["adamw", "adamw8bit", "prodigy", "schedule_free", "adafactor", "muon"] = "adamw"
    lr: Annotated[float, Range(above=0)] = 1e-4
    weight_decay: Annotated[float, Range(at_least=0)] = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Annotated[int, Range(at_least=0)] = 0
    grad_clip: Annotated[float, Range(at_least=0)] = 1.0  # 0 is off
    d_coef: Annotated[float, Range(above=0)] = 1.0  # of Prodigy

    def __post_init__(self):
        if self.name == "schedule_free" and self.schedule != "constant":
            raise ConfigError(f"optimizer.schedule={self.schedule} has no place in schedule_free; use optimizer.schedule=constant.")
        if self.name == "prodigy" and self.lr < 0.1:
            raise ConfigError(
                f"optimizer.lr={self.lr:g} scales the rate that prodigy finds by itself; choose optimizer=prodigy, with lr 1."
            )
        if self.name != "prodigy" and self.d_coef != 1.0:
            raise ConfigError(f"optimizer.d_coef={self.d_coef:g} has an effect in prodigy only.")


@dataclass(frozen=True)
class TrainerSettings:
    steps: Positive = 1000
    accumulate: Positive = 1
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: Positive | None = None  # of each machine; None is one
    nodes: Positive = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    threads: Annotated[int, Range(at_least=0)] = 0  # of the CPU; 0 leaves it to torch
    gradient_checkpointing: bool | Positive = False  # of all blocks, or of that many from the first
    compile: bool = False
    quantize: Literal["int8", "fp8", "nf4"] | None = None  # how the frozen base's linear layers are held
    plan: Literal["auto"] | None = None  # chooses quantize and gradient_checkpointing, where they are not set
    memory: Annotated[float, Range(above=0)] | None = None  # GiB that a plan may take; None is what there is
    ema: Annotated[float, Range(at_least=0, below=1)] = 0.99
    checkpoint_every: Positive = 100
    keep: Positive = 2

    def __post_init__(self):
        count, micros = self.count, self.accumulate
        if micros % count:
            fitting = ", ".join(str(number) for number in range(1, micros + 1) if micros % number == 0)
            raise ConfigError(
                f"trainer.accumulate={micros}: {count} devices cannot share so many micro-batches of a step equally; use {fitting} "
                f"device{'s' * (micros > 1)}, or set trainer.accumulate={-(-micros // count) * count}, of data.batch_size each."
            )
        if self.splits_base and self.compile:
            raise ConfigError("trainer.compile=true: blocks that trainer.strategy=fsdp splits are not compiled; leave one of them out.")
        if self.splits_base and self.quantize:
            raise ConfigError(
                f"trainer.strategy=fsdp splits plain weights, and trainer.quantize={self.quantize} packs them; leave one of them out."
            )
        if self.splits_base and count == 1:
            raise ConfigError(
                "trainer.strategy=fsdp splits the base among devices, and there is one; set trainer.devices, or strategy=ddp."
            )

    @property
    def splits_base(self) -> bool:
        """Whether each device holds but a part of the base."""
        return self.strategy == "fsdp"

    @property
    def count(self) -> int:
        """Devices of all machines."""
        return (self.devices or 1) * self.nodes


@dataclass(frozen=True)
class EvaluationSettings:
    every: Positive = 100
    embedder: str = "charworld"
    follower: str = "charworld"
    others: str | None = None
    prompts: tuple[str, ...] = ()
    seeds: Positive = 1  # pictures per prompt
    times: Positive = 8  # noise levels of the validation loss


@dataclass(frozen=True)
class MotionEvaluationSettings:
    every: Positive = 100
    times: Positive = 8
    prompts: tuple[str, ...] | None = None
    seeds: Positive = 1  # clips per prompt
    embedder: str = "charworld"

    def __post_init__(self):
        if self.prompts == ():
            raise ConfigError("evaluation.prompts is empty; name some, or leave it null for captions of held-out clips.")


@dataclass(frozen=True)
class MotionSettings:
    train: Literal["lora", "module"] = "lora"
    temporal: bool = True
    spatial: bool = True
    spatial_lr: Annotated[float, Range(above=0)] | None = None  # None: the recipe's
    masked: Annotated[float, Range(at_least=0, below=1)] = 0.2
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.1
    debias: Annotated[float, Range(at_least=0)] = 1.0

    def __post_init__(self):
        if not self.temporal and not self.spatial:
            raise ConfigError("motion.temporal=false and motion.spatial=false leave nothing to learn; set one of them to true.")
        if self.train == "module" and not self.temporal:
            raise ConfigError("motion.train=module trains what motion.temporal=false leaves out; set motion.temporal=true.")
        idle = {"spatial": ("spatial_lr", "masked", "dropout"), "temporal": ("train", "masked", "debias")}
        for path, names in idle.items():
            for name in names:
                if not getattr(self, path) and (value := getattr(self, name)) != getattr(MotionSettings, name):
                    raise ConfigError(f"motion.{name}={value} has no effect with motion.{path}=false; leave it as it was.")
