"""Framing, pose, words, light; and what the embedded CLIP takes charworld's pictures for."""

import random

import numpy as np
import pytest
from PIL import Image

from charforgex.charworld.drawing import render
from charforgex.charworld.world import caption, draw_context, draw_identity
from charforgex.curation import facts
from charforgex.curation.items import Face, Finding

SCENES = {
    "plain": "plain", "city": "city", "forest": "nature", "mountains": "nature", "desert": "nature", "beach": "water",
    "underwater": "water", "space": "sky", "sunset": "sky",
}  # fmt: skip


def finding(*faces):
    return Finding("a.png", width=400, height=1000, faces=faces)


def face(height, top=100.0, left=100.0, **angles):
    return Face((left, top, left + 0.8 * height, top + height), 0.9, **angles)


@pytest.mark.parametrize(("height", "answer"), [(450, "close-up"), (399, "portrait"), (200, "portrait"), (120, "upper body"), (50, "full")])
def test_framing_is_the_faces_share_of_the_height(height, answer):
    assert facts.read(finding(face(height)))["framing"] == answer


def test_framing_of_a_crop_and_of_the_face_within():
    both = finding(face(90), face(150, top=800))
    assert facts.read(both)["framing"] == "upper body"
    assert facts.read(both, crop=(0, 50, 400, 350))["framing"] == "portrait"  # 90 of 300
    assert facts.read(both, crop=(0, 300, 400, 700))["framing"] == facts.UNKNOWN


@pytest.mark.parametrize(
    ("yaw", "answer"), [(-80, "far left"), (-120, "far left"), (-30, "left"), (0, "frontal"), (18, "right"), (70, "far right")]
)
def test_yaw(yaw, answer):
    assert facts.read(finding(face(100, yaw=yaw)))["yaw"] == answer


def test_what_is_not_known_is_unknown():
    nothing = facts.read(Finding("a.png", width=10, height=10))
    assert set(nothing) == set(facts.ANSWERS) and set(nothing.values()) == {facts.UNKNOWN}
    assert facts.read(finding(face(100)))["pitch"] == facts.UNKNOWN
    assert facts.read(finding(face(100, pitch=-40.0)))["pitch"] == "down"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a portrait of zkx woman, Smiling, wearing a red hoodie, at the beach", ("smiling", "unknown", "hoodie", "water")),
        ("photo of zkx with long wavy brown hair in a white dress, laughing in a park", ("laughing", "long", "dress", "nature")),
        ("zkx, serious, bald head, blue suit and top hat, grey background", ("neutral", "bald", "suit", "plain")),
        ("a happy dog", ("smiling", "unknown", "unknown", "unknown")),
        ("a smart barber in a stopwatch", ("unknown",) * 4),  # neither a bar nor a top
        ("", ("unknown",) * 4),
    ],
)
def test_words_of_captions(text, expected):
    said = facts.said(text)
    assert tuple(said[question] for question in ("expression", "hair", "garment", "background")) == expected


def test_light_and_colour():
    grey = np.full((40, 40, 3), 128, np.uint8)
    half = grey.copy()
    half[:, :20], half[:, 20:] = 40, 220
    assert [facts.lighting(p) for p in (grey, grey // 4, grey + 110, half)] == ["even", "dark", "bright", "from one side"]
    stripes = np.full((40, 40, 3), 20, np.uint8)
    stripes[::2] = 235
    assert facts.lighting(stripes) == "contrasty"
    paint = [np.full((40, 40, 3), rgb, np.uint8) for rgb in ((90, 90, 95), (200, 140, 90), (90, 120, 200), (140, 110, 130), (20, 200, 20))]
    assert [facts.colour(p) for p in paint] == ["grey", "warm", "cool", "neutral", "vivid"]


def test_zero_shot_on_vectors():
    vectors = {"glasses": (("none", "round", "round"), np.eye(3))}
    features = np.array([[1.0, 0, 0], [0.0, 0.6, 0.8]])
    first, second = facts.zero_shot(features, vectors, scale=np.log(8))
    # softmax of ln 8 (1, 0, 0): 0.8, 0.1, 0.1; phrases of one answer add up
    assert first["glasses"].answer == "none" and first["glasses"].margin == pytest.approx(0.6)
    weights = np.array([1, 8**0.6, 8**0.8])
    assert second["glasses"].answer == "round" and second["glasses"].margin == pytest.approx((weights[1:].sum() - 1) / weights.sum())


def test_captions_go_before_guesses_and_guesses_must_be_sure():
    found = {"expression": "sad", "background": facts.UNKNOWN, "hair": facts.UNKNOWN}
    guesses = {"expression": facts.Guess("smiling", 1.0), "background": facts.Guess("city", 0.6), "glasses": facts.Guess("none", 0.4)}
    completed = facts.complete(found, guesses, margin=0.5)
    assert completed == {"expression": "sad", "background": "city", "hair": facts.UNKNOWN, "glasses": facts.UNKNOWN}


def test_charworld_is_read_from_its_captions_and_by_its_clip():
    from charforgex.embedders import get_clip

    pictures, scenes = [], []
    for seed in range(60):
        rng = random.Random(9000 + seed)
        identity, context = draw_identity(rng, held_out=True), draw_context(rng)
        pictures.append(Image.fromarray(render(identity, context)))
        scenes.append(SCENES[context.scene])
        said = facts.said(caption(identity, context)[0])
        assert said["background"] == scenes[-1]
        assert said["expression"] == {"sleeping": "eyes closed"}.get(context.expression, context.expression)
    clip = get_clip("charworld")
    guesses = facts.zero_shot(clip.see(pictures).numpy(), facts.label_vectors(clip), clip.scale)
    right = [guess["background"].answer == scene for guess, scene in zip(guesses, scenes, strict=True)]
    assert np.mean(right) >= 0.75  # 0.87 of 300
