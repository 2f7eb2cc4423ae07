"""People's votes: strengths, agreement, when it is enough, and how often that is wrong; files of strangers; the command."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from charforgex.cli import guarded
from charforgex.errors import DataError
from charforgex.evaluation import preference
from charforgex.evaluation.ballots import KEY, Ballot, Claim, Key, Look, Pair, Vote, read_ballots, read_key
from charforgex.evaluation.votes import analyse

PAPER = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""  # four observers, twelve units: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C


def table(text):
    return np.array([[math.nan if word == "." else float(word) for word in line.split()] for line in text.strip().splitlines()])


# ---- strengths and agreement ----


def test_bradley_terry_is_the_likelihoods_summit():
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 20, (4, 4)) + 0.5 * rng.integers(0, 3, (4, 4))
    smoothed = (wins + preference.PRIOR) * (1 - np.eye(4))

    def loss(strength):
        return (smoothed * np.logaddexp(0, strength[None, :] - strength[:, None])).sum()

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    assert preference.bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-5)


def test_two_contestants_have_the_odds_of_their_votes():
    wins = np.array([[[0, 29.5], [9.5, 0]], [[0, 7], [0, 0]]])
    strengths = preference.bradley_terry(wins)
    assert strengths[:, 0] - strengths[:, 1] == pytest.approx([math.log(3), math.log(15)])
    assert np.allclose(strengths.sum(-1), 0)


def test_agreement_is_the_papers():
    assert round(preference.krippendorff(table(PAPER), nominal=True), 3) == 0.743
    assert round(preference.krippendorff(table(PAPER)), 3) == 0.849


def test_agreement_of_one_mind_of_coins_and_of_opposites():
    rng = np.random.default_rng(0)
    same = np.tile(rng.choice([-1.0, 0, 1], 40), (3, 1))
    assert preference.krippendorff(same) == 1
    assert abs(preference.krippendorff(rng.choice([-1.0, 0, 1], (3, 4000)))) < 0.03
    assert preference.krippendorff(np.stack([same[0], -same[0]])) < -0.5
    assert math.isnan(preference.krippendorff(np.ones((2, 5)))) and preference.alike(np.ones((2, 5))) == 1
    assert preference.alike(np.array([[1, 1, 0, math.nan], [1, 0, 0, 1], [0, 0, 0, math.nan]])) == pytest.approx(5 / 9)
    assert math.isnan(preference.krippendorff(np.array([[1.0, math.nan], [math.nan, 0.0]])))


# ---- is it enough ----


def test_sign_flips_count_every_sign():
    net = np.array([3, -1, 2, 0, 2, 5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    assert preference.sign_flip(net) == pytest.approx(np.mean(np.abs(net @ signs) >= abs(net.sum())))
    assert preference.sign_flip(np.full(10, 2)) == pytest.approx(2 * 0.5**10)
    assert preference.sign_flip(np.zeros(3, int)) == 1 and preference.sign_flip(np.array([1, -1])) == 1


def test_alpha_is_spent_late_and_never_twice():
    """At a third and two thirds of the plan: 2 - 2 Phi(1.96 / sqrt(t))."""
    assert preference.spent(1 / 3, 0.05) == pytest.approx(0.00069, abs=1e-5)
    assert preference.spent(2 / 3, 0.05) == pytest.approx(0.01638, abs=2e-5)
    assert preference.spent(1, 0.05) == pytest.approx(0.05) and preference.spent(3, 0.05) == pytest.approx(0.05)
    assert preference.spent(0, 0.05) == 0
    fractions = [0.2, 0.5, 0.45, 0.9, 1, 1.2]
    levels = [preference.level_now(t, fractions[:i], 0.05) for i, t in enumerate(fractions)]
    assert sum(levels) == pytest.approx(0.05) and levels[2] == 0 and levels[5] == 0


def test_the_share_lies_in_its_interval_as_often_as_promised():
    """Prompts that differ: 24 of them, 1,000 studies, level 5 %."""
    rng = np.random.default_rng(0)
    likely = rng.beta(3, 2, (1000, 24))  # mean 0.6
    net = 2 * rng.binomial(6, likely) - 6
    inside = [low < 0.6 < high for low, high in (preference.share_interval(row, np.full(24, 6), 0.05) for row in net)]
    assert abs(np.mean(inside) - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 1000)
    low, high = preference.share_interval(net[0], np.full(24, 6), 0.05)
    _, least, most = preference.bootstrap_share(net[0], np.full(24, 6))
    assert abs(low - least) < 0.03 and abs(high - most) < 0.03


def test_votes_needed_are_those_with_which_it_is_found():
    """Planned for a power of 80 %, and as often found in studies of that size."""
    rng = np.random.default_rng(0)
    pilot = 2 * rng.binomial(4, rng.beta(6.5, 3.5, 4000)) - 4  # share 0.65
    needed = preference.votes_needed(pilot, np.full(4000, 4), 0.05)
    prompts = round(needed / 4)
    assert 15 < prompts < 60
    found = [preference.sign_flip(row) <= 0.05 for row in 2 * rng.binomial(4, rng.beta(6.5, 3.5, (1000, prompts))) - 4]
    assert 0.74 < np.mean(found) < 0.88
    assert preference.votes_needed(np.array([1, -1]), np.array([1, 1]), 0.05) is None


PROMPTS, STUDIES = 24, 1000


def studied(
    preferred: float, spread: float, contestants: int = 2, seed: int = 0, raters: int = 3, level: float | None = None
) -> list[list[str | None]]:
    """What is claimed of each pair of contestants in 1,000 simulated studies with a look after each rater; None where nothing is.

    `preferred`: log odds of the first contestant against all others. Each prompt has a bias of its own, of `spread`, and so has each
    picture; all raters see the same two pictures of each prompt. A sixth of the votes are ties. `level` is that of each look, None for the
    rule that stops.
    """
    seeds = 2
    rng = np.random.default_rng(seed)
    pairs = contestants * (contestants - 1) // 2
    shift = preferred * (np.arange(pairs) < contestants - 1)[:, None, None]
    taste = rng.normal(0, spread, (STUDIES, pairs, PROMPTS, 1)) + rng.normal(0, spread, (STUDIES, pairs, PROMPTS, seeds))
    chance = 1 / (1 + np.exp(-shift - taste))
    draw = rng.random((raters, *chance.shape))
    said = np.where(rng.random(draw.shape) < 1 / 6, 0, np.where(draw < chance, 1, -1)).sum(-1)
    nets = said.cumsum(0)  # (raters, studies, pairs, prompts)
    times = [(i + 1) / raters for i in range(raters)]
    levels = [preference.level_now(times[i], times[:i], 0.05) if level is None else level for i in range(raters)]
    votes = [np.full((pairs, PROMPTS), seeds * (i + 1)) for i in range(raters)]
    found = []
    for study in range(STUDIES):
        claims: list[str | None] = [None] * pairs
        for look in range(raters):
            if all(claims):
                break
            said = preference.judged(nets[look, study], votes[look], levels[look], 0.1)
            claims = [old or new for old, new in zip(claims, said, strict=True)]
        found.append(claims)
    return found


def at_most_alpha(count: int) -> bool:
    """Not more than a rate of 5 % gives in all but one of a thousand such tests."""
    return count <= binom.ppf(0.999, STUDIES, 0.05)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_of_equal_contestants_none_is_called_better(spread):
    """1,000 studies with three looks each. Where pictures alone decide nothing, and where prompts pull hard both ways."""
    claims = [claim for (claim,) in studied(0.0, spread)]
    assert at_most_alpha(sum(claim in ("a", "b") for claim in claims))
    close = claims.count("close")
    assert close > 200 if spread == 0 else close < 200  # said where it can be known


def test_many_looks_do_not_add_up():
    """After each of eight raters: within 5 % by the rule, and far from it where each look tests at 5 %."""
    assert at_most_alpha(sum(claim in ("a", "b") for (claim,) in studied(0.0, 0.3, raters=8, seed=4)))
    assert sum(claim in ("a", "b") for (claim,) in studied(0.0, 0.3, raters=8, seed=4, level=0.05)) > 0.08 * STUDIES


def test_of_three_equal_contestants_none_is_called_better():
    assert at_most_alpha(sum(any(claim in ("a", "b") for claim in row) for row in studied(0.0, 0.5, contestants=3, seed=1)))


def test_a_known_preference_is_found():
    """Five votes to two on prompts that differ: found in more than nine of ten studies, and the wrong one in none."""
    claims = [claim for (claim,) in studied(math.log(2.5), 0.5, seed=2)]
    assert claims.count("a") > 0.9 * STUDIES and claims.count("b") == 0


def test_a_difference_as_large_as_the_margin_is_rarely_called_close():
    """A share of 0.6 with ties halved, or 0.62 without: to say "close" there is wrong, and happens in 5 % of studies at most."""
    claims = [claim for (claim,) in studied(math.log(0.62 / 0.38), 0.0, seed=3)]
    assert at_most_alpha(claims.count("close"))


# ---- a study from its files ----


def key_of(pairs=24, repeats=0, **more):
    """Two contestants, one seed each of as many prompts; sides alternate; the first ones come again with sides changed."""
    sides = [("anna", "ben") if i % 2 == 0 else ("ben", "anna") for i in range(pairs)]
    shown = [Pair(f"p{i:03}", *side, f"prompt {i}", 0) for i, side in enumerate(sides)]
    shown += [Pair(f"r{i:03}", *reversed(sides[i]), f"prompt {i}", 0, f"p{i:03}") for i in range(repeats)]
    told = {"raters": 2, "alpha": 0.05, "margin": 0.1} | more
    return Key("charforgex-vote-key-1", "study", "Which?", ["anna", "ben"], pairs=shown, **told)


def ballot(key, rater, choose):
    """`choose` is given a pair and says a contestant, None for a tie, or a side."""
    votes = []
    for pair in key.pairs:
        chosen = choose(pair)
        side = "tie" if chosen is None else chosen if chosen in ("left", "right") else "left" if pair.left == chosen else "right"
        votes.append(Vote(pair.id, side, 2000))
    return Ballot("charforgex-votes-1", key.study, rater, "2026-01-01T00:00:00Z", votes)


def test_a_study_with_a_clear_winner():
    key = key_of(repeats=6)
    late = {"prompt 3", "prompt 11"}
    found = analyse(key, [ballot(key, "b", lambda pair: "ben"), ballot(key, "a", lambda pair: "anna" if pair.prompt in late else "ben")])
    (row,) = found["pairs"]
    assert (row["a_votes"], row["tied"], row["b_votes"], row["prompts"]) == (2, 0, 46, 24)
    assert row["share"]["estimate"] == pytest.approx(2 / 48) and row["share"]["low"] < 2 / 48 < row["share"]["high"]
    assert row["better"] == "ben" and row["verdict"] == "ben better" and found["stop"]
    assert [rank["contestant"] for rank in found["ranking"]] == ["ben", "anna"]
    first, second = found["ranking"]
    assert first["strength"] - second["strength"] == pytest.approx(math.log(46.5 / 2.5))
    assert second["high"] < 0 < first["low"] and first["share"] == pytest.approx(46 / 48)
    assert [(rater["name"], rater["votes"], rater["again"]["same"]) for rater in found["raters"]] == [("a", 30, 6), ("b", 30, 6)]
    assert found["agreement"]["pairs"] == 24 and found["notes"] == []
    assert found["agreement"]["same"] == pytest.approx(22 / 24) and found["agreement"]["alpha"] == pytest.approx(
        1 - 16 * 47 / (2 * 2 * 46 * 4)
    )
    json.dumps(found)


def test_alike_is_too_close_and_said_to_be():
    """Every second prompt to each, by both raters: nothing is claimed when the planned votes are in."""
    key = key_of()
    found = analyse(key, [ballot(key, name, lambda pair: "anna" if int(pair.prompt[7:]) % 4 < 2 else "ben") for name in "xy"])
    (row,) = found["pairs"]
    assert row["better"] is None and row["verdict"] == "too close to call: the planned votes are in; nothing points either way"
    ties = analyse(key, [ballot(key, name, lambda pair: None) for name in "xy"])["pairs"][0]
    assert ties["verdict"] == "too close to call: within 10% of even" and ties["share"]["estimate"] == 0.5
    assert found["agreement"]["alpha"] == 1


def test_half_of_the_votes_say_go_on_and_each_look_spends():
    key = key_of()
    one = ballot(key, "x", lambda pair: "anna" if int(pair.prompt[7:]) % 3 else "ben")
    first = analyse(key, [one])
    (row,) = first["pairs"]
    assert row["state"] == "go on" and not first["stop"] and row["p"] == pytest.approx(0.1516, abs=1e-4)
    assert row["votes_needed"] > 24 and row["verdict"] == f"go on: about {row['votes_needed']:,} votes would tell such a share from even"
    assert first["notes"] == ["One rater: whose taste it is cannot be told."] and first["agreement"]["alpha"] is None
    looks = [Look(**look) for look in first["looks"]]
    assert analyse(key, [one], looks)["looks"] == first["looks"]  # the same votes are the same look
    two = analyse(key, [one, ballot(key, "y", lambda pair: "anna")], looks)
    assert [look["votes"] for look in two["looks"]] == [24, 48]
    assert sum(look["alpha"] for look in two["looks"]) == pytest.approx(0.05)
    assert two["pairs"][0]["better"] == "anna"


def test_a_claim_stands_when_more_votes_come():
    key = key_of(raters=3)
    first = analyse(key, [ballot(key, "x", lambda pair: "anna")])
    looks = first["looks"]
    assert first["pairs"][0]["better"] == "anna"
    looks = [Look(**{**look, "claims": [Claim(**claim) for claim in look["claims"]]}) for look in looks]
    later = analyse(key, [ballot(key, name, lambda pair, name=name: "anna" if name == "x" else None) for name in "xyz"], looks)
    assert later["pairs"][0]["better"] == "anna" and later["pairs"][0]["share"]["estimate"] == pytest.approx(2 / 3)


def test_raters_who_see_sides_or_change_their_minds_are_told():
    key = key_of(repeats=8)
    found = analyse(key, [ballot(key, "left", lambda pair: "left"), ballot(key, "fine", lambda pair: "anna")])
    fine, left = found["raters"]
    assert (left["left"]["count"], left["left"]["of"]) == (32, 32) and left["left"]["p_holm"] < 1e-6
    assert (left["again"]["same"], left["again"]["of"]) == (0, 8) and left["again"]["high"] < 0.5
    assert fine["left"]["count"] == 16 and fine["left"]["p_holm"] == 1 and fine["again"]["same"] == 8 and fine["seconds"] == 2
    assert found["notes"] == [
        "left answered 8 of 8 pairs differently when they came again; without that file the result may be clearer.",
        "left chose the left picture 32 of 32 times; sides are even, so this only adds noise.",
    ]


def test_repeats_count_once_and_a_contestant_without_votes_has_no_strength():
    key = key_of(pairs=8, repeats=8)
    found = analyse(key, [ballot(key, "x", lambda pair: "anna")])
    assert found["pairs"][0]["votes"] == 8 and found["looks"][0]["fraction"] == 0.5
    wider = Key(**{**vars(key), "contestants": ["anna", "ben", "cleo"]})
    found = analyse(wider, [ballot(key, "x", lambda pair: "anna")])
    assert found["ranking"][-1] == {"contestant": "cleo", "votes": 0, "share": None, "strength": None, "low": None, "high": None}
    assert [row["verdict"] for row in found["pairs"]][1:] == ["go on: nothing points either way"] * 2
    few = analyse(key_of(pairs=4), [ballot(key_of(pairs=4), "x", lambda pair: "anna")])
    assert few["notes"][0] == "The page has 4 prompts; with fewer than 6 not even unanimous votes prove anything."


# ---- files ----


def written(folder, key, *ballots):
    from dataclasses import asdict

    folder.mkdir(exist_ok=True)
    (folder / KEY).write_text(json.dumps(asdict(key)))
    paths = []
    for one in ballots:
        paths.append(folder / f"votes-{one.rater}.json")
        paths[-1].write_text(json.dumps(asdict(one)))
    return paths


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    key = key_of(repeats=6)
    written(tmp_path / "page", key, ballot(key, "[red]x", lambda pair: "anna"), ballot(key, "y", lambda pair: "anna"))
    monkeypatch.setenv("COLUMNS", "160")
    from charforgex.cli import FILES, with_files

    typed = ["page/votes-[red]x.json", "page/votes-y.json", "page=page"]
    monkeypatch.chdir(tmp_path)
    arguments = with_files(typed, *FILES["votes"])
    assert guarded("charforgex.evaluation.votes:votes", "votes", arguments, "charforgex votes") == 0
    out = capsys.readouterr().out
    for words in (
        "anna or ben",
        "48 : 0 : 0",
        "anna better",
        "[red]x",
        "6 of 6",
        "two raters say the same of 100% of 24 pairs",
        "48 of 48 planned votes",
        "Stop:",
    ):
        assert words in out, words
    result = json.loads((tmp_path / "page/votes_result.json").read_text())
    assert result["pairs"][0]["better"] == "anna" and len(result["looks"]) == 1
    assert guarded("charforgex.evaluation.votes:votes", "votes", arguments, "charforgex votes") == 0
    assert len(json.loads((tmp_path / "page/votes_result.json").read_text())["looks"]) == 1
    (tmp_path / "page/votes_result.json").write_text('{"study": "study", "looks": [{"votes": "many"}]}')
    assert guarded("charforgex.evaluation.votes:votes", "votes", arguments, "charforgex votes") == 2
    assert "votes_result.json is not as it was written" in capsys.readouterr().err


GOOD = {
    "format": "charforgex-votes-1",
    "study": "study",
    "rater": "x",
    "saved": "now",
    "votes": [{"pair": "p000", "choice": "left", "milliseconds": 1}],
}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "cannot be read as JSON: UnicodeDecodeError"),
        (b"{", "cannot be read as JSON: JSONDecodeError"),
        (b"[" * 200_000, "cannot be read as JSON: RecursionError"),
        (b"9" * 5000, "cannot be read as JSON: ValueError"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": 1, "a": 2}', "a name stands twice"),
        (b"[]", "holds a list"),
        (b"{}", "format is missing"),
        (GOOD | {"study": "\x1b[2Jother"}, r"has votes of the study '\x1b[2Jother'"),
        (GOOD | {"rater": "a\nb"}, "the rater's name"),
        (GOOD | {"rater": " "}, "the rater's name"),
        (GOOD | {"rater": "x" * 1000}, "the rater's name"),
        (GOOD | {"rater": 7}, "rater=7 is a whole number"),
        (GOOD | {"votes": []}, "has no votes"),
        (GOOD | {"votes": GOOD["votes"] * 2}, "pair 'p000' is voted on twice"),
        (GOOD | {"votes": [{"pair": "p999", "choice": "tie", "milliseconds": 1}]}, "pair 'p999' is not on the page"),
        (GOOD | {"votes": [{"pair": "p000", "choice": "up", "milliseconds": 1}]}, "votes[0].choice"),
        (GOOD | {"votes": [{"pair": "p000", "choice": "tie", "milliseconds": -1}]}, "out of range"),
        (GOOD | {"votes": [{"pair": ["p000"], "choice": "tie", "milliseconds": 1}]}, "votes[0].pair"),
        (GOOD | {"votes": {"p000": "left"}}, "a list is needed"),
        (GOOD | {"format": "charforgex-votes-2"}, "charforgex-votes-2"),
        (GOOD | {"more": 1}, "more is unknown"),
    ],
)
def test_hostile_votes_are_one_clear_line(tmp_path, content, told):
    path = tmp_path / "votes.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError) as error:
        read_ballots([path], key_of())
    assert told in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_other_files_that_are_refused(tmp_path):
    key = key_of()
    (one,) = written(tmp_path / "a", key, ballot(key, "Anna", lambda pair: None))
    (other,) = written(tmp_path / "b", key, ballot(key, "anna ", lambda pair: None))
    with pytest.raises(DataError, match="both by anna: keep the later one"):
        read_ballots([one, other], key)
    with pytest.raises(DataError, match="is no file"):
        read_ballots([tmp_path / "none.json"], key)
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (8 * 2**20 + 1))
    with pytest.raises(DataError, match="more than 8,388,608 are not read"):
        read_ballots([large], key)
    with pytest.raises(DataError, match="has no vote_key"):
        read_key(tmp_path)
    assert read_key(tmp_path / "a") == key
    wrong = Key(**{**vars(key), "pairs": [Pair("p000", "anna", "nobody", "prompt")]})
    written(tmp_path / "c", wrong)
    with pytest.raises(DataError, match="pair p000 is not one of two contestants"):
        read_key(tmp_path / "c")
