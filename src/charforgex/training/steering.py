"""What happens between steps: progress, logs, measuring, checkpoints, and stopping when asked."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from charforgex.lora.checkpoints import folder_name
from charforgex.training.checkpoints import prune
from charforgex.training.events import Events
from charforgex.training.logs import StepLog, show_picture
from charforgex.training.memory import told_if_full
from charforgex.training.module import StepModule
from charforgex.training.watching import Watch

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

    def __init__(self, watch: Watch, console: Console):
        self.watch, self.console = watch, console
        self.loss, self.last_line = None, watch.started
        self.bar = Progress(
            TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=watch.steps, completed=watch.first, loss="-", rate="-")

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bar.stop()

    def update(self, step: int, loss: float) -> None:
        self.loss = loss if self.loss is None or self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        rate, steps, now = f"{self.watch.rate:.2f} steps/s", self.watch.steps, self.watch.clock()
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, loss=f"{self.loss:.4f}", rate=rate)
        elif now - self.last_line > QUIET_SECONDS or step == steps:
            self.last_line = now
            self.console.print(f"step {step}/{steps}  loss {self.loss:.4f}  {rate}  {self.watch.left:.0f} s left", highlight=False)


class Steering(L.Callback):
    """Calls `measure(step)` and saves checkpoints at their intervals, after the last step, and when a stop is asked for. Tells the loggers,
    the stream of events and the `watch`."""

    def __init__(
        self, folder: Path, checkpoint_every: int, measure_every: int, keep: int, measure: Callable[[int], None],
        keep_always: Callable[[], set[int]], progress: ProgressLine, watch: Watch, events: Events, asked: Asked,
    ):  # fmt: skip
        self.folder, self.steps, self.keep, self.asked = folder, watch.steps, keep, asked
        self.checkpoint_every, self.measure_every = checkpoint_every, measure_every
        self.measure, self.keep_always, self.progress = measure, keep_always, progress
        self.watch, self.events = watch, events

    def on_train_start(self, trainer: L.Trainer, module: StepModule) -> None:
        self.asked.listen()  # only now: Lightning has set its own handlers before
        module.tell = partial(self.tell, trainer)
        self._warn(module)

    def on_train_batch_start(self, trainer: L.Trainer, module: StepModule, batch, batch_idx) -> None:
        self.watch.enter("computing")

    def on_fit_end(self, trainer, module) -> None:
        self.asked.restore()

    def on_exception(self, trainer, module, exception) -> None:
        self.asked.restore()

    def on_train_batch_end(self, trainer: L.Trainer, module: StepModule, outputs, batch, batch_idx) -> None:
        step, last = module.step, module.step >= self.steps
        numbers = module.numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        measured = step % self.measure_every == 0 or last
        examples = sum(map(module.size, batch)) * module.processes.count
        pace = self.watch.done(step, examples, numbers, certain=measured or step == self.watch.first + 1)
        for logger in trainer.loggers:
            if pace and not isinstance(logger, StepLog):  # whose lines are the same on every machine
                logger.log_metrics(pace, step=step)
        self._warn(module)
        self.progress.update(step, numbers["loss"])
        if measured:
            self.watch.enter("measuring")
            with told_if_full(f"measuring after step {step}", "Lower sampling.batch_size, or data.resolution."):
                self.measure(step)
        self.asked.signal = max(filter(None, module.processes.gather(self.asked.signal)), default=None)
        stop = self.asked.signal is not None
        due = step % self.checkpoint_every == 0 and not module.skipped  # a roll-back goes to before the trouble
        if due or measured or stop or last:
            self.watch.enter("measuring")
            norms = module.weight_norms() if due or measured else {}  # not where a stop is asked for, which is at no certain step
            for logger in trainer.loggers:
                logger.log_metrics(norms, step=step)
            self.save(trainer, module)
            self.events.tell("checkpoint", step, folder=f"{self.folder.name}/{folder_name(step)}", numbers=norms)
        if stop:
            trainer.should_stop = True
        self.watch.enter("waiting")

    def _warn(self, module: StepModule) -> None:
        if module.skipped:
            way_out = "Should it go on, lower optimizer.lr, or set family.dtype=float32."
            self.watch.warn("not_finite", f"the loss or a gradient was not finite, and nothing was learnt in this step. {way_out}")
        while module.warnings:
            self.watch.warn(*module.warnings.popitem())

    def tell(self, trainer: L.Trainer, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """What `measure` has found, to every log and the stream: numbers by the names of `numbers.py`, pictures by names of their own."""
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        self.events.tell("measured", step, numbers=numbers)
        for name, path in pictures.items():
            self.events.picture(name, path, step)
            for logger in trainer.loggers:
                show_picture(logger, name, path, step)

    def save(self, trainer: L.Trainer, module: StepModule) -> None:
        module.check_finite()
        for logger in trainer.loggers:
            logger.save()
        if module.processes.is_first:
            trainer.strategy.checkpoint_io.save_checkpoint(module.checkpoint(), self.folder / folder_name(module.step))
            prune(self.folder, self.keep, self.keep_always())
        module.processes.wait()
