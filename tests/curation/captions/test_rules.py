"""Captions as BLIP-2, Florence, chatty models, taggers and people write them, and what the rules make of them."""

import random

import pytest

from charforgex.binding import bind
from charforgex.charworld import world
from charforgex.charworld.assets import load_clip
from charforgex.curation.captions.rules import CaptionRules, apply, plain, truncation
from charforgex.errors import ConfigError

ALL = ("hair", "eyes", "skin", "glasses", "beard", "marks", "hat", "age")


def rules(class_word="woman", absorb=ALL, **more):
    return CaptionRules(trigger="zatoki", class_word=class_word, absorb=absorb, **more)


def check(caption, expected, **more):
    text, notes = apply(caption, rules(**more))
    assert text == expected
    assert notes == ()
    assert apply(text, rules(**more)) == (text, ())


# everything that the character is, absorbed
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a woman with long black hair and green eyes, smiling", "zatoki woman, smiling"),
        ("a portrait of a woman with brown skin and brown eyes and green pigtails hair and freckles, smiling, "
         "wearing a black t-shirt, at sunset",
         "a portrait of zatoki woman, smiling, wearing a black t-shirt, at sunset"),
        ("a portrait of a woman with a bald head and a crown, with closed eyes, wearing overalls over a red shirt, blue background",
         "a portrait of zatoki woman, with closed eyes, wearing overalls over a red shirt, blue background"),
        ("The image shows a young woman with long, wavy blonde hair and piercing blue eyes, wearing a red dress and sunglasses, "
         "standing in a park.",
         "zatoki woman, wearing a red dress, standing in a park."),
        ("This is a photo of a woman with short brown hair tied back in a ponytail, wearing a white shirt.",
         "zatoki woman, wearing a white shirt."),
        ("arafed woman with long hair and glasses smiling at the camera", "zatoki woman smiling at the camera"),
        ("a woman with red hair and a red dress", "zatoki woman with a red dress"),
        ("a woman with freckles, red hair, and a scarf", "zatoki woman with a scarf"),
        ("a woman wearing a hat and a scarf", "zatoki woman wearing a scarf"),
        ("a blonde woman in a red dress", "zatoki woman in a red dress"),
        ("a young, dark-haired woman with a scar on her left cheek is holding a book", "zatoki woman is holding a book"),
        ("She has long black hair and green eyes. She is smiling.", "zatoki woman is smiling."),
        ("The woman has long black hair and is wearing a white blouse. Her eyes are blue. Her eyes are closed.",
         "zatoki woman is wearing a white blouse. Her eyes are closed."),
        ("A woman with her hair in a bun sits at a table.", "zatoki woman sits at a table."),
        ("a close up of a woman wearing a hat and glasses", "a close up of zatoki woman"),
        ("1girl, solo, long_hair, black_hair, blue_eyes, smile, hat, outdoors, looking_at_viewer",
         "zatoki woman, solo, smile, outdoors, looking at viewer"),
        ("woman, long hair, smiling, red dress, beach", "zatoki woman, smiling, red dress, beach"),
        ("a woman in a straw hat and glasses, at the beach", "zatoki woman, at the beach"),
        ("In this image, we can see a woman with pink hair. She wears a black hat and a blue jacket. The background is blurred.",
         "zatoki woman. She wears a blue jacket. The background is blurred."),
        ("Her hair is long and black, and she is wearing a green sweater.", "zatoki woman is wearing a green sweater."),
        ("a woman with dark skin, brown eyes and a friendly smile", "zatoki woman with a friendly smile"),
        ("The woman, who has short curly hair, is laughing.", "zatoki woman is laughing."),
        ("a brunette in a leather jacket", "zatoki woman in a leather jacket"),
        ("woman with hair blowing in the wind, standing on a cliff", "zatoki woman, standing on a cliff"),
        ("a woman with luxuriant chestnut hair that is braided, looking away", "zatoki woman, looking away"),
        ("a woman with hair ornament, black hair, white dress", "zatoki woman with hair ornament, white dress"),
        ("An elderly woman with white hair and wrinkles, in her seventies, sitting in a chair",
         "zatoki woman with wrinkles, sitting in a chair"),
        ("She has blue eyes, smiling at the camera.", "zatoki woman is smiling at the camera."),
        ("A close-up portrait of a woman with striking green eyes and freckles across her nose and cheeks. Her long red hair cascades over "
         "her shoulders. She is wearing a dark green knit sweater, and the background is softly blurred.",
         "A close-up portrait of zatoki woman. She is wearing a dark green knit sweater, and the background is softly blurred."),
        ("The image depicts a woman with light brown skin, wearing round black glasses and a yellow raincoat, standing in the rain with "
         "an umbrella.",
         "zatoki woman, wearing a yellow raincoat, standing in the rain with an umbrella."),
        ("a woman and a dog, the woman has brown hair and the dog has brown fur", "zatoki woman and a dog, the dog has brown fur"),
        ("a woman with a hat on her head and a glass of wine in her hand", "zatoki woman with a glass of wine in her hand"),
        ("Blue-eyed woman with a nose ring, short hair, and black leather jacket stands in front of a brick wall.",
         "zatoki woman with a nose ring and black leather jacket stands in front of a brick wall."),
        ("a woman with wide eyes and an open mouth", "zatoki woman with wide eyes and an open mouth"),
        ("This image features a woman with curly hair. The woman's eyes are brown. She has a warm smile.",
         "zatoki woman. She has a warm smile."),
        ("Here is a description of the image: A woman with long hair stands in a field of flowers.",
         "zatoki woman stands in a field of flowers."),
        ("A woman with shoulder-length brown hair and bangs, wearing a blue blazer over a white shirt, is smiling at the camera.",
         "zatoki woman, wearing a blue blazer over a white shirt, is smiling at the camera."),
        ("A woman with long hair that falls past her shoulders is standing in the snow.", "zatoki woman is standing in the snow."),
        ("a woman a woman with a hat a hat a hat, a dog", "zatoki woman with a dog"),
        ("A woman in her 30s with black hair, brown eyes, and olive skin is laughing.", "zatoki woman is laughing."),
        ("anime girl with purple hair and cat ears, sitting on a couch, holding a cup of tea",
         "anime zatoki woman, sitting on a couch, holding a cup of tea"),
        ("a woman wearing a pair of black-rimmed glasses, a green beanie and a black coat", "zatoki woman wearing a black coat"),
        ("a drawing of a girl with glasses and a ponytail in a school uniform", "a drawing of zatoki woman in a school uniform"),
        ("a woman with blue eyes looking at the camera", "zatoki woman looking at the camera"),
    ],
)  # fmt: skip
def test_a_woman(caption, expected):
    check(caption, expected)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a man with a beard and moustache", "zatoki man"),
        ("a bearded man in a suit", "zatoki man in a suit"),
        ("an old man with a full gray beard, wearing a top hat and a black suit", "zatoki man, wearing a black suit"),
        ("The man is bald. He has a beard and wears round glasses with black frames.", "zatoki man."),
        ("1boy, solo, beard, facial_hair, bald, suit", "zatoki man, solo, suit"),
        ("a man with a goatee wearing a baseball cap on his head and a grey hoodie in a city street at night",
         "zatoki man wearing a grey hoodie in a city street at night"),
        ("a guy with tattoos on his arms and a mustache holding a guitar", "zatoki man holding a guitar"),
    ],
)  # fmt: skip
def test_a_man(caption, expected):
    check(caption, expected, class_word="man")


@pytest.mark.parametrize(
    ("absorb", "caption", "expected"),
    [
        (("hair",), "a woman with dark hair and dark eyes wearing a dark coat", "zatoki woman with dark eyes wearing a dark coat"),
        (("eyes",), "a woman with dark hair and dark eyes wearing a dark coat", "zatoki woman with dark hair wearing a dark coat"),
        (("hat",), "a woman wearing a red hat, sunglasses, and a blue scarf", "zatoki woman wearing sunglasses and a blue scarf"),
        (("glasses",), "a woman wearing a red hat, sunglasses, and a blue scarf", "zatoki woman wearing a red hat and a blue scarf"),
        (("glasses",), "a woman wearing a red hat, a blue scarf, and sunglasses", "zatoki woman wearing a red hat and a blue scarf"),
        (("hair",), "A woman in her 30s with black hair, brown eyes, and olive skin is laughing.",
         "zatoki woman in her 30s with brown eyes and olive skin is laughing."),
        (("hair", "glasses"), "A woman is sitting on a chair, her hair tied back, wearing glasses.", "zatoki woman is sitting on a chair."),
        (("hair",), "a young woman with red hair", "a young zatoki woman"),
        (("hair",), "a blonde elderly woman on a bench", "an elderly zatoki woman on a bench"),
        ((), "a woman with long black hair", "zatoki woman with long black hair"),
    ],
)  # fmt: skip
def test_only_what_was_chosen_is_absorbed(absorb, caption, expected):
    check(caption, expected, absorb=absorb)


def test_what_cannot_be_taken_out_stays_and_is_told():
    text, notes = apply("a woman running her fingers through her long hair", rules())
    assert text == "zatoki woman running her fingers through her long hair"
    assert notes == ('still says "her long hair": its place in the sentence is not understood',)
    assert apply("a woman holding sunglasses", rules())[0] == "zatoki woman holding sunglasses", "held, not worn"


@pytest.mark.parametrize(
    ("caption", "class_word", "expected"),
    [
        ("a photo of zatoki woman in the rain", "woman", "a photo of zatoki woman in the rain"),
        ("a photo of zatoki in the rain", "woman", "a photo of zatoki woman in the rain"),
        ("{trigger} in the rain", "woman", "zatoki woman in the rain"),
        ("a person in the rain", "woman", "zatoki woman in the rain"),
        ("a man and a lady", "woman", "a man and zatoki woman"),
        ("rain on a window", "woman", "zatoki woman, rain on a window"),
        ("A window in the rain", "woman", "zatoki woman, a window in the rain"),
        ("a knight on a horse", "knight", "zatoki knight on a horse"),
        ("a person on a horse", "horse", "a person on zatoki horse"),
        ("a girl in the rain", None, "zatoki girl in the rain"),
        ("two women and a craftswoman", "woman", "zatoki woman, two women and a craftswoman"),
        ("", "woman", "zatoki woman"),
        ("a wizard smiling", "old wizard", "zatoki old wizard, a wizard smiling"),
    ],
)
def test_the_trigger_has_its_place(caption, class_word, expected):
    check(caption, expected, class_word=class_word, absorb=())


def test_a_trigger_that_has_its_class_in_it_is_not_given_another():
    given = CaptionRules(trigger="zatoki woman", class_word="woman")
    assert given.phrase == "zatoki woman" and apply("a woman smiling", given)[0] == "zatoki woman smiling"


def test_at_the_start_the_caption_keeps_its_words():
    check("A portrait of a woman smiling", "zatoki woman, a portrait of a woman smiling", absorb=(), place="start")


def test_without_a_trigger_only_the_text_is_cleaned():
    text, notes = apply("The picture shows a woman ,with  a “red” scarf…", CaptionRules())
    assert (text, notes) == ('a woman, with a "red" scarf...', ())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("There is a dog. There is a cat. There is a cat. It runs.", "a dog. A cat. It runs."),
        ("a cat and a hat and a hat and a hat", "a cat and a hat"),
        ("red, blue, red, green, blue", "red, blue, green"),
        ("Sure! Here is a caption: a dog", "a dog"),
        ("The image is of a dog", "a dog"),
        ("a photo of a dog", "a photo of a dog"),
        ("caption: a dog", "a dog"),
        ("a 3.5 m dog, 1,000 cats", "a 3.5 m dog, 1,000 cats"),
        ("cafe\u0301\u200b\ue000\x07 au lait", "café au lait"),
        ("ｆull", "ｆull"),
        ("there is", "there is"),
    ],
)
def test_openings_repeats_and_odd_characters(caption, expected):
    assert apply(caption, CaptionRules()) == (expected, ())


def test_sentences_and_tags():
    sentence = "a woman with a friendly smile, wearing a red dress. The background is blurred."
    tags = apply(sentence, CaptionRules(form="tags"))[0]
    assert tags == "woman, friendly smile, wearing a red dress, background is blurred"
    back = apply("1girl, solo, long hair, blue eyes, smile, outdoors", CaptionRules(form="sentence"))[0]
    assert back == "a woman with long hair and blue eyes, smile, outdoors"
    assert apply(sentence, CaptionRules(form="sentence"))[0] == sentence


def test_a_long_caption_is_cut_where_a_clause_ends_and_the_rest_is_told():
    text, notes = apply("a woman in a red dress, standing on a bridge over a river at night", CaptionRules(max_words=10))
    assert text == "a woman in a red dress" and notes == ('cut to 10 words: "standing on a bridge over a river at night" is left out',)


def test_what_clip_does_not_read_is_told():
    long = ", ".join(f"{colour} flower number {i}" for i, colour in enumerate(["red", "blue"] * 10))
    (estimated,) = truncation(long)
    assert "estimated" in estimated and "77" in estimated
    tokenizer = load_clip()[1]
    (counted,) = truncation(long, tokenizer)
    assert counted.startswith(f"{len(tokenizer(long).input_ids)} tokens")
    assert truncation("a short one") == truncation("a short one", tokenizer) == ()
    assert apply(long, CaptionRules(), tokenizer)[1] == (counted,)


# ---- properties ----
OPENINGS = ["", "The image shows ", "This is a photo of ", "In this image, we can see ", "a portrait of ", "a photo of "]
SUBJECTS = ["a woman", "a young woman", "a blonde woman", "an old, bearded woman", "the woman", "a girl", "woman"]
THINGS = {
    "hair": ["long black hair", "her hair tied back", "short, curly red hair", "a ponytail", "dark brown wavy hair in a bun"],
    "eyes": ["green eyes", "big blue eyes", "piercing dark eyes"],
    "glasses": ["glasses", "a pair of round glasses", "sunglasses"],
    "hat": ["a hat", "a red baseball cap on her head", "cat ears"],
    "marks": ["freckles", "a scar on her cheek"],
    None: ["a red scarf", "a backpack", "a friendly smile", "a green dress", "closed eyes", "pearl earrings"],
}
ENDS = [
    ", smiling",
    " smiling at the camera",
    " in a park",
    ", standing in the rain",
    ". She is laughing.",
    ", blue background",
    "",
    " and looking away",
]
ABSENT = (
    "hair",
    "ponytail",
    "green eyes",
    "big blue",
    "piercing",
    "glasses",
    "hat",
    "cap",
    "cat ears",
    "freckles",
    "scar on",
    "blonde",
    "bearded",
)


def composed(rng):
    kinds = [rng.choice(list(THINGS)) for _ in range(rng.randint(1, 4))]
    things = [rng.choice(THINGS[kind]) for kind in kinds]
    joint = rng.choice([", and ", " and "])
    listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + joint + things[-1]
    return rng.choice(OPENINGS) + rng.choice(SUBJECTS) + rng.choice([" with ", " wearing ", " who has "]) + listed + rng.choice(ENDS)


def test_composed_captions_lose_all_that_is_absorbed_and_stay_sentences():
    rng = random.Random("composed captions")
    for _ in range(150):
        caption = composed(rng)
        text, notes = apply(caption, rules())
        assert apply(text, rules()) == (text, notes), caption
        assert notes == (), caption
        assert "zatoki woman" in text, caption
        assert not any(word in text.replace("that", "").replace("scarf", "") for word in ABSENT), f"{caption} -> {text}"
        for broken in (
            "with,",
            "with.",
            "with and",
            "and and",
            "and,",
            "wearing,",
            "wearing.",
            "has.",
            " ,",
            ",,",
            "  ",
            "with in",
            "with smiling",
            "with looking",
        ):
            assert broken not in text, f"{caption} -> {text}"
        assert not text.endswith((" with", " and", " wearing", " who", " has", ",")), f"{caption} -> {text}"
        assert all(word in text for word in ("red scarf", "backpack", "friendly smile", "green dress", "earrings") if word in caption), (
            f"{caption} -> {text}"
        )


def test_any_text_at_all_is_taken_twice_as_once():
    rng = random.Random("any text")
    words = [
        "a",
        "with",
        "and",
        ",",
        ".",
        ";",
        "hair",
        "eyes",
        "long",
        "blue",
        "woman",
        "She",
        "has",
        "is",
        "wearing",
        "glasses",
        "hat",
        "bald",
    ]
    words += ["The", "image", "shows", "zatoki", "her", "_x_", "\ue003", "é", "「", "1girl", "young", "who"]
    for _ in range(80):
        caption = " ".join(rng.choice(words) for _ in range(rng.randint(0, 12)))
        for given in (rules(), CaptionRules(absorb=ALL), rules(place="start", form="tags"), rules(form="sentence", max_words=6)):
            once = apply(caption, given)[0]
            assert apply(once, given)[0] == once, (caption, given)
            assert not any("\ue000" <= c <= "\uf8ff" for c in once)


def test_charworlds_own_captions_keep_what_is_not_the_character():
    for seed in range(50):
        rng = random.Random(seed)
        identity, context = world.draw_identity(rng), world.draw_context(rng)
        caption, _ = world.caption(identity, context, rng)
        text, notes = apply(caption, rules(class_word=identity.kind))
        assert notes == ()
        assert text == ", ".join([f"a {context.frame} of zatoki {identity.kind}", *caption.split(", ")[1:]]), caption


def test_settings_are_checked():
    assert bind(CaptionRules, {"absorb": ["hair"], "max_words": 20}, "captions.rules").absorb == ("hair",)
    for wrong in ({"absorb": ["nose"]}, {"place": "end"}, {"max_words": 1}, {"trigger": " "}, {"class_word": ""}):
        with pytest.raises(ConfigError):
            bind(CaptionRules, wrong, "captions.rules")
    assert plain("") == ""
