"""Compiled and checkpointed blocks learn the same; the first are compiled a bounded number of times, the second hold less."""

import pytest
import torch

from charforgex.errors import ConfigError
from charforgex.families.flux import Flux
from charforgex.families.sd3 import Sd3
from charforgex.families.sdxl import Sdxl
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.training.blocks import check_compiler, checkpoint_blocks, compile_blocks, first_grids, resized, uncompiled
from charforgex.training.losses import Objective
from charforgex.types import Batch, Crop
from tests.families.rows import PICTURES

GRIDS = [(8, 8), (4, 8), (12, 4)]  # 16, 8 and 12 tokens of a transformer


class Learner:
    """A tiny base with an adapter that already does something, and a step's loss and gradients at any size."""

    def __init__(self, family, targets="attention", dtype=torch.float32):
        self.family, self.parts = family, family.tiny()
        self.denoiser = self.parts.denoiser.to(dtype)
        self.blocks = family.blocks(self.denoiser)
        inject(self.denoiser, family.lora_targets(targets, self.denoiser.config), 4, 4.0)
        self.parameters = adapter_parameters(self.denoiser)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.add_(0.02 if name.endswith(".up") else 0.0)
        mean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = family.encode_text(self.parts, ["a man", "a woman"])
        self.batch = Batch(mean, torch.zeros_like(mean), text, Crop.whole(2, 64, 64))

    def losses(self, grid=GRIDS[0]):
        batch = resized(self.batch, grid)
        return Objective().losses(self.family, self.denoiser, self.family.process(self.parts), batch, "key")

    def step(self, grid=GRIDS[0]):
        """Losses and all gradients as one vector."""
        losses = self.losses(grid)
        losses.mean().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in self.parameters.values()])
        for parameter in self.parameters.values():
            parameter.grad = None
        return losses.detach(), gradients


def kept_bytes(learner) -> int:
    """What the graph of a forward pass holds on to, beside the weights."""
    kept, known = {}, {parameter.data_ptr() for parameter in learner.denoiser.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = learner.losses()
    assert losses.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_each_checkpointed_block_takes_memory_off_and_leaves_the_gradients(row):
    learner = Learner(row.family, "all")  # a block that nothing is learnt in or before keeps nothing anyway
    losses, gradients = learner.step()
    held = [kept_bytes(learner)]
    for count in [*range(1, len(learner.blocks)), True]:
        checkpoint_blocks(learner.denoiser, learner.blocks, count)
        held.append(kept_bytes(learner))
        again = learner.step()
        assert torch.equal(again[0], losses)
        assert torch.allclose(again[1], gradients, rtol=1e-5, atol=1e-9)
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held), held
    assert held[-1] < held[0] / 2


def test_blocks_run_in_the_order_in_which_they_are_listed():
    for row in PICTURES:
        learner, order = Learner(row.family), []
        for number, block in enumerate(learner.blocks):
            block.register_forward_pre_hook(lambda *_, number=number, order=order: order.append(number))
        learner.losses()
        assert order == list(range(len(learner.blocks)))


def test_more_blocks_than_there_are_is_refused():
    learner = Learner(Sd3())
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=3.*has 2 blocks"):
        checkpoint_blocks(learner.denoiser, learner.blocks, 3)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "checkpointing"), [(Flux(), False), (Sd3(), True), (Sdxl(), True)], ids=["flux", "sd3", "sdxl"])
def test_all_sizes_share_the_graphs_of_the_first_two(family, checkpointing, fresh_compiler):
    learner = Learner(family)
    expected = {grid: learner.step(grid) for grid in GRIDS}
    if checkpointing:
        checkpoint_blocks(learner.denoiser, learner.blocks, True)
    compile_blocks(learner.denoiser, learner.blocks, backend="eager")  # what a backend makes of a graph does not change their number
    for grid in first_grids(GRIDS):
        learner.step(grid)
    made = graphs()
    assert 0 < made <= 2 * 2  # two kinds of blocks, or one whose first and last differ; each for one size, then for all
    for _ in range(2):
        for grid, (losses, gradients) in expected.items():
            found = learner.step(grid)
            assert torch.allclose(found[0], losses, rtol=1e-5)
            assert torch.allclose(found[1], gradients, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        uncompiled(learner.losses)(GRIDS[2])  # as measuring does: no graphs of its own
    assert graphs() == made
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_code_gives_the_same_losses(fresh_compiler):
    """The real compiler, one size."""
    learner = Learner(Sd3())
    losses, gradients = learner.step()
    checkpoint_blocks(learner.denoiser, learner.blocks, 1)
    compile_blocks(learner.denoiser, learner.blocks)
    found = learner.step()
    assert graphs() == 2
    assert torch.allclose(found[0], losses, rtol=1e-5)
    assert torch.allclose(found[1], gradients, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, learner.step(), strict=True))


def test_the_first_sizes_are_the_extremes():
    assert first_grids([(8, 8), (4, 8), (12, 4), (4, 8)]) == [(4, 8), (8, 8)]
    assert first_grids([(8, 4), (4, 8)]) == [(4, 8)]  # as many tokens: one graph is enough


def test_without_a_compiler_it_is_refused_before_anything_is_loaded(monkeypatch):
    check_compiler("cpu")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler, and there is none of g\+\+"):
        check_compiler("cpu")
    with pytest.raises(ConfigError, match="compile=true has no use on mps"):
        check_compiler("mps")
