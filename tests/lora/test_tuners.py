"""Every kind of adapter does to the weight what its formula says, alone, at any strength, and beside others."""

import pytest
import torch
from torch import nn

from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter, same_output, set_scales, without_adapter
from charforgex.lora.state import Lora
from charforgex.types import Components
from tests.families.rows import ROWS
from tests.families.test_contract import batch_of, predict

KINDS = {
    "lora": {},
    "dora": {"kind": "dora"},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "whole lokr": {"kind": "lokr", "factor": 4},
}
KINDS |= {"pissa": {"init": "pissa"}, "rslora": {"rslora": True}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear, self.plain = nn.Linear(12, 16), nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.requires_grad_(False).eval()

    def forward(self, x):
        x = self.plain(self.linear(x))
        return self.conv(x.reshape(1, 8, 2, 2))


TARGETS = ["linear", "plain", "conv"]


@pytest.fixture
def x():
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


def move(network, size=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def dense(lora, scale=1.0):
    """A network whose weights are changed as the formulas say."""
    network = Net()
    with torch.no_grad():
        for path, layer in lora.of("net").items():
            weight = network.get_submodule(path).weight
            weight += scale * layer.change(weight)
    return network


def parts_of(network):
    return Components("net", "net", {"net": network})


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def adapted(name, **more):
    network = Net()
    inject(network, TARGETS, rank=2, alpha=3.0, seed=5, **KINDS[name], **more)
    move(network)
    return network


@pytest.mark.parametrize("name", KINDS)
def test_a_new_adapter_changes_nothing_and_draws_from_its_key_alone(name, x):
    network, again = Net(), Net()
    for net, seed in ((network, 1), (again, 2)):
        torch.manual_seed(seed)
        inject(net, TARGETS, rank=2, alpha=3.0, seed=5, **KINDS[name])
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    close(network(x), Net()(x)) if name == "pissa" else torch.testing.assert_close(network(x), Net()(x), rtol=0, atol=0)
    one, other = adapter_parameters(network), adapter_parameters(again)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {p.dtype for p in one.values()} == {torch.float32} and all(p.requires_grad for p in one.values())
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in one.values()}


@pytest.mark.parametrize("name", KINDS)
def test_it_does_to_the_weights_what_its_formula_says_at_any_strength(name, x):
    network = adapted(name)
    lora = read_adapter(network, "net")
    trained = network(x)
    assert (trained - Net()(x)).abs().max() > 0.05
    close(trained, dense(lora)(x))
    fresh = parts_of(Net())
    load_adapter(fresh, lora, "mine")
    close(fresh["net"](x), trained)
    set_scales(fresh, {"mine": 0.4})
    close(fresh["net"](x), dense(lora, 0.4)(x))
    set_scales(fresh, {"mine": 0.0})
    close(fresh["net"](x), Net()(x))
    with without_adapter(network):
        assert torch.equal(network(x), Net()(x))
    assert torch.equal(network(x), trained)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_compared_bit_for_bit(name, x):
    network = adapted(name)
    before = network(x)
    lora = read_adapter(network, "net")
    assert same_output(network, "net", lora, lora) == []
    wrong = dict(lora.layers)
    wrong["net.plain"] = wrong["net.plain"].map(lambda tensor: tensor * 1.001)
    assert same_output(network, "net", lora, Lora(wrong)) == ["plain"]
    assert torch.equal(network(x), before)


def test_kinds_beside_each_other_add_up(x):
    loras = {name: read_adapter(adapted(name), "net") for name in ("lora", "dora", "loha", "lokr")}
    parts = parts_of(Net())
    for name, lora in loras.items():
        load_adapter(parts, lora, name, scale=0.5)
    expected = Net()
    with torch.no_grad():
        for path in TARGETS:
            weight = Net().get_submodule(path).weight
            expected.get_submodule(path).weight += sum(0.5 * lora.of("net")[path].change(weight) for lora in loras.values())
    close(parts["net"](x), expected(x))
    for name, lora in loras.items():
        assert read_adapter(parts["net"], "net", name).sha256() == lora.sha256()
    set_scales(parts, dict.fromkeys(loras, 0.0))
    close(parts["net"](x), Net()(x))


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "pissa"])
def test_every_factor_learns(name, x):
    """From where they begin, not all can: one factor is zero so that nothing changes, and those beside it have no gradient yet."""
    network = adapted(name)
    network(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(network).values())
    if name == "dora":  # the norm counts as a constant: the gradient is that of the formula with it detached
        layer, weight = read_adapter(network, "net").of("net")["conv"], Net().conv.weight
        up = layer.up.clone().requires_grad_(True)
        moved = weight + layer.scale * (up.flatten(1) @ layer.down.flatten(1)).view(weight.shape)
        gain = layer.magnitude / torch.linalg.norm(moved.detach().flatten(1), dim=1)
        inner = network.plain(network.linear(x)).detach().reshape(1, 8, 2, 2)
        nn.functional.conv2d(inner, moved * gain.view(-1, 1, 1, 1), network.conv.get_base_layer().bias, padding=1).square().sum().backward()
        close(up.grad, adapter_parameters(network)["conv.up"].grad)


def test_a_bfloat16_base_leaves_magnitudes_and_factors_in_float32(x):
    network = Net().to(torch.bfloat16)
    inject(network, TARGETS, rank=2, alpha=3.0, kind="dora")
    assert {p.dtype for p in adapter_parameters(network).values()} == {torch.float32}
    assert torch.equal(network(x.bfloat16()), Net().to(torch.bfloat16)(x.bfloat16()))
    move(network)
    parts = parts_of(Net().to(torch.bfloat16))
    load_adapter(parts, read_adapter(network, "net"), "mine")
    frozen = {name.rpartition(".")[2]: p.dtype for name, p in adapter_parameters(parts["net"], "mine").items()}
    assert frozen == {"down": torch.bfloat16, "up": torch.bfloat16, "magnitude": torch.float32}


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("name", ["dora", "lokr"])
@torch.no_grad()
def test_every_kind_on_every_family(row, name):
    parts = row.family.tiny()
    batch = batch_of(row, parts)
    base = predict(row, parts, batch)
    targets = row.family.lora_targets("attention", parts.denoiser.config)
    inject(parts.denoiser, targets, rank=2, alpha=2.0, ranks={"to_q": 1}, **KINDS[name])
    torch.testing.assert_close(predict(row, parts, batch), base, rtol=0, atol=1e-4)
    move(parts.denoiser)
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    fresh = row.family.tiny()
    assert load_adapter(fresh, lora, "mine") == len(lora) > 5
    torch.testing.assert_close(predict(row, fresh, batch), predict(row, parts, batch), rtol=1e-3, atol=1e-4)
    assert (predict(row, fresh, batch) - base).abs().max() > 1e-2
