"""A base that is split computes what the whole one does up to rounding, and what learns in it gets the same gradients."""

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.families.packed import PackedLinear
from charforgex.lora.inject import adapter_parameters, inject, read_adapter, same_output
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.losses import Objective
from charforgex.training.sharding import check_splittable, split
from charforgex.types import Batch, Crop
from tests.families.rows import ROWS
from tests.training.together import together


def prepared(row):
    """The family's tiny base with an adapter that changes something, recomputing its first block, and a batch for it."""
    family = row.family
    parts = family.load("tiny")
    targets = family.lora_targets("attention", parts.denoiser.config)
    checkpoint_blocks(parts.denoiser, family.blocks(parts.denoiser), 1)
    inject(parts.denoiser, targets, 2, 2.0)
    learning = adapter_parameters(parts.denoiser)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return family, parts, learning


def batch_of(row, family, parts, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(2 + rank)
    mean = torch.randn(1, *row.latents, generator=generator)
    text = family.encode_text(parts, ["a man" if rank else "a woman with a hat"])
    size = torch.tensor([row.size], dtype=torch.float32)
    return Batch(mean, torch.ones_like(mean), text, Crop(size, torch.zeros(1, 2), size), keys=("x",), captions=("x",))


@pytest.mark.parametrize("row", [row if row.family.name == "flux" else pytest.param(row, marks=pytest.mark.slow) for row in ROWS], ids=str)
def test_a_split_base_is_the_whole_one(row):
    def compare(processes):
        found = []
        for splits in (False, True):
            family, parts, learning = prepared(row)
            batch = batch_of(row, family, parts, processes.rank)
            whole = sum(p.numel() for p in parts.denoiser.parameters()) - sum(p.numel() for p in learning.values())
            if splits:
                split(parts.denoiser, family.blocks(parts.denoiser), learning.values(), "cpu", processes.count)
                here = sum(p.to_local().numel() for p in parts.denoiser.parameters() if hasattr(p, "to_local"))
                assert sum(processes.gather(here)) == whole and here < 0.6 * whole  # of odd first dimensions the first has more
            process = family.process(parts)
            for attempt in range(2):  # the second time from weights that are apart again
                losses = Objective().losses(family, parts.denoiser, process, batch, 0, attempt)
                losses.sum().backward()
            with torch.no_grad():
                again = Objective().losses(family, parts.denoiser, process, batch, 0, 3)
            found.append([losses, again, *(parameter.grad for parameter in learning.values())])
            if splits:
                lora = read_adapter(parts.denoiser, family.denoiser_name)
                assert same_output(parts.denoiser, family.denoiser_name, lora, lora) == []
        assert len(found[0]) > 4 and all(gradient.abs().max() > 0 for gradient in found[0])
        return max(((one - other).abs().max() / one.abs().max()).item() for one, other in zip(*found, strict=True))

    # Weights that lie elsewhere in memory take other instructions of the processor, which add up in another order.
    assert max(together(2, compare)) < 1e-5


def test_packed_weights_are_refused():
    network = torch.nn.Sequential(PackedLinear(2, 2, False, torch.float32))
    with pytest.raises(ConfigError, match=r"trainer.strategy=fsdp: the weights of here are packed, .*; use strategy=ddp"):
        check_splittable(network, "here")
