"""The order of batches: fair, of one bucket, and a function of the number."""

import pickle
from collections import Counter

import pytest

from charforgex.curation.manifest import Record
from charforgex.data.dataset import Order, arrange


def records(*sizes):
    return [Record(f"{n}.png", f"{n:064x}", width, height, ("a",)) for n, (width, height) in enumerate(sizes)]


BUCKETS = {(64, 64): range(0, 9), (48, 80): range(9, 14), (80, 48): range(14, 15)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 20])
def test_everyone_is_seen_equally(batch_size):
    order = Order(BUCKETS, batch_size, seed=1)
    bucket_of = {item: bucket for bucket, items in BUCKETS.items() for item in items}
    counts = Counter()
    for number in range(30):
        batch = order.batch(number)
        assert len(batch) == batch_size and len({bucket_of[item] for item in batch}) == 1
        counts.update(batch)
        for items in BUCKETS.values():  # within a bucket never more than one apart
            seen = [counts[item] for item in items]
            assert max(seen) - min(seen) <= 1
        if (number + 1) % 15 == 0:  # a cycle: 15 items, 15 batches
            assert set(counts.values()) == {(number + 1) // 15 * batch_size} and len(counts) == 15


def test_buckets_are_spread_over_the_cycle():
    order = Order(BUCKETS, 2, seed=1)
    squares = [order.batch(number)[0] < 9 for number in range(15)]
    for number in range(15):
        assert abs(sum(squares[: number + 1]) - 9 * (number + 1) / 15) < 2


def test_epochs_differ_and_so_do_seeds():
    one, two = Order({(8, 8): range(20)}, 20, 1), Order({(8, 8): range(20)}, 20, 2)
    assert one.batch(0) != one.batch(1) and one.batch(0) != two.batch(0)
    assert sorted(one.batch(0)) == list(range(20))
    single = Order({(8, 8): range(20)}, 1, 1)
    cycles = [[single.batch(number)[0] for number in range(start, start + 20)] for start in (0, 20, 40)]
    assert cycles[0] != cycles[1] != cycles[2] and all(sorted(cycle) == list(range(20)) for cycle in cycles)


def test_any_number_in_any_order_and_any_process():
    order = Order(BUCKETS, 3, seed=4)
    wanted = {number: order.batch(number) for number in range(0, 4000, 37)}
    again = pickle.loads(pickle.dumps(Order(dict(reversed(BUCKETS.items())), 3, seed=4)))
    assert {number: again.batch(number) for number in reversed(wanted)} == wanted


def test_arranging_at_several_resolutions():
    items, notes = arrange(records((200, 200), (60, 60)), [64, 128], 16, upscale=False, repeats={})
    # 60 -> 64 enlarges 1.07 times, 60 -> 128 2.1 times
    assert [(item.record.path, item.cut.size) for item in items] == [
        ("0.png", (64, 64)), ("0.png", (128, 128)), ("1.png", (64, 64))]  # fmt: skip
    assert len(notes) == 1 and "1.png (60 x 60) is not used at every resolution" in notes[0] and "2.1 times for 128" in notes[0]


def test_small_pictures_are_left_out_unless_asked():
    items, notes = arrange(records((51, 51), (52, 52)), [64], 16, upscale=False, repeats={})  # 64 / 51 = 1.255, 64 / 52 = 1.23
    assert [item.record.path for item in items] == ["1.png"] and "0.png (51 x 51) is left out" in notes[0]
    items, notes = arrange(records((20, 20)), [64], 16, upscale=True, repeats={})
    assert len(items) == 1 and notes == []


def test_a_panorama_is_noted():
    items, notes = arrange(records((800, 100)), [64], 16, upscale=False, repeats={})
    # 8:1 into 80 x 48 (1.67:1): 1 - 1.667 / 8 = .79
    assert items[0].cut.size == (48, 80) and "loses 79% of its area to the bucket 80 x 48" in notes[0]
