"""Detectors by the user's weights, on tiny files whose answers are known, and errors that say what a file lacks."""

import numpy as np
import pytest
import torch

from charforgex.curation import face_models
from charforgex.curation.face_models import STRIDES, RetinaFace, Scrfd, TransformersDetector, YuNet
from charforgex.curation.faces import FaceSettings, get_detector, overlap
from charforgex.curation.items import Face
from charforgex.embedders import get_embedder
from charforgex.errors import ConfigError, ModelError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

POINTS = np.array([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8)])  # of landmarks in a face's box


def write(path, side, outputs):
    """An ONNX file that gives `outputs`, name -> array, whatever it sees; for engines they hang on the input, by nothing of its mean."""
    constants, nodes = [], [helper.make_node("GlobalAveragePool", ["input"], ["pooled"])]
    constants.append(numpy_helper.from_array(np.array([1, 3, 1], np.int64), "shape"))
    constants.append(numpy_helper.from_array(np.zeros((1, 3, 1), np.float32), "nothing"))
    nodes += [
        helper.make_node("Reshape", ["pooled", "shape"], ["mean"]), helper.make_node("Mul", ["mean", "nothing"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=1),
    ]  # fmt: skip
    infos = []
    for name, value in outputs.items():
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value[None], np.float32), f"{name}_value"))
        nodes.append(helper.make_node("Add", [f"{name}_value", "zero"], [name]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, *value.shape)))
    given = [helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, 3, side, side))]
    graph = helper.make_graph(nodes, "tiny", given, infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def truth(left, top, right, bottom, score):
    points = POINTS * (right - left, bottom - top) + (left, top)
    return Face((left, top, right, bottom), score, tuple(map(tuple, points)))


def check(found, wanted, scale):
    """`wanted` are in the 640 pixels that the network saw."""
    assert len(found) == len(wanted)
    for face, true in zip(found, wanted, strict=True):
        assert np.allclose(face.box, np.array(true.box) / scale, atol=0.02) and face.score == pytest.approx(true.score, abs=1e-4)
        assert np.allclose(face.landmarks, np.array(true.landmarks) / scale, atol=0.02)


WANTED = [truth(100, 60, 164, 140, 0.9), truth(300, 200, 330, 236, 0.6)]


def scrfd_outputs(points=True, width=640):
    """What SCRFD would say of `WANTED`: the first at stride 16, the second at stride 8."""
    outputs = {}
    for stride in STRIDES:
        rows = 2 * (width // stride) ** 2
        parts = {"score": np.zeros((rows, 1)), "bbox": np.zeros((rows, 4)), "kps": np.zeros((rows, 10))}
        for face, at in zip(WANTED, (16, 8), strict=True):
            if at == stride:
                x, y = ((face.box[k] + face.box[k + 2]) / 2 // stride for k in (0, 1))
                row = int(2 * (y * (width // stride) + x)) + 1  # the second anchor of the cell
                corner = np.array([x, y]) * stride
                parts["score"][row] = face.score
                parts["bbox"][row] = np.concatenate([corner - face.box[:2], face.box[2:] - corner]) / stride
                parts["kps"][row] = ((np.array(face.landmarks) - corner) / stride).ravel()
        outputs |= {f"{name}_{stride}": value for name, value in parts.items() if points or name != "kps"}
    return outputs


def test_scrfd_decodes_anchors_strides_and_landmarks(tmp_path):
    detector = Scrfd(write(tmp_path / "scrfd.onnx", 640, scrfd_outputs()))
    check(detector.detect(np.zeros((320, 160, 3), np.uint8)), WANTED, 2.0)
    without = Scrfd(write(tmp_path / "plain.onnx", 640, scrfd_outputs(points=False)))
    assert [face.landmarks for face in without.detect(np.zeros((640, 640, 3), np.uint8))] == [(), ()]


def retina_outputs(detector, logits):
    rows = len(detector)
    parts = {"loc": np.zeros((rows, 4)), "conf": np.tile([1.0, 0.0], (rows, 1)), "landms": np.zeros((rows, 10))}
    if logits:
        parts["conf"] = np.tile([9.0, -9.0], (rows, 1))
    for face in WANTED:
        box = np.array(face.box) / 640
        middle, extent = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        row = int(np.abs(detector - np.concatenate([middle, extent])).sum(1).argmin())
        prior = detector[row]
        parts["loc"][row] = np.concatenate([(middle - prior[:2]) / (0.1 * prior[2:]), np.log(extent / prior[2:]) / 0.2])
        parts["landms"][row] = ((np.array(face.landmarks) / 640 - prior[:2]) / (0.1 * prior[2:])).ravel()
        parts["conf"][row] = np.log([1 - face.score, face.score]) if logits else (1 - face.score, face.score)
    return parts


@pytest.mark.parametrize("logits", [False, True])
def test_retinaface_decodes_priors_with_and_without_a_softmax_inside(tmp_path, logits):
    priors = RetinaFace._priors(RetinaFace)
    assert len(priors) == 16800 and np.allclose(priors[1] * 640, (4, 4, 32, 32))
    path = write(tmp_path / "retina.onnx", 640, retina_outputs(priors, logits))
    check(RetinaFace(path).detect(np.zeros((1280, 640, 3), np.uint8)), WANTED, 0.5)


def test_yunet_runs_in_opencv(tmp_path):
    outputs = {}
    for stride in STRIDES:
        rows = (640 // stride) ** 2
        parts = {"cls": np.zeros((rows, 1)), "obj": np.zeros((rows, 1)), "bbox": np.zeros((rows, 4)), "kps": np.zeros((rows, 10))}
        for face, at in zip(WANTED, (16, 8), strict=True):
            if at == stride:
                middle = np.array([(face.box[k] + face.box[k + 2]) / 2 for k in (0, 1)])
                cell = middle // stride
                row = int(cell[1] * (640 // stride) + cell[0])
                parts["cls"][row] = parts["obj"][row] = face.score
                parts["bbox"][row] = [*(middle / stride - cell), *np.log(np.array([face.width, face.height]) / stride)]
                parts["kps"][row] = (np.array(face.landmarks) / stride - cell).ravel()
        outputs |= {f"{name}_{stride}": value for name, value in parts.items()}
    ordered = {f"{name}_{stride}": outputs[f"{name}_{stride}"] for name in ("cls", "obj", "bbox", "kps") for stride in STRIDES}
    detector = get_detector(FaceSettings("yunet", write(tmp_path / "yunet.onnx", 640, ordered)))
    found = detector.detect(np.zeros((640, 640, 3), np.uint8))
    check(found, WANTED, 1.0)
    assert found[0].roll == pytest.approx(0, abs=2)


def test_a_file_of_another_kind_is_refused(tmp_path):
    scrfd = write(tmp_path / "scrfd.onnx", 640, scrfd_outputs())
    with pytest.raises(ModelError, match="no RetinaFace"):
        RetinaFace(scrfd)
    with pytest.raises(ModelError, match="no SCRFD"):
        Scrfd(write(tmp_path / "half.onnx", 640, {"score_8": np.zeros((12800, 1))}))
    with pytest.raises(ModelError, match="not a YuNet"):
        YuNet(write(tmp_path / "other.onnx", 640, {"score_8": np.zeros((12800, 1))}))
    (tmp_path / "junk.onnx").write_bytes(b"not a network")
    for kind in (Scrfd, RetinaFace, YuNet):
        with pytest.raises(ModelError, match=r"junk\.onnx"):
            kind(str(tmp_path / "junk.onnx"))
        with pytest.raises(ModelError, match="is not a file"):
            kind(str(tmp_path / "absent.onnx"))


def test_arcface_gives_unit_vectors_of_aligned_faces(tmp_path):
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 3, 112, 112)).astype(np.float32), "weight")
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, 3, 112, 112))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, 64, 1, 1))
    graph = helper.make_graph([helper.make_node("Conv", ["input", "weight"], ["out"])], "tiny", [given], [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "arc.onnx")
    from PIL import Image

    embedder = get_embedder(str(tmp_path / "arc.onnx"), faces=True)
    pixels = np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    found = embedder([Image.fromarray(pixels), Image.fromarray(255 - pixels)])
    plain = (numpy_helper.to_array(weight) * (pixels.transpose(2, 0, 1) / 127.5 - 1)).sum((1, 2, 3))
    assert embedder.aligned and found.shape == (2, 64)
    assert np.allclose(found[0], plain / np.linalg.norm(plain), atol=1e-4) and found[0] @ found[1] == pytest.approx(-1, abs=1e-4)
    with pytest.raises(ConfigError, match="aligned faces"):
        get_embedder(str(tmp_path / "arc.onnx"))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64], patch_size=16,
        num_detection_tokens=4, num_labels=2, id2label={0: "cat", 1: "Face"}, label2id={"cat": 0, "Face": 1},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    last = model.class_labels_classifier.layers[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.0, 4.0, 0.0])  # everything is a face
    model.save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_detectors_of_transformers_by_label(yolos):
    detector = TransformersDetector(yolos, "face")
    found = detector.detect(np.full((100, 200, 3), 90, np.uint8))
    assert len(found) == 4 and all(face.score == pytest.approx(np.e**4 / (np.e**4 + 2), abs=1e-3) for face in found)
    assert all(-50 <= face.box[0] <= face.box[2] <= 250 for face in found), "in the picture's pixels"
    assert TransformersDetector(yolos, "cat").detect(np.full((100, 200, 3), 90, np.uint8)) == []
    with pytest.raises(ModelError, match="cat"):
        TransformersDetector(yolos, "dog")
    with pytest.raises(ModelError, match="nowhere"):
        TransformersDetector("/nowhere/at/all", "face")


def test_letterboxing_is_undone():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[20:40, 150:180] = (255, 0, 0)
    canvas, scale = face_models.letterbox(picture, 640)
    rows, columns = (canvas[..., 2] > 200).nonzero()
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
    assert overlap(Face(tuple(box), 1), Face((150, 20, 180, 40), 1)) > 0.9, "red is last: BGR"
    assert canvas.shape == (640, 640, 3) and not canvas[214:].any()
