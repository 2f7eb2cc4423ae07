"""One training step for everything that learns: an adapter, or in pre-training a whole network.

A step is `accumulate` micro-batches, which all processes share. Every draw in it is a function of (seed, step, micro-batch, attempt), and
what a checkpoint holds (weights, EMA, optimizer, step) is all the state there is: a run that is killed and resumed is bit-identical to one
that was not, and a run on several devices takes the steps of a run on one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from charforgex.errors import CheckpointError, TrainingError
from charforgex.families.base import Family
from charforgex.families.process import Process
from charforgex.lora.inject import leaving_casts_to_autocast
from charforgex.toolbox.places import place_of
from charforgex.training.live import LiveText
from charforgex.training.losses import Objective, by_level
from charforgex.training.memory import first_line, is_out_of_memory, told_if_full
from charforgex.training.processes import ALONE, Processes
from charforgex.types import Batch

T = TypeVar("T")
MAX_SKIPPED = 5  # non-finite steps in a row before rolling back


class NotFinite(Exception):
    """Too many non-finite steps in a row: roll back to the last good checkpoint."""


def _told(number: str, solver: str) -> str:
    """What a solver's number is called in logs: `lr`, or `lr/temporal` where there are several."""
    return f"{number}/{solver}" if solver else number


class StepModule(L.LightningModule):
    """Trains the parameters in `trainable` by whatever `losses` a subclass has.

    make_optimizer(trainable) -> optimizer, or several by name, each for parameters of its own, whose gradients are clipped for themselves;
    learning_rate(step) -> factor on every group's initial rate;
    make_loader(first_step) -> iterable of steps, each a list of this process's micro-batches, which are `processes.share` of the step's.
    `attempt` counts roll-backs and gives the steps after one other draws than those that failed.

    Where memory runs out, micro-batches are computed in smaller pieces from then on; see `fitting`.
    """

    way_out = "Lower pretrain.batch_size."  # where memory is too small even so

    def __init__(
        self,
        trainable: dict[str, nn.Parameter],
        make_optimizer: Callable,
        learning_rate: Callable[[int], float],
        seed: int = 0,
        grad_clip: float = 1.0,
        ema_decay: float = 0.0,
        attempt: int = 0,
        make_loader: Callable | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.trainable, self.seed, self.grad_clip, self.ema_decay = trainable, seed, grad_clip, ema_decay
        made, self.learning_rate = make_optimizer(trainable), learning_rate
        self.solvers: dict[str, torch.optim.Optimizer] = made if isinstance(made, dict) else {"": made}
        self.solver_of = {
            parameter: solver for solver in self.solvers.values() for group in solver.param_groups for parameter in group["params"]
        }
        self.has_average = any(hasattr(solver, "eval") for solver in self.solvers.values())  # schedule-free: good elsewhere than it trains
        self.initial_rates = [group["lr"] for group in self._groups()]
        self.ema = {name: p.detach().clone() for name, p in trainable.items()} if ema_decay else {}
        self.step = 0  # optimizer steps drawn so far, skipped ones included
        self.skipped = 0  # non-finite steps in a row
        self.attempt, self.make_loader, self.processes = attempt, make_loader, processes
        self.numbers: dict[str, float] = {}
        self.largest: int | None = None  # examples computed at once, where memory is too small for whole micro-batches
        self.warnings: dict[str, str] = {}  # by kind, for whoever can tell them
        self.tell: Callable | None = None  # tell(step, numbers, pictures), while it is fitted: what an evaluation has found

    def train_dataloader(self):
        """This process's lists of micro-batches from this step on."""
        return self.make_loader(self.step)

    def configure_optimizers(self):
        return list(self.solvers.values())

    def losses(self, micro: Any, key: tuple) -> Tensor:
        """Per-example losses (B,) of a micro-batch; everything random in them is a function of `key`."""
        raise NotImplementedError

    def parts(self, micro: Any, key: tuple) -> Iterator[tuple[str, Tensor]]:
        """What a micro-batch's `losses` are the sum of, by name. Each goes back before the next is computed."""
        yield "", self.losses(micro, key)

    def _groups(self) -> list[dict]:
        return [group for solver in self.solvers.values() for group in solver.param_groups]

    def size(self, micro: Any) -> int:
        """Examples in a micro-batch: a step's loss is the mean over all examples of all its micro-batches."""
        return len(micro)

    def times(self, micro: Any, key: tuple) -> Tensor | None:
        """Noise levels (B,) of what `losses` draw, on the CPU; None where nothing is noisy."""
        return None

    def cut(self, micro: Any, size: int) -> list[Any] | None:
        """A micro-batch in pieces of at most `size` examples, whose losses are those of the whole; None where there are none such."""
        return None

    def pieces(self, micro: Any) -> list[Any]:
        """What is computed at once: the micro-batch itself, unless memory has turned out too small for it."""
        return [micro] if self.largest is None or self.size(micro) <= self.largest else self.cut(micro, self.largest)

    def weight_norms(self) -> dict[str, float]:
        """By block, the length of all its learning weights as one vector; nothing where there are no blocks."""
        return {}

    def training_step(self, batch: list, _) -> None:
        for group, rate in zip(self._groups(), self.initial_rates, strict=True):
            group["lr"] = rate * self.learning_rate(self.step)
        count = sum(self.processes.gather(sum(self.size(micro) for micro in batch)))
        totals, levels = self.fitting(batch, lambda: self._gradients(batch, count))
        totals = self._of_all(totals)
        norms = {_told("grad_norm", name): self._clip(solver) for name, solver in self.solvers.items()}
        seen = [*totals.values(), *(norm.to(totals["loss"]) for norm in norms.values())]
        told = torch.cat([torch.stack(seen), *(losses for _, losses in levels)]).tolist()  # the step's one wait for the device
        values = dict(zip([*totals, *norms], told, strict=False))
        finite = all(map(math.isfinite, values.values()))
        if finite:
            own = self.optimizers()
            with told_if_full("the optimizer took a step", "optimizer=adafactor and adamw8bit need less than others."):
                for solver in own if isinstance(own, list) else [own]:
                    if any(parameter.grad is not None for group in solver.param_groups for parameter in group["params"]):
                        solver.step()
            self._update_ema()
            self.skipped = 0
        else:
            self.check_finite()
            self.skipped += 1
        for parameter in self.trainable.values():
            parameter.grad = None
        self.step += 1
        rates = {_told("lr", name): solver.param_groups[0]["lr"] for name, solver in self.solvers.items()}
        times = [time for t_B, _ in levels for time in t_B.tolist()]
        shared = self.processes.gather([list(zip(times, told[len(values) :], strict=True)), self.warnings])
        by = by_level([pair for pairs, _ in shared for pair in pairs])
        self.warnings = {kind: message for _, warnings in shared for kind, message in warnings.items()}
        self.numbers = values | by | rates | ({} if finite else {"skipped": 1.0})
        if self.skipped >= MAX_SKIPPED:
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            raise NotFinite(f"{told} in {self.skipped} steps up to step {self.step}")

    def _gradients(self, batch: Sequence[Any], count: int) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Adds the step's gradients to the parameters'. Returns the losses, mean over `count` examples, by name, and for pieces that are
        noisy the levels (B,) and the losses (B,) of their examples."""
        totals, levels = {"loss": torch.zeros((), device=self.device)}, []
        for number, micro in enumerate(batch, start=self.processes.rank * len(batch)):
            key = (self.seed, self.step, 0, number, self.attempt)  # 0: where keys have always had a number that nothing needs any more
            for piece in self.pieces(micro):
                whole = 0
                with closing(self.parts(piece, key)) as parts:  # what it switched off is on again, also where memory ran out
                    for name, losses in parts:
                        loss = losses.sum() / count
                        self.manual_backward(loss)
                        totals["loss"] = totals["loss"] + loss.detach()
                        if name:
                            totals[f"loss/{name}"] = totals.get(f"loss/{name}", 0) + loss.detach()
                        whole = whole + losses.detach()
                if (t_B := self.times(piece, key)) is not None:
                    levels.append((t_B, whole.to(totals["loss"])))
        return totals, levels

    def fitting(self, batch: Sequence[Any], work: Callable[[], T]) -> T:
        """What `work` returns, which computes gradients of `batch` piece by piece.

        Where memory runs out, all of it is done again with pieces half as large, which stay so: the same draws, and up to rounding the same
        gradients. Raises TrainingError where no piece is smaller.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if self.processes.in_step:  # pieces of other sizes would have others wait for parts of the base that nobody asks for
                way_out = "Set trainer.gradient_checkpointing=true, or lower data.batch_size."
                raise TrainingError(f"Out of memory in step {self.step + 1}, where the base is split: {reason} {way_out}")
            self._cut_smaller(batch, reason)  # only here are the tensors gone that the error held

    def _cut_smaller(self, batch: Sequence[Any], reason: str) -> None:
        for parameter in self.trainable.values():
            parameter.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        largest = max(map(self.size, batch))
        most = largest if self.largest is None else min(largest, self.largest)
        if most == 1 or self.cut(batch[0], 1) is None:
            what = "one example at a time" if most == 1 else f"{most} examples, which cannot be computed apart"
            raise TrainingError(f"Out of memory with {what}, in step {self.step + 1}: {reason} {self.way_out}")
        self.largest = (most + 1) // 2
        self.warnings["out_of_memory"] = (
            f"out of memory with {most} examples at once: {reason} From here on it is at most {self.largest}, with the same gradients and "
            "no batch lost; trainer.gradient_checkpointing=true may be faster."
        )

    def _of_all(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes: of `totals`, which are returned, and of the gradients, where any process has one."""
        if self.processes.count == 1:
            return totals
        here = [list(totals), [p.grad is not None for p in self.trainable.values()]]
        found = self.processes.gather(here)
        names = list(dict.fromkeys(name for others, _ in found for name in others))
        learning = [p for p, *has in zip(self.trainable.values(), *(has for _, has in found), strict=True) if any(has)]
        zero = torch.zeros((), device=self.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        sums = self.processes.add([*(totals.get(name, zero) for name in names), *gradients])
        for parameter, gradient in zip(learning, sums[len(names) :], strict=True):
            parameter.grad = gradient
        return dict(zip(names, sums, strict=False))

    def _clip(self, solver: torch.optim.Optimizer) -> Tensor:
        """The norm of the gradients of this optimizer's parameters, as it was before they were scaled down to `grad_clip`."""
        own = [parameter for parameter in self.trainable.values() if self.solver_of[parameter] is solver]
        return nn.utils.clip_grad_norm_(own, self.grad_clip or float("inf"))

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Decay rises from 0 with the steps (Tan & Le 2019 style), so that early averages are not the initial weights."""
        if self.ema:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            raw = [self.trainable[name].detach().to(average) for name, average in self.ema.items()]
            torch._foreach_lerp_(list(self.ema.values()), raw, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the denoiser has its EMA weights, if there are any, or the optimizer's own average. Bit for bit as before afterwards."""
        raw = {name: p.detach().clone() for name, p in self.trainable.items()} if self.ema or self.has_average else {}
        self._fill(self.ema)
        if self.has_average:
            for solver in self.solvers.values():
                solver.eval()
        try:
            yield
        finally:
            if self.has_average:
                for solver in self.solvers.values():
                    solver.train()  # its own way back rounds, hence the copy
            self._fill(raw)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.trainable[name].copy_(value)

    # ---- state: plain tensors by name, and plain numbers ----

    def checkpoint(self) -> dict:
        """Everything that a resumed run needs; no pickles: {"tensors": {name: Tensor}, "optimizer": ..., "step": int, "seed": int}.

        What an optimizer keeps in plain numbers, for a parameter or for a group of them, goes into "optimizer".
        """
        tensors = {f"weights/{name}": p.detach() for name, p in self.trainable.items()}
        tensors |= {f"ema/{name}": average for name, average in self.ema.items()}
        numbers: dict[str, dict] = {}
        for name, parameter in self.trainable.items():
            for key, value in self.solver_of[parameter].state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        optimizer = {"groups": groups, "numbers": numbers}
        plain = {"step": self.step, "seed": self.seed, "attempt": self.attempt, "largest": self.largest}
        return {"tensors": tensors, "optimizer": optimizer, **plain}

    @torch.no_grad()
    def restore(self, checkpoint: dict, weights_only: bool = False) -> None:
        """Take up a `checkpoint()`; with `weights_only` just its weights, as the start of another run."""
        tensors = checkpoint["tensors"]
        expected = {f"weights/{name}" for name in self.trainable}
        found = {name for name in tensors if name.startswith("weights/")}
        if found != expected:
            raise CheckpointError(
                f"The checkpoint holds {len(found)} trained tensors, this run has {len(expected)}; "
                f"{len(found ^ expected)} differ, such as {sorted(found ^ expected)[0]}. Was the rank or a target changed?"
            )
        self._fill({name: tensors[f"weights/{name}"] for name in self.trainable})
        if self.ema:
            source = "weights" if weights_only and f"ema/{next(iter(self.ema))}" not in tensors else "ema"
            for name, average in self.ema.items():
                average.copy_(tensors[f"{source}/{name}"])
        if weights_only:
            return
        plain = checkpoint.get("optimizer", {"groups": [], "numbers": {}})  # older checkpoints had only tensors to keep
        for solver in self.solvers.values():
            solver.state.clear()
        for name, values in plain["numbers"].items():
            parameter = self.trainable[name]
            self.solver_of[parameter].state[parameter].update(values)
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, kind, name = key.split("/", 2)
                parameter = self.trainable[name]
                solver = self.solver_of[parameter]
                counter = kind == "step" and not solver.defaults.get("fused")  # which torch keeps on the CPU
                solver.state[parameter][kind] = value.to("cpu" if counter else parameter.device, copy=True)
        for group, values in zip(self._groups(), plain["groups"], strict=bool(plain["groups"])):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        self.step, self.attempt = checkpoint["step"], max(self.attempt, checkpoint["attempt"])
        self.largest = min(filter(None, (self.largest, checkpoint.get("largest"))), default=None)  # older checkpoints have none

    def check_finite(self) -> None:
        """Raises TrainingError if any trained weight is not finite: such weights are never saved."""
        bad = [name for name, p in self.trainable.items() if not torch.isfinite(p).all()]
        if bad:
            raise TrainingError(f"{len(bad)} trained tensors are not finite at step {self.step}, such as {bad[0]}; lower optimizer.lr.")


class DenoiserModule(StepModule):
    """Trains a denoiser of any family, or an adapter in it, by the family's own objective. Micro-batches are `types.Batch`es."""

    way_out = "Lower data.resolution, or set trainer.gradient_checkpointing=true, family.dtype=bfloat16 or trainer.quantize=nf4."

    def __init__(
        self, family: Family, denoiser: nn.Module, process: Process, objective: Objective, trainable: dict, live: LiveText, **settings
    ):
        super().__init__(trainable, **settings)
        self.family, self.denoiser, self.process, self.objective, self.live = family, denoiser, process, objective, live
        self.casting = nullcontext if next(denoiser.parameters()).dtype == torch.float32 else leaving_casts_to_autocast(denoiser)

    def training_step(self, batch: list, index: int) -> None:
        with self.casting():
            super().training_step(batch, index)

    def losses(self, micro: Batch, key: tuple) -> Tensor:
        return self.objective.losses(self.family, self.denoiser, self.process, self.live.batch(micro), *key)

    def times(self, micro: Batch, key: tuple) -> Tensor:
        return self.objective.times_of(self.process, micro, *key)

    def cut(self, micro: Batch, size: int) -> list[Batch]:
        return [micro.rows(first, min(first + size, len(micro))) for first in range(0, len(micro), size)]

    @torch.no_grad()
    def weight_norms(self) -> dict[str, float]:
        """By the names that `numbers.py` lists, in the network's order."""
        components, blocks = {self.family.denoiser_name, *self.live.networks}, {}
        for name, parameter in self.trainable.items():
            place = place_of(name if name.partition(".")[0] in components else f"{self.family.denoiser_name}.{name}")
            block = place.block if place.component == self.family.denoiser_name else f"{place.component}.{place.block}"
            blocks.setdefault(f"weight_norm/{block}", []).append(parameter)
        norms = [torch.stack(torch._foreach_norm(own)).norm() for own in blocks.values()]
        return dict(zip(blocks, torch.stack(norms).tolist(), strict=True))
