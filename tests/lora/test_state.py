import pytest
import torch

from charforgex.errors import LoraError
from charforgex.lora.state import LohaLayer, LokrLayer, Lora, LoraLayer


def test_delta_is_alpha_over_rank_times_up_times_down():
    layer = LoraLayer(down=torch.tensor([[1.0, 2.0], [0.0, 1.0]]), up=torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]), alpha=1.0)
    assert (layer.rank, layer.scale, layer.weight_shape) == (2, 0.5, (3, 2))
    assert torch.equal(layer.delta(), torch.tensor([[0.5, 1.0], [1.0, 2.5], [0.0, 1.5]]))


def test_delta_of_a_convolution_is_the_two_convolutions_in_turn():
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(2, 3, 3, 3, generator=generator), torch.randn(5, 2, 1, 1, generator=generator), alpha=6.0)
    x = torch.randn(1, 3, 7, 7, generator=generator)
    in_turn = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, layer.down), layer.up) * 3
    torch.testing.assert_close(torch.nn.functional.conv2d(x, layer.delta()), in_turn)


@pytest.mark.parametrize("down, up", [((2, 3), (4, 3)), ((2, 3, 3, 3), (4, 2)), ((2, 3), (4, 2, 1, 1)), ((2,), (4, 2)), ((0, 3), (4, 0))])
def test_factors_that_do_not_belong_together_are_refused(down, up):
    with pytest.raises(LoraError, match="no factors of one layer"):
        LoraLayer(torch.ones(down), torch.ones(up), 1.0)


def lora(**ups):
    return Lora({f"unet.{name}": LoraLayer(torch.ones(2, 3), up, 2.0) for name, up in ups.items()})


def test_check_names_the_layers_that_are_not_finite():
    broken = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(LoraError, match=r"1 of 2 layers .*not finite: unet\.b\."):
        lora(a=torch.ones(2, 2), b=broken).check()
    with pytest.raises(LoraError, match="not finite"):
        lora(a=torch.full((2, 2), float("-inf"))).check()


def test_check_refuses_all_zero_but_not_some_zero():
    some = lora(a=torch.ones(2, 2), b=torch.zeros(2, 2))
    some.check()
    assert some.zero_layers() == ["unet.b"]
    with pytest.raises(LoraError, match="All 2 layers are zero"):
        lora(a=torch.zeros(2, 2), b=torch.zeros(2, 2)).check()
    with pytest.raises(LoraError, match="no layers"):
        Lora({}).check()


def test_hash_follows_every_value_and_not_the_order():
    one = lora(a=torch.ones(2, 2), b=torch.eye(2))
    assert one.sha256() == Lora(dict(reversed(one.layers.items()))).sha256()
    changed = torch.eye(2)
    changed[0, 0] = 1.0000001
    assert one.sha256() != lora(a=torch.ones(2, 2), b=changed).sha256()
    assert one.sha256() != Lora({name: LoraLayer(x.down, x.up, 1.0) for name, x in one.layers.items()}).sha256()


def test_a_dora_layer_turns_rows_and_sets_their_length():
    """W = [[3, 4], [1, 0]] and a delta of [[0, 0], [0, 1]]: the rows become 10 * [0.6, 0.8] and 2 * [1, 1] / sqrt 2."""
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    layer = LoraLayer(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]), 1.0, magnitude=torch.tensor([10.0, 2.0]))
    torch.testing.assert_close(weight + layer.change(weight), torch.tensor([[6.0, 8.0], [2**0.5, 2**0.5]]))
    assert layer.kind == "dora" and layer.map(torch.zeros_like).magnitude is layer.magnitude
    assert not layer.equals(LoraLayer(layer.down, layer.up, 1.0)) and layer.equals(layer)
    with pytest.raises(LoraError, match="each of the 2 outputs"):
        LoraLayer(layer.down, layer.up, 1.0, magnitude=torch.ones(3))


def test_a_loha_layer_is_a_product_of_two_products():
    a, b, c, d = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 1.0]])
    layer = LohaLayer(a, b, c, d, alpha=0.5)
    assert torch.equal(layer.delta(), 0.5 * torch.tensor([[2.0, 6.0], [2.0, 6.0]]))
    assert layer.fits((2, 2)) and layer.fits((2, 1, 1, 2)) and not layer.fits((2, 3))
    with pytest.raises(LoraError, match="LoHa"):
        LohaLayer(a, b, c, torch.ones(2, 2), alpha=1.0)


def test_a_lokr_layer_is_a_kronecker_product():
    w1, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, -1.0]])
    layer = LokrLayer(alpha=2.0, w1=w1, w2_a=a, w2_b=b)
    assert torch.equal(layer.delta(), 2.0 * torch.tensor([[1.0, -1.0, 2.0, -2.0], [3.0, -3.0, 6.0, -6.0]]))
    assert layer.weight_shape == (2, 4) and not layer.is_zero
    assert torch.equal(LokrLayer(alpha=7.0, w1=w1, w2=a @ b).delta(), layer.delta() / 2)  # nothing to scale by: alpha says nothing
    for broken in ({"w1": w1}, {"w1": w1, "w2": a, "w2_a": a, "w2_b": b}, {"w1": w1, "w2_a": a, "w2_b": a}):
        with pytest.raises(LoraError, match="LoKr"):
            LokrLayer(alpha=1.0, **broken)
