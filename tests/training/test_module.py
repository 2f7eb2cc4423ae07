"""The step: accumulation, EMA, and what is not finite never reaching the weights."""

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from charforgex.errors import CheckpointError, TrainingError
from charforgex.training.checkpoints import load_last_good
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import StepLoader, fit
from charforgex.training.module import MAX_SKIPPED, StepModule
from charforgex.training.settings import TrainerSettings


class Toy(StepModule):
    """Loss (w - x)^2 of one weight; `bad(step, attempt)` makes it not finite."""

    def __init__(self, xs, bad=lambda step, attempt: False, **settings):
        self_weight = nn.Parameter(torch.zeros(1))
        defaults = {
            "make_optimizer": lambda trainable: torch.optim.SGD(trainable.values(), lr=0.25), "learning_rate": lambda step: 1.0,
            "grad_clip": 0.0,
            "make_loader": lambda first: DataLoader(xs[first:], batch_size=None, collate_fn=list),
        }  # fmt: skip
        super().__init__({"w": self_weight}, **(defaults | settings))
        self.w, self.bad = self_weight, bad

    def losses(self, micro, key):
        _, step, *_, attempt = key
        return (self.w - micro).square() * (float("nan") if self.bad(step, attempt) else 1.0)


def steps_of(*values):
    return [[torch.tensor(micro) for micro in step] for step in values]


def run(module, steps, tmp_path, **settings):
    settings = TrainerSettings(**({"steps": steps, "ema": 0.0, "checkpoint_every": 2, "accelerator": "cpu"} | settings))
    log = StepLog(tmp_path / "metrics.csv", module.step)
    return fit(module, tmp_path / "checkpoints", settings, [log], Console(quiet=True), lambda step: None, 1000, set)


def test_a_step_is_the_mean_over_all_examples_of_all_micro_batches(tmp_path):
    """w = 0, examples 1, 2, 6: gradient of the mean square = -2 * mean = -6; one step of 0.25 gives 1.5."""
    module = Toy(steps_of([[1.0, 2.0], [6.0]]))
    run(module, 1, tmp_path)
    assert module.w.item() == pytest.approx(1.5)
    assert read_log(tmp_path / "metrics.csv")["loss"] == [(1, pytest.approx((1 + 4 + 36) / 3))]


def test_ema_by_hand(tmp_path):
    """x = 1: w goes 0.5, 0.75. Decay min(0.9, (1 + step) / (10 + step)) = 0.1, then 2/11."""
    module = Toy(steps_of([[1.0]], [[1.0]]), ema_decay=0.9)
    run(module, 2, tmp_path, ema=0.9)
    first = 0.1 * 0 + 0.9 * 0.5
    assert module.ema["w"].item() == pytest.approx(2 / 11 * first + 9 / 11 * 0.75)
    with module.averaged():
        assert module.w.item() == pytest.approx(module.ema["w"].item())
    assert module.w.item() == pytest.approx(0.75)


def test_gradients_are_clipped(tmp_path):
    module = Toy(steps_of([[100.0]]), grad_clip=1.0)
    run(module, 1, tmp_path)
    assert module.w.item() == pytest.approx(0.25, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    module = Toy(steps_of(*[[[1.0]]] * 3), bad=lambda step, attempt: step == 1)
    run(module, 3, tmp_path)
    assert module.w.item() == pytest.approx(0.75)  # two of three steps
    assert read_log(tmp_path / "metrics.csv")["skipped"] == [(2, 1.0)]


def test_after_five_it_rolls_back_and_draws_anew(tmp_path):
    module = Toy(steps_of(*[[[1.0]]] * 12), bad=lambda step, attempt: step >= 4 and attempt == 0)
    run(module, 12, tmp_path)
    assert module.attempt == 1
    assert module.w.item() == pytest.approx(1 - 0.5**12)  # nothing was lost
    losses = read_log(tmp_path / "metrics.csv")["loss"]
    assert [step for step, _ in losses] == list(range(1, 13))
    assert all(value == value for _, value in losses)


def test_and_stops_with_the_reason_when_that_does_not_help(tmp_path):
    module = Toy(steps_of(*[[[1.0]]] * 20), bad=lambda step, attempt: step >= 4)
    with pytest.raises(TrainingError, match=f"{MAX_SKIPPED} steps in a row.*Step 4 .*optimizer.lr"):
        run(module, 20, tmp_path)
    checkpoint, _ = load_last_good(tmp_path / "checkpoints")
    assert checkpoint["tensors"]["weights/w"].item() == pytest.approx(1 - 0.5**4)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    module = Toy(steps_of([[1.0]], [[1.0]]), make_optimizer=lambda trainable: torch.optim.SGD(trainable.values(), lr=float("inf")))
    with pytest.raises(TrainingError, match="not finite at step 1"):
        run(module, 2, tmp_path)
    assert load_last_good(tmp_path / "checkpoints")[0]["step"] == 0


def test_the_learning_rate_follows_the_step_alone(tmp_path):
    module = Toy(steps_of(*[[[0.0]]] * 3), learning_rate=lambda step: 1 / (1 + step))
    run(module, 3, tmp_path)
    assert [value for _, value in read_log(tmp_path / "metrics.csv")["lr"]] == [0.25, 0.125, 0.25 / 3]


def test_another_adapters_checkpoint_is_refused():
    module = Toy([])
    with pytest.raises(CheckpointError, match="rank or a target"):
        module.restore({"tensors": {"weights/other": torch.zeros(1)}, "step": 1, "attempt": 0})


def test_step_loader_groups_micro_batches():
    loader = StepLoader(list(range(6)), 3)
    assert len(loader) == 2
    assert list(loader) == [[0, 1, 2], [3, 4, 5]]
