"""First weights: PiSSA's directions, and what is left of a change when its start is subtracted."""

import pytest
import torch
from torch import nn

from charforgex.errors import LoraError
from charforgex.lora.inject import adapter_parameters, inject, read_adapter
from charforgex.lora.start import first_layer, principal, together
from charforgex.lora.state import LoraLayer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (12, 6, 3, 3)])
def test_pissa_begins_with_the_largest_directions(shape):
    weight = draw(*shape)
    values = torch.linalg.svdvals(weight.flatten(1))
    layer = principal(weight, "a.b", rank=4, alpha=2.0, seed=0)
    rest = torch.linalg.svdvals((weight - layer.delta()).flatten(1))
    torch.testing.assert_close(rest[: len(values) - 4], values[4:], rtol=2e-2, atol=1e-3)
    assert (layer.up.norm() / layer.down.norm()).item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(principal(weight, "a.b", 4, 2.0, 0).down, layer.down)
    with pytest.raises(LoraError, match=r"a\.b has .* fewer than rank 99"):
        principal(weight, "a.b", rank=99, alpha=1.0, seed=0)


def test_what_was_learnt_beyond_the_start_survives_half_precision():
    """A change of 1e-3 beside directions of size 10: factors side by side would round it away, decomposed anew they keep it."""
    weight = 10 * draw(32, 3, seed=1) @ draw(3, 48, seed=2)
    start = principal(weight, "x", rank=3, alpha=3.0, seed=0)
    trained = LoraLayer(start.down + 1e-4 * draw(*start.down.shape, seed=3), start.up + 1e-4 * draw(*start.up.shape, seed=4), 3.0)
    exact = trained.up.double() @ trained.down.double() - start.up.double() @ start.down.double()
    both = together(trained, LoraLayer(start.down, -start.up, 3.0))
    assert both.rank == 6 and both.scale == 1.0

    def error(layer):
        return ((layer.delta().double() - exact).norm() / exact.norm()).item()

    half = both.map(lambda x: x.half().float())
    beside = LoraLayer(torch.cat([trained.down, start.down]), torch.cat([trained.up, -start.up], 1), 6.0)
    assert error(both) < 1e-5 and error(half) < 1e-3 and error(beside.map(lambda x: x.half().float())) > 0.1


def test_rslora_is_alpha_over_the_root_of_the_rank_in_plain_words():
    """The layer's alpha says it by the common rule, so that every file and tool has the same strength."""
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(network, ["0", "1"], rank=4, alpha=2.0, rslora=True, ranks={"1": 16})
    layers = read_adapter(network, "net").of("net")
    assert {path: (layer.rank, layer.alpha, layer.scale) for path, layer in layers.items()} == {"0": (4, 4.0, 1.0), "1": (16, 8.0, 0.5)}


def test_ranks_and_alphas_by_pattern():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    inject(network, ["re:[01]"], rank=4, alpha=2.0, ranks={"*": 3, "1": 2}, alphas={"re:0": 6.0})
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(network).items()}
    assert shapes == {"0.down": (3, 8), "0.up": (8, 3), "1.down": (2, 8), "1.up": (8, 2)}
    assert [layer.scale for layer in read_adapter(network, "net").layers.values()] == [2.0, 1.0]


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_step_of_adam_moves_a_weight_by_as_much_for_every_kind(kind):
    """Its first step is the learning rate in every entry of the factor that is zero: the change that makes is a LoRA's within a factor."""

    def moved(kind):
        layer = first_layer(kind, torch.zeros(64, 96), "x", rank=4, alpha=4.0, seed=0)
        zero = next(name for name, factor in layer.tensors().items() if not factor.any())
        change = torch.sign(draw(*getattr(layer, zero).shape))
        return type(layer)(**{"alpha": layer.alpha, **layer.tensors(), zero: change}).delta().square().mean().sqrt()

    assert 0.5 < moved(kind) / moved("lora") < 2
