"""What to do about a dataset, in sentences that carry the numbers they rest on; nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from charforgex.curation.analysis import AnalysisSettings, p_value
from charforgex.curation.items import CLASSES

KNOWN = 8  # answers below which no share is told
SIGNIFICANT = 0.01
OFTEN = 0.25  # share of the files set aside for one reason that is worth a word
ALIKE = 1.5  # a Vendi score below which a set is nearly one picture

# Question -> how much a one-sided answer hurts, 0 to 1. What is not here is the character's own (hair) or harmless (colour).
WEIGHTS = {"framing": 0.9, "background": 0.8, "expression": 0.75, "yaw": 0.7, "garment": 0.65, "lighting": 0.5, "pitch": 0.2}
PLAIN = {("lighting", "even"), ("pitch", "level")}  # what may be so in all pictures
SHOW = {
    "framing": {
        "close-up": "are close-ups", "portrait": "are portraits", "upper body": "show the upper body", "full": "show the whole body",
    },
    "yaw": {
        "far left": "show the left profile", "left": "look left", "frontal": "look straight ahead", "right": "look right",
        "far right": "show the right profile",
    },
    "pitch": {"down": "look down", "level": "are level", "up": "look up"},
}  # fmt: skip
HAVE = {
    "background": "have the background “{}”", "expression": "have the expression “{}”", "garment": "show the garment “{}”",
    "lighting": "are lit alike, {}",
}  # fmt: skip
ADD = {
    "framing": {"close-up": "close-ups", "portrait": "portraits", "upper body": "upper-body ones", "full": "full-body ones"},
    "yaw": {
        "far left": "left profiles", "left": "ones looking left", "frontal": "frontal ones", "right": "ones looking right",
        "far right": "right profiles",
    },
}  # fmt: skip
REMEDIES = {
    "blurred": "give sharper ones, or lower curation.quality.min_sharpness if they look sharp to you",
    "exposure": "give better lit ones, or loosen curation.quality.max_dark and its like",
    "noisy": "give cleaner ones, or raise curation.quality.max_noise",
    "compressed": "give the originals instead of copies that were sent around",
    "marked": "give ones without watermark, text or frame",
    "too_small": "give the originals, or lower curation.quality.min_side",
    "no_face": "give ones that show the face, or another detector with curation.faces.detector",
    "several_people": "give ones with the character alone",
    "wrong_person": "look whether it is the right folder, and set curation.people.references if it is",
}


def recommend(
    analysis: Mapping[str, Any], classes: Mapping[str, int], uncaptioned: int, settings: AnalysisSettings
) -> list[dict[str, Any]]:
    """Recommendations, weightiest first: `text`, `weight` in (0, 1], `topic`, and the `numbers` behind them.

    `analysis` is what `analysis.analyse` gives, `classes` the number of files of each class, `uncaptioned` that of kept pictures without
    a caption.
    """
    advice = [
        *_number(analysis, settings),
        *_composition(analysis, settings),
        *_variety(analysis),
        *_near_limits(analysis["quality"]),
        *_set_aside(classes),
    ]
    if uncaptioned:
        count = analysis["num_pictures"]
        text = f"{uncaptioned} of {count} pictures have no caption: name a captioner with curation.captions.backend, or write them."
        advice.append(_piece(text, 0.9 * uncaptioned / count, "captions", uncaptioned=uncaptioned, pictures=count))
    return sorted(advice, key=lambda piece: -piece["weight"])


def _piece(text: str, weight: float, topic: str, **numbers: Any) -> dict[str, Any]:
    return {"text": text, "weight": round(weight, 4), "topic": topic, "numbers": numbers}


def _number(analysis: Mapping[str, Any], settings: AnalysisSettings) -> list[dict[str, Any]]:
    count, size = analysis["num_pictures"], analysis["size"]
    if not count:
        return [_piece("No picture was kept: look at why each was set aside, below.", 1.0, "number", pictures=0)]
    if count < settings.least:
        text = f"{_pictures(count)} kept: a character wants {settings.least} or more, so add {settings.least - count}."
        return [_piece(text, 1 - 0.5 * count / settings.least, "number", pictures=count, least=settings.least)]
    if size and size["enough"] and size["n_interval"][0] > size["have"]:
        low, high = size["n_interval"]
        text = f"About {size['n']} such pictures ({low} to {high}) would show {size['share']:.0%} of the variety; {size['have']} are kept."
        return [_piece(text, 0.4, "number", pictures=size["have"], n=size["n"], interval=[low, high])]
    return []


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count} pictures are"


def _composition(analysis: Mapping[str, Any], settings: AnalysisSettings) -> list[dict[str, Any]]:
    """What differs from the wish where there is one; elsewhere what nearly all pictures share."""
    advice = []
    for question, covered in analysis["diversity"]["coverage"].items():
        counts = covered["counts"]
        known = sum(counts.values())
        if question in settings.wished:
            advice += _unlike_the_wish(question, counts, analysis["bias"].get(question))
        elif question in WEIGHTS and known >= KNOWN:
            most = max(counts, key=lambda answer: counts[answer])
            if counts[most] >= settings.dominant * known and (question, most) not in PLAIN:
                text = f"{counts[most]} of {known} pictures {_shows(question, most)}: add {_missing(question, counts, most)}."
                advice.append(_piece(text, WEIGHTS[question] * counts[most] / known, question, counts=dict(counts), known=known))
    return advice


def _shows(question: str, answer: str) -> str:
    return SHOW.get(question, {}).get(answer) or HAVE[question].format(answer)


def _missing(question: str, counts: Mapping[str, int], most: str) -> str:
    """The rarest answers, three at most."""
    rare = sorted((answer for answer in counts if answer != most), key=lambda answer: counts[answer])[:3]
    words = ADD.get(question, {})
    found = [words[answer] for answer in rare] if words else [f"“{answer}”" for answer in rare]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def _unlike_the_wish(question: str, counts: Mapping[str, int], tested: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if tested is None or (chance := p_value(tested)) >= SIGNIFICANT:
        return []
    expected = tested["expected"]
    short = max(expected, key=lambda answer: expected[answer] - counts[answer])
    told = ", ".join(f"{answer} {counts[answer]} instead of {expected[answer]:.0f}" for answer in expected)
    text = f"The {question} is not as wished: {told}. Add {_one(question, short)}."
    numbers = {"counts": dict(counts), "expected": dict(expected), "p": chance, "cramers_v": tested["cramers_v"]}
    return [_piece(text, min(1.0, 0.5 + 0.5 * tested["cramers_v"]), question, **numbers)]


def _one(question: str, answer: str) -> str:
    return ADD.get(question, {}).get(answer) or f"pictures of {question} “{answer}”"


def _variety(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    score = analysis["diversity"].get("vendi")
    count = analysis["size"]["have"] if analysis["size"] else 0
    if score is None or count < KNOWN or score >= ALIKE:
        return []
    text = f"{count} pictures amount to {score:.1f} different ones: they are nearly all alike; add other places, poses and clothes."
    return [_piece(text, 0.85, "variety", pictures=count, vendi=score)]


def _near_limits(quality: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    advice = []
    for name, score in quality.items():
        near, count = score.get("near", 0), score["count"]
        if count >= KNOWN and near >= 0.3 * count:
            text = f"{near} of {count} kept pictures are close to the limit of {name} ({score['side']} {score['limit']:g}): look at them."
            advice.append(_piece(text, 0.4 * near / count, "quality", score=name, near=near, kept=count, limit=score["limit"]))
    return advice


def _set_aside(classes: Mapping[str, int]) -> list[dict[str, Any]]:
    looked_at = sum(count for kind, count in classes.items() if kind not in ("sidecar", "container", "unsupported"))
    advice = []
    for kind, remedy in REMEDIES.items():
        count = classes.get(kind, 0)
        if count >= 3 and count >= OFTEN * looked_at:
            text = f"{count} of {looked_at} files were set aside ({CLASSES[kind]}): {remedy}."
            advice.append(_piece(text, 0.5 * count / looked_at, "set aside", kind=kind, count=count, files=looked_at))
    return advice
