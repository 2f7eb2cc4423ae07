"""Which modules a setting means. A pattern is one of three:

to_q, attn.to_q            the end of a module's path, at a dot
*.transformer_blocks.0.*   with a star: the whole path, * for anything
re:.*blocks\\.[0-3]\\..*     after re: a regular expression of the whole path
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from charforgex.errors import ConfigError, LoraError

REGEX = "re:"


def check_patterns(setting: str, patterns: Iterable[str]) -> None:
    """Raises ConfigError for a regular expression that is none."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else "")
        except re.error as error:
            raise ConfigError(f"{setting}: {pattern} is no regular expression: {error}.") from error


def fits(pattern: str, path: str) -> bool:
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), path) is not None
    return fnmatchcase(path, pattern) if "*" in pattern else path == pattern or path.endswith("." + pattern)


def chosen(setting: str, patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths that any pattern fits, in their own order. Raises LoraError for a pattern that fits none."""
    check_patterns(setting, patterns)
    matches = {pattern: [path for path in paths if fits(pattern, path)] for pattern in patterns}
    unmatched = [pattern for pattern, found in matches.items() if not found]
    if unmatched or not patterns:
        ends = sorted({path.rpartition(".")[2] for path in paths if not path[-1].isdigit()})
        raise LoraError(
            f"{setting}: {', '.join(unmatched) or 'nothing'} matches no linear or convolutional module; they end in {', '.join(ends)}."
        )
    wanted = set().union(*matches.values())
    return [path for path in paths if path in wanted]


def each(setting: str, table: Mapping[str, float] | None, default: float, paths: Sequence[str]) -> dict[str, float]:
    """A value for every path: of the patterns that fit it, the last one's. Raises LoraError for a pattern that fits no path."""
    values = dict.fromkeys(paths, default)
    for pattern, value in (table or {}).items():
        values |= dict.fromkeys(chosen(setting, [pattern], paths), value)
    return values
