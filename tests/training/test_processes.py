"""Several processes take the steps of one: the same losses and weights, the same end, whoever of them has the trouble."""

import os
import signal
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from charforgex.errors import ConfigError
from charforgex.training.logs import StepLog, read_log
from charforgex.training.loop import fit
from charforgex.training.module import StepModule
from charforgex.training.processes import Parted, Place, find_place, first_host, meeting_point, place_in
from charforgex.training.settings import TrainerSettings
from tests.training.together import together

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


# ---- who is who ----


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_what_started_a_process_tells_it_its_place(environment):
    assert place_in(environment) == Place(5, 8, 1, 4)
    assert find_place(TrainerSettings(devices=4, nodes=2, accumulate=8), environment) == Place(5, 8, 1, 4)
    with pytest.raises(ConfigError, match=r"8 processes were started, .*devices=1 asks for 1; set trainer.devices=4 trainer.nodes=2"):
        find_place(TrainerSettings(), environment)


def test_alone_or_to_be_started():
    assert find_place(TrainerSettings(), {}) == Place(0, 1, 0, 1)
    assert find_place(TrainerSettings(), {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Place(0, 1, 0, 1)  # a batch script, not srun's task
    assert find_place(TrainerSettings(devices=2, accumulate=2), {}) is None
    with pytest.raises(ConfigError, match=r"trainer.nodes=2: .*srun or torchrun"):
        find_place(TrainerSettings(nodes=2, accumulate=2), {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": 3, "accumulate": 4}, "3 devices cannot share .* use 1, 2, 4 devices, or set trainer.accumulate=6"),
        ({"devices": 2}, "use 1 device, or set trainer.accumulate=2"),
        ({"strategy": "fsdp"}, "there is one; set trainer.devices"),
        ({"strategy": "fsdp", "devices": 2, "accumulate": 2, "compile": True}, "leave one of them out"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainerSettings(**settings)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("a1,b[2-3]", "a1"), ("c[4,6]", "c4"), ("n-1,n-2", "n-1")],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_where_processes_meet():
    assert meeting_point({"MASTER_ADDR": "here", "MASTER_PORT": "29500"}) == "here:29500"
    assert meeting_point({"SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_JOB_ID": "41234", "SLURM_STEP_ID": "1"}) == "gpu3:11235"


# ---- what they tell each other ----


def test_gathering_telling_and_adding():
    def talk(processes):
        found = processes.gather({"rank": processes.rank, "long": "x" * processes.rank})
        told = processes.tell(lambda: ["of", "the first"])
        one, other = processes.add([torch.tensor([1.0, 2.0]) * (processes.rank + 1), torch.tensor(0.5)])
        return found, told, one.tolist(), other.item(), list(processes.share(6))

    expected = [{"rank": 0, "long": ""}, {"rank": 1, "long": "x"}]
    assert together(2, talk) == [
        (expected, ["of", "the first"], [3.0, 6.0], 1.0, [0, 1, 2]),
        (expected, ["of", "the first"], [3.0, 6.0], 1.0, [3, 4, 5]),
    ]


def test_the_end_of_one_is_told_by_the_other():
    def die_or_wait(processes):
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.wait()

    started = time.monotonic()
    first, second = together(2, die_or_wait)
    assert isinstance(first, Parted) and "Another process of this training has ended" in str(first) and second is None
    assert time.monotonic() - started < 30


# ---- steps ----


class Toy(StepModule):
    """Four examples a micro-batch of numbers drawn by its key; a second weight learns in micro-batches of odd numbers alone."""

    def __init__(self, steps, processes, accumulate=4, bad=lambda step, number, attempt: False, **settings):
        generator = torch.Generator().manual_seed(0)
        self_weight, self_other = (nn.Parameter(torch.randn(40, generator=generator)) for _ in range(2))
        share = processes.share(accumulate)
        defaults = {"make_optimizer": lambda trainable: torch.optim.AdamW(trainable.values(), lr=0.1), "ema_decay": 0.9}
        super().__init__(
            {"w": self_weight, "other": self_other}, learning_rate=lambda step: 1.0, processes=processes,
            make_loader=lambda first: DataLoader([[torch.zeros(4)] * len(share)] * (steps - first), batch_size=None, collate_fn=list),
            **(defaults | settings),
        )  # fmt: skip
        self.w, self.other, self.bad = self_weight, self_other, bad

    def parts(self, micro, key):
        _, step, _, number, attempt = key
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1000 * step + number))
        scale = float("nan") if self.bad(step, number, attempt) else 1.0
        yield "one", ((self.w - x).square().mean(1) + micro) * scale
        if number % 2:
            yield "two", (self.other + x).pow(4).mean(1)


def run(folder, processes, steps=6, stop=None, **options):
    """Trains, and returns the log by name, the weights and averages, and the step and signal it ended with."""
    settings = TrainerSettings(steps=steps, accelerator="cpu", checkpoint_every=2, accumulate=options.get("accumulate", 4))
    module = Toy(steps, processes, **options)
    log = [StepLog(folder / "metrics.csv")] if processes.is_first else []

    def measure(step):
        if stop == (processes.rank, step):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = fit(module, folder / "checkpoints", settings, log, Console(quiet=True), measure, 1, set)
    weights = [module.w.tolist(), module.other.tolist(), module.ema["w"].tolist()]
    return read_log(folder / "metrics.csv") if processes.is_first else None, weights, module.step, stopped


def check_numbers(found, expected):
    """Of two logs: equal but for the order in which losses are added up."""
    for name in ("loss", "loss/one", "loss/two", "grad_norm", "lr", "skipped"):
        wanted = [(step, pytest.approx(value, rel=1e-6, nan_ok=True)) for step, value in expected.get(name, [])]
        assert found.get(name, []) == wanted, name


@pytest.fixture
def compare(tmp_path):
    """`count` processes beside one: ((log, weights, step, signal), and the same of the first of several)."""

    def both(count, **options):
        alone = together(1, lambda processes: run(tmp_path / "alone", processes, **options))[0]
        several = together(count, lambda processes: run(tmp_path / "several", processes, **options))
        assert all(found[1:] == several[0][1:] for found in several), "they have drifted apart"
        return alone, several[0]

    return both


def test_two_processes_with_two_micro_batches_are_one_to_the_bit(compare):
    alone, several = compare(2, accumulate=2)
    assert several[1:] == alone[1:]
    check_numbers(several[0], alone[0])
    assert len(alone[0]["loss"]) == 6 and len(alone[0]["loss/two"]) == 6


def test_four_processes_are_one_but_for_the_order_of_sums(compare):
    alone, several = compare(4)
    check_numbers(several[0], alone[0])


def test_what_is_not_finite_in_one_is_skipped_and_rolled_back_in_all(compare):
    def bad(step, number, attempt):
        return number == 1 and (step == 1 or step > 4) and attempt == 0

    alone, several = compare(2, steps=12, accumulate=2, bad=bad)
    # After the fifth of them in a row it goes back to step 9, the last that was saved.
    assert [step for step, _ in alone[0]["skipped"]] == [2, 6, 7, 8, 9]
    assert several[1:] == alone[1:]
    check_numbers(several[0], alone[0])


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    found = together(2, lambda processes: run(tmp_path, processes, stop=(1, 3)))
    assert [row[2:] for row in found] == [(3, signal.SIGTERM)] * 2
