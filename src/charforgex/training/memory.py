"""How much memory a training has, and how it shows that there is too little."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from charforgex.errors import TrainingError

GIB = 2**30
STATUS = Path("/proc/self/status")  # Linux alone has it
SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")  # cuBLAS and cuDNN have an error of their own
SWAPPED = 64 << 20  # bytes of this process on the disk, below which it may be what nobody needs
FAULTS = 50  # reads of memory from the disk in a second, above which it is needed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device, or the computer, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def told_if_full(doing: str, way_out: str) -> Iterator[None]:
    """Inside, memory that runs out is a TrainingError that says what was being done, and the way out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"Out of memory while {doing}: {first_line(error)} {way_out}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without the advice and the C++ frames below it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(". Of the allocated")[0].rstrip(".") + "."


def used() -> dict[str, float]:
    """GiB by the names of `numbers.py`: of the process where the system tells, and of the GPU where there is one in use."""
    status = _status()
    found = {"memory/process": status["VmRSS"] / GIB, "memory/swapped": status["VmSwap"] / GIB} if status else {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["memory/gpu"] = torch.cuda.memory_allocated() / GIB
        found["memory/gpu_peak"] = torch.cuda.max_memory_allocated() / GIB
        found["memory/gpu_reserved"] = torch.cuda.memory_reserved() / GIB
    return found


def _status() -> dict[str, int]:
    """Bytes of this process in memory and swapped out to the disk; nothing where the system does not tell."""
    if not STATUS.exists():
        return {}
    lines = (line.split() for line in STATUS.read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words and words[0] in ("VmRSS:", "VmSwap:")}
    return {"VmRSS": 0, "VmSwap": 0} | found  # a kernel without swap has no line for it


class Spills:
    """Asked now and then, says whether what is computed with lies in slower memory than it should."""

    def __init__(self):
        self.asked, self.faults = time.monotonic(), _faults()

    def found(self) -> str | None:
        """What spills and the way out, or None."""
        before, faults, (self.asked, self.faults) = self.asked, self.faults, (time.monotonic(), _faults())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            told = beyond_gpu(torch.cuda.memory_reserved(), torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
            if told:
                return told
        return on_disk(_status().get("VmSwap", 0), (self.faults - faults) / max(self.asked - before, 1e-3))


def beyond_gpu(reserved: int, total: int) -> str | None:
    """Bytes reserved by this process, and those that the GPU has. Only a driver that moves the rest to the computer's memory, as NVIDIA's
    does on Windows, lets there be more."""
    if reserved <= total:
        return None
    return (
        f"{reserved / GIB:.1f} GiB of GPU memory are in use and the GPU has {total / GIB:.1f}: the rest lies in the computer's memory, and "
        "steps take many times as long. Lower data.batch_size, or set trainer.gradient_checkpointing=true. With CUDA's sysmem fallback off "
        "in NVIDIA's settings, micro-batches are made smaller by themselves."
    )


def on_disk(swapped: int, faults_per_second: float) -> str | None:
    """Bytes of this process on the disk, and how often a second it waits for one of its pages from there."""
    if swapped < SWAPPED or faults_per_second < FAULTS:
        return None
    return (
        f"{swapped / GIB:.1f} GiB of this program lie on the disk, and it reads them {faults_per_second:.0f} times a second: the computer "
        "has too little memory. Close other programs, lower data.batch_size, or set trainer.gradient_checkpointing=true."
    )


def _faults() -> int:
    """How often this process has waited for its memory to come from a disk."""
    if sys.platform == "win32":
        return 0  # there is no such count
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
