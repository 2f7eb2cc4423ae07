"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from charforgex.errors import ConfigError
from charforgex.training.settings import OptimizerSettings

PACKAGES = {"prodigy": ("prodigyopt", "optimizers"), "schedule_free": ("schedulefree", "optimizers"), "adamw8bit": ("bitsandbytes", "cuda")}


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


def check_optimizer(name: str, device: str) -> None:
    """Raises ConfigError, before anything is loaded, if this optimizer cannot run here. `device` is torch's word for it."""
    if name == "adamw8bit" and device != "cuda":
        raise ConfigError(
            f"optimizer.name=adamw8bit runs on NVIDIA GPUs only, and this run is on {device}; use optimizer=adamw or adafactor."
        )
    package, extra = PACKAGES.get(name, (None, None))
    if package and find_spec(package) is None:
        raise ConfigError(f'optimizer.name={name} needs {package}: pip install "charforgex[{extra}]".')


def build_optimizer(
    settings: OptimizerSettings, trainable: Mapping[str, nn.Parameter], rate: Callable[[str], float] = lambda name: 1.0,
    decays: Callable[[str], bool] = lambda name: True,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer of `trainable`. `rate` says by which factor a parameter's learning rate differs from `settings.lr`, and `decays`
    whether weight decay holds for it: not where zero is no rest position.
    """
    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        alike.setdefault((rate(name), decays(name)), []).append(parameter)
    decay = settings.weight_decay
    groups = [
        {"params": parameters, "lr": settings.lr * factor, "weight_decay": decay * decaying}
        for (factor, decaying), parameters in alike.items()
    ]
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True)
        case "muon":
            return Muon(groups)
        case "adafactor":
            from transformers.optimization import Adafactor

            # with a rate of its own, not relative to each weight's size: a LoRA's first up is zero and would never move
            return Adafactor(groups, scale_parameter=False, relative_step=False)
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups)
        case "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, d_coef=settings.d_coef)
        case "schedule_free":
            from schedulefree import AdamWScheduleFree

            optimizer = AdamWScheduleFree(groups)
            optimizer.train()
            return optimizer
