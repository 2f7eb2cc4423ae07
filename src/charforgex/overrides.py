"""Settings as Hydra's overrides: from Python values, and from what people type for texts. Hydra is imported when needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEXTS = ("prompt", "negative", "trigger", "question", "note", "settings")  # settings, by the last part of their name, that hold a sentence
PLAIN = re.compile(r"[A-Za-z0-9_./@%+-]*[A-Za-z_/][A-Za-z0-9_./@%+-]*")
NAME = re.compile(r"[A-Za-z_]\w*")  # others, such as patterns, cannot be spelled with dots: their mapping is one value
WORDS = ("null", "true", "false", "yes", "no", "on", "off", "nan", "inf")


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """`{"steps": 200, "lora": {"rank": 8}, "prompt": "a, b"}` as `steps=200`, `++lora.rank=8`, `prompt='a, b'`."""
    return [override for key, value in settings.items() for override in _override(key, value)]


def _override(key: str, value: Any) -> Iterable[str]:
    if isinstance(value, Mapping) and value and all(NAME.fullmatch(str(name)) for name in value):
        for name, item in value.items():
            yield from _override(f"++{key.removeprefix('++')}.{name}", item)  # ++: a node that takes any names has none of them yet
    else:
        yield f"{key}={written(value)}"


def written(value: Any) -> str:
    """A Python value in Hydra's grammar. Anything but numbers, lists, mappings, None and booleans is written as text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(str(key))}:{written(item)}" for key, item in value.items()) + "}"
    text = str(value)
    return text if PLAIN.fullmatch(text) and text.lower() not in WORDS and not _is_number(text) else quoted(text)


def _key(name: str) -> str:
    """A mapping's name: Hydra takes none in quotes, and what has a meaning for it behind a backslash."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def quoted(text: str) -> str:
    """`text` so that Hydra and OmegaConf read exactly these characters: nothing in it is a list, a sweep or a reference."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text.replace("${", "\\${"), quote=Quote.single).with_quotes()


def quote_texts(arguments: Iterable[str]) -> list[str]:
    """A command line whose texts may be typed as they are: `prompt="a cat, {red|blue}"` reaches Hydra as `prompt='a cat, {red|blue}'`.

    A value that begins with `~/` is the path in the home folder, as in bash; Hydra's grammar knows no `~` and some shells leave it. Lists,
    null, and what is quoted for Hydra already stay. So does every argument of a multirun, where commas mean a sweep.
    """
    arguments = list(arguments)
    if {"-m", "--multirun"} & set(arguments):
        return arguments
    return [_quote_text(argument) for argument in arguments]


def _quote_text(argument: str) -> str:
    key, equals, value = argument.partition("=")
    value = value.strip()
    is_text = equals and re.fullmatch(r"[+]{0,2}[A-Za-z_][\w.]*", key) and key.rpartition(".")[2].lstrip("+") in TEXTS
    if equals and not is_text and re.fullmatch(r"~/[^,]*", value):
        return f"{key}={written(Path(value).expanduser())}"
    if not is_text or not value or value == "null" or value.startswith("["):
        return argument
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return argument
    return f"{key}={quoted(value)}"
