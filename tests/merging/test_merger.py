"""One layer of the result against dense matrices in float64, with different ranks, strengths and missing layers."""

import math
import random

import pytest
import torch

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora import lowrank
from charforgex.lora.state import LohaLayer, LoraLayer
from charforgex.merging import methods
from charforgex.merging.merger import Merger
from charforgex.merging.settings import KINDS, Method, Size

NAME = "unet.mid_block.attentions.0.proj_in"
CASES = 200


def layer(rng, shape, rank):
    draw = torch.Generator().manual_seed(rng.randrange(2**32))
    down = torch.randn(rank, *shape[1:], generator=draw)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw)
    return LoraLayer(down, up, rng.uniform(0.2, 2 * rank))


def exact(found):
    """The change in float64, (out, k)."""
    return found.up.double().flatten(1) @ found.down.double().flatten(1) * found.alpha / found.rank


def merger(method, layers, weights, size=None, factors=None, names=(NAME,), **options):
    made = Method(method, KINDS[method].options(**options))
    files = [one if isinstance(one, dict) else {NAME: one} for one in layers]
    factors = factors or [dict.fromkeys(names, 1.0)] * len(files)
    return Merger(made, size or Size(), lambda index, name: files[index].get(name), weights, factors, names=names)


def random_case(number):
    """Layers of one weight, None where a file has none, and weights."""
    rng = random.Random(number)
    shape = rng.choice([(12, 9), (7, 16), (8, 3, 3, 3)])
    layers = [layer(rng, shape, rng.randint(1, 5)) if rng.random() < 0.85 else None for _ in range(rng.randint(2, 4))]
    layers[rng.randrange(len(layers))] = layer(rng, shape, rng.randint(1, 5))
    return layers, [round(rng.uniform(0.1, 1.5), 3) for _ in layers]


def dense_slerp(changes, weights):
    """Two at a time: a mean of more is checked by what makes it one."""
    (x, y), (v, w) = changes, weights
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    t, size = w / (v + w), v * x.norm() + w * y.norm()
    return size * (math.sin((1 - t) * angle) * x / x.norm() + math.sin(t * angle) * y / y.norm()) / math.sin(angle)


def dense_orthogonal(changes, weights):
    done = torch.zeros_like(changes[0])
    for index, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        before = torch.cat(changes[:index]) if index else change[:0]
        done += weight * (change - change @ torch.linalg.pinv(before, rtol=1e-6) @ before if index else change)
    return done


def dropped(change, chance, key):
    return torch.where(torch.rand(change.shape, generator=torch_generator(*key)) < chance, change / chance, 0)


def reference(method, changes, weights, first, keys):
    """The result as its paper has it, of dense changes (out, k) in float64."""
    if method == "subtract":
        return sum((w if i == 0 and first else -w) * x for i, (x, w) in enumerate(zip(changes, weights, strict=True)))
    if method == "slerp":
        return dense_slerp(changes, weights) if len(changes) == 2 else weights[0] * changes[0]
    if method == "orthogonal":
        return dense_orthogonal(changes, weights)
    if method in ("linear", "stack", "svd"):
        return sum(w * x for x, w in zip(changes, weights, strict=True))
    if method in ("ties", "magnitude_prune"):
        kept = [torch.where(x.abs() >= x.abs().flatten().sort(descending=True).values[int(0.5 * x.numel()) - 1], x, 0) for x in changes]
    elif method == "della":
        kept = []
        for x, key in zip(changes, keys, strict=True):
            ranks = torch.zeros_like(x)
            for i, row in enumerate(x):
                for place, j in enumerate(row.abs().argsort()):
                    ranks[i, j] = 0.4 + 0.2 * place / (x.shape[1] - 1)
            kept.append(dropped(x, ranks, key))
    else:
        kept = [dropped(x, 0.5, key) for x, key in zip(changes, keys, strict=True)]
    if method in ("magnitude_prune", "dare_linear"):
        return sum(w * x for x, w in zip(kept, weights, strict=True))
    winner = torch.stack(kept).sum(0).sign()
    there = torch.stack(kept).sign() == torch.where(winner == 0, 1, winner)
    return (torch.stack(kept) * there * torch.tensor(weights, dtype=torch.float64)[:, None, None]).sum(0) / there.sum(0).clamp(min=1)


@pytest.mark.parametrize("method", KINDS)
def test_every_method_is_that_of_dense_matrices(method):
    """With all of the result kept; of svd the best part of the rank is."""
    tried = 0
    for number in range(10 * CASES):
        layers, weights = random_case(number)
        live = [index for index, found in enumerate(layers) if found is not None]
        if method == "slerp" and len(live) > 2:
            continue
        changes, own = [exact(layers[index]) for index in live], [weights[index] for index in live]
        keys = [(0, "merge", NAME, methods.content(lowrank.product(layers[index]))) for index in live]
        wanted = reference(method, changes, own, live[0] == 0, keys)
        rank = min(wanted.shape) if KINDS[method].dense else None
        made = merger(method, layers, weights, Size(rank=rank))
        found = made.layer(NAME)
        scale = float(wanted.norm())
        if method == "svd":
            kept = max(layers[index].rank for index in live)
            best = float(torch.linalg.svdvals(wanted)[kept:].norm())
            assert found.rank <= kept and float((exact(found) - wanted).norm()) == pytest.approx(best, abs=1e-5 * scale)
            assert made.rows[NAME].error * scale == pytest.approx(best, abs=1e-5 * scale)
        elif scale > 1e-5 * sum(float(change.norm()) for change in changes):
            assert float((exact(found) - wanted).norm()) <= 1e-5 * scale, (method, number)
            assert made.rows[NAME].norm == pytest.approx(scale, rel=1e-5)
        else:  # nothing of the first is left: the same space
            assert found is None
        tried += 1
        if tried == CASES:
            break
    assert tried == CASES


def test_stacked_ranks_add_up_and_both_halves_are_as_large():
    rng = random.Random(0)
    layers = [layer(rng, (12, 9), rank) for rank in (2, 5)]
    found = merger("stack", layers, [1e-4, 1.0]).layer(NAME)
    assert found.rank == 7 and found.alpha == 7
    for part in (slice(0, 2), slice(2, 7)):
        assert float(found.up[:, part].norm()) == pytest.approx(float(found.down[part].norm()), rel=1e-5)


def test_one_file_alone_keeps_its_factors():
    rng = random.Random(1)
    one, other = layer(rng, (12, 9), 3), layer(rng, (12, 9), 4)
    for method, weights in (("linear", [0.5, 0.0]), ("slerp", [1.0, 0.0]), ("slerp", [0.0, 1.0])):
        index = weights.index(max(weights))
        found = merger(method, [one, other], weights).layer(NAME)
        source = (one, other)[index]
        assert torch.equal(found.up, source.up) and torch.equal(found.down, source.down)
        assert found.alpha == source.alpha * weights[index]


def test_ranks_that_are_shared_are_not_kept_twice():
    one = layer(random.Random(2), (12, 9), 3)
    assert merger("linear", [one, one], [0.5, 0.5]).layer(NAME).rank == 3
    assert merger("subtract", [one, one], [1.0, 1.0]).layer(NAME) is None
    assert merger("orthogonal", [one, one], [0.0, 1.0]).layer(NAME) is None


def test_how_much_is_kept():
    rng = random.Random(3)
    layers = [layer(rng, (12, 9), 4) for _ in range(2)]
    values = torch.linalg.svdvals(sum(exact(one) for one in layers) / 2)
    energy = (values**2).cumsum(0) / (values**2).sum()
    assert merger("linear", layers, [0.5, 0.5], Size(rank=2)).layer(NAME).rank == 2
    assert merger("ties", layers, [1.0, 1.0]).layer(NAME).rank == 4
    assert merger("linear", layers, [0.5, 0.5], Size(energy=0.8)).layer(NAME).rank == int((energy < 0.8).sum()) + 1
    made = merger("linear", layers, [0.5, 0.5], Size(error=0.3))
    assert made.layer(NAME).rank == int((1 - energy > 0.09).sum()) + 1 and made.rows[NAME].error <= 0.3


def test_large_layers_are_cut_by_their_largest_directions_alone():
    rng = random.Random(8)
    layers = [layer(rng, (60, 50), 4) for _ in range(2)]
    made, whole = merger("ties", layers, [1.0, 1.0]), merger("ties", layers, [1.0, 1.0], Size(rank=50))
    wanted = exact(whole.layer(NAME))
    values = torch.linalg.svdvals(wanted)
    best = float(values[4:].norm())
    assert float((exact(made.layer(NAME)) - wanted).norm()) == pytest.approx(best, rel=1e-5)
    assert made.rows[NAME].lost == pytest.approx(best, rel=1e-5) and made.rows[NAME].norm == pytest.approx(float(values.norm()), rel=1e-5)


def test_one_angle_for_whole_adapters():
    rng = random.Random(4)
    names = ["unet.a", "unet.b", "unet.c"]
    files = [
        {"unet.a": layer(rng, (6, 5), 2), "unet.b": layer(rng, (4, 7), 2)},
        {"unet.b": layer(rng, (4, 7), 3), "unet.c": layer(rng, (5, 5), 1)},
    ]
    made = merger("slerp", files, [0.75, 0.25], names=names, angle="adapter")
    found = torch.cat([exact(made.layer(name)).flatten() for name in names])
    shapes = {"unet.a": 30, "unet.b": 28, "unet.c": 25}
    ends = [torch.cat([exact(f[name]).flatten() if name in f else torch.zeros(shapes[name]).double() for name in names]) for f in files]
    torch.testing.assert_close(found, dense_slerp(ends, [0.75, 0.25]), rtol=1e-5, atol=1e-5)


def test_a_factor_of_all_files_makes_slerp_weaker_and_no_other():
    rng = random.Random(5)
    layers = [layer(rng, (12, 9), 3) for _ in range(2)]
    whole = exact(merger("slerp", layers, [0.4, 0.6]).layer(NAME))
    for angle in ("layer", "adapter"):
        half = merger("slerp", layers, [0.4, 0.6], factors=[{NAME: 0.5}] * 2, angle=angle)
        torch.testing.assert_close(exact(half.layer(NAME)), whole / 2, rtol=1e-5, atol=1e-5)


def test_chance_depends_on_the_change_and_not_on_the_order():
    rng = random.Random(6)
    one, other = layer(rng, (12, 9), 3), layer(rng, (12, 9), 3)
    for method in ("dare_linear", "dare_ties", "della"):
        first = exact(merger(method, [one, other], [0.3, 0.7], Size(rank=9)).layer(NAME))
        torch.testing.assert_close(exact(merger(method, [other, one], [0.7, 0.3], Size(rank=9)).layer(NAME)), first, rtol=1e-4, atol=1e-4)
        again = exact(merger(method, [one, other], [0.3, 0.7], Size(rank=9), seed=1).layer(NAME))
        assert float((again - first).norm()) > 0.1 * float(first.norm())
        twice = exact(merger(method, [one, one], [0.5, 0.5], Size(rank=9)).layer(NAME))
        scale = 1.0 if method == "dare_linear" else 0.5  # a mean of two halves
        alone = exact(merger(method, [one], [1.0], Size(rank=9)).layer(NAME))
        torch.testing.assert_close(twice, alone * scale, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_named():
    loha = LohaLayer(torch.ones(4, 2), torch.ones(2, 4), torch.ones(4, 2), torch.ones(2, 4), 1.0)
    with pytest.raises(LoraError, match=f"{NAME}: A layer of loha"):
        merger("linear", [loha], [1.0]).layer(NAME)
    rng = random.Random(7)
    with pytest.raises(LoraError, match=f"{NAME}: Changes of weights of different shapes"):
        merger("linear", [layer(rng, (12, 9), 2), layer(rng, (12, 8), 2)], [1.0, 1.0]).layer(NAME)


def test_a_layer_outside_of_its_files_blocks_is_as_if_it_was_not_there():
    """It is not what others are freed of, and its rank counts for nothing."""
    rng = random.Random(11)
    one, other = layer(rng, (12, 9), 5), layer(rng, (12, 9), 2)
    chosen = [{NAME: 0.0}, {NAME: 1.0}]
    found = merger("orthogonal", [one, other], [1.0, 1.0], factors=chosen)
    torch.testing.assert_close(exact(found.layer(NAME)), exact(other))
    assert found.rows[NAME].ranks == (None, 2)
    assert float((exact(merger("orthogonal", [one, other], [0.0, 1.0]).layer(NAME)) - exact(other)).norm()) > 0.1


@pytest.mark.parametrize("method", ["linear", "ties", "stack"])
def test_what_is_zero_or_broken(method):
    one = layer(random.Random(12), (12, 9), 2)
    zero = LoraLayer(one.down, torch.zeros_like(one.up), 2.0)
    assert merger(method, [zero, None], [1.0, 1.0]).layer(NAME) is None
    with pytest.raises(LoraError, match=f"{NAME}: Its values are too large"):
        merger(method, [one, LoraLayer(one.down, one.up, 1e30)], [1.0, 1.0]).layer(NAME)
