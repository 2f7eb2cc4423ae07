"""What happens to captions before they are encoded: the trigger word, and shuffled tags."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from charforgex.curation.manifest import Record, some
from charforgex.draws import python_rng
from charforgex.errors import ConfigError, DataError

PLACEHOLDER = "{trigger}"


def has_trigger(caption: str, trigger: str) -> bool:
    """Whether the trigger stands in the caption as a word of its own. Case counts: encoders may see another word."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption) is not None


def with_trigger(
    records: Sequence[Record], trigger: str | None, add: bool, separator: str, default: str | None, what: str = "pictures"
) -> list[Record]:
    """Records whose every caption holds the trigger.

    `{trigger}` in a caption is replaced; with `add` the trigger is put before captions that lack it; `default` is the caption
    of those without one. Raises DataError naming the files without captions, or whose captions lack the trigger.
    """
    if add and not trigger:
        raise ConfigError("data.add_trigger=true has no effect without data.trigger; set the word.")
    bare = [record.path for record in records if not record.captions]
    if bare and not default:
        raise DataError(
            f"{len(bare)} of {len(records)} {what} have no caption: {some(bare)}. Write a .txt file of the same name beside each, "
            "or set data.default_caption to one for all of them."
        )
    out, lacking = [], []
    for record in records:
        captions = []
        for caption in record.captions or (default,):
            if PLACEHOLDER in caption:
                if not trigger:
                    raise ConfigError(f"The caption of {record.path} has {PLACEHOLDER}, but data.trigger is not set.")
                caption = caption.replace(PLACEHOLDER, trigger)
            if trigger and not has_trigger(caption, trigger):
                if add:
                    caption = f"{trigger}{separator.rstrip()} {caption}"
                else:
                    lacking.append(f'{record.path} ("{caption}")')
            captions.append(caption)
        out.append(replace(record, captions=tuple(dict.fromkeys(captions))))
    if lacking:
        raise DataError(
            f'The trigger "{trigger}" is absent from {len(lacking)} captions: {some(lacking, 3)}. Write it or {PLACEHOLDER} there, '
            "or set data.add_trigger=true to put it in front."
        )
    return out


def class_of(trigger: str | None, class_word: str | None) -> str:
    """What the character is one of: `class_word`, or the trigger without its first word. Raises ConfigError if neither says it."""
    if not trigger:
        raise ConfigError("loss.prior_weight needs data.trigger: captions with the class in its place are what it holds still.")
    word = class_word or trigger.partition(" ")[2].strip()
    if not word:
        raise ConfigError(
            f'loss.prior_weight needs the class of the trigger "{trigger}"; set data.class_word, such as data.class_word=woman.'
        )
    if has_trigger(word, trigger):
        raise ConfigError(f'data.class_word="{word}" holds the trigger "{trigger}"; name the class alone, such as woman.')
    return word


def without_trigger(caption: str, trigger: str, class_word: str) -> str:
    """The caption with the class in the trigger's place."""
    return re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", lambda _: class_word, caption)


def split_tags(caption: str, separator: str) -> list[str]:
    return [tag.strip() for tag in caption.split(separator) if tag.strip()]


def shuffled(caption: str, separator: str, keep: int, rng: random.Random) -> str:
    """The caption with its tags after the first `keep` in random order."""
    tags = split_tags(caption, separator)
    rest = tags[keep:]
    rng.shuffle(rest)
    return f"{separator.rstrip()} ".join(tags[:keep] + rest)


def variants(caption: str, count: int, separator: str, keep: int, seed: int) -> list[str]:
    """The caption itself and up to `count - 1` other orders of its tags. A function of its arguments alone, so they can be cached."""
    texts = [caption]
    for number in range(1, count):
        text = shuffled(caption, separator, keep, python_rng(seed, "tags", caption, number))
        if text not in texts:
            texts.append(text)
    return texts


def tag_frequency(records: Iterable[Record], separator: str) -> dict[str, int]:
    """In how many pictures each tag occurs, the most frequent first."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update({tag for caption in record.captions for tag in split_tags(caption, separator)})
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
