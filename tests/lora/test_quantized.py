"""Codes against tables worked out here, and files with codes against the factors that they stand for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.errors import LoraError
from charforgex.lora import quantized
from charforgex.lora.formats import opened
from charforgex.lora.quantized import Codes, dequantize, quantize
from charforgex.lora.writing import write_tensors

DRAW = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=DRAW)


def error(factor, kind):
    return float((dequantize(quantize(factor, kind), kind, tuple(factor.shape)) - factor).norm() / factor.norm())


def test_nf4_has_the_quantiles_of_a_normal_distribution():
    """Seven below zero and eight above, evenly in probability between 0 and 0.9677083, the largest scaled to 1."""

    def sides(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float64)[:-1])

    positive, negative = sides(8), -sides(7)
    expected = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive[0]
    torch.testing.assert_close(quantized.NF4.double(), expected, rtol=0, atol=2e-6)


def test_values_by_hand():
    down = torch.tensor([[254.0, -127.0, 3.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantize(down, "int8")
    assert codes.tolist() == [[127, -64, 2, 0], [0, 0, 0, 0]] and scale[0] == 2
    assert dequantize(Codes(codes, scale), "int8", (2, 4)).tolist() == [[254, -128, 4, 0], [0, 0, 0, 0]]
    turned = quantize(down.T.contiguous(), "int8")  # an `up`: its columns are the directions
    assert torch.equal(turned.codes, codes.T) and torch.equal(turned.scale, scale)
    codes, scale = quantize(torch.tensor([[448.0, 17.0, 1.0, -2.0]]), "fp8")
    assert codes.float().tolist() == [[448, 16, 1, -2]] and scale.tolist() == [1.0], "e4m3 has three bits behind the point"
    codes, scale = quantize(torch.tensor([[8.0, -8.0, 0.1], [1.0, 0.0, 2.0]]), "nf4")
    assert codes.tolist() == [0xF0, 0x79, 0x7A] and scale.tolist() == [8.0], "1, -1, 0; 1/8 and 1/4 are nearest to 0.16 and 0.25"


@pytest.mark.parametrize("shape", [(4, 100), (100, 4), (3, 7, 3, 3), (41, 5, 1, 1), (1, 65), (8, 8)])
@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.03), ("int8", 0.012), ("nf4", 0.11)])
def test_what_is_read_is_near(kind, most, shape):
    assert error(randn(*shape), kind) < most
    wide = randn(*shape) * 1e-6
    assert error(wide, kind) < most, "scales make it independent of size"
    assert not dequantize(quantize(torch.zeros(shape), kind), kind, shape).any()


def made(tmp_path, kind, dtype="float16", **tensors):
    stored = {key: quantize(tensor, kind) for key, tensor in tensors.items()}
    path = tmp_path / f"{kind}.safetensors"
    written = [(key, codes.codes) for key, codes in stored.items()] + [(key + ".scale", codes.scale) for key, codes in stored.items()]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    write_tensors([*written, ("x.alpha", torch.tensor(3.0))], path, {"a": "b"} | quantized.mark(kind, dtype, shapes))
    return path


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_file_is_read_as_the_factors_that_it_stands_for(tmp_path, kind):
    down, up = randn(4, 33), randn(21, 4, 1, 1)
    path = made(tmp_path, kind, down=down, up=up)
    with opened(path) as file:
        assert set(file.keys()) == {"down", "up", "x.alpha"} and "charforgex.quantized" not in file.metadata()
        assert file.metadata()["a"] == "b" and file.get_tensor("x.alpha") == 3
        for key, factor in {"down": down, "up": up}.items():
            assert tuple(file.get_slice(key).get_shape()) == tuple(factor.shape)
            read = file.get_tensor(key)
            assert read.dtype == torch.float16
            assert torch.equal(read, dequantize(quantize(factor, kind), kind, tuple(factor.shape)).half())
    before = path.read_bytes()
    assert made(tmp_path, kind, down=down, up=up).read_bytes() == before


def hostile(path, change, **tensors):
    """The file with another mark, or other tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["charforgex.quantized"])
    told = told | change if isinstance(change, dict) else change
    save_file({**load_file(path), **tensors}, path, {"charforgex.quantized": told if isinstance(told, str) else json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "tensors", "said"),
    [
        ("{", {}, "cannot be understood"),
        ({"kind": "nf5"}, {}, "it says nf5"),
        ({"kind": []}, {}, "cannot be understood"),
        ({"dtype": "int4"}, {}, "cannot be understood: 'int4'"),
        ({"shapes": {}}, {}, "names 0 of 1 quantised"),
        ({"shapes": {"down": [1 << 40, 1 << 40]}}, {}, "down holds 66 codes"),
        ({"shapes": {"down": [-4, -33]}}, {}, "down holds 66 codes"),
        ({"shapes": {"down": ["x", 1]}}, {}, "cannot be understood"),
        ({}, {"down.scale": torch.zeros(7)}, "down: codes .* are no nf4 of a factor"),
        ({"kind": "int8"}, {}, "down holds 66 codes, which are no int8"),
    ],
)
def test_a_mark_that_lies_is_told(tmp_path, change, tensors, said):
    path = made(tmp_path, "nf4", down=randn(4, 33))
    hostile(path, change, **tensors)
    with pytest.raises(LoraError, match=said), opened(path) as file:
        file.get_tensor("down")
