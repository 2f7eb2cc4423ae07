r"""Prompts from text, lists and files, with wildcards.

    {red|blue|green}    one of these, which may hold wildcards themselves
    __places__          one line of <wildcard_dir>/places.txt; __places/indoor__ of <wildcard_dir>/places/indoor.txt
    {trigger}           the trigger word of the LoRA
    \{ \} \| \( \<      the character itself

Each choice is a function of (seed, number of the prompt, place of the wildcard in it): the same on every machine, and a wildcard that is
added at the end of a prompt changes no choice before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from charforgex.draws import python_rng
from charforgex.errors import ConfigError

NAME = re.compile(r"__([A-Za-z0-9][A-Za-z0-9 /.-]*(?:_[A-Za-z0-9 /.-]+)*)__")  # single underscores may stand inside
TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]*)(?::([^<>]*))?>")
WEIGHT = re.compile(r"\([^()]*:\s*[0-9.]+\s*\)")
ESCAPED = "\\{}|()<>_"
DEEPEST = 16  # wildcard files within wildcard files


def read_prompts(prompt: str | Sequence[str] | None, prompt_file: str | Path | None) -> list[str]:
    """The templates that a user gave. Raises ConfigError unless they came from exactly one place and there is at least one."""
    if prompt is not None and prompt_file is not None:
        raise ConfigError(f"prompt and prompt_file={prompt_file} are both given; keep one of them.")
    if prompt_file is not None:
        prompts = read_lines(Path(prompt_file), "prompt_file")
    elif prompt is None:
        raise ConfigError('no prompt is given; say prompt="a portrait of {trigger}", or prompt_file=<a text file, one prompt per line>.')
    else:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ConfigError('prompt=[] is an empty list; say prompt="a portrait of {trigger}".')
    for number, text in enumerate(prompts, 1):
        if not isinstance(text, str):
            raise ConfigError(f"prompt {number} is {text!r}, which is not text; put it in quotes.")
        if not text.strip():
            raise ConfigError(f"prompt {number} of {len(prompts)} is empty; write what the picture shows, or leave it out.")
    return [text.strip() for text in prompts]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file without empty ones and `#` comments. Raises ConfigError, also when none is left."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}={path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{what}={path} cannot be read: {error.strerror}.") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"{what}={path} holds no line besides comments; write one entry per line.")
    return lines


def check_templates(templates: Sequence[str], wildcard_dir: str | Path | None, trigger: str | None) -> None:
    """Reads every branch of every template and every wildcard file it names. Raises ConfigError as `expand` would for some seed."""
    for number, template in enumerate(templates):
        _Expansion(wildcard_dir, trigger, ("check", number), every_branch=True).text(template, ())


def expand(template: str, seed: int, number: int, wildcard_dir: str | Path | None = None, trigger: str | None = None) -> str:
    """The prompt that a template stands for at this seed; `number` is its place among the prompts. Raises ConfigError."""
    return " ".join(_Expansion(wildcard_dir, trigger, (seed, number)).text(template, ()).split())


class _Expansion:
    """One template's way to a prompt. `every_branch` visits all alternatives, in order to check them."""

    def __init__(self, wildcard_dir, trigger: str | None, key: tuple, every_branch: bool = False):
        self.root = Path(wildcard_dir).resolve() if wildcard_dir is not None else None
        self.trigger, self.key, self.every_branch = trigger, key, every_branch
        self.checked: set[str] = set()  # wildcard files, each of which is visited once

    def text(self, template: str, place: tuple, files: tuple[str, ...] = ()) -> str:
        """`place` is the path of wildcard ordinals that led here, `files` the wildcard files that are open."""
        self._refuse_foreign(template)
        out, ordinal, i = [], 0, 0
        while i < len(template):
            character = template[i]
            if character == "\\" and i + 1 < len(template) and template[i + 1] in ESCAPED:
                out.append(template[i + 1])
                i += 2
            elif character == "{":
                inside, i = self._braces(template, i)
                out.append(self._choice(inside, template, (*place, ordinal), files))
                ordinal += 1
            elif character == "}":
                raise ConfigError(f"prompt {template!r}: the }} at character {i + 1} closes nothing; write \\}} for the character itself.")
            elif found := NAME.match(template, i):
                out.append(self._file(found[1], (*place, ordinal), files))
                ordinal += 1
                i = found.end()
            else:
                out.append(character)
                i += 1
        return "".join(out)

    def _braces(self, template: str, start: int) -> tuple[list[str], int]:
        """The alternatives of the brace at `start`, and the index after its end."""
        depth, parts, begin, i = 0, [], start + 1, start
        while i < len(template):
            character = template[i]
            if character == "\\":
                i += 2
                continue
            if character == "{":
                depth += 1
            elif character == "|" and depth == 1:
                parts.append(template[begin:i])
                begin = i + 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return [*parts, template[begin:i]], i + 1
            i += 1
        raise ConfigError(f"prompt {template!r}: the {{ at character {start + 1} is never closed; write \\{{ for the character itself.")

    def _choice(self, alternatives: list[str], template: str, place: tuple, files: tuple[str, ...]) -> str:
        if alternatives == ["trigger"]:
            if self.trigger is None:
                raise ConfigError(
                    f"prompt {template!r} asks for {{trigger}}, and no LoRA here carries a trigger word; write the word itself, "
                    "or say trigger=<word>."
                )
            return self.trigger
        if len(alternatives) == 1:
            raise ConfigError(
                f"prompt {template!r}: {{{alternatives[0]}}} offers no choice; write {{a|b}} to choose, {{trigger}} for the LoRA's word, "
                "or \\{ and \\} for braces."
            )
        return self._one_of(alternatives, place, files)

    def _file(self, name: str, place: tuple, files: tuple[str, ...]) -> str:
        if self.root is None:
            raise ConfigError(f"__{name}__ names a wildcard file, and there is no folder of them; say wildcard_dir=<folder>.")
        path = (self.root / f"{name}.txt").resolve()
        if not path.is_relative_to(self.root):
            raise ConfigError(f"__{name}__ leads out of wildcard_dir={self.root}; only files inside it are read.")
        if not path.is_file():
            there = sorted(p.relative_to(self.root).with_suffix("").as_posix() for p in self.root.rglob("*.txt"))[:20]
            raise ConfigError(f"__{name}__: there is no file {path}; wildcard_dir has {', '.join(there) or 'no .txt file'}.")
        if name in files or len(files) >= DEEPEST:
            raise ConfigError(f"wildcard files call each other without end: {' -> '.join((*files, name))}; break the circle.")
        if self.every_branch and name in self.checked:
            return ""
        self.checked.add(name)
        return self._one_of(read_lines(path, f"__{name}__"), place, (*files, name))

    def _one_of(self, alternatives: list[str], place: tuple, files: tuple[str, ...]) -> str:
        if self.every_branch:
            return [self.text(alternative, place, files) for alternative in alternatives][-1]
        chosen = python_rng("wildcard", *self.key, *place).choice(alternatives)
        return self.text(chosen, place, files)

    @staticmethod
    def _refuse_foreign(template: str) -> None:
        """Other tools' syntax would reach the text encoder as letters and change the picture in ways nobody asked for."""
        bare = re.sub(r"\\.", "", template)
        if found := TAG.search(bare):
            name, scale = found[2] or "name", found[3] or "1"
            raise ConfigError(
                f"prompt {template!r}: {found[0]} is not read from prompts; load it with lora=<path of {name}.safetensors> scale={scale}."
            )
        if found := WEIGHT.search(bare):
            raise ConfigError(
                f"prompt {template!r}: attention weights such as {found[0]} are not supported; write the words alone, "
                "or \\( for a parenthesis."
            )
