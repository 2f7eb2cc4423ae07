"""What curation passes along: things found, faces, and what is known of each picture. Plain data, no libraries.

The way of a file: `Item` (found), `Finding` (measured, in a shard), `Verdict` (decided, knowing all others), `Record` (in the manifest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

# What becomes of a file: exactly one of these.
CLASSES = {
    "kept": "in the dataset",
    "sidecar": "a caption or mask, used with its picture",
    "container": "an archive or video, whose pictures are listed by themselves",
    "duplicate": "the same picture as another, or nearly, and the other one is better",
    "blurred": "out of focus, shaken, or enlarged",
    "exposure": "too dark, too bright or without contrast",
    "noisy": "grain hides the detail",
    "compressed": "blocks and ringing of strong compression",
    "marked": "a watermark, text or frame lies over it",
    "too_small": "too few pixels, of the picture or of the face",
    "no_face": "no face was found",
    "several_people": "several people, and the character cannot be cut out",
    "wrong_person": "somebody else",
    "corrupt": "damaged, incomplete or empty",
    "unsupported": "not a picture, or of a kind that is not read",
    "too_large": "more pixels or bytes than are decoded",
    "unsafe": "an archive's member that leads outside, is a link, or is a bomb",
}


class Verdict(NamedTuple):
    """A class of `CLASSES` and a sentence for a person: what was found, with its value and the limit."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Item:
    """One thing found that may be a picture: a file, a member of an archive, a frame of a video.

    `name` is unique and printable: `a/b.jpg`, `pack.zip!/c.png`, `clip.mp4!/000012.480s`. Exactly one of the others is set: `data`
    (an encoded file), `picture` (a decoded frame), or `verdict`, if it is decided before it is looked at.
    """

    name: str
    data: bytes | None = None
    picture: Image.Image | None = None
    verdict: Verdict | None = None
    captions: tuple[str, ...] = ()
    mask: bytes | None = None


@dataclass(frozen=True)
class Face:
    """A face in an upright picture. `box` is left, top, right, bottom in pixels: from brow to chin and ear to ear, without hair.

    `landmarks` are (x, y) of the left eye, right eye, nose tip, left and right mouth corner as the viewer sees them, or empty. Angles are
    degrees, None where unknown: `yaw` > 0 looks to the viewer's right, `pitch` > 0 looks up, `roll` > 0 leans clockwise.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: tuple[tuple[float, float], ...] = ()
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @staticmethod
    def from_json(item: Mapping[str, Any]) -> Face:
        return Face(**{**item, "box": tuple(item["box"]), "landmarks": tuple(tuple(point) for point in item["landmarks"])})

    def scaled(self, factor: float) -> Face:
        """The same face in a picture resized by `factor`."""
        points = tuple((x * factor, y * factor) for x, y in self.landmarks)
        return replace(self, box=tuple(value * factor for value in self.box), landmarks=points)


@dataclass(frozen=True)
class Finding:
    """What a shard learns of one item. `scores` are the quality measures by name, `fingerprint` the perceptual hashes as hexadecimal.

    `row` counts the findings of a shard that have arrays (thumbnail, embeddings of faces and picture) beside them; None has none.
    """

    name: str
    sha256: str | None = None
    width: int = 0
    height: int = 0
    captions: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    faces: tuple[Face, ...] = ()
    verdict: Verdict | None = None
    row: int | None = None

    def decided(self, kind: str, reason: str) -> Finding:
        return replace(self, verdict=Verdict(kind, reason))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": list(self.verdict) if self.verdict else None}

    @staticmethod
    def from_json(item: Mapping[str, Any]) -> Finding:
        faces = tuple(map(Face.from_json, item["faces"]))
        verdict = Verdict(*item["verdict"]) if item["verdict"] else None
        return Finding(**{**item, "captions": tuple(item["captions"]), "faces": faces, "verdict": verdict})
