"""What is asked for: prompts in packs, with {trigger} for what calls the character and {class} for what it is one of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charforgex.errors import ConfigError
from charforgex.generation.prompts import check_templates, expand, read_prompts

UNCALLED = ("leakage", "unrelated")  # packs that must not call the character: who comes all the same, and what else changes
OWN = "own"  # the pack of prompts that stand in no file
TRIGGER, CLASS = "{trigger}", "{class}"
ANYBODY = "person"


@dataclass(frozen=True)
class Pack:
    """One file of conf/pack."""

    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """A prompt as it was written; `number` is its place among all, by which wildcards are drawn."""

    text: str
    pack: str
    number: int

    @property
    def calls(self) -> bool:
        """Whether it is a picture of the character that is asked for."""
        return self.pack not in UNCALLED

    def prompt(self, seed: int, trigger: str | None, class_word: str) -> str:
        return expand(self.text.replace(CLASS, class_word), seed, self.number, None, trigger)


def templates(packs: Mapping[str, Pack], prompt: str | Sequence[str] | None, prompt_file: Path | None) -> list[Template]:
    """All prompts, pack by pack. Raises ConfigError for a prompt that cannot be read, or stands in a pack where it means nothing."""
    texts = [(text, name) for name, pack in packs.items() for text in pack.prompts]
    if prompt is not None or prompt_file is not None:
        texts += [(text, OWN) for text in read_prompts(prompt, prompt_file)]
    if not texts:
        raise ConfigError("no prompt is asked for; say pack=[character], or prompt=... .")
    found = [Template(text, pack, number) for number, (text, pack) in enumerate(texts)]
    if len({template.text for template in found}) < len(found):
        twice = next(t for t in found if sum(t.text == other.text for other in found) > 1)
        raise ConfigError(
            f'the prompt "{twice.text}" stands twice among the packs; leave one out, and say count=4 for more pictures of it.'
        )
    for template in found:
        if not template.calls and TRIGGER in template.text:
            raise ConfigError(
                f'packs.{template.pack}: "{template.text}" calls the character; this pack is for prompts without {TRIGGER}. '
                "Put it into another."
            )
    check_templates([template.text.replace(CLASS, ANYBODY) for template in found], None, trigger="")
    return found


def class_of(trigger: str | None, class_word: str | None) -> str:
    """What the character is one of: `class_word`, else the trigger without its first word, else anybody."""
    return class_word or (trigger or "").partition(" ")[2].strip() or ANYBODY
