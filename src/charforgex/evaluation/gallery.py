"""Pictures that are judged together, and what embedders see in them.

A picture is opened when it is looked at and a few at a time; vectors are computed once for each picture and embedder, and stay on disk
where the gallery has a folder for them. So memory does not grow with the pictures.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charforgex.errors import DataError
from charforgex.runs import replace_atomic

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TOGETHER = 32  # pictures in memory at a time
UNIT = 1e-3  # how far from 1 a unit vector's length may be


@dataclass(frozen=True)
class Shot:
    """One picture: a file or the picture itself, and what was asked for. Shots of one prompt are not independent of each other."""

    picture: Path | Image
    prompt: str = ""
    pack: str = ""
    seed: int | None = None
    key: str = ""  # names the content, for caches; a hash of the recipe or of the file
    people: tuple[str, ...] = ()  # who is in it, or was asked for, where that is known

    @property
    def name(self) -> str:
        return self.picture.name if isinstance(self.picture, Path) else f'"{self.prompt}" seed {self.seed}'

    @property
    def marks(self) -> list[object]:
        """What only this picture has: its key, its file or itself."""
        return [mark for mark in (self.key, self.picture if isinstance(self.picture, Path) else id(self.picture)) if mark]

    def open(self) -> Image:
        """RGB. Raises DataError."""
        if not isinstance(self.picture, Path):
            return self.picture.convert("RGB")
        from PIL import Image

        try:
            with Image.open(self.picture) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.picture} cannot be read as a picture: {error}") from error


class Gallery:
    """One contestant's pictures, or a set that others are compared with (references, training pictures, strangers)."""

    def __init__(self, name: str, shots: Sequence[Shot], cache: Path | None = None, losses: Mapping[str, Any] | None = None):
        self.name, self.shots, self.cache = name, tuple(shots), cache
        self.losses = losses  # what `evaluation.levels` found of who drew them: "times" (levels,), "losses" (levels, references)
        self._vectors: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.shots)

    @property
    def prompts(self) -> list[str]:
        return [shot.prompt for shot in self.shots]

    @property
    def groups(self) -> np.ndarray:
        """int64 (N,): the same number for shots of one prompt, whatever their order. A shot without a prompt is a group of its own."""
        names = [shot.prompt or f"\0{shot.key or i}" for i, shot in enumerate(self.shots)]
        return np.unique(names, return_inverse=True)[1] if names else np.zeros(0, np.int64)

    def same(self, other: Gallery) -> np.ndarray:
        """bool (N, M): which shots are one picture with which of `other`, so that none is compared with itself."""
        places: dict[object, list[int]] = {}
        for j, shot in enumerate(other.shots):
            for name in shot.marks:
                places.setdefault(name, []).append(j)
        found = np.zeros((len(self), len(other)), bool)
        for i, shot in enumerate(self.shots):
            for name in shot.marks:
                found[i, places.get(name, [])] = True
        return found

    @property
    def persons(self) -> dict[str, np.ndarray]:
        """Indices of the shots of each person, by name. A shot that names nobody shows somebody of its own."""
        found: dict[str, list[int]] = {}
        for i, shot in enumerate(self.shots):
            for person in shot.people or (f"{self.name} {i}",):
                found.setdefault(person, []).append(i)
        return {person: np.array(places) for person, places in found.items()}

    def partners(self, other: Gallery) -> np.ndarray:
        """int64 (N,): which shot of `other` has the same prompt and seed, -1 where none has."""
        places, used = {}, Counter()
        for j, shot in enumerate(other.shots):
            places[shot.prompt, shot.seed, used[shot.prompt, shot.seed]] = j
            used[shot.prompt, shot.seed] += 1
        used.clear()
        found = np.full(len(self), -1)
        for i, shot in enumerate(self.shots):
            found[i] = places.get((shot.prompt, shot.seed, used[shot.prompt, shot.seed]), -1)
            used[shot.prompt, shot.seed] += 1
        return found

    def only(self, *packs: str) -> Gallery:
        """The shots of these prompt packs."""
        return Gallery(self.name, [shot for shot in self.shots if shot.pack in packs], self.cache, self.losses)

    def batches(self, size: int = TOGETHER) -> Iterator[tuple[list[Shot], list[Image]]]:
        """Shots with their opened pictures, in order. Raises DataError for one that cannot be read."""
        for start in range(0, len(self.shots), size):
            shots = list(self.shots[start : start + size])
            yield shots, [shot.open() for shot in shots]

    def vectors(self, name: str, see: Callable[[Sequence[Image]], Tensor], partial: bool = False) -> np.ndarray:
        """float32 (N, D): `see` of each picture, unit vectors; memory-mapped where there is a cache. `name` identifies `see` to it.

        `partial`: rows of NaN say that the picture lacks what is looked for, such as a face.
        Raises DataError for other vectors that are not finite or not of length 1, naming the picture.
        """
        if name not in self._vectors:
            self._vectors[name] = self._remembered(name, see, partial)
        return self._vectors[name]

    def _remembered(self, name: str, see: Callable[[Sequence[Image]], Tensor], partial: bool) -> np.ndarray:
        if self.cache is None or not self.shots or not all(shot.key for shot in self.shots):
            blocks = [self._seen(name, see, partial, *batch) for batch in self.batches()]
            return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
        key = hashlib.sha256("\n".join([name, *(shot.key for shot in self.shots)]).encode()).hexdigest()
        path = self.cache / f"{key}.npy"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with replace_atomic(path) as temporary:
                self._write(temporary, name, see, partial)
        return np.load(path, mmap_mode="r")

    def _write(self, path: Path, name: str, see: Callable[[Sequence[Image]], Tensor], partial: bool) -> None:
        start, found = 0, None
        for batch in self.batches():
            rows = self._seen(name, see, partial, *batch)
            if found is None:
                found = np.lib.format.open_memmap(path, "w+", np.float32, (len(self), rows.shape[1]))
            found[start : start + len(rows)] = rows
            start += len(rows)
        found.flush()

    @staticmethod
    def _seen(name: str, see: Callable, partial: bool, shots: Sequence[Shot], pictures: Sequence[Image]) -> np.ndarray:
        rows = see(pictures).float().cpu().numpy()
        lengths = np.linalg.norm(rows, axis=1)
        lacking = np.isnan(rows).all(1) & partial
        for shot, length, lacks in zip(shots, lengths, lacking, strict=True):
            if not lacks and not abs(length - 1) <= UNIT:  # NaN is not near anything
                raise DataError(
                    f"{name.partition('@')[0]} makes a vector of length {length} of {shot.name}, and not of 1; use another embedder."
                )
        return rows
