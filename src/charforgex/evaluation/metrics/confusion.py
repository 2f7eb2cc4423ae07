"""With several characters in one picture, or in one LoRA: is each face the right one?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from charforgex.curation.faces import FaceSettings
from charforgex.errors import DataError
from charforgex.evaluation.alignment import calls
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.identity import mix_up, similarity
from charforgex.evaluation.metric import Card, Case, Value, mean_value
from charforgex.evaluation.sight import Recogniser, check_source, recogniser


@dataclass(frozen=True)
class Confusion:
    """Each face is taken for the person whose pictures it resembles most: the character, or one of those in `others`."""

    embedder: str = "charworld"
    faces: FaceSettings = field(default_factory=FaceSettings)

    name: ClassVar[str] = "confusion"
    floor: ClassVar[str] = "others"
    ceiling: ClassVar[str] = "real"
    card: ClassVar[Card] = Card(
        title="mixed up",
        meaning="share of the faces found in a picture that are of nobody asked for, or of one who is there already; parts: share of those "
        "asked for whom no face resembles most, faces a picture",
        range="[0, 1]",
        better="lower",
        source="this project; as rank-1 identification, by face",
        lies="a face like nobody goes to whoever is nearest; passers-by count as wrong; faces that are not found do not count",
    )

    def __post_init__(self):
        check_source(self.embedder, "embedder")

    def __call__(self, gallery: Gallery, case: Case) -> Value:
        if not len(gallery):
            raise DataError("there are no pictures")
        if not case.others:
            raise DataError("the character has nobody to be mixed up with; give pictures of the other characters as others")
        eye = recogniser(self.embedder, self.faces)
        people, known = self._known(eye, gallery, case)
        rows, missing, found = np.full(len(gallery), np.nan), [], []
        shots = ((shot, picture) for batch in gallery.batches() for shot, picture in zip(*batch, strict=True))
        for i, (shot, picture) in enumerate(shots):
            faces = eye.faces(picture).astype(np.float64)
            with np.errstate(invalid="ignore"):  # of somebody whom only this picture shows, nothing is left: NaN
                likeness = np.stack([similarity(faces, vectors, np.tile(hidden[i], (len(faces), 1))) for vectors, hidden in known], 1)
            asked = self._asked(shot, people)
            wrong, absent = mix_up(np.nan_to_num(likeness, nan=-1.0), asked)
            rows[i] = wrong / len(faces) if len(faces) else np.nan
            missing.append(absent / len(asked))
            found.append(len(faces))
        without = found.count(0)
        if without == len(found):
            raise DataError(f"no face was found in any of the {without} pictures; choose another detector with faces.detector")
        notes = (f"no face was found in {without} of the {len(found)} pictures",) if without else ()
        parts = {"missing": float(np.mean(missing)), "faces": float(np.mean(found))}
        return mean_value(rows, gallery, self.name, notes=notes, parts=parts)

    @staticmethod
    def _known(eye: Recogniser, gallery: Gallery, case: Case) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
        """Names, the character's first; of each the vectors (M, D), and which pictures of `gallery` they are, (N, M). Raises DataError."""
        names = {name for shot in case.references.shots for name in shot.people} or {case.trigger or "the character"}
        if len(names) > 1:
            raise DataError(f"the references show {', '.join(sorted(names))}; give those of one character, and the others' as others")
        people, known = [*names], []
        sources = [(case.references, np.arange(len(case.references)))]
        for name, places in case.others.persons.items():
            people.append(name)
            sources.append((case.others, places))
        for name, (source, places) in zip(people, sources, strict=True):
            vectors, hidden = eye(source)[places].astype(np.float64), gallery.same(source)[:, places]
            there = np.isfinite(vectors[:, 0])
            if not there.any():
                raise DataError(f"no face was found in the pictures of {name}; give others, or another detector with faces.detector")
            known.append((vectors[there], hidden[:, there]))
        return people, known

    @staticmethod
    def _asked(shot: Shot, people: list[str]) -> list[int]:
        """Who of `people` was asked for: by the shot, else by name in its prompt, else the character. Raises DataError."""
        unknown = [name for name in shot.people if name not in people]
        if unknown:
            raise DataError(f"{shot.name} asks for {unknown[0]}, of whom there are no pictures; there are {', '.join(people)}")
        return [people.index(name) for name in shot.people] or [i for i, name in enumerate(people) if calls(shot.prompt, name)] or [0]
