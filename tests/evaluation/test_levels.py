"""Loss by noise level: its value, and that it is a function of pictures and levels alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.draws import torch_generator
from charforgex.errors import DataError
from charforgex.evaluation import levels
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.levels import Levels
from charforgex.families import registry
from charforgex.families.process import Ddpm
from charforgex.types import Batch, Crop, Text

PROCESS = Ddpm()


def batch_of(keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.stack([torch.randn(4, 4, 4, generator=torch_generator("test", key)) for key in keys])
    text = Text(torch.zeros(len(keys), 3, 8))
    return Batch(mean, torch.full_like(mean, 0.1), text, Crop.whole(len(keys), 32, 32), keys=tuple(keys)), generator


def predicting(prediction):
    return SimpleNamespace(denoise=lambda denoiser, noisy, t_B, text, crop: prediction(noisy, t_B))


def test_who_predicts_nothing_is_off_by_the_mean_square_of_the_noise():
    batch, _ = batch_of(["a", "b"])
    found = levels.losses(predicting(lambda noisy, t: torch.zeros_like(noisy)), None, PROCESS, batch, 3)
    assert found.shape == (3, 2)
    for row, key in enumerate(["a", "b"]):
        for level in range(3):
            noise = torch.randn(4, 4, 4, generator=torch_generator("level", "noise", key, level))
            assert found[level, row].item() == pytest.approx(noise.square().mean().item(), rel=1e-6)


def test_who_knows_the_noise_is_not_off():
    batch, _ = batch_of(["a"])
    clean = batch.mean_BChw + 0.1 * torch.randn(4, 4, 4, generator=torch_generator("level", "posterior", "a"))

    def knowing(noisy, t_B):
        power = PROCESS.alphas_cumprod[(t_B * 999).round().long()].view(-1, 1, 1, 1)
        return (noisy - power.sqrt() * clean) / (1 - power).sqrt()

    assert levels.losses(predicting(knowing), None, PROCESS, batch, 8).max() < 1e-6


def test_levels_are_the_middle_of_equal_shares():
    assert levels.times(PROCESS, 4).tolist() == pytest.approx([125 / 999, 375 / 999, 624 / 999, 874 / 999], abs=1e-3)


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_neither_order_nor_batch_changes_a_picture_s_loss(name):
    family = registry.get(name)
    parts = family.tiny()
    side = 4 * family.pixel_multiple(parts)
    noise = np.random.default_rng(0).integers(0, 255, (4, side, side, 3), dtype=np.uint8)
    shots = [Shot(Image.fromarray(pixels), prompt=f"picture {i}", key=str(i)) for i, pixels in enumerate(noise)]

    def found(shots, size):
        batches = levels.batches(family, parts, Gallery("g", shots), side, size)
        return torch.cat([levels.losses(family, parts.denoiser, family.process(parts), batch, 2) for batch in batches], 1)

    assert found(shots, 4).numpy() == pytest.approx(found(shots[::-1], 1).flip(1).numpy(), rel=1e-4)


def test_the_metric_is_the_mean_over_levels_and_pictures():
    told = Levels()(Gallery("g", [], losses={"times": [0.25, 0.75], "losses": [[1.0, 3.0, 5.0], [2.0, 6.0, 10.0]]}), None)
    assert told.estimate == 4.5 and told.parts == {"t=0.250": 3.0, "t=0.750": 6.0} and told.count == 3
    assert 1.5 <= told.low < 4.5 < told.high <= 7.5
    with pytest.raises(DataError, match="no denoiser"):
        Levels()(Gallery("g", []), None)
