"""Recommendations: the numbers they rest on, their order, and silence where nothing is wrong."""

import numpy as np
import pytest

from charforgex.curation.advice import recommend
from charforgex.curation.analysis import AnalysisSettings, Limit, analyse
from charforgex.curation.facts import ANSWERS, UNKNOWN

EVEN = {question: [options[number % len(options)] for number in range(30)] for question, options in ANSWERS.items()}


def advise(count=30, scores=0.9, classes=None, uncaptioned=0, features=None, settings=None, **answers):
    told = EVEN | answers
    facts = [{question: told[question][number] for question in ANSWERS} for number in range(count)]
    settings = settings or AnalysisSettings()
    found = analyse(facts, features, {"sharpness": np.full(count, scores)}, {}, {"sharpness": Limit(0.4, "at least")}, settings)
    return recommend(found, classes or {"kept": count}, uncaptioned, settings)


def test_nothing_is_wrong():
    assert advise(features=np.eye(30)) == []


def test_close_ups():
    (advice,) = advise(framing=["close-up"] * 24 + ["portrait"] * 4 + ["upper body"] * 2)
    assert advice["text"] == "24 of 30 pictures are close-ups: add full-body ones, upper-body ones and portraits."
    assert advice["numbers"] == {"counts": {"close-up": 24, "portrait": 4, "upper body": 2, "full": 0}, "known": 30}
    assert advice["topic"] == "framing" and advice["weight"] == pytest.approx(0.72)


def test_plain_light_is_no_fault():
    assert advise(lighting=["even"] * 30, pitch=["level"] * 30) == []
    assert advise(lighting=["dark"] * 30)[0]["text"].startswith("30 of 30 pictures are lit alike, dark: add “")


def test_unknown_answers_are_no_evidence():
    assert advise(framing=["close-up"] * 7 + [UNKNOWN] * 23) == []


def test_weightiest_first():
    found = advise(
        yaw=["frontal"] * 30, background=["plain"] * 27 + ["city"] * 3, scores=0.41, uncaptioned=3,
        classes={"kept": 30, "blurred": 20, "duplicate": 20, "sidecar": 500}, features=np.ones((30, 4)),
    )  # fmt: skip
    assert [advice["topic"] for advice in found] == ["variety", "background", "yaw", "quality", "set aside", "captions"]
    assert [advice["weight"] for advice in found] == sorted((advice["weight"] for advice in found), reverse=True)
    texts = " ".join(advice["text"] for advice in found)
    assert "27 of 30 pictures have the background “plain”: add “indoors”, “nature” and “water”." in texts
    assert "30 pictures amount to 1.0 different ones" in texts
    assert "30 of 30 kept pictures are close to the limit of sharpness (at least 0.4)" in texts
    assert "20 of 70 files were set aside (out of focus, shaken, or enlarged): give sharper ones" in texts
    assert "3 of 30 pictures have no" in texts


def test_a_wish_counts_and_not_the_default():
    lopsided = ["close-up"] * 24 + ["full"] * 6
    wish = AnalysisSettings(wished={"framing": {"close-up": 4, "full": 1}})
    assert advise(framing=lopsided, settings=wish) == []
    (advice,) = advise(framing=lopsided, settings=AnalysisSettings(wished={"framing": {"close-up": 1, "full": 1}}))
    assert advice["text"] == "The framing is not as wished: close-up 24 instead of 15, full 6 instead of 15. Add full-body ones."
    assert advice["numbers"]["p"] == pytest.approx(0.00101, abs=1e-5)  # chi2 = 10.8, one degree of freedom


def test_too_few_and_none():
    (advice,) = advise(count=6)
    assert advice["text"].startswith("6 pictures are kept: a character wants 15 or more, so add 9.")
    assert "No picture was kept" in advise(count=0)[0]["text"]
