"""Face detectors whose weights the user brings: YuNet, SCRFD and RetinaFace as ONNX files, and object detectors of transformers.

All landmarks are in `Face`'s order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from charforgex.curation.items import Face
from charforgex.errors import ModelError
from charforgex.onnx_nets import OnnxNet

STRIDES = (8, 16, 32)
SETTING = "faces.model"
LEAST = 0.05  # scores below are not looked at: a face of that is none


def letterbox(picture: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """The picture in BGR, scaled into the upper left of black (side, side, 3), and the scale."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(np.ascontiguousarray(picture[..., ::-1]), size)
    return canvas, scale


def faces_of(boxes_N4: np.ndarray, scores_N: np.ndarray, points_N10: np.ndarray | None, scale: float) -> list[Face]:
    """As faces of the picture that was scaled by `scale`."""
    faces = []
    for number in np.argsort(-scores_N, kind="stable"):
        points = () if points_N10 is None else tuple(map(tuple, (points_N10[number].reshape(5, 2) / scale).tolist()))
        faces.append(Face(tuple((boxes_N4[number] / scale).tolist()), float(scores_N[number]), points))
    return faces


class YuNet:
    """YuNet (Wu et al. 2023) through `cv2.FaceDetectorYN`; files of OpenCV's model zoo, face_detection_yunet_2023mar.onnx or newer."""

    name = "yunet"
    side = 640

    def __init__(self, path: str):
        if not Path(path).expanduser().is_file():
            raise ModelError(f"faces.model={path} is not a file; give YuNet's .onnx file.")
        try:
            self.net = cv2.FaceDetectorYN.create(str(Path(path).expanduser()), "", (self.side, self.side), LEAST, 0.4, 1000)
            self.net.detect(np.zeros((self.side, self.side, 3), np.uint8))
        except cv2.error as error:
            raise ModelError(
                f"faces.model={path} is not a YuNet that OpenCV runs ({str(error).strip().splitlines()[-1]}); "
                f"face_detection_yunet_2023mar.onnx is one."
            ) from error

    def detect(self, picture: np.ndarray) -> list[Face]:
        canvas, scale = letterbox(picture, self.side)
        rows = self.net.detect(canvas)[1]
        if rows is None:
            return []
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
        return faces_of(boxes, rows[:, 14], rows[:, 4:14], scale)  # its right eye is the person's: on the viewer's left


class Scrfd:
    """SCRFD (Guo et al. 2021) as InsightFace exports it: for strides 8, 16 and 32 scores, distances to the box's sides, and landmarks.

    A file has 9 outputs, or 6 without landmarks. Two anchors a cell; distances count in strides from the cell's corner.
    """

    name = "scrfd"
    side = 640

    def __init__(self, path: str):
        self.net = OnnxNet(path, (1, 3, self.side, self.side), SETTING)
        self._outputs(np.zeros((self.side, self.side, 3), np.uint8), path)

    def _outputs(self, canvas: np.ndarray, path: str = "") -> dict[int, list[np.ndarray]]:
        """Outputs by their width (1: scores, 4: boxes, 10: landmarks), each list from the smallest stride to the largest."""
        pixels = cv2.dnn.blobFromImage(canvas, 1 / 128, None, (127.5, 127.5, 127.5), swapRB=True)
        found = [np.asarray(output).reshape(-1, np.shape(output)[-1]) for output in self.net.run(pixels)]
        by_width = {width: sorted((f for f in found if f.shape[1] == width), key=len, reverse=True) for width in (1, 4, 10)}
        anchors = [2 * (self.side // stride) ** 2 for stride in STRIDES]
        for width, parts in by_width.items():
            if [len(part) for part in parts] != anchors and not (width == 10 and not parts):
                raise ModelError(
                    f"faces.model={path} is no SCRFD: of its outputs those of width {width} have {[len(part) for part in parts]} "
                    f"rows, and {anchors} are needed at {self.side} px; choose the detector that the file is of."
                )
        return by_width

    def detect(self, picture: np.ndarray) -> list[Face]:
        canvas, scale = letterbox(picture, self.side)
        outputs = self._outputs(canvas)
        boxes, scores, points = [], [], []
        for level, stride in enumerate(STRIDES):
            rows, columns = np.divmod(np.arange((self.side // stride) ** 2), self.side // stride)
            corner = np.repeat(np.stack([columns, rows], 1), 2, axis=0) * stride
            score = outputs[1][level][:, 0]
            good = score >= LEAST
            reach = outputs[4][level][good] * stride
            boxes.append(np.concatenate([corner[good] - reach[:, :2], corner[good] + reach[:, 2:]], axis=1))
            scores.append(score[good])
            if outputs[10]:
                points.append(outputs[10][level][good] * stride + np.tile(corner[good], 5))
        return faces_of(np.concatenate(boxes), np.concatenate(scores), np.concatenate(points) if points else None, scale)


class RetinaFace:
    """RetinaFace (Deng et al. 2020) as PyTorch ports export it: boxes, two-class scores and landmarks of SSD-like priors."""

    name = "retinaface"
    side = 640
    sizes = ((16, 32), (64, 128), (256, 512))  # of the priors at each stride
    mean = (104, 117, 123)  # of blue, green, red
    variances = (0.1, 0.2)

    def __init__(self, path: str):
        self.net = OnnxNet(path, (1, 3, self.side, self.side), SETTING)
        self.priors = self._priors()
        self._outputs(np.zeros((self.side, self.side, 3), np.uint8), path)

    def _priors(self) -> np.ndarray:
        """(N, 4): middle x, y, width, height as shares of the side."""
        rows = []
        for stride, sizes in zip(STRIDES, self.sizes, strict=True):
            cells = -(-self.side // stride)
            for y, x, size in product(range(cells), range(cells), sizes):
                rows.append(((x + 0.5) * stride, (y + 0.5) * stride, size, size))
        return np.array(rows, np.float32) / self.side

    def _outputs(self, canvas: np.ndarray, path: str = "") -> dict[int, np.ndarray]:
        found = [np.asarray(output) for output in self.net.run(cv2.dnn.blobFromImage(canvas, 1.0, None, self.mean))]
        by_width = {output.shape[-1]: output.reshape(-1, output.shape[-1]) for output in found}
        shapes = {width: len(output) for width, output in by_width.items()}
        if shapes != dict.fromkeys((2, 4, 10), len(self.priors)):
            raise ModelError(
                f"faces.model={path} is no RetinaFace: its outputs are {[o.shape for o in found]}, and three with "
                f"{len(self.priors)} rows and widths 4, 2 and 10 are needed at {self.side} px; choose the detector that the file is of."
            )
        return by_width

    def detect(self, picture: np.ndarray) -> list[Face]:
        canvas, scale = letterbox(picture, self.side)
        outputs = self._outputs(canvas)
        score = outputs[2]
        if not np.allclose(score.sum(1), 1, atol=1e-3):  # exported without its softmax
            score = np.exp(score - score.max(1, keepdims=True))
            score = score / score.sum(1, keepdims=True)
        good = score[:, 1] >= LEAST
        middle, extent = self.priors[good, :2], self.priors[good, 2:]
        middles = middle + outputs[4][good, :2] * self.variances[0] * extent
        halves = extent * np.exp(outputs[4][good, 2:] * self.variances[1]) / 2
        points = np.tile(middle, 5) + outputs[10][good] * self.variances[0] * np.tile(extent, 5)
        boxes = np.concatenate([middles - halves, middles + halves], axis=1)
        return faces_of(boxes * self.side, score[good, 1], points * self.side, scale)


class TransformersDetector:
    """Any object detector of transformers (`AutoModelForObjectDetection`) by folder or hub id, for one of its labels."""

    def __init__(self, source: str, label: str):
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.name = f"{source}:{label}"
        try:
            self.processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
            self.model = AutoModelForObjectDetection.from_pretrained(source, use_safetensors=True).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"faces.model={source} cannot be loaded as an object detector: {error}") from error
        labels = self.model.config.id2label
        self.labels = [number for number, name in labels.items() if name.lower() == label.lower()]
        if not self.labels:
            raise ModelError(f"faces.label={label} is not among the labels of {source}: {', '.join(known(labels.values()))}.")

    def detect(self, picture: np.ndarray) -> list[Face]:
        import torch
        from PIL import Image

        inputs = self.processor(images=Image.fromarray(picture), return_tensors="pt")
        with torch.no_grad():
            outputs = self.model(**inputs)
        found = self.processor.post_process_object_detection(outputs, threshold=LEAST, target_sizes=[picture.shape[:2]])[0]
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        return sorted((Face(tuple(box), score) for box, score, number in rows if number in self.labels), key=lambda face: -face.score)


def known(labels: Sequence[str], limit: int = 20) -> list[str]:
    labels = sorted(set(labels))
    return labels if len(labels) <= limit else [*labels[:limit], f"and {len(labels) - limit} more"]
