"""Muon, and the learning rate's schedules."""

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.training.optimizers import Muon, build_optimizer, orthogonalise, schedule


def test_orthogonalise_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (8, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3, values  # Jordan's quintic: within about 0.3 of one, not exactly one


def test_muon_moves_a_matrix_by_a_step_of_known_size():
    """The update is 0.2 sqrt(max(out, in)) times an orthogonal matrix: its RMS is about 0.2 of the rate, as AdamW's is."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 64))
    weight.grad = torch.randn(16, 64)
    Muon([weight], lr=0.1).step()
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 * 0.2, rel=0.3)


def test_muon_is_adamw_for_vectors():
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = Muon([ours], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adamw.step()
    assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize(("name", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])])
def test_schedules_by_hand(name, expected):
    factor = schedule(name, steps=10)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx(expected)


def test_warmup_rises_in_equal_steps():
    factor = schedule("constant", steps=10, warmup=4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="schedule=step"):
        schedule("step", 10)
    with pytest.raises(ConfigError, match="name=sgd"):
        build_optimizer("sgd", [], 0.1, 0.0)
