"""Several processes of one training, forked from the test's own: everything heavy is imported already."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from charforgex.training.launching import free_port
from charforgex.training.processes import Place, Processes, joined
from charforgex.training.settings import TrainerSettings

PATIENCE = 300  # seconds


def together(count: int, function: Callable[[Processes], Any]) -> list[Any]:
    """What `function` returns in each of `count` processes, by rank; an exception where it raises one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run, args=(function, rank, count, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        return [_received(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(PATIENCE)
            process.kill()
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def _received(pipe: Any) -> Any:
    if not pipe.poll(PATIENCE):
        pytest.fail("a process of several has not come to an end")
    try:
        return pipe.recv()
    except EOFError:
        return None  # it was killed


def _run(function: Callable[[Processes], Any], rank: int, count: int, pipe: Any) -> None:
    settings = TrainerSettings(accelerator="cpu", devices=count, accumulate=count)
    try:
        with joined(Place(rank, count, rank, count), settings) as processes:
            found = function(processes)
    except Exception as error:
        traceback.print_exc()
        found = error
    pipe.send(found)
