import pytest
import torch

from charforgex.errors import LoraError
from charforgex.lora.state import Lora, LoraLayer


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
