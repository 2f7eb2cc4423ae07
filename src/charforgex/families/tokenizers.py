"""Tokenizers for single files, which hold none: from the user's folder, from beside the files, or from the local hub cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.errors import ModelError
from charforgex.families.parts import component_class

if TYPE_CHECKING:
    from charforgex.families.base import Family

LENGTHS = {"CLIPTokenizer": 77, "T5Tokenizer": 512}  # where a tokenizer does not say: unset it is astronomically large
FLOW_BASES = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-Krea-dev")
SD3_BASES = tuple(f"stabilityai/stable-diffusion-{name}" for name in ("3-medium-diffusers", "3.5-medium", "3.5-large", "3.5-large-turbo"))
HOMES = {  # repository and folder in which the local hub cache may have each kind
    "CLIPTokenizer": [
        ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"), ("openai/clip-vit-large-patch14", ""),
        *((repo, "tokenizer") for repo in (*FLOW_BASES, *SD3_BASES)),
    ],
    "T5Tokenizer": [
        *((repo, "tokenizer_2") for repo in FLOW_BASES), *((repo, "tokenizer_3") for repo in SD3_BASES),
    ],
}  # fmt: skip
WANTED = {
    "CLIPTokenizer": "a CLIP tokenizer (tokenizer.json, or vocab.json with merges.txt)",
    "T5Tokenizer": "a T5 tokenizer (tokenizer.json)",
}
WAYS = {
    "CLIPTokenizer": "hf download openai/clip-vit-large-patch14 vocab.json merges.txt",
    "T5Tokenizer": 'hf download black-forest-labs/FLUX.1-schnell --include "tokenizer_2/*"',
}


def find_tokenizers(family: Family, names: Sequence[str], files: Sequence[Path], folder: str | None) -> dict[str, Path]:
    """The folder of each tokenizer. Nothing is downloaded and nothing loaded. Raises ModelError naming what is not to be had."""
    given = Path(folder).expanduser() if folder else None
    if given is not None and not given.is_dir():
        raise ModelError(f"tokenizer={folder} is not a folder.")
    beside = [place for file in files for place in (file.parent / file.stem, file.parent)]
    found: dict[str, Path] = {}
    for name in names:
        kind = component_class(family, name).__name__
        places = [home for place in ([given] if given else []) + beside for home in _homes(place, name)]
        home = next((home for home in places if _holds(home, kind)), None) or next(_cached(kind), None)
        if home is not None:
            found[name] = home
    lacking = {component_class(family, name).__name__ for name in names if name not in found}
    if given is not None and not any(given in (home, home.parent) for home in found.values()):
        raise ModelError(f"tokenizer={folder} holds no tokenizer that is wanted: {' or '.join(WANTED[kind] for kind in sorted(WANTED))}.")
    if lacking:
        wanted, ways = (" and ".join(words[kind] for kind in sorted(lacking)) for words in (WANTED, WAYS))
        raise ModelError(
            f"{files[0]} comes without its tokenizers. Put {wanted} into a folder `tokenizer`, a second into `tokenizer_2`, beside it, or "
            f"give tokenizer=<folder of a whole base or of tokenizers>, or run once with a network: {ways}"
        )
    return found


def load_tokenizer(family: Family, name: str, home: Path) -> Any:
    cls = component_class(family, name)
    padding = {}
    if cls.__name__ == "CLIPTokenizer" and home.name != name:
        # given at once: set afterwards, "!" would pad without being special, and a "!" in a caption get another id than SDXL's
        padding = {"pad_token": "!" if name == "tokenizer_2" else "<|endoftext|>"}
    try:
        tokenizer = cls.from_pretrained(home, local_files_only=True, **padding)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(f"The tokenizer in {home} cannot be read: {error}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, LENGTHS[cls.__name__])
    return tokenizer


def _homes(place: Path, name: str) -> list[Path]:
    """Where in a folder a tokenizer may be: SDXL's two, and CLIP's of all families, share one vocabulary and differ in the padding."""
    return [place / name, *(place / other for other in ("tokenizer", "tokenizer_2", "tokenizer_3")), place]


def _holds(home: Path, kind: str) -> bool:
    """Whether a folder has a vocabulary of this kind: CLIP's is byte-level BPE, T5's a unigram model."""
    if (home / "tokenizer.json").is_file():
        try:
            model = json.loads((home / "tokenizer.json").read_text("utf-8"))["model"]["type"]
        except (ValueError, KeyError, TypeError):
            return False
        return model == {"CLIPTokenizer": "BPE", "T5Tokenizer": "Unigram"}[kind]
    return kind == "CLIPTokenizer" and (home / "vocab.json").is_file() and (home / "merges.txt").is_file()


def _cached(kind: str) -> Iterator[Path]:
    """Folders in the local hub cache that hold a tokenizer of this kind."""
    from huggingface_hub import try_to_load_from_cache

    for repo, folder in HOMES[kind]:
        for file in ("tokenizer.json", "vocab.json"):
            found = try_to_load_from_cache(repo, f"{folder}/{file}".lstrip("/"))
            if isinstance(found, str) and _holds(Path(found).parent, kind):
                yield Path(found).parent
