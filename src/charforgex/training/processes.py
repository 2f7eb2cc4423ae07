"""The processes of one training, one for each device: which of them this is, and what they tell each other.

Each has the whole of what learns and works on its share of a step's micro-batches. Sums over all are the same bits everywhere, so what
learns stays equal without ever being sent. What is said besides, such as where the run folder is, is JSON over gloo, which notices at once
when another process ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from charforgex.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from charforgex.training.settings import TrainerSettings

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=2)  # for the first process, which measures; one that ends is noticed at once


class Parted(TrainingError):
    """Another process of the training has ended, for a reason that it says itself."""


@dataclass(frozen=True)
class Place:
    """A process among `count`, `local_count` of which are on its machine."""

    rank: int
    count: int
    local_rank: int
    local_count: int


# What tells a process its place: torchrun's words, which are ours too, and those of Slurm's srun.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def place_in(environment: Mapping[str, str]) -> Place | None:
    """What torchrun or srun say; None for a process that neither has started as one of several."""
    for names in (TORCHRUN, SRUN):
        if all(name in environment for name in names):
            *numbers, local_count = (environment[name] for name in names)
            rank, count, local_rank = map(int, numbers)
            if count > 1:
                return Place(rank, count, local_rank, int(local_count.partition("(")[0].partition(",")[0]))  # srun: "4(x2)", "4,3"
    return None


def find_place(settings: TrainerSettings, environment: Mapping[str, str]) -> Place | None:
    """This process's place; None where `settings` ask for several and nothing has started them yet.

    Raises ConfigError if what started this process started others than `settings` ask for, or if nothing started several machines'.
    """
    place, wanted = place_in(environment), settings.count
    if place is None:
        if settings.nodes > 1:
            raise ConfigError(
                f"trainer.nodes={settings.nodes}: a process starts others on its own machine only. Start one for each device, with srun or "
                "torchrun, as docs/devices.md shows."
            )
        return None if wanted > 1 else Place(0, 1, 0, 1)
    if place.count != wanted:
        asked = f"trainer.devices={settings.devices or 1}" + (f" and trainer.nodes={settings.nodes}" if settings.nodes > 1 else "")
        nodes = f" trainer.nodes={place.count // place.local_count}" if place.count > place.local_count else ""
        raise ConfigError(
            f"{place.count} processes were started, and {asked} {'ask' if settings.nodes > 1 else 'asks'} for {wanted}; "
            f"set trainer.devices={place.local_count}{nodes}."
        )
    return place


def check_devices(settings: TrainerSettings, local_count: int) -> None:
    """Raises ConfigError unless this machine has so many devices of the kind that is asked for."""
    import torch

    kind = settings.accelerator
    if kind == "mps" or (kind == "auto" and torch.backends.mps.is_available() and not torch.cuda.is_available()):
        raise ConfigError(f"trainer.devices={settings.devices}: mps is one device; set trainer.devices=1, or trainer.accelerator=cpu.")
    there = torch.cuda.device_count()
    if kind == "gpu" or (kind == "auto" and there):
        seen_by_each = there == 1 and "SLURM_PROCID" in os.environ  # srun --gpus-per-task=1 shows each task its own alone
        if there < local_count and not seen_by_each:
            raise ConfigError(f"trainer.devices={local_count}, and this machine has {there} GPU{'s' * (there != 1)}; set trainer.devices.")


class Processes:
    """All processes of a training as one of them sees them. Made without arguments, it is alone.

    `in_step`: whether the base is split among them, so that none can compute unless all do.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, in_step: bool = False):
        self.rank, self.count, self.group, self.in_step = rank, count, group, in_step

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, logs and says what there is to say."""
        return self.rank == 0

    def share(self, micros: int) -> range:
        """Which of a step's micro-batches are this process's: as many as every other's, side by side."""
        assert micros % self.count == 0
        own = micros // self.count
        return range(self.rank * own, (self.rank + 1) * own)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank; something that JSON has words for. All must call it."""
        if self.count == 1:
            return [value]
        import torch
        import torch.distributed as dist

        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = max(int(size) for size in sizes)
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(found, torch.cat([data, torch.zeros(longest - len(data), dtype=torch.uint8)]), group=self.group)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(found, sizes, strict=True)]

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)

    def tell(self, make: Callable[[], T]) -> T:
        """What the first process makes, which all others wait for. Something that JSON has words for."""
        return self.gather(make() if self.is_first else None)[0]

    def after_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, the others when the first has: what it left on the disk serves them."""
        if not self.is_first:
            self.wait()
        made = make()
        if self.is_first:
            self.wait()
        return made

    def add(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all processes, the same bits in every one. All must have the same shapes."""
        if self.count == 1:
            return list(tensors)
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]


ALONE = Processes()


@contextlib.contextmanager
def _hearing_of_ends() -> Iterator[None]:
    """Turns what the libraries say of a connection that is gone into Parted, also where a split base is put together for a block."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise Parted("Another process of this training has ended, and says why itself.") from error
        raise


@contextlib.contextmanager
def joined(place: Place, settings: TrainerSettings) -> Iterator[Processes]:
    """Inside, this process is one of `place.count` that know each other. Raises Parted when another one ends."""
    if place.count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    check_devices(settings, place.local_count)
    on_gpus = settings.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())  # what is loaded onto "cuda" goes there
    with _hearing_of_ends():
        where = f"tcp://{meeting_point(os.environ)}"
        dist.init_process_group("nccl" if on_gpus else "gloo", where, rank=place.rank, world_size=place.count)
        try:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            yield Processes(place.rank, place.count, group, settings.splits_base)
        finally:
            dist.destroy_process_group()


def meeting_point(environment: Mapping[str, str]) -> str:
    """host:port where the first process listens: torchrun's or ours, else the first host of Slurm's step and a port made from the job."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    if "SLURM_STEP_NODELIST" in environment:
        port = 10000 + int(environment["SLURM_JOB_ID"]) % 20000 + int(environment.get("SLURM_STEP_ID", 0)) % 100
        return f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    raise ConfigError("The processes have no place to meet; set MASTER_ADDR and MASTER_PORT, as torchrun does.")


def first_host(nodes: str) -> str:
    """Of Slurm's short form: "gpu[07-09,12],login1" is gpu07."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + rest.partition("]")[0].partition(",")[0].partition("-")[0]
