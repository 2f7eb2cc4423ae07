"""A folder of finished pictures, whoever made them, with the prompts that they tell of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from charforgex.curation.manifest import some
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Shot

PROMPTS = "captions.jsonl"
NAMES, TEXTS = ("file", "file_name", "path"), ("prompt", "text", "caption")  # keys of its lines, as tools call them
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Finished:
    """`template` is the prompt before wildcards, where the picture says so."""

    shot: Shot
    template: str


def read_finished(folder: Path, packs: Mapping[str, str]) -> tuple[list[Finished], list[str]]:
    """The pictures of a folder and its subfolders, and what is wrong with others. `packs` has the pack of each known template.

    A prompt comes from captions.jsonl in the folder, else name.txt beside the picture, else our own recipe or A1111's text in a PNG.
    Raises DataError if no picture can be read.
    """
    told, problems = _captions(folder / PROMPTS)
    found: list[Finished] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(".") or "/." in name:
            continue
        try:
            with Image.open(path) as picture:
                picture.load()
                said = dict(getattr(picture, "text", {}))
            key = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        prompt, template, seed = _asked(path, said)
        prompt = told.get(name) or prompt
        found.append(Finished(Shot(path, prompt, packs.get(template, ""), seed, key), template or prompt))
    if not found:
        raise DataError(f"pictures={folder} has no picture that can be read{': ' + some(problems, 3) if problems else ''}.")
    return found, problems


def _captions(path: Path) -> tuple[dict[str, str], list[str]]:
    """{file: prompt} of a captions.jsonl, and which of its lines say nothing."""
    if not path.is_file():
        return {}, []
    found, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        row = row if isinstance(row, dict) else {}
        name, text = _first(row, NAMES), _first(row, TEXTS)
        if name and text:
            found[name] = text
        else:
            problems.append(f'{path.name}, line {number} is not {{"file": ..., "prompt": ...}}')
    return found, problems


def _first(row: Mapping[str, object], keys: tuple[str, ...]) -> str:
    return next((row[key].strip() for key in keys if isinstance(row.get(key), str)), "")


def _asked(path: Path, said: Mapping[str, str]) -> tuple[str, str, int | None]:
    """Prompt, template and seed as the file beside a picture or its PNG text tell them; empty where nothing does."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        lines = [line.strip() for line in beside.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
        return (lines[0] if lines else ""), "", None
    try:
        recipe = json.loads(said["charforgex"])
        return str(recipe["prompt"]), str(recipe["template"]), int(recipe["seed"])
    except (KeyError, TypeError, ValueError):
        return _of_a1111(said.get("parameters", ""))


def _of_a1111(text: str) -> tuple[str, str, int | None]:
    """What A1111 and its kin write: the prompt, then a line each for the negative one and the settings."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith(("Negative prompt:", "Steps:"))), len(lines))
    prompt = re.sub(r"<(lora|lyco|hypernet):[^<>]*>", "", " ".join(lines[:end]))
    seed = re.search(r"(?:^|, )Seed: (\d+)", lines[-1]) if lines else None
    return " ".join(re.sub(r"\\([()\[\]\\])", r"\1", prompt).split()), "", int(seed[1]) if seed else None
