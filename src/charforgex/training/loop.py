"""Fit a module to its last step, whatever happens on the way: asked to stop, not finite, or resumed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from rich.console import Console

from charforgex.data.prepared import PreparedData
from charforgex.errors import TrainingError
from charforgex.lora.checkpoints import folder_name
from charforgex.training.checkpoints import SafeCheckpointIO, load_last_good
from charforgex.training.events import Events
from charforgex.training.logs import StepLog
from charforgex.training.module import MAX_SKIPPED, NotFinite, StepModule
from charforgex.training.processes import Processes
from charforgex.training.settings import TrainerSettings
from charforgex.training.steering import Asked, ProgressLine, Steering
from charforgex.training.watching import Watch

MAX_ROLLBACKS = 2


def fit(
    module: StepModule, folder: Path, settings: TrainerSettings, loggers: Sequence[Logger], console: Console,
    measure: Callable[[int], None], measure_every: int, keep_always: Callable[[], set[int]], events: Events | None = None,
) -> int | None:  # fmt: skip
    """Trains `module` from its step to `settings.steps`, with checkpoints in `folder`. Without `events` they are told beside it.

    Returns None when done, or the number of the signal that asked for a stop; all is saved then. A step whose loss or gradients
    are not finite changes nothing; after five in a row the last good checkpoint is taken up again with other draws, twice at most.
    Raises TrainingError then.
    """
    device = next(iter(module.trainable.values())).device
    log = next((logger for logger in loggers if isinstance(logger, StepLog)), None)
    if module.step >= settings.steps:
        return None
    asked = Asked()
    reasons = []
    events = events or Events(folder.parent, module.processes.is_first)
    while True:
        watch = Watch(events, console, settings.steps, module.step)
        with watch, ProgressLine(watch, console) as progress:
            steering = Steering(
                folder, settings.checkpoint_every, measure_every, settings.keep, measure, keep_always, progress, watch, events, asked
            )
            trainer = build_trainer(settings, loggers, steering)
            if module.step == 0:  # so that there is always something to roll back to
                if module.processes.is_first:
                    SafeCheckpointIO().save_checkpoint(module.checkpoint(), folder / folder_name(0))
                module.processes.wait()
            try:
                trainer.fit(module)
                return asked.signal
            except NotFinite as error:
                reasons.append(str(error))
            finally:
                module.to(device)  # Lightning leaves it on the CPU, where the last pictures would take hours
        checkpoint, _ = load_last_good(folder)
        if len(reasons) > MAX_ROLLBACKS:
            raise TrainingError(
                f"Training stopped: {MAX_SKIPPED} steps in a row were not finite, and {MAX_ROLLBACKS} roll-backs did not help: "
                f"{reasons[-1]}. Step {checkpoint['step']} is saved. Lower optimizer.lr, or set family.dtype=float32."
            )
        module.attempt, module.skipped = module.attempt + 1, 0
        module.restore(checkpoint)
        if log is not None:
            log.rewind(module.step)
        console.print(f"[yellow]Not finite: {reasons[-1]}. Back to step {module.step}, with other noise.")
        events.tell("rolled_back", module.step, reason=reasons[-1])


def build_trainer(settings: TrainerSettings, loggers: Sequence[Logger], *callbacks: L.Callback) -> L.Trainer:
    """A quiet Trainer of one device: progress, checkpoints and logs are ours, and so is what several devices tell each other.

    Lightning's own strategies wrap the module so that gradients are summed in every backward pass, of which a step has many here. Named the
    environment, it does not look for other processes, or jobs to queue again, in what torchrun and Slurm say.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")  # the frozen base is
    return L.Trainer(
        accelerator=settings.accelerator, devices=one_device(settings.accelerator),
        max_epochs=1, logger=list(loggers), callbacks=list(callbacks), plugins=[SafeCheckpointIO(), LightningEnvironment()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1, use_distributed_sampler=False,
    )  # fmt: skip


def one_device(accelerator: str) -> list[int] | int:
    """For Lightning: of several GPUs the one that is this process's."""
    return [torch.cuda.current_device()] if accelerator in ("auto", "gpu") and torch.cuda.is_available() else 1


def step_loader(data: PreparedData, first_step: int, settings: TrainerSettings, processes: Processes) -> StepLoader:
    """The steps from `first_step` on, each this process's share of its micro-batches, which are numbered through all steps."""
    share = processes.share(settings.accumulate)
    numbers = [step * settings.accumulate + place for step in range(first_step, settings.steps) for place in share]
    return StepLoader(data.train_dataloader(numbers), len(share))


class StepLoader:
    """Groups a loader's micro-batches into steps."""

    def __init__(self, loader, accumulate: int):
        self.loader, self.accumulate = loader, accumulate

    def __len__(self) -> int:
        return len(self.loader) // self.accumulate

    def __iter__(self):
        group = []
        for batch in self.loader:
            group.append(batch)
            if len(group) == self.accumulate:
                yield group
                group = []
