"""Faces: where they are and which way they look. `charworld` knows drawn characters, `haar` photographs; others come with their weights.

A detector sees pixels uint8 (H, W, 3), RGB, and gives `Face`s, best first, with scores in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import cv2
import numpy as np

from charforgex.binding import Range
from charforgex.curation.items import Face
from charforgex.errors import ConfigError

Share = Annotated[float, Range(at_least=0, at_most=1)]

# x to the viewer's right, y down, z towards the viewer, in distances between the eyes: left and right eye, nose tip, mouth corners.
MEAN_FACE = np.array([(-0.5, 0, 0), (0.5, 0, 0), (0, 0.55, 0.45), (-0.4, 1.05, 0.1), (0.4, 1.05, 0.1)])


@dataclass(frozen=True)
class FaceSettings:
    detector: Literal["auto", "charworld", "haar", "yunet", "scrfd", "retinaface", "transformers"] = "auto"
    model: str | None = None
    label: str | None = None
    threshold: Share = 0.5
    min_size: Share = 0.03

    def __post_init__(self):
        embedded = self.detector in ("auto", "charworld", "haar")
        if embedded and self.model is not None:
            raise ConfigError(
                f"faces.model={self.model} has no use with detector={self.detector}, whose weights are here already; "
                f"leave it null, or choose yunet, scrfd, retinaface or transformers."
            )
        if not embedded and self.model is None:
            kind = "folder or hub id of a detector" if self.detector == "transformers" else "path of an .onnx file"
            raise ConfigError(f"faces.detector={self.detector} needs weights of yours: set faces.model to the {kind}.")
        if (self.label is not None) != (self.detector == "transformers"):
            raise ConfigError(
                f"faces.label={self.label} names what detector=transformers shall look for, such as face; "
                f"it is needed there and has no use elsewhere."
            )


class Detector(Protocol):
    name: str

    def detect(self, picture: np.ndarray) -> list[Face]:
        """The faces in uint8 (H, W, 3), best first."""


def get_detector(settings: FaceSettings) -> Detector:
    """The detector that `settings` name, with its weights loaded. Raises ModelError if they are missing or of another kind."""
    from charforgex.curation import face_models

    chosen: dict[str, Callable[[], Detector]] = {
        "auto": lambda: DrawnOrPhotographed(CharworldDetector(), HaarDetector()),
        "charworld": CharworldDetector,
        "haar": HaarDetector,
        "yunet": lambda: face_models.YuNet(settings.model),
        "scrfd": lambda: face_models.Scrfd(settings.model),
        "retinaface": lambda: face_models.RetinaFace(settings.model),
        "transformers": lambda: face_models.TransformersDetector(settings.model, settings.label),
    }
    return Chosen(chosen[settings.detector](), settings.threshold, settings.min_size)


class Chosen:
    """The faces of a detector that are sure enough and large enough, each once and with its pose."""

    def __init__(self, detector: Detector, threshold: float, min_size: float):
        self.name, self.detector, self.threshold, self.min_size = detector.name, detector, threshold, min_size

    def detect(self, picture: np.ndarray) -> list[Face]:
        least = self.min_size * min(picture.shape[:2])
        faces = [f for f in self.detector.detect(picture) if f.score >= self.threshold and min(f.width, f.height) >= max(1.0, least)]
        return [posed(face) for face in distinct(faces)]


class CharworldDetector:
    """Ours, for drawn characters: `charworld.detector`, trained on charworld by pre-training's stage `faces`."""

    name = "charworld"

    def __init__(self):
        from charforgex.charworld.assets import load_detector

        self.network = load_detector()

    def detect(self, picture: np.ndarray) -> list[Face]:
        import torch

        pixels = torch.tensor(picture).permute(2, 0, 1).float() / 127.5 - 1
        found = self.network.find(pixels)
        return [
            Face(tuple(box), score, tuple(map(tuple, points)))
            for box, score, points in zip(*(part.tolist() for part in found), strict=True)
        ]


class HaarDetector:
    """Viola & Jones' cascades that OpenCV brings: frontal faces, and profiles both ways. Roll comes from the eyes where both are found.

    For photographs. The score is the logistic of the last stage's margin, less what chance brings: the moon comes to 4 without
    eyes, a clear face to 7 with them.
    """

    name = "haar"
    side = 360  # of the picture that the cascades see: larger ones take time and give false alarms
    least = 0.06  # of the shorter side, and at least 20 pixels
    neighbours = 6  # detections at nearly one place that make a face
    doubt = 5.0
    doubt_with_eyes = 3.0

    def __init__(self):
        self.frontal, self.profile, self.eye = (
            cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")
            for name in ("frontalface_default", "profileface", "eye")
        )

    def detect(self, picture: np.ndarray) -> list[Face]:
        height, width = picture.shape[:2]
        scale = min(1.0, self.side / max(height, width))
        grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
        if scale < 1:
            grey = cv2.resize(grey, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
        grey = cv2.equalizeHist(grey)
        faces = []
        for box, margin in self._run(self.frontal, grey):
            roll = self._roll(grey, box)
            faces.append(Face(box, logistic(margin - (self.doubt if roll is None else self.doubt_with_eyes)), roll=roll))
        faces += [Face(box, logistic(margin - self.doubt)) for box, margin in self._run(self.profile, grey)]
        for (left, top, right, bottom), margin in self._run(self.profile, cv2.flip(grey, 1)):
            faces.append(Face((grey.shape[1] - right, top, grey.shape[1] - left, bottom), logistic(margin - self.doubt)))
        return [face.scaled(1 / scale) for face in distinct(faces)]

    def _run(self, cascade: cv2.CascadeClassifier, grey: np.ndarray) -> Iterator[tuple[tuple[float, float, float, float], float]]:
        """Boxes and the margins by which they passed."""
        least = max(20, round(self.least * min(grey.shape)))
        boxes, _, margins = cascade.detectMultiScale3(grey, 1.15, self.neighbours, minSize=(least, least), outputRejectLevels=True)
        for (x, y, w, h), margin in zip(boxes, np.ravel(margins), strict=True):
            yield (float(x), float(y), float(x + w), float(y + h)), float(margin)

    def _roll(self, grey: np.ndarray, box: tuple[float, float, float, float]) -> float | None:
        """Degrees between the eyes, if one is found in each half of the face's upper part, alike in size."""
        left, top, right, bottom = (int(v) for v in box)
        upper = grey[top : top + round(0.6 * (bottom - top)), left:right]
        side = round(0.15 * (right - left))
        found = self.eye.detectMultiScale(upper, 1.05, 4, minSize=(max(4, side), max(4, side))) if upper.size else ()
        middle = (right - left) / 2
        eyes = [(x + w / 2, y + h / 2, w) for x, y, w, h in found]
        pairs = [(a, b) for a in eyes for b in eyes if a[0] < middle < b[0] and b[0] - a[0] > 0.25 * (right - left)]
        pairs = [(a, b) for a, b in pairs if max(a[2], b[2]) < 1.6 * min(a[2], b[2]) and abs(b[1] - a[1]) < 0.5 * (b[0] - a[0])]
        if not pairs:
            return None
        a, b = max(pairs, key=lambda pair: pair[0][2] + pair[1][2])
        return math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))


class DrawnOrPhotographed:
    """A detector for drawings and one for photographs, as one for pictures of either sort.

    Where both mark a face, the first one's box counts, which has landmarks. In a picture where the second is sure of a face, which it
    seldom is of a drawn one, the first has to be surer than else of those that it sees alone: photographs are strange to it.
    """

    sure = 0.5
    surer = 0.75

    def __init__(self, drawn: Detector, photographed: Detector):
        self.drawn, self.photographed = drawn, photographed
        self.name = f"{drawn.name}+{photographed.name}"

    def detect(self, picture: np.ndarray) -> list[Face]:
        drawn, photographed = self.drawn.detect(picture), self.photographed.detect(picture)
        confirmed = [face for face in drawn if any(same(face, other) for other in photographed)]
        alone = [face for face in drawn if face not in confirmed]
        if any(face.score >= self.sure for face in photographed):
            alone = [face for face in alone if face.score >= self.surer]
        faces = [replace(face, score=max(face.score, *(o.score for o in photographed if same(face, o)))) for face in confirmed] + alone
        return distinct(faces + [face for face in photographed if not any(same(face, other) for other in faces)])


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def overlap(a: Face, b: Face) -> float:
    """Intersection over union of the boxes."""
    inside = _common(a, b)
    return inside / (a.width * a.height + b.width * b.height - inside)


def same(a: Face, b: Face) -> bool:
    """Whether two boxes are one face: alike, or the smaller one mostly inside the other."""
    return overlap(a, b) > 0.35 or _common(a, b) > 0.7 * min(a.width * a.height, b.width * b.height)


def _common(a: Face, b: Face) -> float:
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    return max(0.0, width) * max(0.0, height)


def distinct(faces: Iterable[Face]) -> list[Face]:
    """Non-maximum suppression: best first, and none that is one of those before it."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if not any(same(face, other) for other in kept):
            kept.append(face)
    return kept


def posed(face: Face) -> Face:
    """With the head's pose from its landmarks, if it has them and they are a face's."""
    pose = head_pose(face.landmarks)
    return face if pose is None else replace(face, yaw=pose[0], pitch=pose[1], roll=pose[2])


def head_pose(landmarks: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """(yaw, pitch, roll) in degrees, as `Face` has them, or None without five points that span a plane.

    The closed form of a weak perspective: the affine camera that best brings `MEAN_FACE` onto the points, and the rotation nearest to
    it (Horn et al. 1988). Roll is sure, yaw fair, pitch coarse: faces differ in how far the mouth is from the eyes.
    """
    if len(landmarks) != 5:
        return None
    points, model = np.array(landmarks, np.float64), MEAN_FACE - MEAN_FACE.mean(0)
    camera = np.linalg.lstsq(model, points - points.mean(0), rcond=None)[0].T  # (2, 3)
    left, sizes, right = np.linalg.svd(camera, full_matrices=False)
    if sizes[1] < 1e-6 * max(1.0, sizes[0]):
        return None
    across, down = left @ right
    toward = np.cross(across, down)
    yaw = math.degrees(math.asin(float(np.clip(-toward[0], -1, 1))))
    pitch, roll = math.degrees(math.atan2(toward[1], toward[2])), math.degrees(math.atan2(down[0], across[0]))
    return yaw, pitch, roll
