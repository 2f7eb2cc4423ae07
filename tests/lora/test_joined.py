"""Several layers as one of the joined weight: W is [W_0; W_1; W_2] with 3, 2 and 4 rows."""

import pytest
import torch

from charforgex.errors import LoraError
from charforgex.lora.joined import alike, join, split, swap_halves
from charforgex.lora.state import LoraLayer

ROWS = [(0, 3), (3, 5), (5, 9)]


def layer(part, rank=2, alpha=1.0, down=None):
    generator = torch.Generator().manual_seed(part)
    rows = ROWS[part][1] - ROWS[part][0]
    down = torch.randn(rank, 6, generator=generator) if down is None else down
    return LoraLayer(down, torch.randn(rows, rank, generator=generator), alpha)


def stacked(layers):
    """The dense change of the joined weight."""
    return torch.cat([x.delta() if x else torch.zeros(end - start, 6) for x, (start, end) in zip(layers, ROWS, strict=True)])


def same(one, other):
    return (one is None) == (other is None) and (one is None or one.equals(other))


@pytest.mark.parametrize("alpha", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,), (1, 2)])
def test_parts_come_back_as_they_were(present, alpha):
    layers = [layer(i, alpha=alpha) if i in present else None for i in range(3)]
    joined = join(layers, ROWS)
    assert joined.rank == 2 * len(present)
    assert joined.scale == pytest.approx(alpha / 2)
    torch.testing.assert_close(joined.delta(), stacked(layers))
    assert all(map(same, split(joined, ROWS), layers))


def test_by_hand():
    """Rank 1 and alpha 1 each: rank 3 and alpha 3 together, a block of `up` for each."""
    ones = [LoraLayer(torch.full((1, 6), float(i)), torch.ones(end - start, 1), 1.0) for i, (start, end) in enumerate(ROWS)]
    joined = join(ones, ROWS)
    assert joined.alpha == 3.0
    assert joined.down[:, 0].tolist() == [0, 1, 2]
    assert joined.up.tolist() == [[1, 0, 0]] * 3 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 4
    assert joined.delta()[:, 0].tolist() == [0] * 3 + [1] * 2 + [2] * 4


def test_a_part_that_is_zero_is_still_there():
    layers = [layer(0), LoraLayer(torch.ones(2, 6), torch.zeros(2, 2), 1.0), layer(2)]
    assert all(map(same, split(join(layers, ROWS), ROWS), layers))


def test_a_shared_down_is_kept_once():
    """As an adapter that was trained on the joined weight."""
    down = torch.randn(2, 6, generator=torch.Generator().manual_seed(9))
    layers = [layer(i, down=down) for i in range(3)]
    joined = join(layers, ROWS)
    assert joined.rank == 2 and joined.alpha == 1.0 and joined.up.shape == (9, 2)
    torch.testing.assert_close(joined.delta(), stacked(layers))
    back = split(joined, ROWS)
    assert all(map(same, back, layers))
    assert len({x.down.data_ptr() for x in back}) == 3, "shared memory could not be saved"


def test_a_trained_joined_layer_is_split_whatever_its_rank():
    generator = torch.Generator().manual_seed(3)
    for rank in (1, 2, 3, 4, 6):
        joined = LoraLayer(torch.randn(rank, 6, generator=generator), torch.randn(9, rank, generator=generator), 5.0)
        parts = split(joined, ROWS)
        torch.testing.assert_close(stacked(parts), joined.delta())
        assert join(parts, ROWS).equals(joined)


def test_unequal_parts_are_made_alike():
    layers = [layer(0, rank=1, alpha=1.0), layer(1, rank=4, alpha=1.0), layer(2, rank=2, alpha=0.0)]
    made = alike(layers)
    assert {(x.rank, x.alpha) for x in made} == {(4, 1.0)}
    for one, other in zip(layers, made, strict=True):
        torch.testing.assert_close(one.delta(), other.delta())
    torch.testing.assert_close(join(made, ROWS).delta(), stacked(layers))
    equal = [layer(0), layer(1)]
    assert alike(equal) == equal


def test_swapped_halves():
    one = LoraLayer(torch.ones(1, 6), torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 1.0)
    assert swap_halves(one).up.flatten().tolist() == [3, 4, 1, 2]
    assert swap_halves(swap_halves(one)).equals(one)


def test_rows_of_another_weight_are_refused():
    with pytest.raises(LoraError, match=r"up \(8, 2\) does not have the 9 rows of the 3 modules"):
        split(LoraLayer(torch.ones(2, 6), torch.ones(8, 2), 1.0), ROWS)
