"""Captions fused: claims, their scores with numbers, contradictions by name, and the text that comes of it."""

import random

import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.cache import Job, caption_all
from charforgex.curation.captions.claims import NONE, claims, remainder
from charforgex.curation.captions.ensemble import Ensemble, Scorer, Voice, fuse
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError


def claimed(text):
    return {claim.aspect: claim.value for claim in claims(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a portrait of a woman with long black hair and green eyes and round black glasses, smiling, wearing a red hoodie, at the beach",
         {"kind": "woman", "hair_colour": "black", "hair_length": "long", "eyes": "green", "glasses": "round glasses",
          "expression": "smiling", "garment": "hoodie", "garment_colour": "red", "place": "at the beach", "framing": "portrait"}),
        ("1girl, solo, blonde hair, twintails, sunglasses, closed eyes, grey background",
         {"kind": "woman", "hair_colour": "blonde", "hair_style": "pigtails", "glasses": "sunglasses", "expression": "with closed eyes",
          "place": "grey background"}),
        ("A clean-shaven, bald man without glasses in a dark blue suit.",
         {"kind": "man", "hair_length": "bald", "glasses": NONE, "beard": NONE, "garment": "suit", "garment_colour": "blue"}),
        ("The blue-eyed girl's dress is red. She has freckles and a moustache.",
         {"kind": "woman", "eyes": "blue", "garment": "dress", "beard": "moustache", "marks": "freckles"}),
        ("a red car", {}),
    ],
)  # fmt: skip
def test_claims(text, expected):
    assert claimed(text) == expected
    for claim in claims(text):
        start, end = claim.span
        assert 0 <= start < end <= len(text)


def test_a_claim_that_hesitates_counts_half():
    (eyes,) = [claim for claim in claims("A woman. Her hair is long. She appears to have green eyes.") if claim.aspect == "eyes"]
    assert eyes.confidence == 0.5 and eyes.value == "green"
    assert all(claim.confidence == 1 for claim in claims("She appears calm. She has green eyes."))


def test_what_else_is_said():
    assert remainder("a woman with long hair, holding a cup, in front of a brick wall, smiling") == [
        "holding a cup",
        "in front of a brick wall",
    ]


VOICES = [
    Voice("blip2", "a woman with long black hair and glasses smiling"),
    Voice("florence", "A woman with long brown hair and green eyes is wearing a red hoodie. She is smiling."),
    Voice("tagger", "1girl, black hair, green eyes, hoodie, smile, holding cup", 0.5),
]


def test_a_worked_example_without_clip():
    """Weights 1, 1 and 0.5. Black has 1.5 of 2.5 behind it, brown 1: 0.6 and 0.4. Eyes: all who speak (1), 1.5 of 2.5 in all: 0.8."""
    fused = fuse(VOICES)
    by_value = {(answer.aspect, answer.value): answer for answer in fused.answers}
    black, brown, eyes, glasses = (
        by_value[key] for key in (("hair_colour", "black"), ("hair_colour", "brown"), ("eyes", "green"), ("glasses", "glasses"))
    )
    assert (black.support, black.agreement, black.score, black.kept) == pytest.approx((0.6, 0.6, 0.6, True))
    assert (brown.support, brown.agreement, brown.score, brown.kept) == pytest.approx((0.4, 0.4, 0.4, False))
    assert (eyes.support, eyes.agreement, eyes.score) == pytest.approx((1, 0.6, 0.8)) and eyes.said_by == ("florence", "tagger")
    assert (glasses.support, glasses.agreement, glasses.score) == pytest.approx((1, 0.4, 0.7))
    assert fused.contradictions == ("hair_colour: black (blip2, tagger; 0.60) against brown (florence; 0.40)",)
    assert fused.base == "florence"
    assert fused.text == "A woman with glasses and long black hair and green eyes is wearing a red hoodie. She is smiling."
    # 8 questions, one contradicted; kept: kind 1, black .6, long .8, green .6, glasses .4, smiling 1, hoodie .6, red .4 of the panel
    assert fused.parts == pytest.approx({"agreement": 5.4 / 8, "consistency": 7 / 8}) and fused.quality == pytest.approx(0.775)


def test_contradictions_of_kind_glasses_and_hair_are_named_with_who_said_what():
    fused = fuse([Voice("a", "a woman with black hair, smiling"), Voice("b", "a woman with brown hair and glasses"),
                  Voice("c", "a man with black hair without glasses")])  # fmt: skip
    assert [told.split(" against ")[0] for told in fused.contradictions] == [
        "kind: woman (a, b; 0.67)", "hair_colour: black (a, c; 0.67)", "glasses: glasses (b; 0.42)",
    ]  # fmt: skip
    assert fused.text == "a woman with black hair, smiling", "one voice for glasses and one against: unsaid"


def test_less_exact_words_support_exact_ones_and_contradict_nothing():
    fused = fuse([Voice("a", "a woman with glasses"), Voice("b", "a woman with round glasses, smiling")])
    assert fused.contradictions == ()
    assert claimed(fused.text)["glasses"] == "round glasses"
    assert next(answer for answer in fused.answers if answer.aspect == "glasses").said_by == ("a", "b")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a woman in a dress", "a lady in an orange dress"], "a lady in an orange dress"),
        (["a man with a hat", "a man without a hat", "a man without a hat, smiling"], "a man, smiling"),
        (["a woman, smiling", "a woman, laughing, wearing a blue dress", "a woman, laughing"], "a woman, laughing, wearing a blue dress"),
        (
            ["a woman in the rain", "a woman holding an umbrella", "a woman, holding an umbrella"],
            "a woman in the rain, holding an umbrella",
        ),
        (["a woman with blonde hair", "an old man with red hair", "a man with red hair"], "an old man with red hair"),
        (["a girl in a red dress", "a woman wearing an orange dress", "a lady in an orange dress"], "a woman wearing an orange dress"),
        (["only one, a woman with red hair"], "only one, a woman with red hair"),
        (["", "  "], ""),
    ],
)
def test_the_text(texts, expected):
    fused = fuse([Voice(f"model {i}", text) for i, text in enumerate(texts)])
    assert fused.text == expected
    assert 0 <= fused.quality <= 1 and (fused.quality == 0) == (not claims(fused.text))


def test_weights_decide_and_a_captioner_without_weight_is_not_heard():
    voices = [Voice("a", "a woman with red hair", 1), Voice("b", "a woman with blue hair", 3), Voice("c", "a man with green hair", 0)]
    fused = fuse(voices)
    assert fused.text == "a woman with blue hair" and fused.base == "b"
    assert {answer.value: answer.agreement for answer in fused.answers if answer.aspect == "hair_colour"} == {"blue": 0.75, "red": 0.25}


# ---- with the embedded CLIP, on pictures of charworld ----
@pytest.fixture(scope="module")
def scorer():
    return Scorer("charworld")


def scene(seed, **context):
    rng = random.Random(seed)
    identity, drawn = world.draw_identity(rng), world.draw_context(rng)
    drawn = world.Context(**{**drawn.__dict__, "expression": "neutral", "frame": "portrait", **context})
    return Image.fromarray(drawing.render(identity, drawn)), identity, drawn


def test_clip_sees_who_is_right_about_the_place_where_voices_are_equal(scorer):
    right = 0
    for seed in range(6):
        picture, identity, context = scene(seed, scene="beach")
        told = world.caption(identity, context)[0]
        false = told.replace("at the beach", "in a forest")
        fused = fuse([Voice("wrong", false), Voice("right", told)], scorer, scorer.see([picture])[0])
        places = {answer.value: answer for answer in fused.answers if answer.aspect == "place"}
        right += places["at the beach"].kept and "at the beach" in fused.text and "forest" not in fused.text
        assert places["at the beach"].clip + places["in a forest"].clip <= 1.0001
        assert any(contradiction.startswith("place: at the beach (right") for contradiction in fused.contradictions) or not right
    assert right >= 5


def test_clip_overrules_two_who_are_wrong_and_its_share_says_whether(scorer):
    """Two say forest, one says space: 0.67 against 0.33 by votes; CLIP is rather certain of space."""
    picture, identity, context = scene(3, scene="space")
    told = world.caption(identity, context)[0]
    voices = [Voice("a", told), *(Voice(who, told.replace("in outer space", "in a forest")) for who in "bc")]
    seen = scorer.see([picture])[0]
    fused = fuse(voices, scorer, seen, clip_share=0.5)
    space = next(answer for answer in fused.answers if answer.value == "in outer space")
    assert space.clip > 0.7 and space.score == pytest.approx((1 / 3 + space.clip) / 2) and "in outer space" in fused.text
    assert "in a forest" in fuse(voices, scorer, seen, clip_share=0.0).text
    assert set(fused.parts) == {"agreement", "clip", "consistency"}


def test_quality_falls_when_the_captions_are_of_other_pictures(scorer):
    true, false = [], []
    for seed in range(5):
        picture, identity, context = scene(seed)
        _, other, elsewhere = scene(seed + 100)
        seen = scorer.see([picture])[0]
        for qualities, about in ((true, (identity, context)), (false, (other, elsewhere))):
            voices = [Voice(who, world.caption(*about, random.Random(who), keep=0.85)[0]) for who in "abc"]
            qualities.append(fuse(voices, scorer, seen).quality)
    assert sum(true) / 5 > sum(false) / 5 + 0.1
    assert sum(a > b for a, b in zip(true, false, strict=True)) >= 4


# ---- as a captioner ----
class Parrot:
    """A captioner of one sentence."""

    reads = frozenset({"trigger"})

    def __init__(self, name, text):
        self.name, self.text = f"{name}:model:0", text

    def caption(self, pictures, contexts):
        return [self.text] * len(pictures)


def test_an_ensemble_is_a_captioner_that_tells_what_is_contradicted(tmp_path):
    both = Ensemble([Parrot("one", "a woman with red hair\na woman with blue hair"), Parrot("two", "a woman with blue hair")], [1, 1])
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    contexts = [Context("a.png"), Context("b.png")]
    said = both.caption(pictures, contexts)
    assert said == ["a woman with blue hair"] * 2 and both.reads == {"trigger"}
    contradiction = "hair_colour: blue (one, two; 0.75) against red (one; 0.25)"  # one of the two captions of one of two captioners
    assert all(text.about["contradictions"] == (contradiction,) and 0 < text.about["quality"] < 1 for text in said)
    jobs = [Job(str(n), lambda: pictures[0], context) for n, context in enumerate(contexts)]
    for _ in range(2):  # the second time out of the cache
        for (_, text), before in zip(caption_all(both, jobs, tmp_path, 2, pytest.fail), said, strict=True):
            assert text == before and text.about["contradictions"] == [contradiction]
            assert text.about["quality"] == before.about["quality"]


def test_its_name_changes_with_all_that_changes_its_captions():
    members = [Parrot("one", "x"), Parrot("two", "y")]
    names = {Ensemble(members).name, Ensemble(members, [1, 2]).name, Ensemble(members, scorer="charworld").name,
             Ensemble(members, scorer="charworld", clip_share=0.2).name, Ensemble(members[:1]).name}  # fmt: skip
    assert len(names) == 5 and all(name.startswith("ensemble:one") for name in names)


def test_it_is_built_from_settings_and_wrong_ones_are_refused():
    ensemble = get_captioner(CaptionSettings(backend=("sidecar", "charworld"), weights={"charworld": 0.5}, scorer="charworld"))
    assert ensemble.weights == [1.0, 0.5] and ensemble.source == "charworld"
    two = ("sidecar", "charworld")
    for wrong in ({"weights": {"charworld": 2.0}}, {"scorer": "charworld"}, {"backend": two, "weights": {"blip2": 1.0}},
                  {"backend": two, "clip_share": 0.1}):  # fmt: skip
        with pytest.raises(ConfigError):
            CaptionSettings(**wrong)
    with pytest.raises(ConfigError, match="weights"):
        Ensemble([Parrot("one", "x")], [0])
