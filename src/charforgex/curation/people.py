"""Is this the character? Faces against pictures that the user names, or against whoever is in most pictures.

Vectors are unit, so a product is a cosine. The character is one vector: the mean of what is known of it, normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from PIL import Image

from charforgex.binding import Range
from charforgex.curation import crops
from charforgex.curation.items import Face, Finding, Verdict
from charforgex.errors import DataError

if TYPE_CHECKING:
    from charforgex.curation.faces import Detector
    from charforgex.embedders import Embedder

# Where charworld's portraits, on which its judge was trained, have a face: its height, and its middle, in shares of the picture's.
FACE_HEIGHT = 0.36
FACE_MIDDLE = 0.54
SAMPLE = 4000  # faces among which the character is looked for: comparing all with all would grow with the square
ALIGNED = 112
# Left and right eye, nose, mouth corners in ArcFace's 112 x 112 (Deng et al. 2019; the numbers are InsightFace's).
ARCFACE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])


@dataclass(frozen=True)
class PeopleSettings:
    references: Path | None = None
    threshold: Annotated[float, Range(at_least=0, at_most=1)] = 0.6
    same_person: bool = True
    require_face: bool = True
    min_face: Annotated[int, Range(at_least=0)] = 24


@dataclass(frozen=True)
class Character:
    """A unit vector (D,), and words for where it comes from."""

    vector: np.ndarray
    source: str


@dataclass(frozen=True)
class Decision:
    """Which face of a picture is the character, None if there is none, and what follows for the picture, None if it may stay."""

    face: int | None = None
    verdict: Verdict | None = None
    cosine: float | None = None


# ---- a face as a picture for an embedder ----


def view(picture: Image.Image, face: Face, embedder: Embedder) -> Image.Image:
    """The face as `embedder` wants to see it."""
    return aligned(picture, face) if embedder.aligned else head_crop(picture, face)


def head_crop(picture: Image.Image, face: Face) -> Image.Image:
    """A square with head and shoulders, upright where the roll is known, as charworld's portraits are framed.

    What lies outside the picture is filled with its nearest pixels.
    """
    side = max(2.0, face.height / FACE_HEIGHT)
    middle = np.array([(face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2])
    angle = math.radians(face.roll or 0.0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    size = max(2, round(side))
    corner = middle - turn @ (side * np.array([0.5, FACE_MIDDLE]))
    return _warp(picture, turn * side / size, corner, size)


def aligned(picture: Image.Image, face: Face) -> Image.Image:
    """112 x 112 with the landmarks as near to ArcFace's as turning, scaling and moving bring them (Umeyama 1991).

    A face without landmarks is taken to have them where faces of its box mostly do.
    """
    if face.landmarks:
        points = np.array(face.landmarks, np.float64)
    else:
        points = np.array([(0.3, 0.38), (0.7, 0.38), (0.5, 0.6), (0.34, 0.8), (0.66, 0.8)]) * (face.width, face.height) + face.box[:2]
    there, here = ARCFACE - ARCFACE.mean(0), points - points.mean(0)
    spread = (there**2).sum()
    cos, sin = (there * here).sum() / spread, (there[:, 0] * here[:, 1] - there[:, 1] * here[:, 0]).sum() / spread
    turn = np.array([[cos, -sin], [sin, cos]])  # from the aligned face to the picture
    return _warp(picture, turn, points.mean(0) - turn @ ARCFACE.mean(0), ALIGNED)


def _warp(picture: Image.Image, turn: np.ndarray, corner: np.ndarray, size: int) -> Image.Image:
    """The square whose point p is the picture's `turn` p + `corner`. Shrunk by averaging, so that nothing is skipped."""
    import cv2

    pixels = np.asarray(picture.convert("RGB"))
    factor = max(1, math.floor(math.hypot(*turn[:, 0]) + 1e-6))
    if factor > 1:
        large = _warp(picture, turn / factor, corner, size * factor)
        return large.reduce(factor)
    matrix = np.column_stack([turn, turn @ (0.5, 0.5) + corner - 0.5])  # OpenCV counts from the middle of the first pixel
    out = cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    return Image.fromarray(out)


# ---- who is the character ----


def from_references(folder: Path, detector: Detector, embedder: Embedder) -> Character:
    """The mean of the largest faces of all pictures in `folder`. Raises DataError if a picture cannot be read or has no face."""
    from charforgex.curation.pictures import SUFFIXES, read_picture

    folder = Path(folder).expanduser()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise DataError(f"curation.people.references={folder} has no pictures; give a folder with some of the character, one face in each.")
    views = []
    for path in paths:
        picture = read_picture(path)
        faces = detector.detect(np.asarray(picture))
        if not faces:
            raise DataError(f"No face was found in the reference {path}; take it out, or choose another curation.faces.detector.")
        views.append(view(picture, max(faces, key=lambda face: face.width * face.height), embedder))
    return Character(unit(embedder(views).numpy().mean(0)), f"{len(paths)} reference picture{'s'[: len(paths) != 1]}")


def most_frequent(vectors_ND: np.ndarray, threshold: float) -> Character | None:
    """Whoever has the most faces, by average linkage over a sample of at most `SAMPLE`; None without faces.

    Faces whose mean cosine is c have a cosine of about sqrt(c) to their mean, hence groups are told apart at `threshold` squared.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    total = len(vectors_ND)
    if total == 0:
        return None
    chosen = vectors_ND[np.unique(np.linspace(0, total - 1, min(total, SAMPLE)).round().astype(int))].astype(np.float32)
    groups = np.ones(1, int)
    if len(chosen) > 1:
        distance = np.clip(1 - chosen @ chosen.T, 0, 2)
        np.fill_diagonal(distance, 0)
        groups = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - threshold**2, "distance")
    sizes = np.bincount(groups)
    first = {group: place for place, group in reversed(list(enumerate(groups.tolist())))}
    largest = max(first, key=lambda group: (sizes[group], -first[group]))  # of equals the one that is met first
    mean = unit(chosen[groups == largest].mean(0))
    close = chosen[chosen @ mean >= threshold]
    return Character(unit(close.mean(0)) if len(close) else mean, f"the largest group, {sizes[largest]} of {len(chosen)} faces")


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(1e-12, float(np.linalg.norm(vector)))


# ---- what follows for each picture ----


def decide(
    findings: Sequence[Finding], vectors: Callable[[int], np.ndarray], settings: PeopleSettings, shapes: crops.CropSettings,
    references: Character | None = None,
) -> list[Decision]:  # fmt: skip
    """A decision for each finding that has none yet, in order.

    `vectors(i)` are the unit vectors (F, D) of the faces of finding `i`. The character is `references`, or else whoever is in most
    pictures. A picture of several people stays if the character can be cut out of it without the others.
    """
    character = references
    if character is None and settings.same_person:
        usable = [vectors(i) for i, finding in enumerate(findings) if finding.verdict is None and finding.faces]
        character = most_frequent(np.concatenate(usable), settings.threshold) if usable else None
    return [
        Decision() if finding.verdict else _decide(finding, vectors(index) if finding.faces else None, character, settings, shapes)
        for index, finding in enumerate(findings)
    ]


def _decide(
    finding: Finding, vectors_FD: np.ndarray | None, character: Character | None, settings: PeopleSettings, shapes: crops.CropSettings
) -> Decision:
    faces = finding.faces
    if not faces:
        return Decision(verdict=Verdict("no_face", "no face was found in it") if settings.require_face else None)
    best, cosine = max(range(len(faces)), key=lambda k: faces[k].width * faces[k].height), None
    if character is not None:
        cosines = vectors_FD @ character.vector
        best = int(cosines.argmax())
        cosine = float(cosines[best])
        if cosine < settings.threshold:
            likest = "its face" if len(faces) == 1 else f"the likest of its {len(faces)} faces"
            reason = f"{likest} has a cosine of {cosine:.2f} to the character ({character.source}); {settings.threshold:.2f} is needed"
            return Decision(verdict=Verdict("wrong_person", reason), cosine=cosine)
    face = faces[best]
    if min(face.width, face.height) < settings.min_face:
        reason = f"the face has {face.width:.0f} x {face.height:.0f} pixels; {settings.min_face} are needed"
        return Decision(best, Verdict("too_small", reason), cosine)
    others = [other for number, other in enumerate(faces) if number != best]
    if others and not crops.plan(finding.width, finding.height, face, shapes, others=others):
        reason = f"it shows {len(faces)} faces, and no crop of {shapes.min_side} pixels or more has the character's head alone"
        return Decision(best, Verdict("several_people", reason), cosine)
    return Decision(best, None, cosine)
