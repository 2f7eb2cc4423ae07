"""Models of metrics: loaded once, named by content, looked for before anything is drawn."""

import pytest
import torch

from charforgex.config import bind
from charforgex.curation.faces import FaceSettings
from charforgex.embedders import get_embedder
from charforgex.errors import ConfigError, ModelError
from charforgex.evaluation import sight
from charforgex.evaluation.metrics.confusion import Confusion
from charforgex.evaluation.metrics.identity import Identity
from charforgex.evaluation.metrics.prompt_following import PromptFollowing
from charforgex.runs import sha256_path
from tests.evaluation.scenes import case, gallery


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny random Dinov2 in a folder, as from the hub."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return str(folder)


def test_models_are_named_by_what_they_are(dinov2):
    assert sight.stamp(dinov2, "judge") == f"{dinov2}@{sha256_path(dinov2)}"
    assert sight.stamp("facebook/dinov2-base", "judge") == "facebook/dinov2-base"
    names = {sight.stamp("charworld", folder) for folder in ("judge", "clip", "detector")}
    assert len(names) == 3 and all(name.startswith("charworld@") for name in names)


def test_one_is_loaded_once_and_told_from_others(dinov2):
    assert sight.recogniser("charworld") is sight.recogniser("charworld")
    assert sight.get_clip("charworld") is sight.get_clip("charworld")
    ways = [
        ("charworld", None),
        ("charworld", FaceSettings("charworld")),
        ("charworld", FaceSettings("charworld", threshold=0.4)),
        (dinov2, None),
    ]
    assert len({sight.recogniser(*way).name for way in ways}) == 4


def test_identity_by_a_model_of_transformers(dinov2):
    embed, told = get_embedder(dinov2), case()
    a, b = (embed([shot.open() for shot in one.shots]) for one in (gallery(1, 3), told.references))
    found = Identity(embedder=dinov2)(gallery(1, 3), told)
    assert found.rows == pytest.approx((a @ b.T).mean(1).tolist(), abs=1e-5)
    faces = Identity(embedder=dinov2, faces=FaceSettings("charworld"))(gallery(1, 3), told)
    assert faces.count == 3 and faces.rows != pytest.approx(found.rows, abs=1e-3)


@pytest.mark.parametrize("metric", [Identity, Confusion])
def test_embedders_that_are_not_there_stop_it_at_once(metric):
    for source, words in (
        ("", 'embedder="" names nothing'),
        ("~/nowhere/face.onnx", "nowhere/face.onnx does not exist"),
        ("./gone", "gone"),
    ):
        with pytest.raises(ConfigError, match=words):
            bind(metric, {"embedder": source}, "metrics.some")


def test_so_do_clips(tmp_path):
    with pytest.raises(ConfigError, match=r"clip=.*nowhere does not exist"):
        bind(PromptFollowing, {"clip": str(tmp_path / "nowhere")}, "metrics.prompt_following")
    with pytest.raises(ModelError, match="cannot be loaded"):
        PromptFollowing(clip=str(tmp_path))(gallery(1, 1), case())
