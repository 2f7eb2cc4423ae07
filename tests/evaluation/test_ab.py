"""Two contestants by a metric: who wins, counted by prompts, and how often that is claimed when it is not so."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from charforgex.evaluation.ab import compare, fewest, holm, sign_test

SEEDS = range(3)


def scored(values, start=0.0):
    """{(prompt, seed): score} of one value a prompt, the same for each seed."""
    return {(f"prompt {i}", seed): start + value for i, value in enumerate(values) for seed in SEEDS}


def only(found):
    (row,) = found["rows"]
    return row


def test_the_sign_test_is_the_binomials_two_tails():
    assert sign_test(9, 1) == pytest.approx(2 * 11 / 2**10)
    assert sign_test(1, 9) == sign_test(9, 1)
    assert sign_test(0, 0) == 1 and sign_test(4, 4) == 1
    assert fewest(0.05) == 6 and 2 * 0.5**6 <= 0.05 < 2 * 0.5**5 and fewest(0.5) == 2


def test_holms_correction_is_that_of_the_papers_steps():
    """Smallest of four times 4, next times 3, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_a_clear_winner_is_named_and_counted():
    row = only(compare({"identity": {"a": scored([0.1] * 9 + [-0.1]), "b": scored([0] * 10)}}, {"identity": "higher"}))
    assert (row["prompts_won"], row["prompts_tied"], row["prompts_lost"]) == (9, 0, 1)
    assert (row["pictures_won"], row["pictures_lost"], row["pictures"]) == (27, 3, 30)
    assert row["p"] == row["p_holm"] == pytest.approx(0.021484375)
    assert row["verdict"] == "a better" and row["better"] == "a"
    assert row["difference"]["estimate"] == pytest.approx(0.08)
    assert 0 < row["difference"]["low"] < 0.08 < row["difference"]["high"] <= 0.1 + 1e-12


def test_lower_is_better_turns_the_winner_and_not_the_difference():
    scores = {"loss": {"a": scored([0.1] * 8), "b": scored([0] * 8)}}
    row = only(compare(scores, {"loss": "lower"}))
    assert row["verdict"] == "b better" and row["prompts_lost"] == 8 and row["difference"]["estimate"] == pytest.approx(0.1)
    row = only(compare(scores, {"loss": "neither"}))
    assert row["verdict"].startswith("not comparable: neither") and row["p"] is None


def test_seeds_of_one_prompt_are_one_witness():
    """Sixty pictures of two prompts prove nothing of a third."""
    many = {(f"prompt {i}", seed): 1.0 for i in range(2) for seed in range(30)}
    row = only(compare({"identity": {"a": many, "b": dict.fromkeys(many, 0.0)}}, {"identity": "higher"}))
    assert row["p"] is None and row["better"] is None
    assert row["verdict"] == "not comparable: 2 prompts in common, and 6 are the fewest of which a unanimous result is no chance"


def test_only_what_both_have_is_compared():
    a, b = scored([1.0] * 8), scored([0.0] * 8)
    a[("prompt 0", 0)] = float("nan")
    del b[("prompt 1", 2)]
    b[("elsewhere", 0)] = 5.0
    row = only(compare({"identity": {"a": a, "b": b}}, {"identity": "higher"}))
    assert (row["pictures"], row["prompts"]) == (22, 8)
    row = only(compare({"identity": {"a": a, "b": {("elsewhere", 0): 1.0}}}, {"identity": "higher"}))
    assert row["verdict"].startswith("not comparable: no picture of the same prompt and seed")


def test_the_correction_counts_every_pair_and_metric():
    """Six of six is 0.031 alone and no claim among six tests."""
    few = {"a": scored([0.1] * 6), "b": scored([0] * 6), "c": scored([0] * 6)}
    found = compare({"identity": few, "prompt": few}, {"identity": "higher", "prompt": "higher"})
    assert found["tests"] == 6 and len(found["rows"]) == 6
    assert {row["verdict"] for row in found["rows"]} == {"too close to call"}
    ties = [row for row in found["rows"] if row["a"] == "b"]
    assert all(row["prompts_tied"] == 6 and row["p"] == 1 for row in ties)
    assert compare({"identity": {"a": scored([1])}}, {"identity": "higher"}) is None


def test_order_does_not_matter():
    rng = np.random.default_rng(0)
    a, b = scored(rng.normal(size=12)), scored(rng.normal(size=12))
    one = only(compare({"m": {"a": a, "b": b}}, {"m": "higher"}))
    other = only(compare({"m": {"a": dict(reversed(a.items())), "b": b}}, {"m": "higher"}))
    assert one == other


def test_false_claims_and_finds_over_a_thousand_studies():
    """Three contestants, two metrics, prompts with a hardness and an interaction of their own: pictures alone would lie, prompts do not."""
    studies, prompts, seeds = 1000, 24, 4
    rng = np.random.default_rng(1)
    taste = 2 * rng.normal(size=(studies, prompts))  # what contestant a makes of a prompt: the same for all seeds
    noise = rng.normal(size=(studies, prompts, seeds))
    null = taste + noise.mean(-1)
    won, lost = (null > 0).sum(1), (null < 0).sum(1)
    # studies of one test: claims at 5 %, at most; the exact level of 24 coins is below it
    p = {(k, prompts - k): sign_test(k, prompts - k) for k in range(prompts + 1)}
    false = np.mean([p[key] <= 0.05 for key in zip(won, lost, strict=True)])
    level = sum(binom.pmf(k, prompts, 0.5) for k in range(prompts + 1) if sign_test(k, prompts - k) <= 0.05)
    assert level <= 0.05 and abs(false - level) < 4 * np.sqrt(level * (1 - level) / studies)
    # pictures as witnesses would claim far too often
    pictures = np.sum(taste[:, :, None] + noise > 0, (1, 2))
    each = {k: sign_test(k, prompts * seeds - k) for k in set(pictures.tolist())}
    assert np.mean([each[k] <= 0.05 for k in pictures.tolist()]) > 0.15
    # an effect as large as the spread between prompts is found as often as coins that fall so with Phi(1) = 0.84 tell
    found = (null + np.sqrt(4 + 1 / seeds) > 0).sum(1)
    power = sum(binom.pmf(k, prompts, norm.cdf(1)) for k in range(prompts // 2, prompts + 1) if p[k, prompts - k] <= 0.05)
    assert power > 0.9 and abs(np.mean([p[k, prompts - k] <= 0.05 for k in found]) - power) < 4 * np.sqrt(power * (1 - power) / studies)
    # six tests in each study, Holm: any false claim in at most 5 %
    many = rng.normal(size=(studies, 6, prompts)) > 0
    any_false = np.mean([min(holm([p[k, prompts - k] for k in row])) <= 0.05 for row in many.sum(2)])
    assert any_false <= binom.ppf(0.999, studies, 0.05) / studies


def test_whole_comparisons_under_the_null_claim_nothing_false():
    """The function itself, over a hundred studies: false claims within what chance allows at 5 %."""
    rng = np.random.default_rng(2)
    claims = 0
    for _ in range(100):
        scores = {name: dict(zip(scored([0] * 8), rng.normal(size=24), strict=True)) for name in "ab"}
        claims += only(compare({"m": scores}, {"m": "higher"}))["better"] is not None
    assert claims <= binom.ppf(0.999, 100, 0.05)
