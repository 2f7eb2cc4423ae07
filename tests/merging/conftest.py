import math

import pytest
import torch

from charforgex.families import bases
from charforgex.lora.state import Lora, LoraLayer
from charforgex.lora.writing import write_layers


@pytest.fixture
def make(tmp_path):
    """make(name, ...): a LoRA file on the layers that `choose` picks, with random factors; returns its path and the adapter."""

    def make(name, base="charworld_sdxl", choose=lambda name: ".attn" in name, rank=4, alpha=None, format="diffusers", seed=0, dtype=None):
        found, generator = bases.get(base), torch.Generator().manual_seed(seed)
        layers = {}
        for layer, shape in found.shapes.items():
            if choose(layer):
                down = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
                up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / math.sqrt(rank)
                layers[layer] = LoraLayer(down, up, float(rank if alpha is None else alpha))
        path = tmp_path / f"{name}.safetensors"
        metadata = {"charforgex.family": found.family, "ss_output_name": name}
        write_layers(layers.get, list(layers), path, format, found.names, dtype or torch.float32, metadata)
        return path, Lora(layers)

    return make
