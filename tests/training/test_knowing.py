"""How the best checkpoint is chosen, and the curves and logs that show it."""

import pytest
from PIL import Image

from charforgex.training.curves import draw_curves, smooth
from charforgex.training.knowing import Anchors, Scores, as_metrics
from charforgex.training.logs import StepLog, read_log

ANCHORS = Anchors(floor=0.0, base=0.1, ceiling=0.9, prompt_following=0.8, diversity=0.6, validation=0.1)


def scores(identity, prompt_following=0.8, diversity=0.6, step=1):
    return Scores(step=step, identity=identity, prompt_following=prompt_following, diversity=diversity, nearest=0.5, validation=0.09)


def test_gain_is_the_share_of_the_way_from_base_to_real():
    assert [ANCHORS.gain(identity) for identity in (0.1, 0.5, 0.9)] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    ("found", "value"),
    [
        (scores(0.5), 0.5),
        (scores(0.5, prompt_following=0.72), 0.5),  # 90 % of the base's is enough
        (scores(0.5, prompt_following=0.36), 0.25),  # half of that halves it
        (scores(0.5, diversity=0.3), 0.5),  # half as varied as the base is enough
        (scores(0.5, diversity=0.15), 0.25),
        (scores(0.0, prompt_following=0.1), -0.125),  # below the base stays below, whatever else
    ],
)
def test_the_value_of_a_checkpoint(found, value):
    assert ANCHORS.value(found) == pytest.approx(value)


def test_identity_does_not_win_over_obedience():
    memorised, faithful = scores(0.9, prompt_following=0.3, diversity=0.1), scores(0.75)
    assert max((memorised, faithful), key=ANCHORS.value) is faithful


def test_metrics_have_the_names_that_all_loggers_share():
    metrics = as_metrics(scores(0.5), ANCHORS)
    assert metrics["identity/gain"] == pytest.approx(0.5) and metrics["value"] == pytest.approx(0.5)
    assert {"identity/floor", "validation/base", "prompt_following/lora", "diversity/lora", "nearest_training_picture"} <= set(metrics)


def test_the_log_keeps_all_digits_and_is_cut_back(tmp_path):
    log = StepLog(tmp_path / "metrics.csv")
    for step in range(1, 5):
        log.log_metrics({"loss": 1 / (3 * step), "lr": 0.1}, step)
    log.save()
    log.finalize("success")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,loss,0.0")  # a kill in the middle of a line
    again = StepLog(tmp_path / "metrics.csv", first_step=2)
    again.log_metrics({"loss": 7.0}, 3)
    again.finalize("success")
    assert read_log(tmp_path / "metrics.csv")["loss"] == [(1, 1 / 3), (2, 1 / 6), (3, 7.0)]


def test_smoothing_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert smooth([1.0, 0.0])[1] == pytest.approx(0.95 / 1.95)


def test_curves_are_drawn_from_what_is_there(tmp_path):
    series = {"loss": [(1, 0.5), (2, 0.4)], **{name: [(2, value)] for name, value in as_metrics(scores(0.5), ANCHORS).items()}}
    draw_curves(series, tmp_path / "curves.png", best_step=2)
    full = Image.open(tmp_path / "curves.png")
    draw_curves({"loss": series["loss"]}, tmp_path / "bare.png")
    bare = Image.open(tmp_path / "bare.png")
    assert full.size == bare.size and full.width > 1000
    assert full.convert("RGB").tobytes() != bare.convert("RGB").tobytes()
