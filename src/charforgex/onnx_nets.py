"""An ONNX file of the user's as a function. OpenCV's own engine runs it; what that cannot, onnxruntime does where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from charforgex.errors import ModelError


class OnnxNet:
    """Pixels (1, 3, side, side), float32, to a list of arrays. Raises ModelError, naming `setting`, if no engine here runs it."""

    def __init__(self, path: str, side: int, setting: str):
        import cv2

        source = Path(path).expanduser()
        if not source.is_file():
            raise ModelError(f"{setting}={path} is not a file; give the .onnx file of the model.")
        probe = np.zeros((1, 3, side, side), np.float32)
        try:
            net = cv2.dnn.readNetFromONNX(str(source))
            names = net.getUnconnectedOutLayersNames()

            def run(pixels: np.ndarray) -> list[np.ndarray]:
                net.setInput(pixels)
                return list(net.forward(names))

            run(probe)
            self.run = run
        except cv2.error as error:
            self.run = _in_onnxruntime(source, probe, setting, str(error).strip().splitlines()[-1])


def _in_onnxruntime(source: Path, probe: np.ndarray, setting: str, said: str):
    if find_spec("onnxruntime") is None:
        raise ModelError(
            f"{setting}={source} is not an ONNX file that OpenCV runs: {said}. "
            f"If it is a good one, pip install onnxruntime, which runs more."
        )
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        session.run(None, {name: probe})
    except Exception as error:  # onnxruntime's own errors share no base class
        raise ModelError(f"{setting}={source} runs neither in OpenCV ({said}) nor in onnxruntime: {error}") from error
    return lambda pixels: session.run(None, {name: pixels})
