"""What happens between steps: progress, logs, measuring, checkpoints, and stopping when asked."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from charforgex.lora.checkpoints import folder_name
from charforgex.training.checkpoints import prune
from charforgex.training.module import StepModule

QUIET_SECONDS = 15  # between lines where there is no terminal to draw a bar on


class Asked:
    """Ctrl-C and SIGTERM ask for a stop at the next step boundary; asked twice, the program ends at once."""

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._hear)

    def _hear(self, number, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class ProgressLine:
    """A bar with ETA, loss and step rate; a line now and then where output is no terminal."""

    def __init__(self, steps: int, first_step: int, console: Console):
        self.steps, self.console, self.started, self.first = steps, console, time.monotonic(), first_step
        self.loss, self.last_line = None, 0.0
        self.bar = Progress(
            TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, completed=first_step, loss="-", rate="-")

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bar.stop()

    def update(self, step: int, loss: float) -> None:
        self.loss = loss if self.loss is None or self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        elapsed = time.monotonic() - self.started
        rate = (step - self.first) / max(elapsed, 1e-6)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, loss=f"{self.loss:.4f}", rate=f"{rate:.2f} steps/s")
        elif elapsed - self.last_line > QUIET_SECONDS or step == self.steps:
            self.last_line = elapsed
            left = (self.steps - step) / max(rate, 1e-6)
            self.console.print(f"step {step}/{self.steps}  loss {self.loss:.4f}  {rate:.2f} steps/s  {left:.0f} s left", highlight=False)


class Steering(L.Callback):
    """Calls `measure(step)` and saves checkpoints at their intervals, after the last step, and when a stop is asked for."""

    def __init__(
        self, folder: Path, steps: int, checkpoint_every: int, measure_every: int, keep: int,
        measure: Callable[[int], None], keep_always: Callable[[], set[int]], progress: ProgressLine, asked: Asked,
    ):  # fmt: skip
        self.folder, self.steps, self.keep, self.asked = folder, steps, keep, asked
        self.checkpoint_every, self.measure_every = checkpoint_every, measure_every
        self.measure, self.keep_always, self.progress = measure, keep_always, progress

    def on_train_start(self, trainer: L.Trainer, module: StepModule) -> None:
        self.asked.listen()  # only now: Lightning has set its own handlers before

    def on_fit_end(self, trainer, module) -> None:
        self.asked.restore()

    def on_exception(self, trainer, module, exception) -> None:
        self.asked.restore()

    def on_train_batch_end(self, trainer: L.Trainer, module: StepModule, outputs, batch, batch_idx) -> None:
        step, last = module.step, module.step >= self.steps
        numbers = module.numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        self.progress.update(step, numbers["loss"])
        measured = step % self.measure_every == 0 or last
        if measured:
            self.measure(step)
        self.asked.signal = max(filter(None, module.processes.gather(self.asked.signal)), default=None)
        stop = self.asked.signal is not None
        due = step % self.checkpoint_every == 0 and not module.skipped  # a roll-back goes to before the trouble
        if due or measured or stop or last:
            self.save(trainer, module)
        if stop:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer, module: StepModule) -> None:
        module.check_finite()
        for logger in trainer.loggers:
            logger.save()
        if module.processes.is_first:
            trainer.strategy.checkpoint_io.save_checkpoint(module.checkpoint(), self.folder / folder_name(module.step))
            prune(self.folder, self.keep, self.keep_always())
        module.processes.wait()
