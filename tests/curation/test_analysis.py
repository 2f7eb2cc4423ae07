"""Worked examples of the Vendi score, coverage and the tests of bias; and limits read from settings."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from charforgex.curation.analysis import (
    AnalysisSettings,
    Limit,
    analyse,
    bias,
    coverage,
    distribution,
    limits,
    p_value,
    vendi,
)
from charforgex.curation.facts import ANSWERS, UNKNOWN
from charforgex.errors import ConfigError

RNG = np.random.default_rng(0)


def vendi_of_kernel(kernel_NN, weights_N=None):
    """The definition, by the eigenvalues of all similarities."""
    weights = np.ones(len(kernel_NN)) if weights_N is None else weights_N
    root = np.sqrt(weights / weights.sum())
    values = np.linalg.eigvalsh(kernel_NN * root[:, None] * root)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def test_vendi_of_equals_and_of_orthogonals():
    assert vendi(np.ones((7, 5))) == pytest.approx(1)
    assert vendi(np.eye(6) * 3) == pytest.approx(6)  # lengths do not count
    assert vendi(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3)
    assert vendi(np.eye(4)[:, :, None].repeat(1, axis=2)[..., 0], np.array([1, 1, 0, 0])) == pytest.approx(2)


def test_vendi_of_two():
    """Two pictures of cosine s: eigenvalues (1 + s) / 2 and (1 - s) / 2."""
    s = 0.6
    expected = math.exp(-sum(x * math.log(x) for x in (0.8, 0.2)))
    assert vendi(np.array([[1, 0], [s, math.sqrt(1 - s * s)]])) == pytest.approx(expected)


def test_vendi_of_weights_is_that_of_copies():
    features, copies = RNG.normal(size=(5, 3)), np.array([1, 4, 2, 1, 3])
    repeated = vendi(np.repeat(features, copies, axis=0))
    assert vendi(features, copies) == pytest.approx(repeated)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert vendi_of_kernel(unit @ unit.T, copies) == pytest.approx(repeated)


def test_both_ways_to_the_eigenvalues_agree():
    for shape in ((6, 20), (20, 6), (1500, 3)):
        features = RNG.normal(size=shape)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        assert vendi(features) == pytest.approx(vendi_of_kernel(unit @ unit.T))


def test_coverage():
    found = coverage(["a", "a", "b", "b", UNKNOWN], ("a", "b", "c", "d"))
    assert found["counts"] == {"a": 2, "b": 2, "c": 0, "d": 0} and found["unknown"] == 1
    assert found["evenness"] == pytest.approx(0.5) and found["empty"] == ["c", "d"]  # ln 2 / ln 4
    assert coverage(["a"] * 3, ("a", "b"))["evenness"] == 0 and coverage([], ("a", "b"))["evenness"] == 0


def test_chi_square_of_large_counts():
    found = bias({"a": 50, "b": 30, "c": 20})
    assert found["statistic"] == pytest.approx(14) and found["freedom"] == 2 and found["p"] == pytest.approx(math.exp(-7))
    assert found["cramers_v"] == pytest.approx(math.sqrt(14 / 200)) and "alternative" not in found
    assert bias({"a": 60, "b": 40}, {"a": 3, "b": 2})["statistic"] == pytest.approx(0)
    assert bias({"a": 9, "b": 0, "c": 0})["cramers_v"] == pytest.approx(1)


def test_small_counts_get_the_exact_p():
    found = bias({"a": 5, "b": 0, "c": 1})
    assert found["p"] is None and "chi-square needs 5" in found["warning"]
    # at least as extreme as (5, 0, 1): six orders of it, (6, 0, 0) in three; 6 * 6 + 3 of 3 ** 6 sequences
    assert found["alternative"] == {"method": "exact", "p": pytest.approx(39 / 729)}
    assert p_value(found) == pytest.approx(39 / 729)
    assert bias({"a": 4, "b": 0})["alternative"]["p"] == pytest.approx(2 / 16)


def test_many_outcomes_get_drawn_ones():
    counts = {str(number): number % 3 + 1 for number in range(14)}
    found = bias(counts)["alternative"]
    assert found["method"] == "monte carlo" and found == bias(counts)["alternative"]
    assert 0.9 < found["p"] <= 1
    assert bias(counts | {"0": 40})["alternative"]["p"] == pytest.approx(1 / 10_000)


def test_distribution():
    found = distribution([0.5, 0.42, 0.9, 0.37], [0.1, 0.2], Limit(0.4, "at least"), near=0.1)
    assert found["near"] == 2 and found["count"] == 4 and found["percentiles"]["50"] == pytest.approx(0.46)
    assert sum(found["kept"]) == 4 and sum(found["rest"]) == 2 and len(found["edges"]) == 25
    assert distribution([]) == {"count": 0}
    assert sum(distribution([1.0, 1.0])["kept"]) == 2


def test_limits_are_read_from_settings():
    @dataclass(frozen=True)
    class Settings:
        min_sharpness: float = 0.4
        max_noise: float | None = None
        max_text: float = 0.02
        assessor: str = "x"

    assert limits(Settings()) == {"sharpness": Limit(0.4, "at least"), "text": Limit(0.02, "at most")}


def test_all_of_it_is_json():
    facts = [dict.fromkeys(ANSWERS, UNKNOWN) | {"framing": "full" if number % 2 else "portrait"} for number in range(12)]
    settings = AnalysisSettings(wished={"framing": {"full": 1, "portrait": 2}})
    found = analyse(facts, RNG.normal(size=(12, 8)), {"sharpness": np.full(12, 0.5)}, {"sharpness": np.full(3, 0.1)}, {}, settings)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["bias"].keys() == {"framing"} and found["bias"]["framing"]["expected"] == {"full": 4.0, "portrait": 8.0}
    assert 1 < found["diversity"]["vendi"] <= 8 and found["size"]["have"] == 12
    assert analyse([], None, {}, {}, {}, settings)["size"] is None


@pytest.mark.parametrize(
    ("wished", "message"),
    [
        ({"frame": {}}, "did you mean framing"),
        ({"framing": {"whole": 1, "full": 1}}, "close-up, portrait"),
        ({"yaw": {"left": 1}}, "two or more"),
    ],
)
def test_wishes_that_nothing_answers(wished, message):
    with pytest.raises(ConfigError, match=message):
        AnalysisSettings(wished=wished)


def test_questions_need_a_clip_that_knows_the_words():
    from charforgex.curation.settings import CurationSettings

    asked = AnalysisSettings(labels={"glasses": {"none": ("",), "glasses": ("with glasses",)}})
    with pytest.raises(ConfigError, match=r"curation\.clip=charworld knows no such words"):
        CurationSettings(analysis=asked)
    assert CurationSettings(analysis=asked, clip="openai/clip-vit-base-patch32").analysis == asked
