"""What both tools are given, what they say while they train, and how their options are read from their own code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from charforgex.errors import ConfigError

FLOW = ("flux", "sd3")  # families of rectified flow; the others have betas


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures with one .txt each, how often they come in an epoch, whether they are of others of the class, their masks."""

    folder: Path
    repeats: int = 1
    regular: bool = False
    masks: Path | None = None


@dataclass(frozen=True)
class Session:
    """One start of a tool: where it writes, the state that it goes on from, and the steps done before it."""

    out: Path
    state: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Given:
    """What is known of a training when the tool starts, besides its settings. `base` are the base's files by diffusers' component.

    Without `base`, paths are made up: for a check of the settings alone.
    """

    work: Path
    session: Session
    pictures: tuple[Pictures, ...]
    prompts: tuple[str, ...]
    trigger: str | None = None
    class_word: str | None = None
    base: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """So many of `total` steps are done, as the tool counts, and what it says of the last. Values may be NaN."""

    step: int
    total: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Said:
    """A line that matters. "saving" and "saved" enclose what must not be interrupted."""

    kind: Literal["phase", "warning", "error", "saving", "saved", "out of memory"]
    text: str


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b.c` in nested dictionaries."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def sides(resolution: int | list[int]) -> list[int]:
    return sorted({resolution} if isinstance(resolution, int) else set(resolution))


def refuse_unknown(tool: str, folder: Path, written: Iterable[str], known: set[str]) -> None:
    """Raises ConfigError for options that this version of a tool does not have: it would swallow them without a word."""
    unknown = sorted(set(written) - known)
    if unknown:
        raise ConfigError(
            f"backend.folder={folder}: this version of {tool} does not know {', '.join(unknown)}, and would pass over it; update it, or "
            "leave out the settings that ask for it (docs/backends.md says which)."
        )


def parsed(path: Path) -> ast.Module:
    """A file of a tool's code, of which nothing is run. Raises ConfigError if it is not there or no Python."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as Python ({error}); is backend.folder a whole checkout?") from error


def calls(tree: ast.AST, method: str) -> set[str]:
    """The first arguments of all `<something>.method("...")`."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", None) == method]
    return {node.args[0].value for node in found if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)}


def strings(tree: ast.AST) -> set[str]:
    """All texts that stand in a file's code."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def first(value: Any, otherwise: Any) -> Any:
    """`value`, or `otherwise` where it is None."""
    return otherwise if value is None else value
