"""What the network of frames between frames learns on, and that learning helps."""

import random

import pytest
import torch

from charforgex.generation.ifnet import warped
from charforgex.training.interpolating import SIZE, Example, FlowModule, Moves, laplacian, turned


@pytest.fixture(scope="module")
def moves():
    return Moves(6, seed=1)


def known(moves):
    return next(moves.example(number) for number in range(6) if moves.example(number).flow.isfinite().all())


def off(example: Example) -> list[float]:
    """How far either frame along either flow is from the truth."""
    first, truth, second = (one[None].float() for one in example[:3])
    flows = [part[None].float() for flow in (example.flow, example.begun) for part in (flow[:2], flow[2:])]
    return [float((warped(one, flow) - truth).abs().mean()) for one, flow in zip((first, second) * 2, flows, strict=True)]


def test_a_turned_example_is_as_true_as_before(moves):
    example, seen = known(moves), set()
    before = off(example)
    for number in range(24):
        after = turned(example, random.Random(number))
        backwards = after.time != example.time
        assert after.time == (1 - example.time if backwards else example.time)
        assert off(after) == pytest.approx([before[k] for k in ((1, 0, 3, 2) if backwards else (0, 1, 2, 3))], rel=1e-3)
        seen.add(bytes(after.first.contiguous().numpy()))
    assert len(seen) > 12


def test_a_batch_begins_with_the_optical_flow_and_the_time(moves):
    first, truth, second, time, flow, begun = FlowModule.batch(moves, [0, 3], random.Random(0))
    assert first.shape == truth.shape == second.shape == (2, 3, SIZE, SIZE) and first.min() >= 0 and 0.2 < first.max() <= 1
    middle = torch.sigmoid(begun[:, 4, SIZE // 3 : -SIZE // 3, SIZE // 3 : -SIZE // 3])
    torch.testing.assert_close(middle, (1 - time).view(2, 1, 1).expand_as(middle), atol=1e-3, rtol=0)
    assert flow.dtype == begun.dtype == torch.float32 and flow.shape == (2, 4, SIZE, SIZE)


def test_the_error_counts_at_each_fineness():
    even, fine = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.5)
    fine[..., ::2] *= -1
    assert laplacian(0 * even).item() == 0
    assert laplacian(even).item() == pytest.approx(0.5, abs=0.03) and laplacian(fine).item() == pytest.approx(0.5, abs=0.03)
    assert laplacian(even + fine).item() == pytest.approx(laplacian(even).item() + laplacian(fine).item(), abs=0.02)


def test_it_begins_as_the_optical_flow_has_it_and_learns(moves):
    torch.manual_seed(0)
    settings = {"make_optimizer": lambda trainable: torch.optim.AdamW(trainable.values(), lr=1e-3), "learning_rate": lambda step: 1.0}
    module = FlowModule(**settings)
    micro = FlowModule.batch(moves, [0, 1, 2, 4], random.Random(0))
    first, _, second, _, _, begun = micro
    share = torch.sigmoid(begun[:, 4:])
    found_by = module.network.refined(first, second, micro[3], begun)
    for how, (found, mask, between) in zip(("bilinear", "bicubic"), found_by, strict=True):  # the last as `by=dis` moves frames
        torch.testing.assert_close(found, begun[:, :4])
        torch.testing.assert_close(mask, share)
        torch.testing.assert_close(between, warped(first, begun[:, :2], how) * share + warped(second, begun[:, 2:4], how) * (1 - share))
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-3), []
    for _ in range(8):
        losses.append(module.losses(micro, ()).mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
