"""`charforgex lora distill`: several LoRAs into one, or a high rank into a low one, by teaching a student what the teachers predict.

Nothing heavy is imported before the settings are known to be right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError
from charforgex.families.settings import FamilySettings, Positive
from charforgex.generation.prompts import expand
from charforgex.generation.settings import Scale
from charforgex.generation.settings import Settings as Generating
from charforgex.toolbox.common import Inputs, Outputs

if TYPE_CHECKING:
    from charforgex.generation.stack import Adapter, Stack

COUNT = 64  # pictures that teachers draw to be learnt from
HELD_OUT = 4  # one more for so many of them
PROMPTS = (
    "a {portrait|close-up} of a {trigger}, {smiling|laughing|with a neutral face|looking sad|looking angry|looking surprised|winking}, "
    "wearing {a red hoodie|a blue suit|a yellow t-shirt|a white shirt|a black coat|a green striped shirt}, "
    "{at the beach|in a forest|in a city|in a room|in outer space|at sunset|in the snow|underwater}",
    "a {portrait|full-body picture} of a {trigger}",
)


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs, Outputs):
    """`base` is here what generate.py calls so. conf/lora_distill.yaml says what each is."""

    weights: list[Scale] | None = None
    together: bool = True
    triggers: list[str] | None = None
    family: FamilySettings | None = None
    tokenizer: str | None = None
    rank: Positive = 8
    pictures: Path | None = None
    prompts: list[str] | None = None
    count: Positive | None = None
    steps: Positive = 200
    batch_size: Positive | None = None
    lr: Annotated[float, Range(above=0, below=1)] = 0.02
    seed: Annotated[int, Range(at_least=0)] = 0
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    cache_dir: Path = Path("runs/cache")

    def __post_init__(self):
        for name in ("weights", "triggers"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.paths):
                raise ConfigError(f"{name}={given} has {len(given)} entries for {len(self.paths)} LoRAs; give one for each.")
        if self.weights is not None and 0 in self.weights:
            raise ConfigError(f"weights={self.weights}: a LoRA of weight 0 teaches nothing; leave it out.")
        for name in ("prompts", "count"):
            if self.pictures is not None and getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect with pictures={self.pictures}, which have captions; leave one of them out.")
        if self.prompts is not None and not self.prompts:
            raise ConfigError("prompts=[] is an empty list; name prompts, or leave it out.")
        if self.pictures is not None and not self.pictures.exists():
            raise ConfigError(f"pictures={self.pictures} is not there; name a folder or a .jsonl manifest.")


def distill(cfg: Any) -> dict[str, Any]:
    """Makes the LoRA that lora_distill.yaml's settings ask for. Returns what <out>.json holds, in a dry run what is known before.

    Raises CharForgeError; exits with 130 or 143 when stopped, with all saved.
    """
    settings = bind(Settings, cfg, "")
    out = settings.check_out(settings.paths)

    from charforgex.families.registry import refuse_clips
    from charforgex.generation.stack import read_stack
    from charforgex.quiet import quiet
    from charforgex.training.distilled import distilled, sketched

    with quiet():
        stack = read_stack(
            Generating(lora=list(map(str, settings.paths)), base=settings.base, family=settings.family, tokenizer=settings.tokenizer)
        )
        refuse_clips(stack.family, "distill", "merge motion LoRAs with charforgex merge.")
        teachers = Teachers.of(stack.adapters, settings)
        check_rank(stack, settings)
        prompts = [] if settings.pictures else teachers.prompts(settings.prompts or PROMPTS, settings.seed, settings.count or COUNT)
        if settings.dry_run:
            return sketched(settings, stack, teachers)
        return distilled(settings, stack, teachers, prompts, out)


def check_rank(stack: Stack, settings: Settings) -> None:
    """Raises ConfigError where a plain sum would be exact: then there is nothing to be learnt."""
    layers: dict[str, int] = {}
    for adapter in stack.adapters:
        for name, layer in adapter.lora.layers.items():
            if layer.kind != "lora" or not name.startswith(stack.family.denoiser_name):
                return
            layers[name] = layers.get(name, 0) + layer.rank
    most = max(layers.values())
    if settings.together and settings.rank >= most:
        what = "their sum is exact, and python merge.py method=stack makes it" if len(stack.adapters) > 1 else "it is as small already"
        raise ConfigError(f"rank={settings.rank}: at rank {most} {what}; choose a lower rank.")


@dataclass(frozen=True)
class Teachers:
    """Who answers a caption. Names are the adapters'; a word is None where a LoRA carries none."""

    words: dict[str, str | None]
    weights: dict[str, float]
    together: bool

    @staticmethod
    def of(adapters: Sequence[Adapter], settings: Settings) -> Teachers:
        """Raises LoraError or ConfigError for LoRAs that cannot teach like this."""
        for adapter in adapters:
            if adapter.tokens:
                raise LoraError(
                    f"{adapter.path} has new tokens for its trigger, which no student can take over; train it with text_encoder.tokens=0."
                )
        triggers = settings.triggers or [adapter.trigger for adapter in adapters]
        words = {adapter.name: word for adapter, word in zip(adapters, triggers, strict=True)}
        if not settings.together:
            for adapter in adapters:
                if not words[adapter.name]:
                    raise ConfigError(f"{adapter.path} carries no trigger, by which together=false knows its prompts; say triggers=[...].")
            if len(set(words.values())) < len(words):
                raise ConfigError(
                    f"together=false needs triggers that differ, and they are {', '.join(map(str, words.values()))}; say triggers=[...], "
                    "with pictures or prompts that use them, or together=true."
                )
        weights = dict(zip(words, settings.weights or [1.0] * len(words), strict=True))
        return Teachers(words, weights, settings.together)

    def answering(self, caption: str) -> list[tuple[str, ...]]:
        """Sets of LoRAs that act at once; the answer is their predictions' mean.

        Nobody but the base answers for strangers. The empty caption, against which guidance is measured, is everybody's.
        """
        if self.together:
            return [tuple(self.words)]
        if not caption:
            return [(name,) for name in self.words]
        return [tuple(name for name, word in self.words.items() if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption))]

    def prompts(self, templates: Sequence[str], seed: int, count: int) -> list[str]:
        """`count` prompts and those held out after them, templates and triggers in turn. Raises ConfigError."""
        words = list(dict.fromkeys(word for word in self.words.values() if word))
        pairs = [(template, word) for template in templates for word in (words if "{trigger}" in template else [None])]
        if not pairs:
            raise ConfigError("No LoRA here carries a trigger, which all prompts ask for; say triggers=[...], or prompts=[...] without it.")
        return [expand(*_drawn(pairs, seed, number)) for number in range(count + -(-count // HELD_OUT))]


def number_to_learn(count: int) -> int:
    """How many of `Teachers.prompts` are not held out."""
    return count * HELD_OUT // (HELD_OUT + 1)


def _drawn(pairs: list[tuple[str, str | None]], seed: int, number: int) -> tuple[str, int, int, None, str | None]:
    template, word = pairs[number % len(pairs)]
    return template, seed, number, None, word
