"""Several captioners' answers made into one caption, with what they disagree on.

Each caption's claims (`claims.py`) are answers to the same questions. An answer's `support` is the weight behind it among those who answer,
its `agreement` the same among all, where a captioner weighs its weight times the claim's confidence. CLIP (Radford et al. 2021) says how
probable it is beside its rivals. The score is the mean of support and agreement, mixed with CLIP's probability; the best answer to each
question that scores enough is kept. The caption that says most of these is the base; what it says wrong is replaced or taken out, and what
it does not say is added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from charforgex.curation.captions.base import Captioner, Context, Said, captioner_name, model_digest
from charforgex.curation.captions.claims import BY_NAME, NONE, Aspect, Claim, agrees, claims, remainder
from charforgex.curation.captions.rules import absorbed, tidy
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError

ENOUGH = 0.5  # of a score, for a claim to be kept


@dataclass(frozen=True)
class Voice:
    """One caption, of a captioner of that weight. A captioner with several captions divides its weight among them."""

    who: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Answer:
    """A value claimed for an aspect. All numbers are in [0, 1]; `clip` is None where no CLIP was asked."""

    aspect: str
    value: str
    said_by: tuple[str, ...]
    support: float
    agreement: float
    clip: float | None
    score: float
    kept: bool


@dataclass(frozen=True)
class Fused:
    """The fused caption, its quality in [0, 1] with the parts it is the mean of, and how it came about."""

    text: str
    quality: float
    parts: Mapping[str, float] = field(default_factory=dict)
    base: str = ""
    answers: tuple[Answer, ...] = ()
    contradictions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Scorer:
    """How probable texts are beside their rivals, for one picture after another, by a CLIP of `embedders.get_clip`."""

    def __init__(self, source: str):
        from charforgex.embedders import get_clip

        self.clip = get_clip(source)
        self.known: dict[str, np.ndarray] = {}

    def see(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors (N, D)."""
        return self.clip.see(pictures).numpy()

    def probabilities(self, seen_D: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Softmax over the texts of the scaled cosines, (len(texts),)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self.clip.read(new).numpy(), strict=True))
        logits = self.clip.scale * np.stack([self.known[text] for text in texts]) @ seen_D
        exponents = np.exp(logits - logits.max())
        return exponents / exponents.sum()


def fuse(voices: Sequence[Voice], scorer: Scorer | None = None, seen_D: np.ndarray | None = None, clip_share: float = 0.5) -> Fused:
    """One caption of several. Without a scorer the captions' weights decide alone. `seen_D` is the picture as `scorer.see` gives it."""
    voices = [voice for voice in voices if voice.text.strip() and voice.weight > 0]
    if not voices:
        return Fused("", 0.0)
    said = [claims(voice.text) for voice in voices]
    answers, contradictions = [], []
    for name in BY_NAME:
        found = _answers(BY_NAME[name], voices, said, scorer, seen_D, clip_share)
        answers += found
        if BY_NAME[name].contradicts and len(found) > 1:
            contradictions.append(_told(name, found))
    kept = {answer.aspect: answer for answer in reversed(answers) if answer.kept}  # the best of each aspect
    base = max(range(len(voices)), key=lambda i: (_worth(said[i], answers), voices[i].weight, -i))
    text = _corrected(voices[base].text, said[base], kept)
    text = _completed(text, kept)
    extra = _extra(voices, base, scorer, seen_D, clip_share)
    text = _with_end(text, "".join(f", {words}" for words in extra))
    parts = _parts(answers, kept, contradictions)
    quality = sum(parts.values()) / len(parts) if parts else 0.0
    return Fused(text, quality, parts, voices[base].who, tuple(answers), tuple(contradictions))


# ---------------------------------------------------------------- scores
def _answers(
    aspect: Aspect,
    voices: Sequence[Voice],
    said: Sequence[Sequence[Claim]],
    scorer: Scorer | None,
    seen_D: Any,
    clip_share: float,
) -> list[Answer]:
    """The different answers to one question, the best first."""
    spoken = [(voice, claim) for voice, listed in zip(voices, said, strict=True) for claim in listed if claim.aspect == aspect.name]
    if not spoken:
        return []
    values = dict.fromkeys(claim.value for _, claim in spoken)
    exact = [
        v for v in values if not any(other != v and other.endswith(f" {v}") for other in values)
    ]  # "glasses" is no rival of "round glasses"
    asked = sum(voice.weight * claim.confidence for voice, claim in spoken)
    panel = sum(voice.weight for voice in voices)
    voice, claim = max(spoken, key=lambda pair: (pair[1].value in exact, pair[0].weight * pair[1].confidence))
    chances = _chances(aspect, exact, claim, voice.text, scorer, seen_D)
    found = []
    for value in exact:
        behind = [(voice, claim) for voice, claim in spoken if agrees(claim.value, value)]
        weight = sum(voice.weight * claim.confidence for voice, claim in behind)
        support, agreement, clip = weight / asked, weight / panel, chances.get(value)
        votes = (support + agreement) / 2
        score = votes if clip is None else (1 - clip_share) * votes + clip_share * clip
        found.append((aspect.name, value, tuple(dict.fromkeys(voice.who for voice, _ in behind)), support, agreement, clip, score))
    found.sort(key=lambda row: -row[-1])
    best = found[0][-1]
    return [Answer(*row, kept=row[-1] >= ENOUGH and (row[-1] == best or not aspect.contradicts) and _first_of(found, row)) for row in found]


def _first_of(found: list[tuple], row: tuple) -> bool:
    """Of answers with the same score only the one said first is kept."""
    return next(other for other in found if other[-1] == row[-1]) is row


def _chances(aspect: Aspect, values: Sequence[str], claim: Claim, text: str, scorer: Scorer | None, seen_D: Any) -> dict[str, float]:
    """CLIP's probability of each value beside the other ones and the aspect's rivals, each said in the place of `claim`."""
    if scorer is None:
        return {}
    rivals = [v for v in dict.fromkeys((*values, *aspect.rivals)) if v in values or not any(agrees(v, value) for value in values)]
    found = scorer.probabilities(seen_D, [variant(aspect, value, claim, text) for value in rivals])
    return dict(zip(values, found.tolist(), strict=False))  # the values come first


def variant(aspect: Aspect, value: str, claim: Claim, text: str) -> str:
    """What CLIP is asked: the claim's sentence with another value in its place, so that nothing else differs."""
    begin = max(text.rfind(mark, 0, claim.span[0]) for mark in (". ", "! ", "; ")) + 2 if claim.span[0] else 0
    begin = begin if begin > 1 else 0
    end = min((place for place in (text.find(mark, claim.span[1]) for mark in (". ", "! ", "; ")) if place >= 0), default=len(text))
    before, after = text[begin : claim.span[0]], text[claim.span[1] : end]
    if NONE in aspect.rivals:  # with or without
        bare = tidy(before + after) if claim.value == NONE else absorbed(text[begin:end], (WORDS[aspect.name],))
        return bare if value == NONE else _behind_the_person(bare, aspect.phrase.format(value))
    return tidy(f"{before}{value}{after}")


def _told(name: str, found: Sequence[Answer]) -> str:
    """ "hair_colour: black (blip2, florence; 0.62) against brown (chat; 0.21)"."""
    said = [f"{answer.value} ({', '.join(answer.said_by)}; {answer.score:.2f})" for answer in found]
    return f"{name}: {said[0]} against {' and '.join(said[1:])}"


def _worth(said: Sequence[Claim], answers: Sequence[Answer]) -> float:
    """How much a caption says that is kept, less what it says that is not."""
    scores = {(answer.aspect, answer.value): (answer.score, answer.kept) for answer in answers}
    worth = 0.0
    for claim in said:
        matching = [row for (aspect, value), row in scores.items() if aspect == claim.aspect and agrees(claim.value, value)]
        score, kept = max(matching, key=lambda row: row[0])
        worth += score if kept else score - 1
    return worth


def _parts(answers: Sequence[Answer], kept: Mapping[str, Answer], contradictions: Sequence[str]) -> dict[str, float]:
    """agreement: mean share of the panel behind what is kept; clip: its mean probability; consistency: aspects not contradicted."""
    if not answers:
        return {}
    asked = len({answer.aspect for answer in answers})
    parts = {
        "agreement": sum(answer.agreement for answer in kept.values()) / max(len(kept), 1),
        "consistency": 1 - len(contradictions) / asked,
    }
    seen = [answer.clip for answer in kept.values() if answer.clip is not None]
    return parts | ({"clip": sum(seen) / len(seen)} if seen else {})


# ---------------------------------------------------------------- the text
WORDS = {
    "eyes": "eyes",
    "skin": "skin",
    "glasses": "glasses",
    "beard": "beard",
    "hat": "hat",
    "marks": "marks",
}  # aspect -> kind of the rules


def _corrected(text: str, said: Sequence[Claim], kept: Mapping[str, Answer]) -> str:
    """The base caption, what it says wrong replaced by what is right; if nothing is known to be right, it is unsaid."""
    unsaid: list[str] = []
    for claim in sorted(said, key=lambda claim: -claim.span[0]):
        best = kept.get(claim.aspect)
        start, end = claim.span
        if claim.value == NONE and text[start:end].lower().startswith(("no ", "not ", "with", "she ", "he ")):
            text = _cut(text, start, end)  # what is not there is better unsaid: to an encoder it is there
            continue
        if best is not None and agrees(claim.value, best.value):
            continue
        if best is not None and best.value != NONE and claim.value != NONE and claim.aspect != "marks":
            text = text[:start] + _as_word(claim, best.value, text[end:]) + text[end:]
        elif claim.aspect in WORDS:
            unsaid.append(WORDS[claim.aspect])
        else:
            text = _cut(text, start, end)
    if unsaid:
        text = absorbed(text, tuple(unsaid))
    return tidy(_articles(text))


def _articles(text: str) -> str:
    """ "an" before vowels and "a" before the rest, but for words whose letters mislead ("hour", "uniform")."""
    return re.sub(
        r"\b([Aa])n? (?!hour|honest|uni|us[ae]|one\b|eu)(?=(\w))",
        lambda match: f"{match[1]}{'n' if match[2].lower() in 'aeiou' else ''} ",
        text,
    )


def _as_word(claim: Claim, value: str, after: str) -> str:
    """The right value in the place of the wrong one; "glasses" that follow are not said twice."""
    if claim.aspect == "glasses" and re.match(r"\s+(?:\w+\s+)?glasses", after):
        return value.removesuffix(" glasses")
    return value


def _cut(text: str, start: int, end: int) -> str:
    """Without the words, and without the clause if they were most of it."""
    left = max(text.rfind(mark, 0, start) for mark in ",.;") + 1
    right = min((place for place in (text.find(mark, end) for mark in ",.;") if place >= 0), default=len(text))
    clause = text[left:right].split()
    if left > 0 and len(clause) <= 2 + len(text[start:end].split()):
        return text[: max(left - 1, 0)] + text[right:]
    return text[:start] + text[end:]


def _completed(text: str, kept: Mapping[str, Answer]) -> str:
    """With what is kept and not said yet: traits behind the person, the rest at the end."""
    have = {claim.aspect for claim in claims(text)}
    missing = {name: answer.value for name, answer in kept.items() if name not in have and answer.value != NONE}
    hair = []
    if "hair" not in text:
        hair = [missing.pop(name) for name in ("hair_length", "hair_colour", "hair_style") if name in missing]
    if "hair" in text:
        for name in ("hair_style", "hair_colour", "hair_length"):
            if (value := missing.pop(name, None)) and value != "bald":
                text = re.sub(r"\bhair\b", f"{value} hair", text, count=1)
    traits = ["a bald head" if "bald" in hair else f"{' '.join(hair)} hair"] if hair else []
    traits += [
        BY_NAME[name].phrase.format(missing[name]) for name in ("eyes", "skin", "glasses", "beard", "hat", "marks") if name in missing
    ]
    if traits:
        text = _behind_the_person(text, " and ".join(traits))
    if "garment_colour" in missing and "garment" in have:
        start = next(claim.span[0] for claim in claims(text) if claim.aspect == "garment")
        text = _articles(f"{text[:start]}{missing['garment_colour']} {text[start:]}")
    end = ""
    if "expression" in missing:
        end += f", {missing['expression']}"
    if "garment" in missing:
        colour = f"{missing['garment_colour']} " if "garment_colour" in missing else ""
        garment = f"{colour}{missing['garment']}"
        end += f", wearing {'an' if garment[0] in 'aeiou' else 'a'} {garment}"
    if "place" in missing:
        end += f", {missing['place']}"
    return _with_end(text, end)


def _behind_the_person(text: str, traits: str) -> str:
    person = next((claim for claim in claims(text) if claim.aspect == "kind"), None)
    if person is None:
        return _with_end(text, f", with {traits}")
    before, after = text[: person.span[1]], text[person.span[1] :]
    if after.startswith(" with "):
        return f"{before} with {traits} and {after[6:]}"
    return f"{before} with {traits}{after}"


def _with_end(text: str, end: str) -> str:
    """The text with `end` before its full stop."""
    stop = text[-1:] if text[-1:] in ".!?" else ""
    return text.removesuffix(stop) + end + stop if end else text


def _extra(voices: Sequence[Voice], base: int, scorer: Scorer | None, seen_D: Any, clip_share: float) -> list[str]:
    """What others say besides the aspects, and the base does not, if it scores enough; the most certain first, three at most."""
    mine = {word for tag in remainder(voices[base].text) for word in tag.split()}
    panel = sum(voice.weight for voice in voices)
    scored: dict[str, float] = {}
    for voice in voices:
        for tag in remainder(voice.text) if voice is not voices[base] else ():
            words = set(tag.split())
            if words & mine:
                continue
            behind = sum(v.weight for v in voices if any(len(words & set(t.split())) >= len(words) / 2 for t in remainder(v.text)))
            votes = behind / panel
            if scorer is not None:
                clip = float(scorer.probabilities(seen_D, ["a portrait of a person", f"a portrait of a person, {tag}"])[1])
                votes = (1 - clip_share) * votes + clip_share * clip
            if votes >= ENOUGH and not any(words & set(other.split()) for other in scored):
                scored[tag] = votes
    return sorted(scored, key=lambda tag: -scored[tag])[:3]


# ---------------------------------------------------------------- as a captioner
class Ensemble:
    """A captioner of captioners. About each caption it tells what `Fused` knows but the answers: quality and contradictions above all."""

    def __init__(
        self,
        captioners: Sequence[Captioner],
        weights: Sequence[float] | None = None,
        scorer: str | None = None,
        clip_share: float = 0.5,
    ):
        self.captioners = list(captioners)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.captioners)
        if len(self.weights) != len(self.captioners) or not self.captioners or min(self.weights) < 0 or max(self.weights) <= 0:
            raise ConfigError(
                f"curation.captions.weights={self.weights} must be {len(self.captioners)} numbers from 0, one of them above it."
            )
        self.source, self.clip_share, self.scorer = scorer, clip_share, None
        members = [[captioner.name, weight] for captioner, weight in zip(self.captioners, self.weights, strict=True)]
        shapes = [members, clip_share, model_digest(scorer) if scorer else None]
        self.name = captioner_name("ensemble", "+".join(captioner.name.partition(":")[0] for captioner in self.captioners), shapes)
        self.reads = frozenset().union(*(captioner.reads for captioner in self.captioners))

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        said = [captioner.caption(pictures, contexts) for captioner in self.captioners]
        if self.source and self.scorer is None:
            self.scorer = Scorer(self.source)
        seen_ND = self.scorer.see(pictures) if self.scorer else [None] * len(pictures)
        texts = []
        for number in range(len(contexts)):
            voices = []
            for captioner, weight, answers in zip(self.captioners, self.weights, said, strict=True):
                lines = [line for line in answers[number].splitlines() if line.strip()]
                voices += [Voice(captioner.name.partition(":")[0], line, weight / len(lines)) for line in lines]
            fused = fuse(voices, self.scorer, seen_ND[number], self.clip_share)
            about = {"quality": fused.quality, "parts": dict(fused.parts), "base": fused.base, "contradictions": fused.contradictions}
            texts.append(Said(fused.text, about))
        return texts


def build(settings: CaptionSettings, members: Sequence[Captioner]) -> Ensemble:
    """The ensemble of `settings.backends`; a backend without a weight of its own weighs 1."""
    return Ensemble(members, [settings.weights.get(backend, 1.0) for backend in settings.backends], settings.scorer, settings.clip_share)
