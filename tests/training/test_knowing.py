"""How the best checkpoint is chosen, and the curves and logs that show it."""

import pytest
from PIL import Image

from charforgex.training.curves import draw_curves, smooth
from charforgex.training.knowing import Anchors, Scores, as_metrics
from charforgex.training.logs import StepLog, read_log

ANCHORS = Anchors(floor=0.0, base=0.1, ceiling=0.9, prompt_following=0.8, diversity=0.6, validation=0.1)


def scores(identity, prompt_following=0.8, diversity=0.6, step=1):
    return Scores(step=step, identity=identity, prompt_following=prompt_following, diversity=diversity, nearest=0.5, validation=0.09)


def test_a_checkpoint_is_worth_its_gain():
    assert ANCHORS.value(scores(0.5)) == pytest.approx(0.5)
    assert ANCHORS.value(scores(0.5, prompt_following=0.36)) == pytest.approx(0.25)


def test_metrics_have_the_names_that_all_loggers_share():
    metrics = as_metrics(scores(0.5), ANCHORS)
    assert metrics["identity/gain"] == pytest.approx(0.5) and metrics["value"] == pytest.approx(0.5)
    assert {"identity/floor", "validation/base", "prompt_following/lora", "diversity/lora", "nearest_training_picture/lora"} <= set(metrics)


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
