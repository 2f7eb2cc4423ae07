"""What is known of a kept picture when the dataset is looked at as a whole: a few questions, each with one of few answers or `UNKNOWN`.

From faces: framing, yaw, pitch. From pixels: lighting, colour. From captions: expression, hair, garment, background, in ordinary English
words. From any CLIP: `zero_shot` (Radford et al. 2021), for what no caption says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from charforgex.curation.items import Face, Finding

if TYPE_CHECKING:
    from charforgex.embedders import Clip

UNKNOWN = "unknown"
# Least height of the face, brow to chin, in picture heights. A grown-up is about eleven such faces tall.
FRAMINGS = {"close-up": 0.4, "portrait": 0.2, "upper body": 0.1, "full": 0.0}
YAWS = {"far left": -90.0, "left": -50.0, "frontal": -18.0, "right": 18.0, "far right": 50.0}  # degrees from which on
PITCHES = {"down": -90.0, "level": -15.0, "up": 15.0}

PAINTS = "white|black|gr[ea]y|red|orange|yellow|green|blue|purple|pink|brown"

# Question -> answer -> what says so, as whole words; of several answers the one said first counts.
WORDS: dict[str, dict[str, str]] = {
    "expression": {
        "neutral": r"neutral (?:face|expression|look)|expressionless|serious|calm|stoic",
        "smiling": r"smil(?:e|es|ing)|grin(?:s|ning)?|happy|cheerful",
        "laughing": r"laugh(?:s|ing)?",
        "sad": r"sad|crying|frown(?:s|ing)?|tear(?:y|ful)|melancholic",
        "angry": r"angry|furious|glaring|scowl(?:s|ing)?",
        "surprised": r"surprised|shocked|astonished|amazed",
        "winking": r"wink(?:s|ing)?|one eye closed",
        "eyes closed": r"(?:with )?(?:her |his |their )?(?:closed eyes|eyes (?:are )?closed)|asleep|sleeping",
    },
    "hair": {
        "bald": r"bald(?: head)?|shaved head|no hair",
        "tied": r"ponytails?|pigtails?|twintails?|braid(?:s|ed)?|bun|updo",
        "short": r"(?:short|spiky|bob|cropped|mohawk|buzz)(?:[ -]cut)?(?: \w+){0,2} hair|bob cut|pixie cut|mohawk",
        "curly": r"(?:curly|wavy|frizzy|afro)(?: \w+){0,2} hair|curls|afro",
        "long": r"(?:very )?long(?: \w+){0,3} hair|flowing hair",
    },
    "garment": {
        "t-shirt": r"t-?shirts?|tee|tank top",
        "hoodie": r"hoodies?|sweatshirts?",
        "suit": r"suits?|tuxedo|blazer",
        "dress": r"(?:sun)?dress(?:es)?|gown|kimono",
        "coat": r"coats?|jackets?|parka|cloak|cape",
        "sweater": r"sweaters?|cardigans?|pullovers?|jumper",
        "overalls": r"overalls?|dungarees|apron",
        "uniform": r"uniforms?|armou?r",
        "swimwear": r"swimsuits?|bikinis?|swimwear|swimming trunks",
        "shirt": r"(?:\w+ )?shirts?|blouses?|tops?(?! hat)",
    },
    "background": {
        "plain": rf"(?:plain|simple|solid|blank|studio|{PAINTS}) (?:back(?:ground|drop)|wall)",
        "indoors": r"indoors?|room|kitchen|bedroom|office|caf[eé]|restaurant|library|classroom|inside|bar",
        "city": r"city|street|urban|alley|buildings?|skyline|town|market",
        "nature": r"forest|woods|trees|park|garden|field|meadow|mountains?|hills?|snow(?:y)?|desert|outdoors|grass",
        "water": r"beach|sea|ocean|lake|river|pool|underwater|harbou?r",
        "sky": r"sky|(?:outer )?space|stars|sunset|sunrise|clouds",
    },
}  # fmt: skip
PATTERNS = {question: {answer: re.compile(rf"\b(?:{words})\b") for answer, words in answers.items()} for question, answers in WORDS.items()}
LIGHTINGS = ("dark", "even", "bright", "contrasty", "from one side")
COLOURS = ("grey", "warm", "neutral", "cool", "vivid")

# Question -> all answers it can have, in the order in which people would list them.
ANSWERS: dict[str, tuple[str, ...]] = {
    "framing": tuple(FRAMINGS), "yaw": tuple(YAWS), "pitch": tuple(PITCHES),
    **{question: tuple(options) for question, options in WORDS.items()},
    "lighting": LIGHTINGS, "colour": COLOURS,
}  # fmt: skip

# Question -> answer -> ends of sentences that say so. Asked for what captions leave open.
Labels = Mapping[str, Mapping[str, Sequence[str]]]
LABELS: Labels = {
    "expression": {
        "neutral": ("with a neutral face",), "smiling": ("smiling",), "laughing": ("laughing",), "sad": ("looking sad",),
        "angry": ("looking angry",), "surprised": ("looking surprised",), "winking": ("winking",), "eyes closed": ("with closed eyes",),
    },
    "background": {
        "plain": ("white background", "black background", "red background", "green background", "blue background", "yellow background"),
        "indoors": ("in a room",), "city": ("in a city at night", "in a street"),
        "nature": ("in a forest", "in the snowy mountains", "in the desert"), "water": ("at the beach", "underwater"),
        "sky": ("in outer space", "at sunset"),
    },
}  # fmt: skip
TEMPLATES = ("a photo of a person, {}", "a portrait of a woman, {}", "a portrait of a man, {}", "a drawing of a character, {}")


class Guess(NamedTuple):
    """What a CLIP takes a picture for. `margin`: its probability less the next answer's, among the answers offered, 0 to 1."""

    answer: str
    margin: float


def read(finding: Finding, caption: str = "", crop: Sequence[float] | None = None, thumbnail: np.ndarray | None = None) -> dict[str, str]:
    """Every question of `ANSWERS` answered for one picture.

    `crop` is what is trained on (left, top, right, bottom in pixels; None: all of it), `thumbnail` any small copy of it, uint8 (H, W, 3).
    Of several faces the largest within the crop counts.
    """
    face, height = largest_face(finding, crop)
    found = {
        "framing": framing(face.height / height) if face else UNKNOWN,
        "yaw": _bin(face.yaw, YAWS) if face else UNKNOWN,
        "pitch": _bin(face.pitch, PITCHES) if face else UNKNOWN,
        **said(caption),
        "lighting": UNKNOWN if thumbnail is None else lighting(thumbnail),
        "colour": UNKNOWN if thumbnail is None else colour(thumbnail),
    }
    assert found.keys() == ANSWERS.keys()
    return found


def largest_face(finding: Finding, crop: Sequence[float] | None = None) -> tuple[Face | None, float]:
    """The tallest face whose middle lies in the crop, and the crop's height in pixels."""
    left, top, right, bottom = crop or (0, 0, finding.width, finding.height)

    def inside(face: Face) -> bool:
        x, y = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
        return left <= x <= right and top <= y <= bottom

    return max(filter(inside, finding.faces), key=lambda face: face.height, default=None), bottom - top


def framing(share: float) -> str:
    """`share` is the face's height, brow to chin, in picture heights."""
    return next(name for name, least in FRAMINGS.items() if share >= least)


def _bin(angle: float | None, bins: Mapping[str, float]) -> str:
    return UNKNOWN if angle is None else [name for name, least in bins.items() if angle >= least or name == next(iter(bins))][-1]


def said(caption: str) -> dict[str, str]:
    """What the words of a caption answer."""
    text = caption.lower()
    found = {}
    for question, patterns in PATTERNS.items():
        hits = [(match.start(), -len(match[0]), answer) for answer, pattern in patterns.items() if (match := pattern.search(text))]
        found[question] = min(hits)[2] if hits else UNKNOWN
    return found


def lighting(thumbnail: np.ndarray) -> str:
    """From the brightness (Rec. 709 luma, 0 to 1) of the middle 80 %: of one half against the other, its mean, its spread."""
    luma = _middle(thumbnail) @ np.array([0.2126, 0.7152, 0.0722])
    mean, spread, half = luma.mean(), luma.std(), luma.shape[1] // 2
    if abs(luma[:, :half].mean() - luma[:, -half:].mean()) > 0.5 * mean and spread > 0.1:
        return "from one side"
    if mean < 0.25:
        return "dark"
    if mean > 0.75:
        return "bright"
    return "contrasty" if spread > 0.28 else "even"


def colour(thumbnail: np.ndarray) -> str:
    """From the mean of saturation (the largest channel less the smallest, 0 to 1) and of red less blue."""
    pixels = _middle(thumbnail)
    saturation, warmth = np.ptp(pixels, axis=-1).mean(), (pixels[..., 0] - pixels[..., 2]).mean()
    if saturation < 0.06:
        return "grey"
    if abs(warmth) > 0.12:
        return "warm" if warmth > 0 else "cool"
    return "vivid" if saturation > 0.35 else "neutral"


def _middle(thumbnail: np.ndarray) -> np.ndarray:
    height, width = thumbnail.shape[:2]
    return thumbnail[height // 10 : height - height // 10, width // 10 : width - width // 10].astype(np.float32) / 255


# ---- zero-shot ----


def label_vectors(
    clip: Clip, labels: Labels = LABELS, templates: Sequence[str] = TEMPLATES
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Question -> the answer of each phrase, and the phrases' unit vectors (K, D): means over templates (Radford et al. 2021, 3.1.4)."""
    vectors = {}
    for question, options in labels.items():
        phrases = [(answer, phrase) for answer, said in options.items() for phrase in said]
        texts = [template.format(phrase).rstrip(", ") for _, phrase in phrases for template in templates]
        read = clip.read(texts).numpy().reshape(len(phrases), len(templates), -1).mean(axis=1)
        vectors[question] = (tuple(answer for answer, _ in phrases), read / np.linalg.norm(read, axis=1, keepdims=True))
    return vectors


def zero_shot(features_ND: np.ndarray, vectors: Mapping[str, tuple[tuple[str, ...], np.ndarray]], scale: float) -> list[dict[str, Guess]]:
    """For each picture and question the likeliest answer; phrases of one answer add up. `features_ND` are unit vectors of the CLIP that
    read the phrases, `scale` its logit scale."""
    guesses: list[dict[str, Guess]] = [{} for _ in features_ND]
    for question, (phrases, vectors_KD) in vectors.items():
        logits = scale * features_ND @ vectors_KD.T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        options = tuple(dict.fromkeys(phrases))
        summed = np.stack([shares[:, [phrase == answer for phrase in phrases]].sum(axis=1) for answer in options], axis=1)
        ranked = np.sort(summed, axis=1)
        for guess, best, row in zip(guesses, summed.argmax(axis=1), ranked, strict=True):
            guess[question] = Guess(options[best], float(row[-1] - row[-2]))
    return guesses


def complete(found: Mapping[str, str], guesses: Mapping[str, Guess], margin: float) -> dict[str, str]:
    """`found`, and what the CLIP adds by at least `margin` where that says nothing."""
    sure = {question: guess.answer if guess.margin >= margin else UNKNOWN for question, guess in guesses.items()}
    return sure | {question: answer for question, answer in found.items() if answer != UNKNOWN or question not in sure}


def answers(labels: Labels = LABELS) -> dict[str, tuple[str, ...]]:
    """All questions with all answers they can have, those that only a CLIP is asked included."""
    return ANSWERS | {question: tuple(found) for question, found in labels.items() if question not in ANSWERS}
