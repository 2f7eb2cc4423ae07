"""Pictures of several sizes in one run: each batch is of one size, no transformer sees padding, and times are shifted by its own tokens."""

import math

import pytest
import torch

from charforgex.data.datamodule import CharacterData
from charforgex.families.flux import Flux
from charforgex.families.process import shifted
from charforgex.families.sd3 import Sd3
from charforgex.training.losses import Objective
from tests.data.conftest import draw

SIZES = [(96, 96), (144, 96), (96, 144), (192, 96)]  # width, height of the pictures


@pytest.mark.parametrize("family", [Flux(), Sd3()], ids=["flux", "sd3"])
def test_batches_are_of_one_size_without_padding_and_shifted_by_it(family, tmp_path):
    for number in range(12):
        draw(tmp_path / "in" / f"{number}.png", number, SIZES[number % len(SIZES)])
        (tmp_path / "in" / f"{number}.txt").write_text("a portrait")
    parts = family.tiny()
    data = CharacterData(tmp_path / "in", tmp_path / "cache", resolution=[64, 96], batch_size=2, val_count=0)
    geometry = {"pixel_multiple": family.pixel_multiple(parts), "latent_stride": family.latent_stride(parts)}
    data.prepare(family, lambda groups: parts, weights={"vae": "tiny", "text": "tiny"}, progress=False, **geometry)

    seen = []
    denoiser, process = parts.denoiser, family.process(parts)
    denoiser.register_forward_pre_hook(lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True)
    lengths = []
    family.blocks(denoiser)[0].register_forward_pre_hook(
        lambda module, args, given: lengths.append((args[0] if args else given["hidden_states"]).shape[1]), with_kwargs=True
    )
    by_size = Objective(timesteps="logit_normal", shift="resolution")
    unshifted = Objective(timesteps="logit_normal")
    grids = set()
    for step in range(24):
        batch = data.batch(step)
        height, width = batch.mean_BChw.shape[-2:]
        assert {(height * 8, width * 8)} == {tuple(map(int, size)) for size in batch.crop.target_B2}  # the bucket of both, to the pixel
        with torch.no_grad():
            by_size.losses(family, denoiser, process, batch, step)
        tokens = height * width // 4
        assert lengths[-1] == tokens
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        expected = shifted(unshifted.times(2, process, step), math.exp(mu))
        scale = 1000 if isinstance(family, Sd3) else 1
        assert torch.allclose(seen[-1], scale * expected, rtol=1e-5)
        grids.add((height, width))
    assert len({height * width for height, width in grids}) >= 4 and len(grids) >= 6  # two resolutions, three shapes
