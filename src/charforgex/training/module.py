"""One training step for everything that learns: an adapter, or in pre-training a whole network.

A step is `accumulate` micro-batches, which all processes share. Every draw in it is a function of (seed, step, micro-batch, attempt), and
what a checkpoint holds (weights, EMA, optimizer, step) is all the state there is: a run that is killed and resumed is bit-identical to one
that was not, and a run on several devices takes the steps of a run on one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from charforgex.errors import CheckpointError, TrainingError
from charforgex.families.base import Family
from charforgex.families.process import Process
from charforgex.lora.inject import leaving_casts_to_autocast
from charforgex.training.live import LiveText
from charforgex.training.losses import Objective
from charforgex.training.processes import ALONE, Processes
from charforgex.types import Batch

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
    """

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

    def training_step(self, batch: list, _) -> None:
        for group, rate in zip(self._groups(), self.initial_rates, strict=True):
            group["lr"] = rate * self.learning_rate(self.step)
        count = sum(self.processes.gather(sum(self.size(micro) for micro in batch)))
        totals = {"loss": torch.zeros((), device=self.device)}
        for number, micro in enumerate(batch, start=self.processes.rank * len(batch)):
            key = (self.seed, self.step, 0, number, self.attempt)  # 0: where keys have always had a number that nothing needs any more
            for name, losses in self.parts(micro, key):
                loss = losses.sum() / count
                self.manual_backward(loss)
                totals["loss"] = totals["loss"] + loss.detach()
                if name:
                    totals[f"loss/{name}"] = totals.get(f"loss/{name}", 0) + loss.detach()
        totals = self._of_all(totals)
        norms = {_told("grad_norm", name): self._clip(solver) for name, solver in self.solvers.items()}
        seen = [*totals.values(), *(norm.to(totals["loss"]) for norm in norms.values())]
        values = dict(zip([*totals, *norms], torch.stack(seen).tolist(), strict=True))  # the step's one wait for the device
        finite = all(map(math.isfinite, values.values()))
        if finite:
            own = self.optimizers()
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
        self.numbers = values | rates | ({} if finite else {"skipped": 1.0})
        if self.skipped >= MAX_SKIPPED:
            told = ", ".join(f"{name} {value}" for name, value in values.items())
            raise NotFinite(f"{told} in {self.skipped} steps up to step {self.step}")

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
        return {"tensors": tensors, "optimizer": optimizer, "step": self.step, "seed": self.seed, "attempt": self.attempt}

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

    def check_finite(self) -> None:
        """Raises TrainingError if any trained weight is not finite: such weights are never saved."""
        bad = [name for name, p in self.trainable.items() if not torch.isfinite(p).all()]
        if bad:
            raise TrainingError(f"{len(bad)} trained tensors are not finite at step {self.step}, such as {bad[0]}; lower optimizer.lr.")


class DenoiserModule(StepModule):
    """Trains a denoiser of any family, or an adapter in it, by the family's own objective. Micro-batches are `types.Batch`es."""

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
