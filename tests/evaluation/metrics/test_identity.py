"""Likeness to the references: the numbers, what they are invariant to, and what is said where there are none."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.config import bind
from charforgex.curation.faces import FaceSettings
from charforgex.curation.people import view
from charforgex.embedders import ArcFaceEmbedder, get_embedder
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation import sight
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.identity import Identity
from tests.curation.captions.onnx_file import INTS, field, node, value
from tests.evaluation.scenes import case, gallery, picture, strangers, turned

DRAWN = FaceSettings("charworld")


def test_it_is_the_mean_cosine_to_the_references():
    embed, pictures, references = get_embedder("charworld"), gallery(1), gallery(1, 6, 100)
    a, b = (embed([shot.open() for shot in one.shots]).double().numpy() for one in (pictures, references))
    found = Identity()(pictures, case())
    assert found.rows == pytest.approx((a @ b.T).mean(1), abs=1e-6)
    assert found.estimate == pytest.approx((a @ b.T).mean(), abs=1e-6)
    assert found.low < found.estimate < found.high and found.count == 6


def test_neither_order_nor_batches_change_it():
    pictures = gallery(1, 9)
    other, order = turned(pictures)
    found, again = Identity()(pictures, case()), Identity()(other, case())
    assert again.rows == pytest.approx(found.rows[order], abs=1e-6)
    assert (again.estimate, again.low, again.high) == pytest.approx((found.estimate, found.low, found.high), abs=1e-6)
    one_by_one = np.concatenate([Identity()(Gallery("one", [shot]), case()).rows for shot in pictures.shots])
    assert one_by_one == pytest.approx(found.rows, abs=1e-5)


def test_a_reference_is_not_compared_with_itself():
    references = gallery(1, 4, 100)
    vectors = sight.recogniser("charworld")(references).astype(np.float64)
    cosines = vectors @ vectors.T
    expected = (cosines.sum(1) - np.diag(cosines)) / 3
    assert Identity()(references, case(references=references)).rows == pytest.approx(expected)
    unnamed = Gallery("again", [replace(shot, key="") for shot in references.shots])  # the same pictures without a key
    assert Identity()(unnamed, case(references=unnamed)).rows == pytest.approx(expected, abs=1e-6)


def changed(identity, rng):
    """The character, then with one more of its named traits changed at a time."""
    names = ["kind", "hair", "hair_colour", "skin", "eye_colour", "glasses", "beard", "mark", "hat"]
    rng.shuffle(names)
    yield identity
    for name in names:
        hiding = (getattr(identity, name), "bald", "sunglasses")  # what hides other traits is no single change
        identity = replace(identity, **{name: rng.choice([v for v in world.IDENTITY_ATTRIBUTES[name] if v not in hiding])})
        yield identity


def test_it_falls_with_every_attribute_that_is_changed():
    means = []
    for number in range(14):
        rng = random.Random(f"mono {number}")
        contexts = [world.draw_context(rng) for _ in range(4)]

        def drawn(identity, contexts):
            return Gallery("drawn", [Shot(Image.fromarray(drawing.render(identity, context))) for context in contexts])

        references = drawn(held_out_character(number), contexts[:2])
        steps = changed(held_out_character(number), rng)
        means.append([Identity()(drawn(who, contexts[2:]), case(references=references)).estimate for who in steps])
    curve = np.mean(means, 0)
    assert (np.diff(curve) < -0.01).all(), curve
    assert curve[0] > 0.9 and curve[-1] < 0.2


# ---- faces ----


def test_faces_are_compared_where_that_is_asked_for():
    found = Identity(faces=DRAWN)(gallery(1, 3, size=160), case(references=gallery(1, 3, 100, size=160)))
    assert found.estimate > 0.85
    assert Identity(faces=DRAWN)(gallery(2, 3, size=160), case(references=gallery(1, 3, 100, size=160))).estimate < 0.4


def blank(size=64):
    return Shot(Image.new("RGB", (size, size), (90, 120, 60)), "nobody")


def test_a_picture_without_a_face_is_told_and_counts_for_nothing():
    with_face = gallery(1, 3)
    mixed = Gallery("mixed", [with_face.shots[0], blank(), *with_face.shots[1:]])
    found, alone = (Identity(faces=DRAWN)(one, case()) for one in (mixed, with_face))
    assert np.isnan(found.rows).tolist() == [False, True, False, False]
    assert found.estimate == pytest.approx(alone.estimate) and found.count == 3
    assert found.notes == ("no face was found in 1 of the 4 pictures",)
    with pytest.raises(DataError, match="no face was found in any of the 2 pictures"):
        Identity(faces=DRAWN)(Gallery("empty", [blank(), blank()]), case())
    with pytest.raises(DataError, match="no face was found in any of the 1 references"):
        Identity(faces=DRAWN)(with_face, case(references=Gallery("references", [blank()])))


@pytest.fixture(scope="module")
def arcface(tmp_path_factory):
    """An ONNX file that stands for a face recogniser: the means of rows of (1, 3, 112, 112)."""
    means = node(
        "ReduceMean",
        ["input"],
        "output",
        field(1, "axes") + field(8, 3) + field(20, INTS),
        field(1, "keepdims") + field(3, 0) + field(20, 2),
    )
    graph = field(1, means) + field(2, "rows") + field(11, value("input", (1, 3, 112, 112))) + field(12, value("output", (1, 3, 112)))
    path = tmp_path_factory.mktemp("arcface") / "rows.onnx"
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    return str(path)


def test_a_face_recogniser_sees_faces_aligned_as_curation_aligns_them(arcface):
    eye, drawn = sight.recogniser(arcface, DRAWN), picture(1, 0, 160)[0]
    faces = eye.detector.detect(np.asarray(drawn))
    embedder = ArcFaceEmbedder(arcface)
    seen = view(drawn, faces[0], embedder)
    assert seen.size == (112, 112)
    assert eye(Gallery("one", [Shot(drawn), blank()]))[0] == pytest.approx(embedder([seen])[0].numpy(), abs=1e-6)
    assert sight.recogniser(arcface).detector is not None  # whole pictures are nothing to it
    found = Identity(embedder=arcface, faces=DRAWN)(gallery(1, 2, size=160), case(references=gallery(1, 2, 100, size=160)))
    assert -1 <= found.estimate <= 1 and found.count == 2


# ---- nothing to go by ----


def test_what_is_lacking_is_said():
    with pytest.raises(DataError, match="there are no pictures"):
        Identity()(Gallery("none", []), case())
    with pytest.raises(DataError, match="there are no references"):
        Identity()(gallery(1), case(references=Gallery("references", [])))
    alone = gallery(1, 1, 100)
    with pytest.raises(DataError, match="nothing is compared with itself"):
        Identity()(alone, case(references=alone))


def test_one_picture_has_a_number_and_no_interval():
    found = Identity()(gallery(1, 1), case())
    assert found.estimate > 0.8 and np.isnan([found.low, found.high]).all()


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        Identity()(Gallery("broken", [Shot(tmp_path / "broken.png")]), case())


def test_vectors_that_are_not_finite_are_no_number():
    class Broken:
        name, aligned = "broken", False

        def __call__(self, pictures):
            return torch.full((len(pictures), 8), torch.nan)

    eye = sight.Recogniser("broken", Broken(), None)
    with pytest.raises(DataError, match="broken makes a vector of length nan"):
        eye(strangers(1))
    with pytest.raises(DataError, match="not finite of faces"):
        sight.Recogniser("broken faces", Broken(), sight.recogniser("charworld", DRAWN).detector)(gallery(1, 1))


def test_settings():
    assert bind(Identity, {"embedder": "charworld", "faces": {"detector": "haar"}}, "metrics.identity").faces == FaceSettings("haar")
    with pytest.raises(ConfigError, match="detector"):
        bind(Identity, {"faces": {"detector": "nobody"}}, "metrics.identity")
