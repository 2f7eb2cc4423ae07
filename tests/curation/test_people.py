"""Who is the character: against references, or whoever is most frequent; and what follows for each picture."""

import random

import numpy as np
import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.curation import people
from charforgex.curation.crops import CropSettings
from charforgex.curation.faces import posed
from charforgex.curation.items import Face, Finding, Verdict
from charforgex.curation.people import ARCFACE, Character, PeopleSettings, aligned, decide, head_crop, most_frequent, unit
from charforgex.embedders import get_embedder
from charforgex.errors import DataError

SHAPES = CropSettings(min_side=48)


def picture_of(number, seed, size=160, tilt=None):
    rng = random.Random(seed)
    context = world.draw_context(rng)
    if tilt is not None:
        context = world.Context(**{**context.__dict__, "tilt": tilt})
    identity = held_out_character(number)
    box, points = drawing.face_of(identity, context, size)
    return Image.fromarray(drawing.render(identity, context, size)), posed(Face(tuple(box), 1.0, tuple(map(tuple, points))))


def vectors(seed, who, count, noise=0.5, width=32):
    """`count` unit vectors around a direction of their own."""
    middle = np.random.default_rng(who).standard_normal(width)
    spread = np.random.default_rng(1000 + seed).standard_normal((count, width)) * noise
    found = (middle + spread).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_a_head_crop_of_a_portrait_is_the_portrait():
    identity, context = held_out_character(2), world.draw_context(random.Random(4))
    context = world.Context(**{**context.__dict__, "frame": "portrait", "tilt": 0.0, "dx": 0.0, "dy": 0.0, "scale": 1.0})
    box, _ = drawing.face_of(identity, context, 160)
    picture = Image.fromarray(drawing.render(identity, context, 160))
    seen = head_crop(picture, Face(tuple(box), 1.0))
    assert abs(seen.width - 160) < 16

    def apart(a, b):
        return np.abs(np.asarray(a.resize((64, 64)), float) - np.asarray(b.resize((64, 64)), float)).mean()

    assert apart(seen, picture) < 25 < apart(seen.rotate(180), picture)


def test_a_head_crop_is_upright_and_goes_beyond_the_picture():
    picture, face = picture_of(2, 4, tilt=25.0)
    assert face.roll == pytest.approx(25, abs=3)
    embedder = get_embedder("charworld")
    straight, there = picture_of(2, 4, tilt=0.0)
    leaning = head_crop(picture, face)
    plain, turned, crooked = embedder([head_crop(straight, there), leaning, head_crop(picture, Face(face.box, 1.0))])
    assert plain @ turned > plain @ crooked, "the judge knows the character better upright"
    edge = Image.new("RGB", (100, 100), (10, 20, 30))
    assert set(head_crop(edge, Face((0, 0, 60, 60), 1.0)).getdata()) == {(10, 20, 30)}


def test_alignment_brings_landmarks_to_arcface_places():
    points = ARCFACE @ np.array([[0.8, 0.5], [-0.5, 0.8]]) * 2 + (120, 40)  # turned, scaled and moved
    pixels = np.zeros((420, 420, 3), np.uint8)
    for number, (x, y) in enumerate(points):
        pixels[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4] = 50 * (number + 1)
    seen = np.asarray(aligned(Image.fromarray(pixels), Face((0, 0, 400, 400), 1.0, tuple(map(tuple, points)))))
    assert seen.shape == (112, 112, 3)
    assert [int(seen[round(y), round(x), 0]) for x, y in ARCFACE] == pytest.approx([50, 100, 150, 200, 250], abs=8)
    assert aligned(Image.fromarray(pixels), Face((10, 10, 90, 100), 1.0)).size == (112, 112)


def test_the_most_frequent_is_found_among_others():
    crowd = np.concatenate([vectors(0, 1, 12), vectors(1, 2, 30), vectors(2, 3, 9)])
    character = most_frequent(crowd, 0.6)
    assert character.source == "the largest group, 30 of 51 faces"
    cosines = crowd @ character.vector
    assert cosines[12:42].min() > 0.6 > max(cosines[:12].max(), cosines[42:].max())
    assert most_frequent(crowd[:0], 0.6) is None
    assert np.allclose(most_frequent(crowd[:1], 0.6).vector, crowd[0], atol=1e-6)


def test_a_large_set_is_sampled(monkeypatch):
    monkeypatch.setattr(people, "SAMPLE", 50)
    crowd = np.concatenate([vectors(0, 1, 400), vectors(1, 2, 600)])
    character = most_frequent(crowd, 0.6)
    assert character.source == "the largest group, 30 of 50 faces"
    assert (crowd[400:] @ character.vector).mean() > 0.8


def finding(name, *faces, width=400, height=400, verdict=None):
    return Finding(name, width=width, height=height, faces=faces, verdict=verdict)


A, B = Face((40, 120, 120, 220), 0.9), Face((260, 120, 340, 220), 0.9)
BEHIND = Face((60, 60, 110, 130), 0.8)  # where A's forehead is


def test_every_picture_gets_what_its_faces_say():
    her, him = vectors(0, 1, 8, 0.2), vectors(1, 2, 2, 0.2)
    given = [
        (finding("alone", A), her[:1]), (finding("second", A), her[1:2]), (finding("nobody"), None), (finding("other", A), him[:1]),
        (finding("pair", A, B), np.stack([him[1], her[2]])), (finding("over each other", A, BEHIND), np.stack([her[3], him[0]])),
        (finding("tiny", Face((0, 0, 10, 12), 0.9)), her[4:5]), (finding("done", A, verdict=Verdict("blurred", "it is")), him[:1]),
    ]  # fmt: skip
    decisions = decide([f for f, _ in given], lambda i: given[i][1], PeopleSettings(), SHAPES)
    kinds = {f.name: d.verdict and d.verdict.kind for (f, _), d in zip(given, decisions, strict=True)}
    assert kinds == {
        "alone": None, "second": None, "nobody": "no_face", "other": "wrong_person", "pair": None, "over each other": "several_people",
        "tiny": "too_small", "done": None,
    }  # fmt: skip
    assert decisions[4].face == 1 and decisions[0].cosine > 0.9 and decisions[7] == people.Decision()
    assert "0.60 is needed" in decisions[3].verdict.reason and "10 x 12 pixels; 24" in decisions[6].verdict.reason


def test_references_settle_it_and_anybody_may_be_allowed():
    her, him = vectors(0, 1, 1, 0.2), vectors(1, 2, 9, 0.2)
    given = [(finding("her", A), her), *((finding(f"him{k}", A), him[k : k + 1]) for k in range(9))]
    findings, of = [f for f, _ in given], lambda i: given[i][1]
    known = Character(unit(vectors(5, 1, 4, 0.2).mean(0)), "4 reference pictures")
    decided = decide(findings, of, PeopleSettings(), SHAPES, known)
    assert decided[0].verdict is None and all("4 reference pictures" in d.verdict.reason for d in decided[1:])
    assert all(d.verdict is None for d in decide(findings, of, PeopleSettings(same_person=False), SHAPES))
    free = PeopleSettings(require_face=False, same_person=False)
    assert decide([finding("view")], of, free, SHAPES) == [people.Decision()]


def test_the_judge_tells_characters_apart_at_the_default():
    embedder, pictures = get_embedder("charworld"), [picture_of(number, seed) for number in (1, 3) for seed in range(6)]
    found = embedder([people.view(*one, embedder) for one in pictures]).numpy()
    findings = [finding(str(k), A) for k in range(12)]
    known = Character(unit(found[:3].mean(0)), "3 reference pictures")
    decided = decide(findings, lambda i: found[i : i + 1], PeopleSettings(), SHAPES, known)
    assert [d.verdict is None for d in decided] == [True] * 6 + [False] * 6


class Middle:
    """Sees one face in the middle of anything that is not black."""

    name = "middle"

    def detect(self, picture):
        height, width = picture.shape[:2]
        return [Face((width * 0.3, height * 0.35, width * 0.7, height * 0.75), 1.0)] if picture.any() else []


def test_references_are_read_from_a_folder(tmp_path):
    embedder = get_embedder("charworld")
    with pytest.raises(DataError, match="has no pictures"):
        people.from_references(tmp_path, Middle(), embedder)
    for seed in range(2):
        picture_of(1, seed)[0].save(tmp_path / f"{seed}.png")
    known = people.from_references(tmp_path, Middle(), embedder)
    assert known.source == "2 reference pictures" and np.linalg.norm(known.vector) == pytest.approx(1, abs=1e-5)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(DataError, match=r"No face was found in the reference .*black\.png"):
        people.from_references(tmp_path, Middle(), embedder)
