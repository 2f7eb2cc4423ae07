"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from charforgex.errors import ConfigError


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrix by the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions (convolutions as out x rest), AdamW for the rest, in one optimizer.

    torch.optim.Muon takes matrices only; our base models are half convolutions. `lr` is AdamW's; matrices use
    `lr * matrix_lr` with the update scaled to AdamW's size by 0.2 sqrt(max(out, in)) (Liu et al. 2025, Moonlight).
    """

    def __init__(self, params, lr: float = 2e-3, matrix_lr: float = 1.0, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "matrix_lr": matrix_lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.ndim >= 2:
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                    scale = 0.2 * math.sqrt(max(update.shape))
                    p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * group["matrix_lr"] * scale)
                else:
                    step = state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
                    mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - beta1)
                    square = state.setdefault("square", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - beta2)
                    denominator = (square / (1 - beta2 ** step.item())).sqrt_().add_(1e-8)
                    p.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** step.item()))
        return loss


def schedule(name: str, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """The learning rate's factor at each step: `constant`, `cosine` or `linear` after a linear warm-up."""
    shapes = {
        "constant": lambda x: 1.0,
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        "linear": lambda x: 1 - x,
    }
    if name not in shapes:
        raise ConfigError(f"optimizer.schedule={name} is unknown; choose one of {', '.join(shapes)}.")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shapes[name](min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor


def build_optimizer(name: str, parameters: list, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    if name == "muon":
        return Muon(parameters, lr=lr, weight_decay=weight_decay)
    raise ConfigError(f"optimizer.name={name} is unknown; choose adamw or muon.")
