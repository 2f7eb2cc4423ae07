"""Everything against dense matrices in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch

from charforgex.errors import LoraError
from charforgex.lora import lowrank
from charforgex.lora.lowrank import Product
from charforgex.lora.state import LohaLayer, LoraLayer

DRAW = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=DRAW)


def drawn(rank, out=40, inner=(24,)):
    return Product(randn(out, rank), randn(rank, math.prod(inner)), (out, *inner))


def whole(found):
    return found.up.double() @ found.down.double()


@pytest.mark.parametrize("inner", [(24,), (5, 3, 3), (200,)])
def test_a_layer_is_its_product_and_back(inner):
    down, up = randn(4, *inner), randn(40, 4)[(..., *[None] * (len(inner) - 1))]
    layer = LoraLayer(down, up, 6.0)
    found = lowrank.product(layer)
    torch.testing.assert_close(found.dense(), layer.delta())
    for alpha in (None, 1.0, 8.0):
        again = lowrank.layer_of(found, alpha)
        assert again.weight_shape == layer.weight_shape and again.alpha == (alpha or 4.0)
        torch.testing.assert_close(again.delta(), layer.delta())
    with pytest.raises(LoraError, match="loha is no product"):
        lowrank.product(LohaLayer(randn(4, 2), randn(2, 4), randn(4, 2), randn(2, 4), 1.0))


def test_sums_and_inner_products_are_those_of_the_dense_matrices():
    some = [drawn(rank) for rank in (1, 4, 9)]
    total = lowrank.stacked(some, [0.5, -1, 2])
    dense = 0.5 * whole(some[0]) - whole(some[1]) + 2 * whole(some[2])
    torch.testing.assert_close(whole(total), dense, rtol=1e-5, atol=1e-5)
    for one in some:
        assert one.norm() == pytest.approx(float(whole(one).norm()), rel=1e-6)
        for other in some:
            assert lowrank.inner(one, other) == pytest.approx(float((whole(one) * whole(other)).sum()), rel=1e-5, abs=1e-3)
    assert lowrank.cosine(some[0], some[0].scaled(-3)) == pytest.approx(-1) and lowrank.cosine(some[0], some[1].scaled(0)) == 0
    with pytest.raises(LoraError, match="different shapes"):
        lowrank.stacked([some[0], drawn(2, out=41)])


@pytest.mark.parametrize("rank, out, inner", [(1, 40, 24), (7, 40, 24), (24, 40, 24), (60, 40, 24), (8, 24, 100)])
def test_the_spectrum_is_that_of_the_dense_matrix(rank, out, inner):
    found = drawn(rank, out, (inner,))
    mine, dense = lowrank.spectrum(found), torch.linalg.svdvals(whole(found))
    torch.testing.assert_close(mine.values.double(), dense[: len(mine.values)], rtol=1e-5, atol=1e-5 * float(dense[0]))
    torch.testing.assert_close(whole(mine.truncated(99)), whole(found), rtol=1e-4, atol=1e-5 * float(dense[0]))
    assert mine.numerical_rank() == min(rank, out, inner)
    for kept in (1, 3, 7):
        error = float((whole(mine.truncated(kept)) - whole(found)).norm() / whole(found).norm())
        best = float(dense[kept:].norm() / dense.norm())
        assert error == pytest.approx(best, abs=1e-5) and mine.error(kept) == pytest.approx(best, abs=1e-5)
    other = lowrank.dense_spectrum(found.dense())
    torch.testing.assert_close(other.values, mine.values[: len(other.values)], rtol=1e-4, atol=1e-4 * float(dense[0]))
    torch.testing.assert_close(whole(other.truncated(99)), whole(found), rtol=1e-4, atol=1e-4 * float(dense[0]))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (40, 8, 3, 3)])
def test_the_largest_directions_alone_are_those_of_all(shape):
    change = randn(*shape)
    every, some = lowrank.dense_spectrum(change), lowrank.dense_spectrum(change, 5)
    assert len(some.values) == 5
    torch.testing.assert_close(some.values, every.values[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole(some.truncated(4)), whole(every.truncated(4)), rtol=1e-4, atol=1e-5)
    assert [some.error(rank) for rank in (2, 5)] == pytest.approx([every.error(rank) for rank in (2, 5)], rel=1e-6)
    assert len(lowrank.dense_spectrum(change, 30).values) == 40, "all at once are as quick"


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e17])
@pytest.mark.parametrize("kind", ["flat", "even", "steep", "low", "low and flat", "unit", "zero"])
def test_the_largest_directions_lack_no_more_than_the_least(kind, scale):
    """Where float32 would do and where it would not: told as it is, and as small as can be."""
    left, right = (torch.linalg.qr(randn(side, 160).double()).Q for side in (160, 210))
    i = torch.arange(160).double()
    values = {
        "flat": 1 - i / 200, "even": 1 / (1 + i), "steep": torch.exp(-i / 3), "low": (i < 6).double(), "low and flat": (i < 6) + 1e-4,
        "unit": torch.ones(160).double(), "zero": torch.zeros(160).double(),
    }[kind]  # fmt: skip
    dense = torch.eye(160) if kind == "unit" else ((left * values) @ right.T).float()
    dense = dense * scale
    exact = torch.linalg.svdvals(dense.double())
    for change in (dense, dense.T):
        for rank in (3, 8, 30):
            found = lowrank.dense_spectrum(change, rank)
            best = float(exact[rank:].norm() / exact.norm()) if exact[0] else 0.0
            lacks = float((whole(found.truncated(rank)) - change.double()).norm() / exact.norm()) if exact[0] else 0.0
            assert lacks == pytest.approx(best, rel=1e-5, abs=2e-6), (rank, "what it lacks")
            assert found.error(rank) == pytest.approx(best, rel=1e-5, abs=2e-6), (rank, "what it tells")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_lapack_has_one_thread_and_the_environment_is_left_alone():
    code = (
        "import os; from charforgex.lora import lowrank; count = lambda: len(os.listdir('/proc/self/task')); before = count();"
        "lowrank._one_threaded_linalg(); print(count() - before, os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    for given, told in ((None, "0 None"), ("1", "0 1")):
        environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"} | {"OMP_NUM_THREADS": "4"}
        environment |= {"OPENBLAS_NUM_THREADS": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == told


def test_equal_and_zero_factors():
    one = drawn(4)
    doubled = lowrank.spectrum(lowrank.stacked([one, one]))
    assert doubled.numerical_rank() == 4
    torch.testing.assert_close(whole(doubled.truncated(4)), 2 * whole(one), rtol=1e-4, atol=1e-4)
    nothing = lowrank.spectrum(one.scaled(0))
    assert nothing.numerical_rank() == 0 and nothing.error(1) == 0 and not nothing.truncated(2).dense().any()


def test_how_much_to_keep():
    values = torch.tensor([4.0, 2.0, 1.0, 1e-9])
    found = lowrank.Spectrum(torch.eye(6)[:, :4], values, torch.eye(5)[:4], (6, 5))
    assert [lowrank.keep_rank(rank)(found) for rank in (1, 2, 9)] == [1, 2, 3], "never more than there are"
    assert [lowrank.keep_energy(share)(found) for share in (0.5, 0.77, 20.5 / 21, 1)] == [1, 2, 3, 4]
    assert [lowrank.keep_error(most)(found) for most in (0.9, 0.4, 0.2, 0)] == [1, 2, 3, 4]
    assert [lowrank.keep_ratio(ratio)(found) for ratio in (1, 2, 4, 1e20)] == [1, 2, 3, 4]
    assert found.truncated(0).rank == 1 and not found.truncated(0).dense().any()
