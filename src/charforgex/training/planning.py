"""What a training will take of memory and time, before it is begun: its step runs on tensors that have sizes and no values.

The step is the training's own: the network from its config, peft's layers in it, the objective, backwards. So whatever frees or keeps a
tensor there does so here, and nothing is estimated but what kernels take inside themselves. Time is counted work over what this machine
was measured to do in a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from charforgex.errors import ConfigError
from charforgex.families.base import Family
from charforgex.families.process import Process
from charforgex.families.quantized import QuantizedLinear, blank, packable
from charforgex.families.single_file import empty
from charforgex.lora.inject import adapter_parameters, inject, leaving_casts_to_autocast
from charforgex.lora.quantized import Kind
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.losses import Objective
from charforgex.training.settings import LoraSettings
from charforgex.training.tally import Tally, held_bytes
from charforgex.types import Batch, Components, Crop, Prior, Text

GIB = 2**30
# Bytes an optimizer keeps for each number that learns, float32
STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedule_free": 8, "adafactor": 0.1}
RUNTIME_BYTES = 0.6 * GIB  # besides tensors: libraries, CUDA's context, kernels' own workspaces
ROUNDS = {None: 0, "int8": 1, "fp8": 2, "nf4": 3}  # the base, from least to most
SLACK = 1.05  # what allocators lose between tensors


@dataclass(frozen=True)
class Plan:
    """What may be chosen without changing what is asked of the training. `quantize` rounds the base; recomputing changes nothing."""

    quantize: Kind | None = None
    gradient_checkpointing: bool | int = False

    def settings(self) -> str:
        """As they are typed."""
        kind = self.quantize or "null"
        return f"trainer.quantize={kind} trainer.gradient_checkpointing={str(self.gradient_checkpointing).lower()}"


@dataclass(frozen=True)
class Work:
    """What is trained, whatever the plan. `base` has the scheduler and the facts; `configs` those of the denoiser and the VAE.

    `grid` is the largest picture's, in latents; `text` tokens, width and pooled width; `targets` the modules that are adapted.
    """

    family: Family
    base: Components
    configs: Mapping[str, Mapping[str, Any]]
    dtype: torch.dtype
    batch_size: int
    grid: tuple[int, int]
    text: tuple[int, int, int]
    targets: Sequence[str]
    lora: LoraSettings
    objective: Objective
    optimizer: str = "adamw"
    ema: bool = True
    draws: tuple[int, int] | None = None  # pictures at once while it trains, and their side in pixels; None: none are drawn

    @property
    def process(self) -> Process:
        return self.family.process(self.base)


@dataclass(frozen=True)
class Cost:
    """Bytes of a plan, and the work of a step of one micro-batch."""

    held: int  # the base with its adapter, and the decoder for the pictures that are drawn
    learning: int  # averages: the optimizer's and the EMA
    step: int  # the most of a step: what is kept for backwards, gradients, what passes by
    drawing: int  # the most of decoding a picture
    flops: int
    moved: int
    calls: int

    @property
    def tensors(self) -> int:
        """The most that is alive at once."""
        return self.held + self.learning + max(self.step, self.drawing)

    @property
    def memory(self) -> int:
        """What a device must have."""
        return int(self.tensors * SLACK + RUNTIME_BYTES)


@dataclass(frozen=True)
class Machine:
    """What a device does in a second, as measured: multiplications with additions count two."""

    flops: float
    moved: float
    calls: float

    def seconds(self, cost: Cost) -> float:
        return cost.flops / self.flops + cost.moved / self.moved + cost.calls / self.calls


def costs(work: Work, plans: Sequence[Plan]) -> dict[Plan, Cost]:
    """Each plan's. Packing changes no activations: one step on plain weights stands for all kinds, and what unpacking takes is added.

    Raises ConfigError for more checkpointed blocks than there are.
    """
    found, steps = {}, {}
    for plan in plans:
        plain = replace(plan, quantize=None)
        if plain not in steps:
            steps[plain] = traced(work, plain)
        found[plan] = steps[plain] if plan.quantize is None else _packed(work, plan, steps[plain])
    return found


def traced(work: Work, plan: Plan) -> Cost:
    """The cost of a plan of plain weights, by running its step on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    denoiser = prepared(work, _empty(work, work.family.denoiser_name), plan)
    decoder = _empty(work, "vae")
    decoder.encoder = None
    with FakeTensorMode(allow_non_fake_inputs=True):
        _embody(denoiser)
        _embody(decoder)
        tally = run_step(work, denoiser)
        drawing = _drawing(work, decoder)
    learns = sum(parameter.numel() for parameter in adapter_parameters(denoiser).values())
    held = held_bytes(denoiser) + (held_bytes(decoder) if work.draws else 0)
    learning = int(learns * (STATES[work.optimizer] + 4 * work.ema))
    return Cost(held, learning, tally.peak_bytes, drawing, tally.flops, tally.moved_bytes, tally.calls)


def _empty(work: Work, component: str) -> nn.Module:
    """On the meta device."""
    network = empty(work.family, component, work.configs[component])
    return nn.Module.to(network, work.dtype)  # diffusers' own warns of parts that want float32, and names none


def prepared(work: Work, denoiser: nn.Module, plan: Plan) -> nn.Module:
    """A denoiser as it is trained: frozen, with its adapter, blocks checkpointed."""
    denoiser.eval().requires_grad_(False)
    if plan.gradient_checkpointing:
        checkpoint_blocks(denoiser, work.family.blocks(denoiser), plan.gradient_checkpointing)
    lora = work.lora
    inject(denoiser, work.targets, lora.rank, lora.alpha, ranks=lora.ranks, alphas=lora.alphas, **lora.how())
    return denoiser


def run_step(work: Work, denoiser: nn.Module) -> Tally:
    """One micro-batch forth and back through a `prepared` denoiser, real or fake, counted. Its gradients are left where they are."""
    batch = _batch(work)
    casting = leaving_casts_to_autocast(denoiser)
    with Tally() as tally:
        if work.dtype == torch.float32:
            work.objective.losses(work.family, denoiser, work.process, batch, "plan").sum().backward()
        else:
            with casting():
                work.objective.losses(work.family, denoiser, work.process, batch, "plan").sum().backward()
    return tally


def _batch(work: Work) -> Batch:
    count, (tokens, width, pooled) = work.batch_size, work.text
    channels = work.configs[work.family.denoiser_name]["in_channels"] // work.family.channels_per_latent
    mean = torch.zeros(count, channels, *work.grid)
    text = Text(torch.zeros(count, tokens, width), torch.zeros(count, pooled))
    stride = work.family.latent_stride(work.base)
    prior = Prior(text, text) if work.objective.prior_weight else None
    return Batch(mean, torch.zeros_like(mean), text, Crop.whole(count, work.grid[0] * stride, work.grid[1] * stride), prior=prior)


def _drawing(work: Work, vae: nn.Module) -> int:
    """The most bytes of decoding as many pictures as are decoded at once."""
    if work.draws is None:
        return 0
    count, side = work.draws
    side //= work.family.latent_stride(work.base)
    parts = Components(work.base.source, work.family.denoiser_name, {"vae": vae}, work.base.config)
    with Tally() as tally:
        work.family.decode_latents(parts, torch.zeros(count, work.configs["vae"]["latent_channels"], side, side))
    return tally.peak_bytes


def _embody(network: nn.Module) -> None:
    """Inside FakeTensorMode: weights of the meta device as fake ones of the CPU, whose kernels keep what a GPU's keep."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device="cpu"), requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _packed(work: Work, plan: Plan, plain: Cost) -> Cost:
    """A plan's cost from that of the same on plain weights. The largest layer's unpacking is taken to coincide with the step's peak."""
    denoiser = _empty(work, work.family.denoiser_name)
    saved = passed = moved = calls = 0
    known: dict[tuple[int, int], Tally] = {}
    for layer in packable(work.family, denoiser).values():
        shape = layer.out_features, layer.in_features
        stored = blank(*shape, plan.quantize)
        saved += shape[0] * shape[1] * work.dtype.itemsize - sum(tensor.numel() * tensor.element_size() for tensor in stored)
        if shape not in known:
            known[shape] = _unpacking(shape, stored, plan.quantize, work.dtype)
        passed = max(passed, known[shape].peak_bytes)
        moved, calls = moved + known[shape].moved_bytes, calls + known[shape].calls
    times = 3 if plan.gradient_checkpointing else 2
    return replace(
        plain, held=plain.held - saved, step=plain.step + passed, moved=plain.moved + times * moved, calls=plain.calls + times * calls
    )


def _unpacking(shape: tuple[int, int], stored: Sequence[torch.Tensor], kind: Kind, dtype: torch.dtype) -> Tally:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer = QuantizedLinear(*(mode.from_tensor(tensor) for tensor in stored), kind, shape[1], shape[0], False, dtype)
        with Tally() as tally:
            _ = layer.weight
    return tally


# ---- the machine ----


def calibrated(device: str, dtype: torch.dtype, seconds: float = 1.0) -> Machine:
    """Measures a device for about so many seconds: products of matrices, copies, and calls that do nearly nothing."""
    side = 512 if device == "cpu" else 4096
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    long, one = torch.zeros(2**24, dtype=dtype, device=device), torch.zeros(8, device=device)

    def rate(work: Any, each: float) -> float:
        work()
        _wait(device)
        started, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < seconds / 3:
            for _ in range(8):
                work()
            _wait(device)
            count += 8
        return each * count / spent

    return Machine(
        flops=rate(lambda: a @ b, 2 * side**3), moved=rate(lambda: long.add(1), 2 * long.numel() * dtype.itemsize),
        calls=rate(lambda: one.add(1), 1),
    )  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def available_bytes(device: str) -> int:
    """Of the GPU, all of it; else what this computer could give now."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    from pathlib import Path

    told = Path("/proc/meminfo")
    if not told.exists():
        raise ConfigError("trainer.memory is null, and this system does not say how much memory it has; set it, in GiB.")
    (line,) = (line for line in told.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


# ---- the choice ----


def candidates(quantize: Kind | None, gradient_checkpointing: bool | int) -> list[Plan]:
    """The plans to choose from: what was set stays as it is."""
    kinds = [quantize] if quantize else [None, "int8", "nf4"]
    return [Plan(kind, chosen) for kind in kinds for chosen in ([gradient_checkpointing] if gradient_checkpointing else [False, True])]


def fastest(found: Mapping[Plan, Cost], memory: float) -> Plan | None:
    """The quickest of those plans that fit and, among these, round the base least: the one of least work. None: none fits."""
    fitting = [plan for plan, cost in found.items() if cost.memory <= memory]
    return min(fitting, key=lambda plan: (ROUNDS[plan.quantize], found[plan].flops), default=None)
