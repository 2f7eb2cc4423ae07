import pytest
import torch

from charforgex.families.sdxl import Sdxl
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.types import Crop, Text

TEXT_PATHS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


@pytest.fixture
def family():
    return Sdxl()


@pytest.fixture
def parts(family):
    return family.tiny()


@pytest.fixture
def trained():
    """trained(parts): an adapter in the denoiser whose every weight has moved, at alpha / rank = 1/2."""

    def train(parts, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"), rank=4, alpha=2.0):
        paths = inject(parts.denoiser, targets, rank, alpha, seed=3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapter_parameters(parts.denoiser).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return paths

    return train


@pytest.fixture
def predict(family):
    """predict(parts): the denoiser's output for one fixed input."""

    def run(parts):
        generator = torch.Generator().manual_seed(7)
        config = parts.denoiser.config
        noisy = torch.randn(2, config.in_channels, 8, 8, generator=generator)
        tokens = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
        text = Text(tokens, torch.randn(2, 32, generator=generator))
        with torch.no_grad():
            return family.denoise(parts.denoiser, noisy, torch.tensor([0.3, 0.8]), text, Crop.whole(2, 64, 64))

    return run
