"""The motion base's start: what SDXL's base draws, in a smaller network that knows frames."""

import random

import pytest
import torch

from charforgex.charworld import models
from charforgex.charworld.assets import ROOT
from charforgex.data.rendered import RenderedBank, RenderedClips
from charforgex.training import filming


@pytest.fixture(scope="module")
def pictures():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(ROOT / "sdxl/unet", torch_dtype=torch.float32, use_safetensors=True)


def test_a_network_as_wide_predicts_the_same(pictures):
    """Nothing is lost by the way from a picture network to a motion network: only what is narrower loses channels."""
    network = models.motion_unet(channels=(64, 96, 128), text_width=192)
    filming.fill_from(network, pictures)
    draw = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 5, 192, generator=draw)
    with torch.no_grad():
        times = torch.tensor([10, 900])
        besides = {"text_embeds": torch.zeros(2, 128), "time_ids": torch.zeros(2, 6)}
        said = pictures.add_embedding(torch.cat([besides["text_embeds"], pictures.add_time_proj(torch.zeros(12)).reshape(2, -1)], -1))
        wanted = pictures(noisy, times, text, added_cond_kwargs=besides).sample
        shifted = network.time_embedding.forward
        network.time_embedding.forward = lambda x, condition=None: shifted(x) + said  # what SDXL alone is told
        found = network(noisy.unsqueeze(2), times, text).sample[:, :, 0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_narrower_layers_keep_the_parts_that_belong_together(pictures):
    network = models.motion_unet()
    filming.fill_from(network, pictures)
    known, found = pictures.state_dict(), network.state_dict()
    joined, narrow = known["up_blocks.0.resnets.1.conv1.weight"], found["up_blocks.0.resnets.1.conv1.weight"]
    assert narrow.shape[:2] == (96, 192) and joined.shape[:2] == (128, 224)
    torch.testing.assert_close(narrow, torch.cat([joined[:96, :96], joined[:96, 128:]], 1))
    gated = known["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"]
    narrow = found["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"]
    torch.testing.assert_close(narrow, torch.cat([gated[:384, :96], gated[512:896, :96]]))
    said = known["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    torch.testing.assert_close(found["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"], said[:, 64:])
    assert all((value == 0).all() for name, value in found.items() if "motion_modules" in name and ".proj_out." in name)


def test_batches_are_clips_or_as_many_pictures(tmp_path):
    films = filming.Films(RenderedBank(tmp_path, 16, 16, seed=1), RenderedClips(tmp_path, 3, 16, seed=1), share=0.5)
    assert len(films) == 16 and films.clips.pixels.shape == (3, 8, 16, 16, 3)
    assert filming.clips_of(films.clips, [2, 0]).shape == (2, 3, 8, 16, 16)
    assert filming.frames_of(films.pictures, [1]).shape == (1, 3, 1, 16, 16)
    text = films.clips.caption(0, random.Random(0))
    assert text.startswith("a portrait of a ") and text == films.clips.caption(0, random.Random(0))
