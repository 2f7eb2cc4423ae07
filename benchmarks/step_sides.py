"""The sides of `train_step.py`: our step, the plain loop, the floor; what they are given, and the clock that is called at their steps."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from random_bases import SCALES, T5_TOKENS, build_denoiser, denoiser_config

if TYPE_CHECKING:
    from torch import nn

    from charforgex.families.base import Family
    from charforgex.training.module import DenoiserModule
    from charforgex.types import Batch, Components

WARM_UP = 2  # steps that do not count
# what the example scripts adapt, so that both sides learn as much
TARGETS = {"sdxl": ["to_k", "to_q", "to_v", "to_out.0"]}
TARGETS["sd3"] = [f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")]
TARGETS["flux"] = [*TARGETS["sd3"], "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


@dataclass(frozen=True)
class Setup:
    """What is measured; the same for every side."""

    family: str
    scale: str
    device: str
    dtype: str
    resolution: int
    batch_size: int
    rank: int
    steps: int  # of a round
    rounds: int
    threads: int
    compile: bool = False
    checkpointing: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def get_family(self) -> Family:
        from charforgex.families import registry

        return registry.get(self.family)

    def load(self, model: Path, groups: Sequence[str]) -> Components:
        import torch

        return self.get_family().load(str(model), groups, getattr(torch, self.dtype), self.device)

    def autocast(self):
        import torch

        return torch.autocast("cuda" if self.on_gpu else "cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")


# ---- the clock ----


class Clock:
    """Called at the end of every step. On a CPU it reads the process's CPU seconds, on a GPU the time."""

    def __init__(self, steps: int, on_gpu: bool):
        self.steps, self.on_gpu = steps, on_gpu
        self.times: list[float] = []
        self.peaks: list[int] = []

    def __call__(self, *_) -> None:
        if self.on_gpu and len(self.times) + 1 in (WARM_UP, self.steps):  # only there: a wait at every step would cost time itself
            import torch

            torch.cuda.synchronize()
        self.times.append(time.perf_counter() if self.on_gpu else time.process_time())
        self.peaks.append(peak_bytes(self.on_gpu))

    def seconds(self) -> float:
        """Of one step: the median of those after the first ones; on a GPU their mean, as single steps are not waited for."""
        assert len(self.times) == self.steps, f"{len(self.times)} of {self.steps} steps were seen"
        if self.on_gpu:
            return (self.times[-1] - self.times[WARM_UP - 1]) / (self.steps - WARM_UP)
        counted = self.times[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in pairwise(counted))

    def at_optimizer(self):
        """Have it called after every step of any optimizer until the returned handle is removed."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        return register_optimizer_step_post_hook(self)


def peak_bytes(on_gpu: bool) -> int:
    """The most memory so far: of the GPU, else resident in this process."""
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # where ru_maxrss begins at what the parent process held
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the sides: each makes a function that does `setup.steps` steps and calls the clock at the end of each ----

Side = Callable[[Clock], None]


def switch_on(setup: Setup, denoiser: nn.Module) -> None:
    """Compiled and checkpointed blocks, on every side alike."""
    from charforgex.training.blocks import checkpoint_blocks, compile_blocks

    blocks = setup.get_family().blocks(denoiser)
    if setup.checkpointing:
        checkpoint_blocks(denoiser, blocks, True)
    if setup.compile:
        compile_blocks(denoiser, blocks)


def make_module(setup: Setup, parts: Components, batches: Callable[[int], Iterable[Batch]]) -> DenoiserModule:
    """What `training.character` makes, without EMA. `batches(first step)` are a round's."""
    from charforgex.lora.inject import adapter_parameters, inject
    from charforgex.training.live import LiveText
    from charforgex.training.loop import StepLoader
    from charforgex.training.losses import Objective
    from charforgex.training.module import DenoiserModule
    from charforgex.training.optimizers import build_optimizer, schedule
    from charforgex.training.settings import OptimizerSettings
    from charforgex.types import Components

    family, denoiser = setup.get_family(), parts.denoiser
    inject(denoiser, TARGETS[setup.family], setup.rank, setup.rank)
    switch_on(setup, denoiser)
    objective = Objective() if setup.family == "sdxl" else Objective(timesteps="logit_normal")
    return DenoiserModule(
        family, denoiser, family.process(parts), objective, adapter_parameters(denoiser), LiveText(family, Components("none", "none")),
        make_optimizer=lambda trainable: build_optimizer(OptimizerSettings(lr=1e-4, weight_decay=0.01), trainable),
        learning_rate=schedule("constant", 1), make_loader=lambda first: StepLoader(batches(first), 1),
    )  # fmt: skip


def ours(setup: Setup, module: DenoiserModule, folder: Path) -> Side:
    """The real module through the real `fit`, with the logs that are on by default."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from rich.console import Console

    from charforgex.training.logs import StepLog
    from charforgex.training.loop import fit
    from charforgex.training.settings import TrainerSettings

    never = 10**9

    def run(clock: Clock) -> None:
        place = folder / f"from-{module.step}"
        place.mkdir(parents=True)
        accelerator = "gpu" if setup.on_gpu else "cpu"
        settings = TrainerSettings(steps=module.step + setup.steps, accelerator=accelerator, ema=0.0, checkpoint_every=never)
        loggers = [StepLog(place / "metrics.csv"), TensorBoardLogger(place, name="tensorboard", version="")]
        handle = clock.at_optimizer()
        with (place / "output.txt").open("w") as output:
            stopped = fit(module, place / "checkpoints", settings, loggers, Console(file=output), lambda step: None, never, set)
        handle.remove()
        if stopped is not None:
            raise SystemExit(128 + stopped)

    return run


def predict(setup: Setup, denoiser: nn.Module, noisy, t_B, batch: Batch):
    """The denoiser called as diffusers' scripts call it. `t_B` is 0..999 for SDXL and 0..1 for the others."""
    import torch

    dtype = getattr(torch, setup.dtype)
    tokens, pooled = batch.text.tokens_BLD.to(dtype), batch.text.pooled_BD.to(dtype)
    with setup.autocast():
        if setup.family == "sdxl":
            ids = torch.cat([batch.crop.original_B2, batch.crop.top_left_B2, batch.crop.target_B2], dim=1)
            conditions = {"text_embeds": pooled, "time_ids": ids}
            return denoiser(noisy, t_B, encoder_hidden_states=tokens, added_cond_kwargs=conditions, return_dict=False)[0]
        if setup.family == "sd3":
            return denoiser(noisy, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=1000 * t_B, return_dict=False)[0]
        from diffusers import FluxPipeline

        b, c, h, w = noisy.shape
        packed = denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w), timestep=t_B, guidance=torch.ones_like(t_B),
            pooled_projections=pooled, encoder_hidden_states=tokens, txt_ids=tokens.new_zeros(tokens.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, dtype), return_dict=False,
        )[0]  # fmt: skip
        return FluxPipeline._unpack_latents(packed, 8 * h, 8 * w, 8)


def plain(setup: Setup, denoiser: nn.Module, batches: list[Batch]) -> Side:
    """What one would write by hand: diffusers' and peft's own calls, no framework, no logs, data on the device already."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    targets = TARGETS[setup.family]
    denoiser.add_adapter(LoraConfig(r=setup.rank, lora_alpha=setup.rank, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(denoiser, dtype=torch.float32)
    switch_on(setup, denoiser)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)

    def run(clock: Clock) -> None:
        handle = clock.at_optimizer()
        for batch in batches:
            latents = batch.mean_BChw + batch.std_BChw * torch.randn_like(batch.mean_BChw)
            noise = torch.randn_like(latents)
            if setup.family == "sdxl":
                times = torch.randint(0, 1000, (len(batch),), device=latents.device)
                noisy, target = scheduler.add_noise(latents, noise, times), noise
            else:
                times = torch.randn(len(batch), device=latents.device).sigmoid()
                share = times[:, None, None, None]
                noisy, target = (1 - share) * latents + share * noise, noise - latents
            mse_loss(predict(setup, denoiser, noisy, times, batch).float(), target).backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()

    return run


def floor(setup: Setup, denoiser: nn.Module, batches: list[Batch]) -> Side:
    """Forward and backward of the frozen denoiser. The gradient goes to the latents, so that the whole backward pass runs."""
    import torch

    switch_on(setup, denoiser)

    def run(clock: Clock) -> None:
        for batch in batches:
            noisy = torch.randn_like(batch.mean_BChw).requires_grad_()
            times = torch.full((len(batch),), 500 if setup.family == "sdxl" else 0.5, device=noisy.device)
            predict(setup, denoiser, noisy, times, batch).float().square().mean().backward()
            clock()

    return run


# ---- what a step is made of ----


def random_batches(setup: Setup, count: int) -> list[Batch]:
    """Latents and texts as they come out of the caches, at random."""
    import torch

    from charforgex.types import Batch, Crop, Text

    config = denoiser_config(setup.get_family(), SCALES[setup.scale])
    side, dtype, many = setup.resolution // 8, getattr(torch, setup.dtype), setup.batch_size
    channels = config["in_channels"] // setup.get_family().channels_per_latent
    tokens = 77 + T5_TOKENS.get(setup.family, 0) if setup.family != "flux" else T5_TOKENS["flux"]
    if setup.family == "sdxl":
        width, pooled = (
            config["cross_attention_dim"],
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],
        )
    else:
        width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]

    def batch() -> Batch:
        mean = torch.randn(many, channels, side, side)
        text = Text(torch.randn(many, tokens, width, dtype=dtype), torch.randn(many, pooled, dtype=dtype))
        return Batch(mean, torch.full_like(mean, 0.1), text, Crop.whole(many, setup.resolution, setup.resolution))

    return [batch().to(setup.device) for _ in range(count)]


def scheduler_of(setup: Setup):
    import diffusers

    return diffusers.DDPMScheduler() if setup.family == "sdxl" else diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def count_flops(setup: Setup, batch: Batch) -> int:
    """Floating-point operations of a step's forward and backward pass with the adapter, counted without computing anything."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from charforgex.lora.inject import inject

    denoiser = build_denoiser(setup.get_family(), SCALES[setup.scale], torch.float32, "meta")
    inject(denoiser, TARGETS[setup.family], setup.rank, setup.rank)
    batch = batch.to("meta")
    times = torch.zeros(len(batch), device="meta")
    # the plain kernel: attention is then matrix products, which are counted on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(replace(setup, dtype="float32"), denoiser, batch.mean_BChw, times, batch).mean().backward()
    return counter.get_total_flops()


def matrix_rate(setup: Setup) -> float:
    """FLOP a second of a large matrix product in the model's dtype: what a step can be at best."""
    import torch

    side = 8192 if setup.on_gpu else 1024
    a = torch.randn(side, side, device=setup.device, dtype=getattr(torch, setup.dtype))
    clock = Clock(12, setup.on_gpu)
    for _ in range(clock.steps):
        a @ a
        clock()
    return 2 * side**3 / clock.seconds()
