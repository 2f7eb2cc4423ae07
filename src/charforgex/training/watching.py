"""The pace of a training, and what hampers it, named while it happens."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.markup import escape

from charforgex.training.events import Events
from charforgex.training.memory import Spills, used

LOOKS = 1.0  # seconds between looks at what goes on
CALM = 300.0  # seconds before the same trouble is named again
SLOW, LEAST = 10.0, 5.0  # a stall lasts so many times the usual step, and at least so many seconds
RECENT, KNOWN = 64, 8  # steps that say what is usual, and how many it takes to know
BUSY = 20  # steps of which more than half was spent on waiting for data, to be worth a word
SPARSE = 2000  # lines of steps that a run has while it is young: later ones are further apart, by a share of its age


class Watch:
    """Told what goes on, it knows the pace, writes `step` events, and warns: each kind of trouble once in `CALM` seconds.

    A thread looks every second, so that a step that never ends is named, too. `clock` counts seconds.
    """

    def __init__(
        self, events: Events, console: Console, steps: int, first_step: int, clock: Callable[[], float] = time.monotonic
    ):  # fmt: skip
        self.events, self.console, self.steps, self.clock = events, console, steps, clock
        self.first, self.step = first_step, first_step
        self.started = self.since = self.last_line = clock()
        self.phase, self.waited = "waiting", 0.0  # for data, seconds of this step; then computing, or measuring
        self.spent = dict.fromkeys(("waiting", "computing", "measuring"), 0.0)  # seconds since the last line
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of whole steps, and of their waits
        self.waits: deque[float] = deque(maxlen=RECENT)
        self.usual: float | None = None
        self.sums: dict[str, list[float]] = {}  # of numbers since the last line, and how often each was there
        self.examples, self.lines_step = 0, first_step
        self.warned: dict[str, float] = {}
        self.spills, self.over = Spills(), threading.Event()

    def __enter__(self) -> Watch:
        self.over.clear()
        self.thread = threading.Thread(target=self._keep_looking, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def _keep_looking(self) -> None:
        while not self.over.wait(LOOKS):
            self.look()

    def enter(self, phase: str) -> float:
        """What is done from now on: "waiting", "computing" or "measuring". Returns the seconds of what was done until now."""
        now = self.clock()
        lasted = now - self.since
        self.spent[self.phase] += lasted
        if self.phase == "waiting":
            self.waited = lasted
        self.phase, self.since = phase, now
        return lasted

    def look(self) -> None:
        """Warns if what is being done takes far longer than a whole step does."""
        phase, lasted = self.phase, self.clock() - self.since
        if phase == "measuring" or self.usual is None or lasted < max(LEAST, SLOW * self.usual):
            return
        usual = f"a whole step usually takes {self.usual:.2g} s"
        if phase == "waiting":
            self.warn("waiting_for_data", f"{lasted:.0f} s of waiting for data, and {usual}. Is the disk busy, or a network folder gone?")
        else:
            self.warn("stalled", f"{lasted:.0f} s in one step, and {usual}. Is something else using the device, or its memory full?")

    def warn(self, kind: str, message: str) -> None:
        """A yellow line and a `warning` event, if this kind was not told lately."""
        now = self.clock()
        if now - self.warned.get(kind, -CALM) < CALM:
            return
        self.warned[kind] = now
        self.console.print(f"[yellow]After step {self.step}: {escape(message)}", soft_wrap=True, highlight=False)
        self.events.tell("warning", self.step, kind=kind, message=message)

    # ---- the pace ----

    @property
    def rate(self) -> float:
        """Steps a second in this sitting, measuring included."""
        return (self.step - self.first) / max(self.clock() - self.started, 1e-6)

    @property
    def left(self) -> float:
        """Seconds until the last step at this rate."""
        return (self.steps - self.step) / max(self.rate, 1e-6)

    def done(self, step: int, examples: int, numbers: Mapping[str, float], certain: bool) -> dict[str, float]:
        """A step is computed. Returns numbers of pace and memory where a line is due, as it is where `certain`; else nothing. The line
        has the means of all `numbers` since the one before."""
        self.step = step
        self.examples += examples
        self.waits.append(self.waited)
        self.recent.append(self.waited + self.enter("computing"))
        if len(self.recent) >= KNOWN:
            self.usual = statistics.median(self.recent)
        for name, value in numbers.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0], total[1] = total[0] + value, total[1] + 1
        now = self.clock()
        if not certain and now - self.last_line < max(1.0, (now - self.started) / SPARSE):
            return {}
        working = max(self.spent["waiting"] + self.spent["computing"], 1e-6)
        if len(self.waits) >= BUSY and (share := sum(self.waits) / max(sum(self.recent), 1e-6)) > 0.5:
            self.warn("waiting_for_data", f"{share:.0%} of the time goes into waiting for data; set data.num_workers=4, which reads ahead.")
        if told := self.spills.found():
            self.warn("spilling", told)
        pace = {
            "speed/steps": (step - self.lines_step) / working, "speed/examples": self.examples / working,
            "speed/waiting": self.spent["waiting"] / working, "speed/seconds_left": self.left, **used(),
        }  # fmt: skip
        self.events.tell("step", step, steps=self.steps, numbers={name: total / count for name, (total, count) in self.sums.items()} | pace)
        self.last_line, self.lines_step, self.examples, self.sums = now, step, 0, {}
        self.spent = dict.fromkeys(self.spent, 0.0)
        return pace
