"""Directions taken apart and put together again, on layers whose singular values are known."""

import json
import math

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError
from charforgex.families import bases
from charforgex.lora.formats import open_lora
from charforgex.lora.state import LohaLayer, LokrLayer, Lora, LoraLayer
from charforgex.lora.writing import write
from charforgex.toolbox.decomposing import chooser, decompose

BASE = bases.get("charworld_flux")
BLOCK = "transformer.transformer_blocks.0."
DRAW = torch.Generator().manual_seed(1)


def drawn(name, values):
    """A layer with these singular values along random directions."""
    out, k = BASE.shapes[name]
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=DRAW))[0] for size in (out, k))
    return LoraLayer(right.T.contiguous() * 4, left * torch.tensor(values) / 2, len(values) / 2)


@pytest.fixture(scope="module")
def layers():
    values = {"attn.to_q": [5.0, 2.0, 1.0], "attn.to_k": [4.0, 3.0], "attn.to_v": [6.0], "ff.net.2": [1.5, 0.5]}
    return {BLOCK + name: drawn(BLOCK + name, found) for name, found in values.items()}


@pytest.fixture(scope="module")
def path(layers, tmp_path_factory):
    return write(Lora(layers), tmp_path_factory.mktemp("in") / "a.safetensors", "kohya", BASE.spelling, BASE.config, torch.float32)


def run(path, *overrides):
    return decompose(compose("lora_decompose", [f"lora={path}", *overrides]))


def written(path):
    with open_lora(path, BASE.names) as file:
        return file.load().layers


def test_directions_of_all_layers_are_told_in_order(path):
    told = run(path)
    values = [row["value"] for row in told["directions"]]
    assert values == pytest.approx([6, 5, 4, 3, 2, 1.5, 1, 0.5], rel=1e-5)
    assert (told["directions"][3]["layer"], told["directions"][3]["index"]) == (BLOCK + "attn.to_k", 1)
    assert sum(row["share"] for row in told["directions"]) == pytest.approx(1)
    assert told["kept"] == 8 and "out" not in told


def test_the_chosen_and_the_others_add_up(path, layers, tmp_path):
    first = run(path, f"out={tmp_path}/first.safetensors", "keep=0")
    rest = run(path, f"out={tmp_path}/rest.safetensors", "keep=1-")
    assert (first["kept"], rest["kept"]) == (4, 4)
    assert first["energy"] == pytest.approx((36 + 25 + 16 + 2.25) / (36 + 25 + 16 + 9 + 4 + 2.25 + 1 + 0.25), rel=1e-5)
    one, other = written(tmp_path / "first.safetensors"), written(tmp_path / "rest.safetensors")
    assert BLOCK + "attn.to_v" not in other  # it has one direction alone
    for name, layer in layers.items():
        others = other[name].delta() if name in other else 0
        torch.testing.assert_close(one[name].delta() + others, layer.delta(), atol=2e-6, rtol=1e-5)
        assert float(torch.linalg.matrix_norm(one[name].delta(), 2)) == pytest.approx(float(one[name].delta().norm()), rel=1e-5)
    assert json.loads((tmp_path / "first.safetensors.json").read_text())["kept"] == 4
    with open_lora(tmp_path / "first.safetensors", BASE.names) as file:
        assert json.loads(file.metadata["charforgex.lineage"])["settings"] == {"keep": 0, "layers": None}


def test_layers_and_directions_are_chosen(path, layers, tmp_path):
    out = tmp_path / "some.safetensors"
    told = run(path, f"out={out}", "keep=[0,2]", "layers=[to_q,net.2]", "dry_run=true")
    assert told["kept"] == 3 and not out.exists()  # ff.net.2 has no third one
    run(path, f"out={out}", "keep=[0,2]", "layers=[to_q,net.2]")
    found = written(out)
    assert set(found) == {BLOCK + "attn.to_q", BLOCK + "ff.net.2"}
    values = torch.linalg.svdvals(found[BLOCK + "attn.to_q"].delta())
    assert values[:3].tolist() == pytest.approx([5, 1, 0], abs=1e-5)


def test_ranges():
    assert chooser("1-2")(5) == [1, 2] and chooser("3-")(5) == [3, 4] and chooser("1-9")(3) == [1, 2]
    assert chooser([2, 0])(5) == [0, 2] and chooser([2, 0])(1) == [0] and chooser(None)(2) == [0, 1]
    for keep, said in (("all", "is no range"), ("3-1", "ends before"), ([-1], "counted from 0"), ([1, 1], "named once"), ([], "counted")):
        with pytest.raises(ConfigError, match=said):
            chooser(keep)


def test_products_of_hadamard_are_taken_apart_and_dora_is_refused(tmp_path):
    name = BLOCK + "attn.to_out.0"
    loha = LohaLayer(*(torch.randn(*shape, generator=DRAW) for shape in ((128, 2), (2, 128)) * 2), 2.0)
    path = write(Lora({name: loha}), tmp_path / "loha.safetensors", "kohya", BASE.spelling, BASE.config, torch.float32)
    told = run(path, f"out={tmp_path}/lora.safetensors", "keep=0-")
    assert told["kept"] == 4
    torch.testing.assert_close(written(tmp_path / "lora.safetensors")[name].delta(), loha.delta(), atol=1e-4, rtol=1e-4)
    plain = drawn(name, [1.0])
    dora = Lora({name: LoraLayer(plain.down, plain.up, 1.0, torch.ones(128))})
    path = write(dora, tmp_path / "dora.safetensors", "kohya", BASE.spelling, BASE.config, torch.float32)
    with pytest.raises(LoraError, match=r"charforgex lora convert .*dora\.safetensors out=dora_lora\.safetensors kind=lora"):
        run(path)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_directions_of_a_convolution_are_one_s_of_a_convolution(kind, tmp_path):
    """The factors of these kinds do not tell kernels; programs want them."""
    base, name = bases.get("charworld_sdxl"), "unet.down_blocks.0.downsamplers.0.conv"
    shape = base.shapes[name]
    if kind == "loha":
        sizes = [(shape[0], 2), (2, math.prod(shape[1:]))] * 2
        layer = LohaLayer(*(torch.randn(*size, generator=DRAW) for size in sizes), 2.0)
    else:
        sizes = (2, 2), (shape[0] // 2, shape[1] // 2, *shape[2:])
        layer = LokrLayer(1.0, **{side: torch.randn(*size, generator=DRAW) for side, size in zip(("w1", "w2"), sizes, strict=True)})
    path = write(Lora({name: layer}), tmp_path / "a.safetensors", "kohya", base.spelling, base.config, torch.float32)
    run(path, f"out={tmp_path}/b.safetensors", "keep=0-")
    with open_lora(tmp_path / "b.safetensors", base.names) as file:
        found = file.layer(name)
    assert found.kind == "lora" and found.fits(shape)
    torch.testing.assert_close(found.delta().flatten(1), layer.delta(), atol=1e-4, rtol=1e-3)


def test_settings_without_use_are_refused(path, tmp_path):
    out = f"out={tmp_path}/x.safetensors"
    for overrides, said in (
        (["keep=0"], "out is not set"), ([out], "needs to know which directions"), ([out, "keep=7-"], "chooses none"),
        ([out, "keep=x"], "is no range"), (["format=kohya", "dtype=float16"], "format and dtype without a file"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            run(path, *overrides)
    with pytest.raises(LoraError, match="no LoRA format nonsense"):
        run(path, out, "keep=0", "format=nonsense", "dry_run=true")
    with pytest.raises(LoraError, match="layers: to_x matches no"):
        run(path, "layers=[to_x]")
