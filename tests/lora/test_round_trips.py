"""Every format of every listed base gives back the very layers that were written: the real rows, and few columns, so that it is quick."""

import pytest
import torch

from charforgex.families import bases
from charforgex.lora.formats import FORMATS, open_lora
from charforgex.lora.state import LoraLayer
from charforgex.lora.writing import write_layers

ALIKE = ("flux_schnell", "sd3_medium", "sd35_large", "sd15", "animatediff_v3", "animatediff_sdxl")  # of the others' modules
LISTED = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in bases.WRITTEN if not name.startswith("charworld")]


def narrow(base: bases.Base) -> dict[str, LoraLayer]:
    """A layer of rank 1 on every module that has a name, each of other values. alpha = rank, which all formats can say."""
    generator, layers = torch.Generator().manual_seed(0), {}
    named = {f"{component}.{path}" for component, modules in base.names.modules.items() for path in modules}
    for name, shape in base.shapes.items():
        if name in named:
            kernel = shape[2:]
            down = torch.randn(1, 2, *kernel, generator=generator)
            layers[name] = LoraLayer(down, torch.randn(shape[0], 1, *[1] * len(kernel), generator=generator), 1.0)
    return layers


@pytest.mark.parametrize("name", LISTED)
def test_every_module_comes_back_from_every_format(name, tmp_path):
    base = bases.get(name)
    layers = narrow(base)
    assert len(layers) > 100
    for format in (*FORMATS, "ai-toolkit", *base.names.dialects):
        places = base.names.places(format)
        held = {ours: layer for ours, layer in layers.items() if ours in places}
        if format not in base.names.dialects:  # all but what no program reads in that format
            assert all(base.names.unread[format] in ours for ours in layers.keys() - held.keys())
        write_layers(held.get, held, tmp_path / "x.safetensors", format, base.names, torch.float32)
        with open_lora(tmp_path / "x.safetensors", base.names) as file:
            found = dict(file)
        assert found.keys() == held.keys() and all(layer.equals(found[ours]) for ours, layer in held.items()), format
