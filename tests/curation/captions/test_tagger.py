import numpy as np
import pytest
import torch
from PIL import Image

from charforgex import onnx_nets
from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.curation.captions.tagger import spaced, squared
from charforgex.errors import ConfigError, ModelError
from tests.curation.captions.onnx_file import mean_colours_tagger

TAGS = "tag_id,name,category,count\n1,explicit,9,5\n2,blue_sky,0,4\n3,red_hair,0,3\n4,^_^,0,2\n5,some_one_(a_series),4,1\n"
RED, BLUE = Image.new("RGB", (448, 448), (255, 0, 0)), Image.new("RGB", (448, 448), (0, 0, 255))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(params=["opencv", "onnxruntime"])
def engine(request, monkeypatch):
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
    else:
        monkeypatch.setattr(onnx_nets, "find_spec", lambda name: None)


@pytest.fixture
def folder(tmp_path):
    """Blue sky by blue, red hair by red, a smile in any case; a rating and a name that are always sure."""
    weight = np.zeros((3, 5))
    weight[0, 1] = weight[2, 2] = 4 / 255  # the colours come as BGR
    mean_colours_tagger(tmp_path / "model.onnx", weight, [9, -2, -2, 1, 3])
    (tmp_path / "selected_tags.csv").write_text(TAGS, encoding="utf-8")
    return tmp_path


def tagger(folder, **options):
    return get_captioner(CaptionSettings(backend="tagger", source=str(folder), **options))


def caption(captioner, *pictures):
    return captioner.caption(pictures, [Context(str(n)) for n in range(len(pictures))])


def test_sure_tags_the_surest_first_with_spaces_without_ratings_and_names(engine, folder):
    assert caption(tagger(folder), RED, BLUE) == ["red hair, ^_^", "blue sky, ^_^"]
    assert caption(tagger(folder, general=0.8), RED, BLUE) == ["red hair", "blue sky"]
    assert caption(tagger(folder, character=0.9), RED) == ["some one (a series), red hair, ^_^"]
    assert caption(tagger(folder, general=0.9), RED) == [""]


def test_pictures_stand_in_the_middle_of_a_white_square(engine, folder):
    tall = Image.new("RGB", (100, 200), (255, 0, 0))  # half of the square is white: blue 0.5, red 1
    [row] = tagger(folder).network([tall])
    np.testing.assert_allclose(row, sigmoid(np.array([9, -2 + 4 * 0.5, -2 + 4, 1, 3])), atol=0.01)
    middle = squared(tall, 448)
    assert middle.getpixel((224, 0)) == (255, 0, 0) and middle.getpixel((50, 224)) == middle.getpixel((398, 224)) == (255, 255, 255)


def test_a_batch_is_as_one_by_one(engine, folder):
    both = tagger(folder).network([RED, BLUE])
    np.testing.assert_array_equal(both, np.concatenate([tagger(folder).network([one]) for one in (RED, BLUE)]))


@pytest.mark.parametrize(("tag", "words"), [("long_hair", "long hair"), ("^_^", "^_^"), ("o_o", "o_o"), ("3_3", "3_3"), ("1girl", "1girl")])
def test_faces_of_signs_keep_their_underscore(tag, words):
    assert spaced(tag) == words


def test_broken_files_are_told_of(engine, folder):
    (folder / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ModelError, match="is no list of tags with the columns name and category"):
        tagger(folder)
    (folder / "selected_tags.csv").write_text(TAGS + "6,one_more,0,1\n")
    with pytest.raises(ModelError, match="5 numbers a picture for 6 tags"):
        caption(tagger(folder), RED)
    (folder / "model.onnx").write_bytes(b"no network")
    with pytest.raises(
        ModelError, match=r"captions\.source=.*model\.onnx (does not run in onnxruntime|is not an ONNX file that OpenCV runs)"
    ):
        caption(tagger(folder), RED)
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.onnx"):
        tagger(folder)


@pytest.mark.parametrize(("several", "expected"), [(True, ["big hat, red", "big hat"]), (False, ["big hat", "big hat"])])
def test_a_classifier_of_transformers_tags_too(tmp_path, several, expected):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    kind = "multi_label_classification" if several else "single_label_classification"
    labels = {0: "red", 1: "big_hat", 2: "never"}
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=16)
    model = ViTForImageClassification(ViTConfig(**size, problem_type=kind, id2label=labels, label2id={v: k for k, v in labels.items()}))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.4, 3.0, -9.0]))  # the bias alone: which picture it is does not matter yet
        red, blue = (model.vit(pixel_values=one).last_hidden_state[0, 0] for one in pixels(RED, BLUE))
        model.classifier.weight[0] = (red - blue) * 4 / (red - blue).square().sum()
        model.classifier.bias[0] = -((red + blue) / 2) @ model.classifier.weight[0]  # +2 for red, -2 for blue
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert caption(tagger(tmp_path), RED, BLUE) == expected
    with pytest.raises(ConfigError, match="is a classifier without names"):
        tagger(tmp_path, character=0.9)


def pixels(*pictures):
    """As the processor above has them: 16 x 16 in [-1, 1]."""
    arrays = (np.asarray(picture.resize((16, 16))) for picture in pictures)
    return [torch.tensor(array).permute(2, 0, 1)[None].float() / 127.5 - 1 for array in arrays]
