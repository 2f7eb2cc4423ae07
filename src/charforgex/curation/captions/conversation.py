"""What is asked about a picture: templates in Jinja2, several turns, and what of an answer is the caption.

A template knows `name`, `captions`, `framing`, `trigger` and `class_word` of the picture, and `answers`, the earlier ones of this
conversation. Templates run sandboxed, and a word that they do not know is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

from PIL import Image

from charforgex.curation.captions.base import Context, one_line
from charforgex.errors import ConfigError, DataError

KNOWN = {field.name for field in fields(Context)} - {"turns"}
LONGEST = 1536  # pixels of a side: 2,304 tokens of Qwen3-VL; what a caption tells is not smaller than that

logger = logging.getLogger(__name__)
Said = tuple[str, str]  # role, "user" or "assistant", and text


class Answer(NamedTuple):
    """`ended` is false where the model was cut off by `max_tokens`."""

    text: str
    ended: bool


class Questions:
    """The turns of a conversation for each framing, checked when made. Raises ConfigError with the template and what is wrong with it."""

    def __init__(self, turns: Mapping[str, Sequence[str]], option: str):
        from jinja2 import StrictUndefined, TemplateError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        self.turns, used = {}, set()
        for framing, templates in turns.items():
            for template in templates:
                try:
                    words = meta.find_undeclared_variables(environment.parse(template))
                except TemplateError as error:
                    raise ConfigError(f"{option}: the template {template!r} cannot be read: {error}.") from error
                if unknown := sorted(words - KNOWN - {"answers"}):
                    raise ConfigError(
                        f"{option}: {template!r} asks for {', '.join(unknown)}; known are {', '.join(sorted(KNOWN))}, answers."
                    )
                used |= words
            self.turns[framing] = [environment.from_string(template) for template in templates]
        self.reads = frozenset(used - {"answers"} | ({"framing"} if len(self.turns) > 1 else set()))

    def of(self, context: Context) -> list:
        return self.turns.get(context.framing) or self.turns["any"]

    def ask(self, context: Context, number: int, answers: Sequence[str]) -> str:
        from jinja2 import TemplateError

        words = {name: getattr(context, name) for name in KNOWN}
        try:
            return self.of(context)[number].render(**words, answers=list(answers)).strip()
        except (TemplateError, TypeError, ArithmeticError) as error:  # a filter on None is a TypeError
            raise DataError(f"the template of turn {number + 1} does not fit this picture: {error}") from error


def converse(questions: Questions, contexts: Sequence[Context], answer: Callable[[list[int], list[list[Said]]], list[Answer]]) -> list[str]:
    """The last answers, as captions. `answer(indices, conversations)` says what follows on each, the picture being with its first words."""
    said: list[list[Said]] = [
        [item for question, reply in context.turns for item in (("user", question), ("assistant", reply))] for context in contexts
    ]
    answers: list[list[str]] = [[] for _ in contexts]
    for number in range(max(len(questions.of(context)) for context in contexts)):
        active = [index for index, context in enumerate(contexts) if number < len(questions.of(context))]
        for index in active:
            said[index].append(("user", questions.ask(contexts[index], number, answers[index])))
        for index, reply in zip(active, answer(active, [said[index] for index in active]), strict=True):
            answers[index].append(whole(reply))
            said[index].append(("assistant", answers[index][-1]))
    return [one_line(replies[-1]) for replies in answers]


def whole(answer: Answer) -> str:
    """The answer without its thinking, and without the sentence in which it was cut off."""
    text = re.sub(r"<think>.*?</think>", "", answer.text, flags=re.DOTALL).rpartition("</think>")[2]  # some begin inside it
    if "<think>" in text:
        logger.warning("curation.captions.max_tokens were used up while the model was still thinking: no caption; raise it, to 2048 say.")
        return ""
    text = re.sub(r"</?answer>", "", text).strip()
    if not answer.ended and (ends := [match.end() for match in re.finditer(r"[.!?。！？](?=\s|$)", text)]):
        text = text[: ends[-1]]
    return text


def without_special(text: str, special: Collection[str]) -> str:
    """Text without a tokenizer's tokens that are no words, declared or not; thinking marks stay, for `whole` to see."""
    for token in sorted(set(special) - {"<think>", "</think>"}, key=len, reverse=True):
        text = text.replace(token, "")
    return re.sub(r"<\|[^<>|]*\|>", "", text)


def shrink(picture: Image.Image) -> Image.Image:
    """RGB, with no side longer than a caption needs."""
    picture = picture.convert("RGB")  # a copy, also of RGB
    if max(picture.size) > LONGEST:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return picture
