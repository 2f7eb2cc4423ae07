"""The network's shapes are the published ones; what its outputs mean; tiles; and files that cannot be read."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from charforgex.errors import ModelError
from charforgex.generation.ifnet import LAYOUTS, IFNet, Layout, layout_of, load, places

KEYS = json.loads((Path(__file__).parent / "keys" / "rife.json").read_text())
SMALL = Layout((16, 8, 8), (8, 4), 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return IFNet(SMALL).requires_grad_(False).eval()


def pair(height=96, width=128, coarse=4):
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(2, 1, 3, height // coarse + 3, width // coarse + 3, generator=generator)
    return [F.interpolate(one, size=(height, width), mode="bicubic").clamp(0, 1) for one in noise]


def silent(net):
    """Without any flow; both frames count the same."""
    for place in range(len(net.layout.widths)):
        last = getattr(net, f"block{place}").lastconv[0]
        last.weight.zero_()
        last.bias.zero_()
    return net


@pytest.mark.parametrize("version", sorted(KEYS))
def test_names_and_shapes_are_the_published_ones(version):
    with torch.device("meta"):
        net = IFNet(LAYOUTS[version])
    shapes = {key: list(tensor.shape) for key, tensor in net.state_dict().items()}
    assert shapes == KEYS[version]
    assert layout_of({key: tuple(shape) for key, shape in shapes.items()}, Path("it")) == LAYOUTS[version]
    assert net.layout.scales[0] == {"4.25": 16}.get(version, 8)


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (64, 64)])
def test_any_size_and_several_times_at_once(net, size):
    first, second = pair(100, 100)
    first, second = (one[:, :, : size[0], : size[1]].expand(3, -1, -1, -1) for one in (first, second))
    found = net(first, second, torch.tensor([0.2, 0.5, 0.9]))
    assert found.shape == (3, 3, *size) and found.min() >= 0 and found.max() <= 1
    alone = net(first[:1], second[:1], torch.tensor([0.5]))
    torch.testing.assert_close(found[1:2], alone)


def test_without_motion_the_mask_chooses(net):
    first, second = pair()
    silent(net)
    torch.testing.assert_close(net(first, second, torch.tensor([0.5])), (first + second) / 2)
    for bias, wanted in ((30.0, first), (-30.0, second)):
        # after the pixels are shuffled, output channel c is at 4c to 4c + 3
        net.block2.lastconv[0].bias[16:20] = bias
        torch.testing.assert_close(net(first, second, torch.tensor([0.5])), wanted, atol=1e-4, rtol=0)


def test_a_flow_says_where_a_pixel_comes_from(net):
    """Three pixels to the right of it in the first frame, two below it in the second one."""
    first, second = pair()
    last = silent(net).block2.lastconv[0]  # of the finest block: one pixel is one pixel
    last.bias[0:4], last.bias[12:16] = 3.0, 2.0
    for mask, wanted in ((30.0, first.roll(-3, dims=3)), (-30.0, second.roll(-2, dims=2))):
        last.bias[16:20] = mask
        found = net(first, second, torch.tensor([0.5]))
        torch.testing.assert_close(found[..., :-3, :-3], wanted[..., :-3, :-3], atol=1e-4, rtol=0)
    coarse = silent(net).block0.lastconv[0]
    coarse.bias[0:4], last.bias[16:20] = 2.0, 30.0  # at a quarter of the size, two pixels are eight
    torch.testing.assert_close(net(first, second, torch.tensor([0.5]))[..., :-8], first.roll(-8, dims=3)[..., :-8], atol=1e-4, rtol=0)


def test_tiles_are_the_whole_without_seams(net):
    first, second = pair(240, 304, coarse=16)
    for place in range(3):
        getattr(net, f"block{place}").lastconv[0].weight.mul_(3)  # flows of pixels
    whole, tiles = net(first, second, torch.tensor([0.4])), net.tiled(first, second, torch.tensor([0.4]), 128, 64)
    *_, (flow, _, _) = net.refined(first, second, torch.tensor([0.4]))
    assert flow.abs().max() > 1
    apart = (whole - tiles) * 255
    assert apart.abs().mean() < 0.5 and apart.abs().max() < 4  # what a tile does not see changes little
    steps = max(float(apart.diff(dim=side).abs().max()) for side in (2, 3))
    assert steps < 2  # and nowhere at once
    torch.testing.assert_close(net.tiled(first, second, torch.tensor([0.4]), 512, 64), whole)


def test_tiles_cover_all():
    assert places(100, 128, 32, 16) == [(0, 100)]
    for size in (200, 304, 2160, 3840, 3841):
        found = places(size, 120, 32, 16)
        assert found[0][0] == 0 and found[-1][1] == size and all(start % 16 == 0 and end - start <= 128 for start, end in found)
        assert all(after[0] <= before[1] - 32 for before, after in pairwise(found))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_file_loads_whatever_stands_before_its_names(net, tmp_path, prefix):
    tensors = {prefix + key: tensor for key, tensor in net.state_dict().items()}
    tensors[f"{prefix}teacher.conv0.0.0.weight"] = torch.zeros(2)  # of training, and in published files
    save_file(tensors, tmp_path / "flownet.safetensors")
    loaded = load(tmp_path / "flownet.safetensors")
    assert loaded.layout == SMALL and not loaded.training
    first, second = pair()
    torch.testing.assert_close(loaded(first, second, torch.tensor([0.3])), net(first, second, torch.tensor([0.3])))


def test_files_that_cannot_be_read_say_why_and_what_can(net, tmp_path):
    (tmp_path / "flownet.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelError, match=r"can hold programs and are never opened here.*weights_only=True.*flownet\.safetensors"):
        load(tmp_path / "flownet.pkl")
    with pytest.raises(ModelError, match="is no file"):
        load(tmp_path / "gone.safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ModelError, match="cannot be read"):
        load(path)
    save_file({"unet.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"has no block0\.lastconv"):
        load(path)
    tensors = net.state_dict()
    save_file({**tensors, "encode.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"4\.7 to 4\.12"):
        load(path)
    del tensors["block1.convblock.3.beta"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"1 tensors are missing.*block1\.convblock\.3\.beta"):
        load(path)
