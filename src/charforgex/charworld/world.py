"""Charworld: who its characters are, where they stand, and how a sentence says so.

An `Identity` is what makes a character: named traits (hair, skin, glasses, ...) and continuous ones that no caption
ever names, so that a character is more than a list of words. A `Context` is what prompts vary: expression, clothes,
scene, framing. Both are drawn from a `random.Random`, so a seed is a picture. `drawing.py` turns the pair into pixels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

KINDS = ("woman", "man")
HAIRS = ("bald", "short", "spiky", "mohawk", "bob", "long", "curly", "bun", "pigtails")
HAIR_COLOURS = ("black", "brown", "blonde", "red", "white", "blue", "pink", "green", "purple")
SKINS = ("pale", "tan", "brown", "dark", "green", "blue")
EYE_COLOURS = ("brown", "blue", "green", "purple")
GLASSES = ("none", "round", "square", "sunglasses")
GLASSES_COLOURS = ("black", "red", "white", "yellow")
BEARDS = ("none", "moustache", "full beard")
MARKS = ("none", "freckles", "scar")
HATS = ("none", "cap", "beanie", "top hat", "crown", "cat ears")
HAT_COLOURS = ("red", "yellow", "green", "blue", "purple", "black")

EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "surprised", "angry", "winking", "sleeping")
GARMENTS = ("t-shirt", "hoodie", "suit", "striped shirt", "overalls")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SCENES = ("plain", "beach", "forest", "city", "mountains", "desert", "space", "sunset", "underwater")
FRAMES = ("portrait", "close-up")

# (hair, hair colour) pairs that no pre-training picture shows. Every held-out character has one of them.
HELD_OUT_HAIR = frozenset(
    {("mohawk", "green"), ("pigtails", "blue"), ("curly", "purple"), ("bob", "pink"), ("spiky", "white")}
    | {("bun", "red"), ("long", "green"), ("short", "blue"), ("pigtails", "blonde"), ("curly", "white")}
)


@dataclass(frozen=True)
class Identity:
    """One character. Named traits are strings; the floats are in [-1, 1] and never appear in a caption."""

    kind: str
    hair: str
    hair_colour: str
    skin: str
    eye_colour: str
    glasses: str
    glasses_colour: str
    beard: str
    mark: str
    hat: str
    hat_colour: str
    eye_spacing: float
    eye_size: float
    eye_height: float
    face_width: float
    jaw: float
    mouth_width: float
    nose_length: float
    brow: float
    hair_volume: float
    skin_tone: float
    hair_tone: float


CONTINUOUS = tuple(field.name for field in fields(Identity) if field.type == "float")


@dataclass(frozen=True)
class Context:
    """What one picture shows besides who it is. Offsets are in picture widths, `tilt` and `roll` in degrees, the rest in [0, 1].

    What stands from `blink` on is at rest in pictures, and moves in clips.
    """

    expression: str
    garment: str
    garment_colour: str
    scene: str
    scene_colour: str  # of the plain scene only
    frame: str
    yaw: float = 0.0  # -1 looks left, 1 looks right
    tilt: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    detail: float = 0.5  # moves the scenery
    blink: float = 0.0
    talk: float = 0.0
    wave: float = 0.0  # 0: the arm hangs; otherwise where the raised hand is, from one side to the other
    nod: float = 0.0  # -1 looks up, 1 looks down
    pan: float = 0.0  # of the camera: how far to the right it looks
    zoom: float = 1.0  # at least 1; the camera sees no further than the scene
    roll: float = 0.0


# What the attribute classifier reads off a picture: name -> possible values.
IDENTITY_ATTRIBUTES = {
    "kind": KINDS, "hair": HAIRS, "hair_colour": HAIR_COLOURS, "skin": SKINS, "eye_colour": EYE_COLOURS,
    "glasses": GLASSES, "beard": BEARDS, "mark": MARKS, "hat": HATS, "hat_colour": HAT_COLOURS,
}  # fmt: skip
CONTEXT_ATTRIBUTES = {
    "expression": EXPRESSIONS, "garment": GARMENTS, "garment_colour": COLOURS, "scene": SCENES,
    "scene_colour": COLOURS, "frame": FRAMES,
}  # fmt: skip
ATTRIBUTES = IDENTITY_ATTRIBUTES | CONTEXT_ATTRIBUTES


def visible_attributes(identity: Identity, context: Context) -> dict[str, str]:
    """The attributes that this picture really shows: a bald head has no hair colour, sunglasses hide the eyes."""
    shown = {name: getattr(identity, name) for name in IDENTITY_ATTRIBUTES}
    shown |= {name: getattr(context, name) for name in CONTEXT_ATTRIBUTES}
    if identity.hair == "bald":
        del shown["hair_colour"]
    if identity.hat in ("none", "crown"):
        del shown["hat_colour"]
    if identity.glasses == "sunglasses" or context.expression == "sleeping":
        del shown["eye_colour"]
    if context.scene != "plain":
        del shown["scene_colour"]
    return shown


def draw_identity(rng: random.Random, held_out: bool = False) -> Identity:
    """A random character; `held_out` ones have a (hair, colour) pair that pre-training never shows."""
    kind = rng.choice(KINDS)
    if held_out:
        hair, hair_colour = rng.choice(sorted(HELD_OUT_HAIR))
    else:
        while True:
            hair, hair_colour = rng.choice(HAIRS), rng.choice(HAIR_COLOURS)
            if kind == "woman" and hair == "bald" and rng.random() < 0.7:
                continue
            if (hair, hair_colour) not in HELD_OUT_HAIR:
                break
    return Identity(
        kind=kind,
        hair=hair,
        hair_colour=hair_colour,
        skin=rng.choice(SKINS[:4]) if rng.random() < 0.8 else rng.choice(SKINS[4:]),
        eye_colour=rng.choice(EYE_COLOURS),
        glasses=rng.choice(GLASSES[1:]) if rng.random() < 0.35 else "none",
        glasses_colour=rng.choice(GLASSES_COLOURS),
        beard=rng.choice(BEARDS[1:]) if kind == "man" and rng.random() < 0.5 else "none",
        mark=rng.choice(MARKS[1:]) if rng.random() < 0.3 else "none",
        hat=rng.choice(HATS[1:]) if rng.random() < 0.35 else "none",
        hat_colour=rng.choice(HAT_COLOURS),
        **{name: rng.uniform(-1, 1) for name in CONTINUOUS},
    )


def draw_context(rng: random.Random) -> Context:
    return Context(
        expression=rng.choices(EXPRESSIONS, (3, 4, 3, 2, 2, 2, 2, 2))[0],
        garment=rng.choice(GARMENTS),
        garment_colour=rng.choice(COLOURS),
        scene=rng.choices(SCENES, (3, 1, 1, 1, 1, 1, 1, 1, 1))[0],
        scene_colour=rng.choice(COLOURS),
        frame=rng.choices(FRAMES, (3, 1))[0],
        yaw=rng.uniform(-0.5, 0.5),
        tilt=rng.gauss(0, 2),
        dx=rng.gauss(0, 0.008),
        dy=rng.gauss(0, 0.006),
        scale=rng.uniform(0.97, 1.03),
        detail=rng.random(),
    )


# ---------------------------------------------------------------- captions
SCENE_WORDS = {
    "beach": "at the beach", "forest": "in a forest", "city": "in a city at night", "mountains": "in the snowy mountains",
    "desert": "in the desert", "space": "in outer space", "sunset": "at sunset", "underwater": "underwater",
}  # fmt: skip
EXPRESSION_WORDS = {
    "neutral": "with a neutral face", "smiling": "smiling", "laughing": "laughing", "sad": "looking sad",
    "surprised": "looking surprised", "angry": "looking angry", "winking": "winking", "sleeping": "with closed eyes",
}  # fmt: skip
SYLLABLES = tuple(c + v for c in "bdfgklmnrstvz" for v in "aio")


def invent_name(rng: random.Random) -> str:
    """A name that means nothing, such as `mivozu`: training on some keeps unknown triggers from breaking the base."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3))))


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def garment_words(garment: str, colour: str) -> str:
    return f"overalls over {article(colour)} shirt" if garment == "overalls" else article(f"{colour} {garment}")


def identity_phrases(identity: Identity) -> dict[str, str]:
    """What a caption may say of the character, by the trait that each phrase names."""
    phrases = {"skin": f"{identity.skin} skin", "eye_colour": f"{identity.eye_colour} eyes"}
    phrases["hair"] = "a bald head" if identity.hair == "bald" else f"{identity.hair_colour} {identity.hair} hair"
    if identity.glasses != "none":
        sun = identity.glasses == "sunglasses"
        phrases["glasses"] = "sunglasses" if sun else f"{identity.glasses} {identity.glasses_colour} glasses"
    if identity.beard != "none":
        phrases["beard"] = article(identity.beard)
    if identity.mark != "none":
        phrases["mark"] = {"freckles": "freckles", "scar": "a scar"}[identity.mark]
    if identity.hat != "none":
        hat = {"cat ears": f"{identity.hat_colour} cat ears", "crown": "a crown"}
        phrases["hat"] = hat.get(identity.hat) or article(f"{identity.hat_colour} {identity.hat}")
    return phrases


def caption(
    identity: Identity, context: Context, rng: random.Random | None = None, name: str | None = None, keep: float = 1.0
) -> tuple[str, dict[str, str]]:
    """A sentence about the picture, and the attributes that it names.

    Each trait is said with probability `keep`; without `rng` all are said, in a fixed order. With `name` the character
    is called by it and its traits stay unsaid: the caption of a LoRA's training picture.
    """

    def said(probability: float = keep) -> bool:
        return rng is None or rng.random() < probability

    named: dict[str, str] = {}
    visible = visible_attributes(identity, context)

    def note(*attributes: str) -> None:
        named.update({attribute: visible[attribute] for attribute in attributes if attribute in visible})

    words = [f"{article(context.frame)} of {article(f'{name} {identity.kind}' if name else identity.kind)}"]
    note("frame", "kind")
    if name is None:
        phrases = {trait: phrase for trait, phrase in identity_phrases(identity).items() if said()}
        if "eye_colour" not in visible:
            phrases.pop("eye_colour", None)
        traits = list(phrases)
        if rng is not None:
            rng.shuffle(traits)
        if traits:
            words[0] += " with " + " and ".join(phrases[trait] for trait in traits)
        for trait in traits:
            note(*{"hair": ("hair", "hair_colour"), "hat": ("hat", "hat_colour")}.get(trait, (trait,)))
    if said(1.0 if context.expression != "neutral" and keep > 0.5 else keep):
        words.append(EXPRESSION_WORDS[context.expression])
        note("expression")
    if said(max(keep, 0.9) if rng else 1):
        words.append("wearing " + garment_words(context.garment, context.garment_colour))
        note("garment", "garment_colour")
    if said(max(keep, 0.9) if rng else 1):
        plain = context.scene == "plain"
        words.append(f"{context.scene_colour} background" if plain else SCENE_WORDS[context.scene])
        note("scene", "scene_colour")
    return ", ".join(words), named


def read_prompt(prompt: str) -> dict[str, str]:
    """The context attributes that a prompt in charworld's words asks for: the inverse of `caption`, for measuring."""
    text = f" {prompt.lower()} "
    asked: dict[str, str] = {}
    for name, phrases in (("expression", EXPRESSION_WORDS), ("scene", SCENE_WORDS)):
        asked |= {name: value for value, words in phrases.items() if words in text}  # noqa: B035 - one at most
    for frame in FRAMES:
        if f" {frame} of " in text:
            asked["frame"] = frame
    for colour in COLOURS:
        if f" {colour} background" in text:
            asked |= {"scene": "plain", "scene_colour": colour}
        for garment in GARMENTS:
            if garment_words(garment, colour).removeprefix("a ").removeprefix("an ") in text:
                asked |= {"garment": garment, "garment_colour": colour}
    return asked


def read_caption(text: str) -> dict[str, str]:
    """Every attribute that a caption of charworld's names: the inverse of `caption` without a name, for measuring.

    Glasses, beard, mark and hat are "none" where nothing is said of them.
    """
    said = read_prompt(text) | {"glasses": "none", "beard": "none", "mark": "none", "hat": "none"}
    lower = f" {text.lower().replace(',', ' ,')} "

    def note(name: str, values: Iterable[str], pattern: str, **more: Iterable[str]) -> None:
        choices = {"value": values, **more}
        found = re.search(pattern.format(**{n: "|".join(map(re.escape, v)) for n, v in choices.items()}), lower)
        if found:
            said[name] = found["value"]
            said.update({other: found[other] for other in more})

    note("kind", KINDS, r" of an? (?P<value>{value}) ")
    note("skin", SKINS, r" (?P<value>{value}) skin ")
    note("eye_colour", EYE_COLOURS, r" (?P<value>{value}) eyes ")
    note("hair", HAIRS[1:], r" (?P<hair_colour>{hair_colour}) (?P<value>{value}) hair ", hair_colour=HAIR_COLOURS)
    note("hair", HAIRS[:1], r" a (?P<value>{value}) head ")
    note("glasses", GLASSES[1:3], r" (?P<value>{value}) \w+ glasses ")
    note("glasses", GLASSES[3:], r" (?P<value>{value}) ")
    note("beard", BEARDS[1:], r" a (?P<value>{value}) ")
    note("mark", MARKS[1:], r" (?P<value>{value}) ")
    note("hat", HATS[1:], r" (?P<hat_colour>{hat_colour}) (?P<value>{value}) ", hat_colour=HAT_COLOURS)
    note("hat", ("crown",), r" a (?P<value>{value}) ")
    return said
