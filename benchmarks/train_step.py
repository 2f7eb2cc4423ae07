"""What a LoRA training step costs: python benchmarks/train_step.py [--quick] [--diffusers-script train_dreambooth_lora_sdxl.py]

Everything is measured in one run, in turn, on one random model of SDXL's layout and the same drawn pictures. CPU seconds with one
thread on a CPU, seconds on a GPU. The last line is one JSON object: ratios are ours divided by theirs, smaller is better.

step_vs_plain        our step, everything that train.py does between two measurements (Lightning, data, losses, clipping, AdamW, logs;
                     EMA off)  against  a hand-written diffusers + peft loop over latents and texts that lie ready
step_vs_floor        our step  against  forward and backward of the denoiser alone, without adapter, loss of nothing, optimizer
step_vs_diffusers    our step  against  a step of diffusers' example script, given by its path; each in a process of its own
memory_vs_diffusers  the peak of those two processes up to their last step: encoding what there is to encode included

--scale mini is SDXL with a quarter of its widths and one transformer block a place (40 M parameters, 88 adapted layers) at 256 px;
deep an eighth of its widths at its full depth (40 M, 560 layers): what each layer costs besides its arithmetic weighs most there; real
is SDXL itself, in bfloat16 at 1024 px, for a GPU: also steps a second, peak memory and the share of the chip's bfloat16 peak.
--compile compiles all three in-process sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from charforgex.data.datamodule import CharacterData
    from charforgex.training.module import DenoiserModule
    from charforgex.types import Batch

GOALS = {"step_vs_plain.sdxl": 1.10, "step_vs_floor.sdxl": 1.25, "step_vs_diffusers.sdxl": 0.55, "memory_vs_diffusers.sdxl": 0.85}
WARM_UP = 2  # steps that do not count
PROMPT = "a portrait of a person"
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1}  # dense bfloat16 TFLOP/s, from the makers' data sheets
SCALES = {  # widths divided by, transformer blocks a level, resolution, pictures' side, steps a round, rounds
    "quick": (16, [1, 1, 2], 64, 128, 6, 2),
    "mini": (4, [1, 1, 1], 256, 1024, 10, 5),
    "deep": (8, [1, 2, 10], 256, 1024, 10, 5),
    "real": (1, [1, 2, 10], 1024, 1024, 20, 3),
}


@dataclass(frozen=True)
class Setup:
    """What is measured; the same for every side."""

    scale: str
    device: str
    dtype: str
    resolution: int
    batch_size: int
    rank: int
    steps: int  # of a round
    rounds: int
    threads: int
    compile: str | None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def autocast(self):
        import torch

        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16")


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


# ---- the model and the pictures ----


def narrowed(name: str, config: dict, by: int, depth: list[int], vocabulary: int) -> dict:
    """SDXL's own config of a component with all widths divided, and the vocabulary of the tokenizers that need no download."""
    widths = {
        "unet": ("cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
        "vae": (),
        "text_encoder": ("hidden_size", "intermediate_size", "projection_dim"),
        "text_encoder_2": ("hidden_size", "intermediate_size", "projection_dim"),
    }[name]
    config = config | {key: config[key] // by for key in widths}
    if name == "unet":
        config |= {"block_out_channels": [width // by for width in config["block_out_channels"]], "norm_num_groups": 32 if by == 1 else 4}
        config |= {"transformer_layers_per_block": depth}
    elif name == "vae":
        # at most by 4, which its group norms need; at a quarter of its widths it has 5.3 M parameters
        config |= {"block_out_channels": [width // min(by, 4) for width in config["block_out_channels"]]}
    else:
        config |= {"vocab_size": vocabulary}
    return config


def save_base(setup: Setup, folder: Path) -> None:
    """A random base model of SDXL's layout as an ordinary diffusers folder."""
    import diffusers
    import torch

    from charforgex.families.parts import build, read_config
    from charforgex.families.sdxl import Sdxl
    from charforgex.families.tiny import clip_tokenizer
    from charforgex.types import Components

    family, (by, depth, *_) = Sdxl(), SCALES[setup.scale]
    dtype = getattr(torch, setup.dtype)
    modules = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    torch.manual_seed(0)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        config = narrowed(name, read_config(family.configs, name), by, depth, len(modules["tokenizer"]))
        with torch.device(setup.device):
            modules[name] = build(family, name, config).to(dtype)
    scheduler = read_config(family.configs, "scheduler")
    modules["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    facts = family.facts({name: modules[name].config for name in ("unet", "vae")})
    family.pipeline(Components("random", family.denoiser_name, modules, facts)).save_pretrained(folder)


def draw_pictures(folder: Path, side: int, count: int = 8) -> None:
    """Smooth random pictures: to decode and encode they cost what photographs do."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def prepare_data(setup: Setup, model: Path, pictures: Path, cache: Path) -> CharacterData:
    """Our data with everything encoded, as train.py has it before its first step. The encoders are gone when this returns."""
    import torch

    from charforgex.data.datamodule import CharacterData
    from charforgex.families.loading import weights_hash
    from charforgex.families.sdxl import Sdxl

    family, dtype = Sdxl(), getattr(torch, setup.dtype)
    data = CharacterData(
        pictures, cache, setup.resolution, default_caption=PROMPT, batch_size=setup.batch_size, caption_dropout=0.0, val_count=0
    )  # fmt: skip
    facts = family.load(str(model), [], dtype)
    data.prepare(
        family, lambda groups: family.load(str(model), groups, dtype, setup.device),
        weights={group: weights_hash(family, str(model), group) for group in ("vae", "text")},
        pixel_multiple=family.pixel_multiple(facts), latent_stride=family.latent_stride(facts), dtype=setup.dtype, progress=False,
    )  # fmt: skip
    return data


def load_denoiser(setup: Setup, model: Path) -> nn.Module:
    import torch

    from charforgex.families.sdxl import Sdxl

    return Sdxl().load(str(model), ["denoiser"], getattr(torch, setup.dtype), setup.device).denoiser


def compile_denoiser(setup: Setup, denoiser: nn.Module) -> None:
    if setup.compile == "blocks":
        denoiser.compile_repeated_blocks()
    elif setup.compile == "model":
        denoiser.compile()


# ---- the sides: each makes a function that does `setup.steps` steps and calls the clock at the end of each ----

Side = Callable[[Clock], None]


def make_module(setup: Setup, denoiser: nn.Module, process, data: CharacterData) -> DenoiserModule:
    """What `training.character` makes, without EMA."""
    from charforgex.families.sdxl import Sdxl
    from charforgex.lora.inject import adapter_parameters, inject
    from charforgex.training.live import LiveText
    from charforgex.training.loop import StepLoader
    from charforgex.training.losses import Objective
    from charforgex.training.module import DenoiserModule
    from charforgex.training.optimizers import build_optimizer, schedule
    from charforgex.training.settings import OptimizerSettings
    from charforgex.types import Components

    family = Sdxl()
    inject(denoiser, family.lora_targets("attention", denoiser.config), setup.rank, setup.rank)
    compile_denoiser(setup, denoiser)
    return DenoiserModule(
        family, denoiser, process, Objective(), adapter_parameters(denoiser), LiveText(family, Components("", family.denoiser_name)),
        make_optimizer=lambda trainable: build_optimizer(OptimizerSettings(), trainable), learning_rate=schedule("constant", 1),
        make_loader=lambda first, rank, world: StepLoader(data.train_dataloader(first, setup.steps, rank, world), 1),
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


def network_inputs(noisy, timesteps, batch: Batch, dtype) -> dict:
    import torch

    ids = torch.cat([batch.crop.original_B2, batch.crop.top_left_B2, batch.crop.target_B2], dim=1)
    conditions = {"text_embeds": batch.text.pooled_BD.to(dtype), "time_ids": ids}
    return {
        "sample": noisy, "timestep": timesteps, "encoder_hidden_states": batch.text.tokens_BLD.to(dtype), "added_cond_kwargs": conditions,
        "return_dict": False,
    }  # fmt: skip


def plain(setup: Setup, denoiser: nn.Module, scheduler_config: dict, batches: list[Batch]) -> Side:
    """What one would write by hand: diffusers' and peft's own calls, no framework, no logs, data on the device already."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    scheduler = DDPMScheduler.from_config(scheduler_config)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    denoiser.add_adapter(LoraConfig(r=setup.rank, lora_alpha=setup.rank, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(denoiser, dtype=torch.float32)
    compile_denoiser(setup, denoiser)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)
    dtype = getattr(torch, setup.dtype)

    def run(clock: Clock) -> None:
        handle = clock.at_optimizer()
        for batch in batches:
            latents = batch.mean_BChw + batch.std_BChw * torch.randn_like(batch.mean_BChw)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(batch),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with setup.autocast():
                prediction = denoiser(**network_inputs(noisy, timesteps, batch, dtype))[0]
            mse_loss(prediction.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()

    return run


def floor(setup: Setup, denoiser: nn.Module, batches: list[Batch]) -> Side:
    """Forward and backward of the frozen denoiser. The gradient goes to the latents, so that the whole backward pass runs."""
    import torch

    compile_denoiser(setup, denoiser)
    dtype = getattr(torch, setup.dtype)

    def run(clock: Clock) -> None:
        for batch in batches:
            noisy = torch.randn_like(batch.mean_BChw).requires_grad_()
            timesteps = torch.randint(0, 1000, (len(batch),), device=noisy.device)
            with setup.autocast():
                prediction = denoiser(**network_inputs(noisy, timesteps, batch, dtype))[0]
            prediction.float().square().mean().backward()
            clock()

    return run


# ---- whole jobs, each in a process of its own ----


def job(setup: Setup, model: Path, pictures: Path, folder: Path) -> None:
    """What train.py does up to its last step, without measuring: encode, let go of the encoders, train."""
    import torch

    from charforgex.families.sdxl import Sdxl

    torch.set_num_threads(setup.threads)
    family, dtype = Sdxl(), getattr(torch, setup.dtype)
    data = prepare_data(setup, model, pictures, folder / "cache")
    parts = family.load(str(model), ["denoiser"], dtype, setup.device)
    module = make_module(setup, parts.denoiser, family.process(parts), data)
    decoder = family.load(str(model), ["vae"], dtype, setup.device)["vae"]  # for the previews: train.py holds it while it trains
    decoder.encoder = None
    ours(setup, module, folder / "run")(Clock(setup.steps, setup.on_gpu))  # the outer clock is the one that is read


def watch(result: str, steps: str, device: str, script: str, *arguments: str) -> None:
    """Runs a script as it is, and writes the seconds of its steps and its memory. Imports nothing that the script need not."""
    clock = Clock(int(steps), device != "cpu")
    clock.at_optimizer()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    peaks = {"to_last_step": clock.peaks[-1], "whole": peak_bytes(clock.on_gpu)}
    Path(result).write_text(json.dumps({"seconds": clock.seconds(), "peak_bytes": peaks}))


def run_job(setup: Setup, script: Path, arguments: list[str], folder: Path) -> dict:
    """A script in its own process under `watch`. Raises CalledProcessError with its output."""
    result = folder / "watched.json"
    command = [sys.executable, __file__, "watch", result, setup.steps, setup.device, script, *arguments]
    hidden = {} if setup.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1"} | hidden
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return json.loads(result.read_text())


def peer_arguments(setup: Setup, model: Path, pictures: Path, output: Path) -> list[str]:
    values = {
        "pretrained_model_name_or_path": model, "instance_data_dir": pictures, "instance_prompt": PROMPT, "output_dir": output,
        "resolution": setup.resolution, "train_batch_size": setup.batch_size, "max_train_steps": setup.steps, "rank": setup.rank,
        "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0, "checkpointing_steps": 10**6, "seed": 0,
        "mixed_precision": "bf16" if setup.dtype == "bfloat16" else "no",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


# ---- what a step is made of ----


def count_flops(setup: Setup, model: Path, batch: Batch) -> int:
    """Floating-point operations of a step's forward and backward pass with the adapter, counted without computing anything."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from charforgex.families.parts import build, read_config
    from charforgex.families.sdxl import Sdxl
    from charforgex.lora.inject import inject

    family = Sdxl()
    with torch.device("meta"):
        denoiser = build(family, "unet", read_config(model, "unet"))
    inject(denoiser, family.lora_targets("attention", denoiser.config), setup.rank, setup.rank)
    batch = batch.to("meta")
    timesteps = torch.zeros(len(batch), dtype=torch.long, device="meta")
    # the plain kernel: attention is then matrix products, which are counted on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(**network_inputs(batch.mean_BChw, timesteps, batch, torch.float32))[0].mean().backward()
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


# ---- all of it ----


def measure(setup: Setup, script: Path | None, with_jobs: bool, folder: Path) -> tuple[dict[str, list], dict]:
    """Seconds of a step by side, one a round; and what else is to be known."""
    import torch

    from charforgex.families.sdxl import Sdxl

    torch.set_num_threads(setup.threads)
    model, pictures = folder / "model", folder / "pictures"
    save_base(setup, model)
    draw_pictures(pictures, SCALES[setup.scale][3])
    family = Sdxl()
    data = prepare_data(setup, model, pictures, folder / "cache")
    batches = [data.batch(number).to(setup.device) for number in range(setup.steps)]

    parts = family.load(str(model), ["denoiser"], getattr(torch, setup.dtype), setup.device)
    module = make_module(setup, parts.denoiser, family.process(parts), data)
    sides = {
        "ours": ours(setup, module, folder / "ours"),
        "plain": plain(setup, load_denoiser(setup, model), dict(parts["scheduler"].config), batches),
        "floor": floor(setup, load_denoiser(setup, model), batches),
    }
    seconds: dict[str, list] = {name: [] for name in sides}
    for number in range(setup.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:  # back and forth, so that a machine that slows down is unfair to none
            clock = Clock(setup.steps, setup.on_gpu)
            sides[name](clock)
            seconds[name].append(clock.seconds())
            print(f"round {number + 1} of {setup.rounds}: {name} {clock.seconds():.4f} s a step", flush=True)

    flops, rate = count_flops(setup, model, batches[0]), matrix_rate(setup)
    middle = statistics.median(seconds["ours"])
    values = {
        "parameters": sum(parameter.numel() for parameter in load_denoiser(setup, model).parameters()),
        "lora_parameters": sum(parameter.numel() for parameter in module.trainable.values()),
        "tflop_per_step": flops / 1e12, "matrix_tflop_per_second": rate / 1e12,
        "share_of_matrix_rate": {name: flops / statistics.median(taken) / rate for name, taken in seconds.items() if name != "floor"},
    }  # fmt: skip
    if setup.on_gpu:
        values |= {"steps_per_second": 1 / middle, "pictures_per_second": setup.batch_size / middle}
    del sides, module, parts, batches, data
    if with_jobs:
        values["peak_bytes"] = peaks = {}
        for number in range(1 if script is None else min(3, setup.rounds)):
            for name, job_seconds, peak in jobs(setup, script, model, pictures, folder / f"jobs-{number}"):
                seconds.setdefault(name, []).append(job_seconds)
                peaks.setdefault(name, []).append(peak)
                print(f"whole job {number + 1}: {name} {job_seconds:.4f} s a step, peak {peak / 2**20:.0f} MiB", flush=True)
    return seconds, values


def jobs(setup: Setup, script: Path | None, model: Path, pictures: Path, folder: Path):
    """(side, seconds of a step, peak bytes) of our whole job, and of the example script's if there is one."""
    folder.mkdir()
    mine = ["job", json.dumps(asdict(setup)), str(model), str(pictures), str(folder / "ours")]
    commands = {"job": (Path(__file__).resolve(), mine)}
    if script is not None:
        commands["diffusers"] = (script.resolve(), peer_arguments(setup, model, pictures, folder / "diffusers"))
    for name, (program, arguments) in commands.items():
        found = run_job(setup, program, arguments, folder)
        yield name, found["seconds"], found["peak_bytes"]["to_last_step"]


def in_turn(ours_seconds: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(ours_seconds, theirs, strict=True))


def parse() -> tuple[Setup, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps; the numbers say little")
    parser.add_argument("--scale", choices=["mini", "deep", "real"], help="the model; mini if not given")
    parser.add_argument("--diffusers-script", type=Path, help="examples/dreambooth/train_dreambooth_lora_sdxl.py of a diffusers checkout")
    parser.add_argument("--device", help="cpu or cuda; cuda for --scale real, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the frozen base; bfloat16 for --scale real, else float32")
    parser.add_argument("--compile", choices=["blocks", "model"], help="torch.compile the repeated block, or the denoiser as a whole")
    parser.add_argument("--peak-tflops", type=float, help="the chip's dense bfloat16 peak, where the script does not know it")
    for name, default in (("batch-size", 1), ("rank", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("resolution", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    scale = "quick" if options.quick else options.scale or "mini"
    if options.quick and options.scale:
        parser.error(f"--quick has a scale of its own: leave --scale {options.scale} out.")
    _, _, resolution, _, steps, rounds = SCALES[scale]
    device = options.device or ("cuda" if scale == "real" else "cpu")
    setup = Setup(
        scale, device, options.dtype or ("bfloat16" if scale == "real" else "float32"), options.resolution or resolution,
        options.batch_size, options.rank, options.steps or steps, options.rounds or rounds, options.threads, options.compile,
    )  # fmt: skip
    if scale == "real" and device == "cpu":
        parser.error("--scale real needs a GPU: on a CPU a step of SDXL at 1024 px takes minutes. Use --scale mini there.")
    if setup.on_gpu:
        import torch

        if not torch.cuda.is_available():
            parser.error(f"--device {device} was asked for, and torch finds no GPU here; --scale mini or --quick run on the CPU.")
    if setup.steps < WARM_UP + 2:
        parser.error(f"--steps {setup.steps} is too few: the first {WARM_UP} do not count; give at least {WARM_UP + 2}.")
    if options.diffusers_script is not None and not options.diffusers_script.is_file():
        parser.error(f"--diffusers-script {options.diffusers_script} is no file.")
    return setup, options


def main() -> None:
    setup, options = parse()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
        os.environ[variable] = str(setup.threads)
    with tempfile.TemporaryDirectory() as temporary:
        seconds, values = measure(
            setup, options.diffusers_script, not options.quick or options.diffusers_script is not None, Path(temporary)
        )

    ratios = {f"step_vs_{name}.sdxl": in_turn(seconds["ours"], seconds[name]) for name in ("plain", "floor")}
    if "diffusers" in seconds:
        ratios["step_vs_diffusers.sdxl"] = in_turn(seconds["job"], seconds["diffusers"])
        ratios["memory_vs_diffusers.sdxl"] = in_turn(values["peak_bytes"]["job"], values["peak_bytes"]["diffusers"])
    skipped = [name for name in GOALS if name not in ratios]
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    if setup.on_gpu:
        import torch

        name = torch.cuda.get_device_name()
        machine = f"{name}, {machine}"
        peak = options.peak_tflops or next((tflops for chip, tflops in PEAKS.items() if chip in name), None)
        if peak is not None:
            values["share_of_peak"] = {side: values["tflop_per_step"] / middle[side] / peak for side in ("ours", "plain")}

    for name, taken in seconds.items():
        print(f"{name:<26} {middle[name]:8.4f} s a step   ({min(taken):.4f} to {max(taken):.4f} in {len(taken)} rounds)")
    for name, ratio in ratios.items():
        print(f"{name:<26} {ratio:8.3f}   goal {GOALS[name]:.2f}")
    for name in skipped:
        print(f"{name:<26}  skipped: no --diffusers-script")

    from charforgex.runs import versions

    values = {"step_seconds": middle, "rounds": seconds, "load": os.getloadavg(), "setup": asdict(setup)} | values
    print(
        json.dumps(
            {"benchmark": "train_step", "ratios": ratios, "values": values, "machine": machine, "versions": versions(), "skipped": skipped}
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        watch(*sys.argv[2:])
    elif sys.argv[1:2] == ["job"]:
        job(Setup(**json.loads(sys.argv[2])), *map(Path, sys.argv[3:]))
    else:
        main()
