"""Memory that runs out in a step: smaller pieces, the same step, no batch lost."""

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from charforgex.errors import TrainingError
from charforgex.families.sdxl import Sdxl
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.training.checkpoints import load_last_good
from charforgex.training.events import read_events
from charforgex.training.live import LiveText
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import fit
from charforgex.training.losses import Objective
from charforgex.training.memory import is_out_of_memory, told_if_full
from charforgex.training.module import DenoiserModule
from charforgex.training.optimizers import schedule
from charforgex.training.settings import TrainerSettings
from charforgex.types import Batch, Components, Crop, Prior
from tests.training.test_module import Toy, steps_of
from tests.training.together import together

FAMILY = Sdxl()
STEPS, SIZE = 3, 5


def batches() -> list[list[Batch]]:
    """Two micro-batches of five pictures a step, with all that a batch can have."""
    parts, found = FAMILY.tiny(), []
    for number in range(2 * STEPS):
        generator = torch.Generator().manual_seed(number)
        captions = tuple(f"a man, number {number} {row}" for row in range(SIZE))
        text = FAMILY.encode_text(parts, captions)
        mean = torch.randn(SIZE, 4, 8, 8, generator=generator)
        mask = torch.rand(SIZE, 1, 8, 8, generator=generator)
        weight = torch.rand(SIZE, generator=generator)
        prior = Prior(text, text, captions)
        found.append(Batch(mean, 0.1 * torch.ones_like(mean), text, Crop.whole(SIZE, 64, 64), mask, captions, captions, weight, prior))
    return [found[2 * step : 2 * step + 2] for step in range(STEPS)]


def run(tmp_path, most: int | None, steps: int = STEPS, module=None) -> DenoiserModule:
    """Trains an adapter on a network that runs out of memory with more than `most` examples, in its second step for the first time."""
    module = module or make(batches())
    seen = []

    def guard(network, inputs):
        if most is not None and module.step > 0 and len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB.\nSee")
        seen.append(len(inputs[0]))

    handle = module.denoiser.register_forward_pre_hook(guard)
    settings = TrainerSettings(steps=steps, ema=0.0, checkpoint_every=2, accelerator="cpu")
    log = StepLog(tmp_path / "metrics.csv", module.step)
    fit(module, tmp_path / "checkpoints", settings, [log], Console(quiet=True), lambda step: None, 1000, set)
    handle.remove()
    module.seen = seen
    return module


def make(steps: list[list[Batch]]) -> DenoiserModule:
    parts = FAMILY.tiny()
    inject(parts.denoiser, FAMILY.lora_targets("attention", parts.denoiser.config), 2, 2.0)
    objective = Objective(noise_offset=0.1, prior_weight=0.5, weighting="min_snr")
    return DenoiserModule(
        FAMILY, parts.denoiser, FAMILY.process(parts), objective, adapter_parameters(parts.denoiser),
        LiveText(FAMILY, Components("", FAMILY.denoiser_name)), make_optimizer=lambda own: torch.optim.AdamW(own.values(), lr=0.01),
        learning_rate=schedule("constant", STEPS),
        make_loader=lambda first: DataLoader(steps[first:], batch_size=None, collate_fn=list),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run for which there is memory enough, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, None), folder


def test_a_step_that_did_not_fit_is_the_same_step_in_pieces(whole, tmp_path):
    module, folder = whole
    cut = run(tmp_path, most=2)
    assert set(module.seen) == {5} and set(cut.seen[-6:]) == {1, 2}, "3 do not fit either, and 5 are 2, 2 and 1"
    assert cut.step == STEPS and cut.largest == 2
    logs = read_log(folder / "metrics.csv"), read_log(tmp_path / "metrics.csv")
    assert logs[0].keys() == logs[1].keys() and len(logs[0]["loss"]) == STEPS
    for name, rows in logs[0].items():
        for (step, value), (other_step, other) in zip(rows, logs[1][name], strict=True):
            assert step == other_step and other == pytest.approx(value, rel=1e-5, abs=1e-6), (name, step)
    for name, weight in module.trainable.items():
        assert torch.allclose(cut.trainable[name], weight, rtol=0, atol=1e-6), name


def test_it_is_told_once_and_kept_for_the_rest_of_the_run(tmp_path):
    cut = run(tmp_path, most=2)
    (warning,) = [row for row in read_events(tmp_path) if row["event"] == "warning"]
    assert warning["kind"] == "out_of_memory" and "at most 2" in warning["message"] and "2.00 GiB" in warning["message"]
    assert cut.seen.count(5) == 6, "the first step's two micro-batches: each is predicted, and the class with and without the adapter"
    checkpoint, _ = load_last_good(tmp_path / "checkpoints")
    resumed = make([])
    resumed.restore(checkpoint)
    assert resumed.largest == 2


def test_a_run_gone_on_with_has_the_log_of_one_in_one_piece(whole, tmp_path):
    """Losses by level and norms by block, too."""
    run(tmp_path, None, steps=2)
    resumed = make(batches())
    resumed.restore(load_last_good(tmp_path / "checkpoints")[0])
    run(tmp_path, None, module=resumed)
    log = (tmp_path / "metrics.csv").read_bytes()
    assert log == (whole[1] / "metrics.csv").read_bytes() and b"3,loss/t=" in log and b"2,weight_norm/" in log and b"1,weight" not in log


class Cut(Toy):
    """Losses of examples that can be computed apart; out of memory with two at once in the second process."""

    def cut(self, micro, size):
        return list(micro.split(size))

    def losses(self, micro, key):
        if self.processes.rank == 1 and len(micro) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().losses(micro, key)


def test_one_of_several_processes_may_have_too_little(tmp_path):
    def train(processes):
        own = ([1.0, 2.0], [3.0, 6.0])[processes.rank]
        module = Cut(steps_of([own], [own]), processes=processes)
        fit(
            module, tmp_path / "checkpoints", TrainerSettings(steps=2, ema=0.0, accelerator="cpu"), [], Console(quiet=True),
            lambda step: None, 1000, set,
        )  # fmt: skip
        return module.w.item(), module.largest

    assert together(2, train) == [(pytest.approx(2.25), None), (pytest.approx(2.25), 1)], "0, 1.5 and 2.25 on the way to the mean 3"
    (warning,) = [row for row in read_events(tmp_path) if row["event"] == "warning"]
    assert warning["kind"] == "out_of_memory" and warning["step"] == 1


def test_a_single_example_that_does_not_fit_ends_it_with_the_ways_out(tmp_path):
    with pytest.raises(TrainingError, match=r"one example at a time, in step 2: .*2\.00 GiB.*data\.resolution.*gradient_checkpointing"):
        run(tmp_path, most=0)
    assert load_last_good(tmp_path / "checkpoints")[0]["step"] == 0
    assert [row["step"] for row in read_events(tmp_path) if row["event"] == "step"] == [1]


def test_examples_that_need_each_other_are_not_cut(tmp_path):
    class Greedy(Toy):
        def losses(self, micro, key):
            raise MemoryError

    module = Greedy(steps_of([[1.0, 2.0]]))
    settings = TrainerSettings(steps=1, ema=0.0, accelerator="cpu")
    with pytest.raises(TrainingError, match=r"2 examples, which cannot be computed apart, in step 1: MemoryError\. .*batch_size"):
        fit(module, tmp_path / "checkpoints", settings, [], Console(quiet=True), lambda step: None, 1000, set)


def test_rows_know_what_was_drawn_for_them():
    batch = batches()[0][0]
    pieces = [batch.rows(0, 3), batch.rows(3, 5)]
    assert [len(piece) for piece in pieces] == [3, 2] and pieces[1].captions == batch.captions[3:] == pieces[1].prior.captions
    draws = torch.cat([piece.drawn(torch.arange) for piece in pieces])
    assert draws.tolist() == [0, 1, 2, 3, 4]
    assert pieces[1].rows(1, 2).drawn(torch.arange).tolist() == [4]
    assert torch.equal(torch.cat([piece.text.tokens_BLD for piece in pieces]), batch.text.tokens_BLD)
    assert torch.equal(pieces[1].crop.original_B2, batch.crop.original_B2[3:])


def test_what_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
    with (
        pytest.raises(TrainingError, match=r"Out of memory while measuring: .*allocate.* Lower it\."),
        told_if_full("measuring", "Lower it."),
    ):
        torch.empty(2**50)
    with pytest.raises(KeyError), told_if_full("measuring", "Lower it."):
        raise KeyError
