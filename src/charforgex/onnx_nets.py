"""An ONNX file of the user's as a function: by onnxruntime where it is installed, on the GPU if it has one, else by OpenCV's own engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from charforgex.errors import ModelError

Run = Callable[[np.ndarray], list[np.ndarray]]


class OnnxNet:
    """Pixels of `shape`, float32, to a list of arrays. Raises ModelError, naming `setting`, if no engine here runs it."""

    def __init__(self, path: str | Path, shape: Sequence[int], setting: str):
        source = Path(path).expanduser()
        if not source.is_file():
            raise ModelError(f"{setting}={path} is not a file; give the .onnx file of the model.")
        open_net = _in_onnxruntime if find_spec("onnxruntime") else _in_opencv
        self.run = open_net(source, np.zeros(shape, np.float32), setting)


def _in_onnxruntime(source: Path, probe: np.ndarray, setting: str) -> Run:
    import onnxruntime

    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(source), providers=providers)
        name = session.get_inputs()[0].name
        session.run(None, {name: probe})
    except Exception as error:  # onnxruntime's own errors share no base class
        raise ModelError(f"{setting}={source} does not run in onnxruntime on {list(probe.shape)}: {error}") from error
    return lambda pixels: session.run(None, {name: pixels})


def _in_opencv(source: Path, probe: np.ndarray, setting: str) -> Run:
    import cv2

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        net.setInput(pixels)
        return list(net.forward(names))

    try:
        net = cv2.dnn.readNetFromONNX(str(source))
        names = net.getUnconnectedOutLayersNames()
        run(probe)
    except cv2.error as error:
        said = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{setting}={source} is not an ONNX file that OpenCV runs on {list(probe.shape)}: {said}. "
            "If it is a good one, pip install onnxruntime, which runs more."
        ) from error
    return run
