"""Numbers that can be worked out by hand: constructed spectra, angles between constructed spaces, shares of known weights."""

import json
import math
import subprocess
import sys

import pytest
import torch

from charforgex.config import compose
from charforgex.errors import ConfigError, LoraError, ModelError
from charforgex.families import bases
from charforgex.lora.lowrank import Product, spectrum
from charforgex.lora.state import LohaLayer, Lora, LoraLayer
from charforgex.lora.writing import write
from charforgex.toolbox import checkpoints, spectra
from charforgex.toolbox.analyzing import analyze
from charforgex.toolbox.places import in_order, place_of

BASE = "charworld_sdxl"
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 96 x 96
TO_V = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"  # 128 x 192
UP = "unet.up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2"


def unit(size, *places):
    """Columns of the identity."""
    return torch.eye(size)[:, list(places)]


def diagonal(values, out, k, rows=None, columns=None):
    """A layer whose singular values are `values`, along chosen axes."""
    values = torch.tensor(values)
    up = unit(out, *(rows or range(len(values)))) * values
    return LoraLayer(unit(k, *(columns or range(len(values)))).T.contiguous(), up, float(len(values)))


def saved(path, layers):
    base = bases.get(BASE)
    return write(Lora(layers), path, "kohya", base.spelling, base.config, torch.float32)


def test_ranks_of_known_values():
    assert spectra.effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert spectra.stable_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert spectra.effective_rank(torch.tensor([2.0])) == pytest.approx(1)
    values = torch.tensor([3.0, 1.0])  # shares 3/4 and 1/4; squares 9 and 1
    assert spectra.effective_rank(values) == pytest.approx(4 / 27**0.25)
    assert spectra.stable_rank(values) == pytest.approx(10 / 9)
    assert spectra.effective_rank(torch.zeros(0)) == spectra.stable_rank(torch.zeros(0)) == 0


def test_angles_of_constructed_spaces():
    turned = unit(5, 0) * math.cos(math.radians(30)) + unit(5, 3) * math.sin(math.radians(30))
    one, other = unit(5, 0, 1), torch.cat([unit(5, 1), turned], dim=1)
    assert spectra.principal_angles(one, other).tolist() == pytest.approx([0, 30], abs=1e-5)
    assert spectra.principal_angles(one, unit(5, 4)).tolist() == pytest.approx([90])
    assert spectra.principal_angles(turned, one).tolist() == pytest.approx([30], abs=1e-5)
    tiny = 1e-5  # degrees: its cosine is 1 to within rounding, its sine is not
    near = unit(4, 0).double() * math.cos(math.radians(tiny)) + unit(4, 1).double() * math.sin(math.radians(tiny))
    assert spectra.principal_angles(unit(4, 0), near).tolist() == pytest.approx([tiny], rel=1e-6)


def test_overlap_of_constructed_spaces():
    one = spectrum(Product(unit(6, 0, 1), unit(8, 0, 1).T, (6, 8)))
    other = spectrum(Product(unit(6, 1, 2) * torch.tensor([3.0, 4.0]), unit(8, 0, 5).T, (6, 8)))  # energies 9 and 16
    found = spectra.overlap(one, other)
    assert found == pytest.approx({"columns": 9 / 25, "rows": 9 / 25, "both": 9 / 25, "chance": 2 / 6 * 2 / 8})
    crossed = spectrum(Product(unit(6, 1, 2) * torch.tensor([3.0, 4.0]), unit(8, 5, 0).T, (6, 8)))
    assert spectra.overlap(one, crossed) == pytest.approx({"columns": 9 / 25, "rows": 16 / 25, "both": 0, "chance": 1 / 12}, abs=1e-7)
    assert spectra.inner(one, other) == pytest.approx(0, abs=1e-6)
    same = spectrum(Product(unit(6, 0) * 5, unit(8, 0).T, (6, 8)))
    assert spectra.inner(one, same) == pytest.approx(5)


@pytest.mark.parametrize(
    "name, place",
    [
        (TO_Q, ("unet", "down_blocks.1.attentions.0", "attn1.to_q")),
        ("unet.mid_block.resnets.1.conv2", ("unet", "mid_block.resnets.1", "conv2")),
        ("unet.conv_in", ("unet", "outside", "conv_in")),
        ("transformer.single_transformer_blocks.37.proj_out", ("transformer", "single_transformer_blocks.37", "proj_out")),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", ("text_encoder", "encoder.layers.3", "mlp.fc1")),
        ("text_encoder_2.encoder.block.4.layer.0.SelfAttention.q", ("text_encoder_2", "encoder.block.4", "SelfAttention.q")),
    ],
)
def test_where_a_layer_stands(name, place):
    assert place_of(name) == place


def test_blocks_are_told_in_the_order_in_which_they_run():
    blocks = ["text_encoder.encoder.layers.0", "unet.outside", "unet.up_blocks.0.attentions.0", "unet.up_blocks.0.upsamplers.0"]
    blocks += ["unet.mid_block.resnets.1", "unet.mid_block.attentions.0", "unet.mid_block.resnets.0", "unet.up_blocks.0.resnets.1"]
    blocks += ["unet.up_blocks.0.resnets.0", "unet.down_blocks.1.resnets.0"]
    assert in_order(blocks) == [
        "unet.down_blocks.1.resnets.0", "unet.mid_block.resnets.0", "unet.mid_block.attentions.0", "unet.mid_block.resnets.1",
        "unet.up_blocks.0.resnets.0", "unet.up_blocks.0.attentions.0", "unet.up_blocks.0.resnets.1", "unet.up_blocks.0.upsamplers.0",
        "unet.outside", "text_encoder.encoder.layers.0",
    ]  # fmt: skip
    singles = [f"transformer.single_transformer_blocks.{i}" for i in (10, 2)]
    assert in_order([*singles, "transformer.transformer_blocks.18"]) == ["transformer.transformer_blocks.18", *singles[::-1]]


def test_one_file_with_its_base(tmp_path):
    path = saved(tmp_path / "anna.safetensors", {TO_Q: diagonal([3.0, 4.0], 96, 96), UP: diagonal([12.0], 128, 512)})
    told = analyze(compose("lora_analyze", [f"lora={path}", "base=charworld"]))
    (file,) = told["files"]
    assert file["norm"] == 13 and file["layers"][TO_Q]["values"] == [4, 3] and file["layers"][TO_Q]["norm"] == 5
    assert file["kind"]["attn1.to_q"]["energy"] == pytest.approx(25 / 169, rel=1e-5)
    assert file["heat"]["unet.up_blocks.0.attentions.1"] == {"ff.net.2": pytest.approx(144 / 169, rel=1e-5)}
    part, place = checkpoints.find("charworld", bases.get(BASE)).modules[TO_Q]
    assert file["layers"][TO_Q]["share"] == pytest.approx(5 / float(part.read(place).float().norm()), rel=1e-5)
    folder = tmp_path / "anna.analysis"
    assert json.loads((folder / "analysis.json").read_text()) == json.loads(json.dumps(told))
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "<script" not in page and "http://" not in page and TO_Q in page
    analyze(compose("lora_analyze", [f"lora={path}"]))  # its own report is replaced
    (folder / "analysis.json").unlink()
    with pytest.raises(ConfigError, match="holds other files"):
        analyze(compose("lora_analyze", [f"lora={path}"]))


def test_two_files_are_compared(tmp_path):
    one = saved(tmp_path / "a/lora.safetensors", {TO_Q: diagonal([3.0, 4.0], 96, 96), UP: diagonal([12.0], 128, 512)})
    other = {TO_Q: diagonal([3.0, 4.0], 96, 96, rows=[0, 5]), TO_V: diagonal([1.0], 128, 192)}
    two = saved(tmp_path / "b/lora.safetensors", other)
    told = analyze(compose("lora_analyze", [f"lora=[{one},{two}]", f"out={tmp_path}/both"]))
    (pair,) = told["pairs"]
    assert (pair["first"], pair["second"], pair["common_layers"]) == ("a/lora", "b/lora", 1)
    assert pair["cosine"] == pytest.approx(9 / (13 * 26**0.5), rel=1e-5)
    block = pair["blocks"]["unet.down_blocks.1.attentions.0"]
    assert block["cosine"] == pytest.approx(9 / 25)
    assert block["second_in_first"] == pytest.approx({"columns": 9 / 25, "rows": 1, "both": 9 / 25, "chance": 4 / 96**2}, rel=1e-5)
    assert pair["layers"][TO_Q]["column_angles"] == pytest.approx([0, 90], abs=1e-4)
    assert pair["layers"][TO_Q]["row_angles"] == pytest.approx([0, 0], abs=1e-4)


def test_other_kinds_of_layers(tmp_path):
    draw = torch.Generator().manual_seed(0)
    loha = LohaLayer(*(torch.randn(*shape, generator=draw) for shape in ((96, 2), (2, 96)) * 2), 2.0)
    path = saved(tmp_path / "loha.safetensors", {TO_Q: loha})
    (file,) = analyze(compose("lora_analyze", [f"lora={path}"]))["files"]
    assert file["norm"] == pytest.approx(float(loha.delta().norm()), rel=1e-4) and file["layers"][TO_Q]["numerical_rank"] == 4

    weight = weight_of(TO_Q)
    plain = diagonal([3.0, 4.0], 96, 96)
    dora = LoraLayer(plain.down, plain.up, plain.alpha, magnitude=2 * torch.linalg.norm(weight + plain.delta(), dim=1))
    path = saved(tmp_path / "dora.safetensors", {TO_Q: dora})
    with pytest.raises(LoraError, match=r"attn1\.to_q: What a DoRA changes depends on the base's weights; say base="):
        analyze(compose("lora_analyze", [f"lora={path}"]))
    (file,) = analyze(compose("lora_analyze", [f"lora={path}", "base=charworld", f"out={tmp_path}/dora"]))["files"]
    assert file["norm"] == pytest.approx(float((weight + 2 * plain.delta()).norm()), rel=1e-4)  # twice the moved weight, less the weight


def weight_of(name):
    part, place = checkpoints.find("charworld", bases.get(BASE)).modules[name]
    return part.read(place).float()


def test_what_cannot_be_measured_is_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", {TO_Q: diagonal([3.0, 4.0], 96, 96)})
    with pytest.raises(ModelError, match="nowhere"):
        analyze(compose("lora_analyze", [f"lora={path}", "base=nowhere"]))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name another folder"):
        analyze(compose("lora_analyze", [f"lora={path}", f"out={tmp_path}/file"]))


def test_no_network_is_needed(tmp_path):
    path = saved(tmp_path / "a.safetensors", {TO_Q: diagonal([3.0, 4.0], 96, 96)})
    code = (
        "import sys; from charforgex.toolbox import analyzing, decomposing, directions; from charforgex.config import compose;"
        "assert 'torch' not in sys.modules;"
        f"analyzing.analyze(compose('lora_analyze', ['lora={path}', 'base=charworld']));"
        f"decomposing.decompose(compose('lora_decompose', ['lora={path}', 'keep=0', 'out={tmp_path}/b.safetensors']));"
        "assert not {'diffusers', 'transformers', 'peft', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
