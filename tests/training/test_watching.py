"""The pace, and trouble by its name."""

import io
import time

import pytest
from rich.console import Console

from charforgex.training import memory
from charforgex.training.events import Events, read_events
from charforgex.training.watching import SPARSE, Watch


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Steps:
    """A watch and a clock, whose steps wait for data and compute for so long."""

    def __init__(self, folder, steps=100_000, first=0):
        self.folder, self.clock, self.output, self.step = folder, Clock(), io.StringIO(), first
        self.watch = Watch(Events(folder), Console(file=self.output, width=200), steps, first, self.clock)

    def take(self, waiting: float, computing: float, numbers=None, certain=False) -> dict:
        self.clock.now += waiting
        self.watch.enter("computing")
        self.clock.now += computing
        self.step += 1
        found = self.watch.done(self.step, 4, numbers or {}, certain)
        self.watch.enter("waiting")
        return found

    def told(self, event: str) -> list[dict]:
        return [row for row in read_events(self.folder) if row["event"] == event]


@pytest.fixture
def steps(tmp_path) -> Steps:
    return Steps(tmp_path)


def test_lines_are_means_and_pace_since_the_line_before(steps):
    steps.take(0.1, 0.3, {"loss": 1.0, "loss/t=0.00-0.25": 8.0}, certain=True)
    assert steps.take(0.1, 0.3, {"loss": 2.0}) == {}
    pace = steps.take(0.1, 0.3, {"loss": 4.0}, certain=True)
    assert pace["speed/steps"] == pytest.approx(2 / 0.8) and pace["speed/examples"] == pytest.approx(8 / 0.8)
    assert pace["speed/waiting"] == pytest.approx(0.25)
    assert pace["speed/seconds_left"] == pytest.approx((100_000 - 3) * 0.4)
    first, second = steps.told("step")
    assert first["numbers"]["loss/t=0.00-0.25"] == 8.0 and second["numbers"]["loss"] == 3.0
    assert "loss/t=0.00-0.25" not in second["numbers"] and (second["step"], second["steps"]) == (3, 100_000)


def test_measuring_takes_no_pace_but_time(steps):
    steps.take(0.0, 1.0, certain=True)
    steps.watch.enter("measuring")
    steps.clock.now += 98
    steps.watch.enter("waiting")
    pace = steps.take(0.0, 1.0, certain=True)
    assert pace["speed/steps"] == pytest.approx(1) and pace["speed/seconds_left"] == pytest.approx((100_000 - 2) * 50)


def test_the_stream_of_a_long_run_stays_small(steps, monkeypatch):
    """A hundred thousand steps in 14 hours: a line a second at first, then one in a 2000th of the run's age."""
    told = []
    monkeypatch.setattr(steps.watch.events, "tell", lambda event, *_, **__: told.append(event))
    monkeypatch.setattr("charforgex.training.watching.used", dict)
    monkeypatch.setattr(steps.watch.spills, "found", lambda: None)
    for _ in range(20_000):  # the first fifth of it
        steps.take(0.0, 0.5)
    assert 2000 < len(told) < SPARSE * (1 + 1.7) and set(told) == {"step"}  # 2000 s, and 2000 ln(10000 s / 2000 s)


def test_a_stall_is_told_while_it_lasts_and_once(steps):
    for _ in range(10):
        steps.take(0.1, 0.9)
    steps.clock.now += 0.1
    steps.watch.enter("computing")
    steps.clock.now += 9
    steps.watch.look()
    assert not steps.told("warning")
    steps.clock.now += 2
    steps.watch.look()
    steps.watch.look()
    (warning,) = steps.told("warning")
    assert warning["kind"] == "stalled" and "11 s in one step" in warning["message"] and warning["step"] == 10
    assert steps.output.getvalue().count("\n") == 1 and "After step 10: 11 s" in steps.output.getvalue()
    steps.clock.now += 400
    steps.watch.look()
    assert len(steps.told("warning")) == 2


def test_waiting_for_data_is_told_apart(steps):
    for _ in range(10):
        steps.take(0.1, 0.9)
    steps.clock.now += 12
    steps.watch.look()
    (warning,) = steps.told("warning")
    assert warning["kind"] == "waiting_for_data" and "12 s of waiting" in warning["message"]


def test_data_that_is_always_late_is_told(steps):
    for _ in range(30):
        steps.take(0.06, 0.04)
    (warning,) = steps.told("warning")
    assert warning["kind"] == "waiting_for_data" and "60% of the time" in warning["message"] and "data.num_workers" in warning["message"]


def test_neither_measuring_nor_the_first_steps_are_stalls(steps):
    for _ in range(3):
        steps.take(0.0, 50.0)
        steps.watch.look()
    for _ in range(10):
        steps.take(0.0, 0.1)
    steps.watch.enter("measuring")
    steps.clock.now += 1000
    steps.watch.look()
    assert not steps.told("warning")


def test_a_thread_looks(steps, monkeypatch):
    looked = []
    monkeypatch.setattr("charforgex.training.watching.LOOKS", 0.001)
    monkeypatch.setattr(steps.watch, "look", lambda: looked.append(1))
    with steps.watch:
        deadline = time.monotonic() + 20
        while not looked and time.monotonic() < deadline:
            time.sleep(0.002)
    assert looked and not steps.watch.thread.is_alive()


def test_spills_are_told_with_the_way_out(steps, monkeypatch):
    monkeypatch.setattr(steps.watch.spills, "found", lambda: memory.on_disk(3 << 30, 400.0))
    steps.take(0.0, 1.0)
    (warning,) = steps.told("warning")
    assert warning["kind"] == "spilling" and "3.0 GiB" in warning["message"] and "400 times a second" in warning["message"]


def test_what_is_a_spill():
    assert memory.on_disk(3 << 30, 0.0) is None, "what nobody reads may lie on the disk"
    assert memory.on_disk(1 << 20, 400.0) is None, "files are read, too"
    assert memory.beyond_gpu(8 << 30, 8 << 30) is None
    assert "9.0 GiB of GPU memory are in use and the GPU has 8.0" in memory.beyond_gpu(9 << 30, 8 << 30)


def test_memory_is_that_of_this_process(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 99 kB\nVmRSS:\t 2097152 kB\nVmSwap:\t 524288 kB\nThreads:\t1\n")
    monkeypatch.setattr(memory, "STATUS", status)
    found = memory.used()
    assert found["memory/process"] == 2.0 and found["memory/swapped"] == 0.5
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert "memory/process" not in memory.used()
