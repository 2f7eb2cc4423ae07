"""Each method on numbers worked by hand, and against peft's functions on dense tensors."""

import math

import pytest
import torch

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora.lowrank import Product
from charforgex.merging import methods


def product(matrix):
    """A matrix as its product with the unit matrix."""
    dense = torch.tensor(matrix, dtype=torch.float32)
    return Product(dense, torch.eye(dense.shape[1]), tuple(dense.shape))


def total(terms):
    return sum(term.weight * term.change.dense().double() for term in terms)


def dropped(change, chance, key):
    return torch.where(torch.rand(change.shape, generator=torch_generator(*key)) < chance, change / chance, 0)


def close(found, wanted):
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)


A, B = product([[2.0, 0.0], [0.0, 0.0]]), product([[0.0, 0.0], [1.0, 4.0]])


def test_linear_adds_products_and_not_factors():
    one, other = (
        Product(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]), (2, 2)),
        Product(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0]]), (2, 2)),
    )
    close(total(methods.linear([one, other], [0.5, 0.5])), [[0.5, 0.0], [0.0, 0.5]])  # of factors it would be 0.25 everywhere


def test_subtract():
    close(total(methods.subtract([A, B], [1.0, 0.5])), [[2.0, 0.0], [-0.5, -2.0]])
    close(total(methods.subtract([B, B], [1.0, 0.5], first=False)), [[0.0, 0.0], [-1.5, -6.0]])


def test_slerp_of_a_right_angle():
    """Norms 2 and sqrt(17), halfway: the directions at 1 / sqrt(2) each, at the mean of the norms."""
    size = (2 + math.sqrt(17)) / 2 / math.sqrt(2)
    close(total(methods.slerp([A, B], [0.5, 0.5])), [[size, 0.0], [size / math.sqrt(17), size * 4 / math.sqrt(17)]])
    third = methods.slerp([product([[3.0, 0.0]]), product([[0.0, 3.0]])], [2 / 3, 1 / 3])
    close(total(third), [[3 * math.cos(math.pi / 6), 3 * math.sin(math.pi / 6)]])


def test_slerp_ends_where_it_is_asked_to():
    assert [term.weight for term in methods.slerp([A, B], [1.0, 0.0])] == [1.0, 0.0]
    assert [term.weight for term in methods.slerp([A, B], [0.0, 1.0])] == [0.0, 1.0]
    near = Product(A.up, A.down + 1e-7, A.shape)
    close(total(methods.slerp([A, near], [0.5, 0.5])), [[2.0, 0.0], [0.0, 0.0]])
    close(total(methods.slerp([A, product([[0.0, 0.0], [0.0, 0.0]])], [0.5, 0.5])), [[1.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_slerp_divides_the_angle(share):
    draw = torch.Generator().manual_seed(3)
    one, other = (Product(torch.randn(9, 2, generator=draw), torch.randn(2, 7, generator=draw), (9, 7)) for _ in range(2))
    found = total(methods.slerp([one, other], [1 - share, share])).flatten()
    ends = [change.dense().double().flatten() for change in (one, other)]
    angle = math.acos(torch.cosine_similarity(*ends, dim=0))
    assert math.acos(torch.cosine_similarity(found, ends[0], dim=0)) == pytest.approx(share * angle, abs=1e-6)
    assert math.acos(torch.cosine_similarity(found, ends[1], dim=0)) == pytest.approx((1 - share) * angle, abs=1e-6)
    assert float(found.norm()) == pytest.approx((1 - share) * float(ends[0].norm()) + share * float(ends[1].norm()), rel=1e-6)


def test_slerp_of_three_is_as_far_from_each():
    ends = [product([[3.0, 0.0, 0.0]]), product([[0.0, 3.0, 0.0]]), product([[0.0, 0.0, 3.0]])]
    close(total(methods.slerp(ends, [1 / 3] * 3)), [[math.sqrt(3)] * 3])
    weights = [0.5, 0.3, 0.2]
    mean = total(methods.slerp(ends, weights)).flatten() / 3
    tangents = []  # at the mean, the ways to the three cancel: this is what makes it the mean
    for end, weight in zip(torch.eye(3, dtype=torch.float64), weights, strict=True):
        angle = math.acos(float(mean @ end))
        tangents.append(weight * angle / math.sin(angle) * (end - math.cos(angle) * mean))
    assert float(sum(tangents).norm()) < 1e-9
    two = methods.slerp(ends, [0.6, 0.4, 0.0])
    assert [term.weight for term in two] == pytest.approx([*methods.slerp_coefficients(methods.gram(ends[:2]), [0.6, 0.4]), 0.0])


def test_opposite_directions_have_no_mean():
    with pytest.raises(LoraError, match=r"opposite directions.*method=linear"):
        methods.slerp([A, A.scaled(-2)], [0.5, 0.5])


@pytest.mark.parametrize(
    "remove, wanted",
    [
        ("inputs", [[2.0, 3.0], [0.0, 5.0]]),  # the first column is what A reads
        ("outputs", [[2.0, 0.0], [4.0, 5.0]]),  # the first row is what A writes
        ("either", [[2.0, 0.0], [0.0, 5.0]]),
        ("both", [[2.0, 3.0], [4.0, 5.0]]),
    ],
)
def test_orthogonal(remove, wanted):
    other = product([[7.0, 3.0], [4.0, 5.0]])
    close(total(methods.orthogonal([A, other], [1.0, 1.0], remove)), wanted)
    (left,) = methods.orthogonal([A, other], [0.0, 1.0], remove)
    close(left.change.dense(), [[0.0, wanted[0][1]], wanted[1]])


def test_orthogonal_without_a_layer_and_of_three():
    close(total(methods.orthogonal([None, B], [1.0, 1.0])), [[0.0, 0.0], [1.0, 4.0]])
    close(total(methods.orthogonal([A, None], [1.0, 1.0])), [[2.0, 0.0], [0.0, 0.0]])
    first, second, third = product([[1.0, 0, 0]]), product([[5.0, 1, 0]]), product([[6.0, 7, 1]])
    close(total(methods.orthogonal([first, second, third], [1.0, 1.0, 1.0])), [[1.0, 1.0, 1.0]])
    nothing = A.scaled(0)
    close(total(methods.orthogonal([nothing, nothing, B], [1.0, 1.0, 1.0], "either")), [[0.0, 0.0], [1.0, 4.0]])
    doubled = Product(torch.cat([A.up, A.up], 1), torch.cat([A.down, A.down]), A.shape)  # no more directions than before
    close(total(methods.orthogonal([doubled, B], [0.0, 1.0])), [[0.0, 0.0], [0.0, 4.0]])


X = torch.tensor([[4.0, -1.0, 2.0], [0.5, -3.0, 0.1]])
Y = torch.tensor([[-2.0, -5.0, 1.0], [0.2, 6.0, -0.3]])


def test_trimming_keeps_the_largest():
    def trimmed(change, density):
        return methods.magnitude_prune([change], [1.0], density)

    close(trimmed(X, 0.5), [[4.0, 0.0, 2.0], [0.0, -3.0, 0.0]])
    close(trimmed(X, 1.0), X.tolist())
    close(trimmed(X, 0.01), [[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    close(trimmed(torch.tensor([[1.0, -1.0, 0.5, 0.0]]), 0.25), [[1.0, -1.0, 0.0, 0.0]])  # equal ones stay or go together
    close(methods.magnitude_prune([X, Y], [1.0, 0.5], 0.5), [[3.0, -2.5, 2.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("kind", ["random", "equal", "zero", "sorted", "periodic"])
def test_the_border_of_the_largest_is_exact(kind):
    """Whatever the values that the sample sees: those of `periodic` are all alike, and others lie between them."""
    draw = torch.randn(700, 610, generator=torch.Generator().manual_seed(5))
    change = {
        "random": draw, "equal": torch.ones_like(draw), "zero": torch.where(draw > 1, draw, 0),
        "sorted": draw.flatten().sort().values.view_as(draw),
        "periodic": torch.where(torch.arange(610) % methods.SAMPLED == 0, 1e3, draw),
    }[kind]  # fmt: skip
    values = change.abs().flatten().sort(descending=True).values
    for count in (1, 2, 999, len(values) // 2, len(values) - 1, len(values)):
        assert float(methods.smallest_kept(change, count)) == float(values[count - 1]), count


def test_a_few_rows_at_a_time_make_what_all_do(monkeypatch):
    draw = torch.Generator().manual_seed(6)
    changes, keys = [torch.randn(40, 30, generator=draw) for _ in range(2)], [(0,), (1,)]
    for name, options in (("ties", {}), ("dare_ties", {"keys": keys}), ("della", {"keys": keys}), ("dare_linear", {"keys": keys})):
        monkeypatch.setattr(methods, "CACHED", 1 << 20)
        whole = getattr(methods, name)(changes, [1.0, 0.5], **options)
        monkeypatch.setattr(methods, "CACHED", 7 * 30)
        assert torch.equal(getattr(methods, name)(changes, [1.0, 0.5], **options), whole), name


def test_ties_by_hand():
    """Trimmed: 4, 0, 2 / 0, -3, 0 and -2, -5, 0 / 0, 6, 0. Signs of the sums: +, -, + / any, +, any."""
    close(methods.ties([X, Y], [1.0, 1.0], 0.5), [[4.0, -5.0, 2.0], [0.0, 6.0, 0.0]])
    close(methods.ties([X, X / 2], [1.0, 1.0], 0.5), [[3.0, 0.0, 1.5], [0.0, -2.25, 0.0]])
    votes = [torch.tensor([[-9.0]]), torch.tensor([[1.0]]), torch.tensor([[2.0]])]
    close(methods.ties(votes, [1.0] * 3, 1.0), [[-9.0]])
    close(methods.ties(votes, [1.0] * 3, 1.0, sign="frequency"), [[1.5]])


def test_dropping_keeps_the_expectation():
    ones = torch.ones(200, 200)

    def found_by(*key):
        return methods.dare_linear([ones], [1.0], [key], 0.25)

    found = found_by(0, "x")
    assert set(found.unique().tolist()) == {0.0, 4.0} and float(found.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(found, found_by(0, "x")) and not torch.equal(found, found_by(1, "x"))
    close(methods.dare_linear([X, Y], [1.0, 2.0], [(0,), (1,)], 1.0), (X + 2 * Y).tolist())
    close(methods.dare_ties([X, X], [1.0, 1.0], [(0,), (0,)], 1.0), X.tolist())


def test_della_keeps_large_values_sooner():
    rows = torch.arange(1, 11.0).repeat(4000, 1)
    found = methods.della([rows], [1.0], [(0,)], density=0.5, epsilon=0.4)
    stayed = (found != 0).double().mean(dim=0)
    wanted = torch.linspace(0.3, 0.7, 10, dtype=torch.float64)
    torch.testing.assert_close(stayed, wanted, rtol=0, atol=0.03)
    torch.testing.assert_close(found.max(dim=0).values.double(), rows[0].double() / wanted, rtol=1e-6, atol=0)
    same = methods.della([X, Y], [1.0, 1.0], [(0,), (1,)], density=0.5, epsilon=0.0)
    close(same, methods.dare_ties([X, Y], [1.0, 1.0], [(0,), (1,)], 0.5).tolist())


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_dense_methods_are_those_of_peft(density):
    from peft.utils import merge_utils

    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        changes, weights = [torch.randn(12, 9, generator=draw) for _ in range(3)], torch.rand(3, generator=draw)
        told = weights.tolist()
        torch.testing.assert_close(methods.magnitude_prune(changes, told, density), merge_utils.magnitude_prune(changes, weights, density))
        for sign in ("total", "frequency"):
            theirs = merge_utils.ties(changes, weights, density, sign)
            torch.testing.assert_close(methods.ties(changes, told, density, sign), theirs)
        keys = [(0, "merge", index) for index in range(3)]
        kept = [dropped(change, density, key) for change, key in zip(changes, keys, strict=True)]  # in place of their global chance
        torch.testing.assert_close(methods.dare_linear(changes, told, keys, density), merge_utils.task_arithmetic(kept, weights))
        signs = merge_utils.calculate_majority_sign_mask(torch.stack(kept))
        theirs = merge_utils.disjoint_merge(torch.stack(kept) * weights[:, None, None], signs)
        torch.testing.assert_close(methods.dare_ties(changes, told, keys, density), theirs)
