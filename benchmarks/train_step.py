"""What a LoRA training step costs: python benchmarks/train_step.py [--quick] [--diffusers-scripts diffusers/examples/dreambooth]

Everything is measured in one run, in turn, family by family, on random models of the families' layouts and the same drawn pictures.
CPU seconds with one thread on a CPU, seconds on a GPU. The last line is one JSON object: ratios are ours divided by theirs, smaller
is better; each ends in the family's name.

step_vs_plain        our step, everything that train.py does between two measurements (Lightning, data, losses, clipping, AdamW, logs;
                     EMA off)  against  a hand-written diffusers + peft loop over latents and texts that lie ready
step_vs_floor        our step  against  forward and backward of the denoiser alone, without adapter, loss of nothing, optimizer
step_vs_diffusers    our step  against  a step of diffusers' example script of the family, unchanged; each in a process of its own
memory_vs_diffusers  the peak of those two processes up to their last step: encoding what there is to encode included

--scale mini: SDXL with a quarter of its widths and one transformer block a place (40 M parameters), Flux and SD3 of 9 M; deep: narrow
and at full depth, where what each layer costs besides its arithmetic weighs most; both at 256 px. real: for a GPU, SDXL, FLUX.1-dev or
SD3.5-large at 512 and 1024 px in batches of 1 and 4 in bfloat16, eager and compiled; see `measure_real`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))  # also where a test loads this file
from random_bases import SCALES, T5_TOKENS, build_denoiser, save_base
from step_sides import (
    WARM_UP,
    Clock,
    Setup,
    count_flops,
    floor,
    make_module,
    matrix_rate,
    ours,
    peak_bytes,
    plain,
    random_batches,
    scheduler_of,
)

if TYPE_CHECKING:
    from charforgex.data.datamodule import CharacterData

GOALS = {
    "step_vs_plain": {"sdxl": 1.10, "flux": 1.10, "sd3": 1.10},
    "step_vs_floor": {"sdxl": 1.25, "flux": 1.25, "sd3": 1.25},
    "step_vs_diffusers": {"sdxl": 0.55, "flux": 0.40, "sd3": 0.40},
    "memory_vs_diffusers": {"sdxl": 0.85, "flux": 0.85, "sd3": 0.85},
}
FAMILIES = ("sdxl", "flux", "sd3")
PROMPT = "a portrait of a person"
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1}  # dense bfloat16 TFLOP/s, from the makers' data sheets

# ---- the model and the pictures ----


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
    from charforgex.data.datamodule import CharacterData
    from charforgex.families.loading import weights_hash

    family = setup.get_family()
    data = CharacterData(
        pictures, cache, setup.resolution, default_caption=PROMPT, batch_size=setup.batch_size, caption_dropout=0.0, val_count=0
    )  # fmt: skip
    facts = setup.load(model, [])
    data.prepare(
        family, lambda groups: setup.load(model, groups),
        weights={group: weights_hash(family, str(model), group) for group in ("vae", "text")},
        pixel_multiple=family.pixel_multiple(facts), latent_stride=family.latent_stride(facts), dtype=setup.dtype, progress=False,
    )  # fmt: skip
    return data


# ---- whole jobs, each in a process of its own ----


def job(setup: Setup, model: Path, pictures: Path, folder: Path) -> None:
    """What train.py does up to its last step, without measuring: encode, let go of the encoders, train."""
    import torch

    torch.set_num_threads(setup.threads)
    data = prepare_data(setup, model, pictures, folder / "cache")
    module = make_module(setup, setup.load(model, ["denoiser"]), lambda first: data.train_dataloader(range(first, first + setup.steps)))
    decoder = setup.load(model, ["vae"])["vae"]  # for the previews: train.py holds it while it trains
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
    if setup.family != "sdxl":
        values["max_sequence_length"] = T5_TOKENS[setup.family]  # as the pipelines have it, and we
    return [f"--{name}={value}" for name, value in values.items()]


# ---- all of it ----


def measure(setup: Setup, script: Path | None, with_jobs: bool, folder: Path) -> tuple[dict[str, list], dict]:
    """Seconds of a step by side, one a round; and what else is to be known."""
    import torch

    torch.set_num_threads(setup.threads)
    model, pictures = folder / "model", folder / "pictures"
    save_base(setup.get_family(), SCALES[setup.scale], getattr(torch, setup.dtype), setup.device, model)
    draw_pictures(pictures, SCALES[setup.scale].picture)
    data = prepare_data(setup, model, pictures, folder / "cache")
    batches = [data.batch(number).to(setup.device) for number in range(setup.steps)]

    module = make_module(setup, setup.load(model, ["denoiser"]), lambda first: data.train_dataloader(range(first, first + setup.steps)))
    sides = {
        "ours": ours(setup, module, folder / "ours"),
        "plain": plain(setup, setup.load(model, ["denoiser"]).denoiser, batches),
        "floor": floor(setup, setup.load(model, ["denoiser"]).denoiser, batches),
    }
    seconds: dict[str, list] = {name: [] for name in sides}
    for number in range(setup.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:  # back and forth, so that a machine that slows down is unfair to none
            clock = Clock(setup.steps, setup.on_gpu)
            sides[name](clock)
            seconds[name].append(clock.seconds())
            print(f"{setup.family}, round {number + 1} of {setup.rounds}: {name} {clock.seconds():.4f} s a step", flush=True)

    flops, rate = count_flops(setup, batches[0]), matrix_rate(setup)
    values = {
        "parameters": sum(p.numel() for p in module.denoiser.parameters() if not p.requires_grad),
        "lora_parameters": sum(parameter.numel() for parameter in module.trainable.values()),
        "tflop_per_step": flops / 1e12, "matrix_tflop_per_second": rate / 1e12,
        "share_of_matrix_rate": {name: flops / statistics.median(taken) / rate for name, taken in seconds.items() if name != "floor"},
    }  # fmt: skip
    del sides, module, batches
    if with_jobs:
        values["peak_bytes"] = peaks = {}
        for number in range(1 if script is None else min(3, setup.rounds)):
            for name, job_seconds, peak in jobs(setup, script, model, pictures, folder / f"jobs-{number}"):
                seconds.setdefault(name, []).append(job_seconds)
                peaks.setdefault(name, []).append(peak)
                print(f"{setup.family}, job {number + 1}: {name} {job_seconds:.4f} s a step, peak {peak / 2**20:.0f} MiB", flush=True)
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


def report(setups: list[Setup], options: argparse.Namespace) -> tuple[dict, dict, list[str]]:
    """Ratios, values by family, and what was skipped: `measure` for each family."""
    ratios, values, skipped = {}, {}, []
    for setup in setups:
        script = options.diffusers_scripts and options.diffusers_scripts / f"train_dreambooth_lora_{setup.family}.py"
        with tempfile.TemporaryDirectory() as temporary:
            seconds, found = measure(setup, script, not options.quick or script is not None, Path(temporary))
        for name in ("plain", "floor"):
            ratios[f"step_vs_{name}.{setup.family}"] = in_turn(seconds["ours"], seconds[name])
        if script is None:
            skipped += [f"step_vs_diffusers.{setup.family}", f"memory_vs_diffusers.{setup.family}"]
        else:
            ratios[f"step_vs_diffusers.{setup.family}"] = in_turn(seconds["job"], seconds["diffusers"])
            ratios[f"memory_vs_diffusers.{setup.family}"] = in_turn(found["peak_bytes"]["job"], found["peak_bytes"]["diffusers"])
        middle = {name: statistics.median(taken) for name, taken in seconds.items()}
        values[setup.family] = {"step_seconds": middle, "rounds": seconds, "setup": asdict(setup)} | found
        for name, taken in seconds.items():
            label = f"{setup.family}: {name}"
            print(f"{label:<26} {middle[name]:8.4f} s a step   ({min(taken):.4f} to {max(taken):.4f} in {len(taken)} rounds)")
    for name, ratio in ratios.items():
        kind, family = name.split(".")
        print(f"{name:<26} {ratio:8.3f}   goal {GOALS[kind][family]:.2f}")
    for name in skipped:
        print(f"{name:<26}  skipped: no --diffusers-scripts")
    return ratios, values, skipped


# ---- real sizes, on a GPU ----


def measure_side(setup: Setup, name: str, folder: Path) -> dict[str, float]:
    """One side alone on the device, so that its peak is its own: seconds of a step, and bytes."""
    import torch

    from charforgex.types import Components

    family = setup.get_family()
    if setup.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    denoiser = build_denoiser(family, SCALES[setup.scale], getattr(torch, setup.dtype), setup.device)
    batches = random_batches(setup, setup.steps)
    if name == "ours":
        parts = Components("random", family.denoiser_name, {family.denoiser_name: denoiser, "scheduler": scheduler_of(setup)})
        side = ours(setup, make_module(setup, parts, lambda first: batches), folder)
    else:
        side = plain(setup, denoiser, batches)
    clocks = [Clock(setup.steps, setup.on_gpu) for _ in range(setup.rounds)]
    for clock in clocks:
        side(clock)
    return {"step_seconds": statistics.median(clock.seconds() for clock in clocks), "peak_bytes": peak_bytes(setup.on_gpu)}


def measure_real(
    setups: list[Setup], sizes: list[int], batch_sizes: list[int], peak_tflops: float | None, ways: Sequence[bool] = (False, True)
) -> tuple[dict, dict, list[str]]:
    """Our step and the plain loop's for each family, size and batch size, eager and compiled, each alone on the device.

    Steps a second, peak memory, and the share of the chip's bfloat16 peak. What does not fit is measured with all blocks checkpointed;
    what does not fit then is skipped by name.
    """
    import torch

    ratios, values, skipped = {}, {}, []
    for base, resolution, many, compiled in product(setups, sizes, batch_sizes, ways):
        setup = replace(base, resolution=resolution, batch_size=many, compile=compiled)
        case = f"{setup.family}.{resolution}px.batch{many}.{'compiled' if compiled else 'eager'}"
        flops = count_flops(setup, random_batches(replace(setup, device="meta"), 1)[0])
        for checkpointing in (False, True):
            found = {}
            try:
                for name in ("ours", "plain"):
                    with tempfile.TemporaryDirectory() as temporary:
                        found[name] = measure_side(replace(setup, checkpointing=checkpointing), name, Path(temporary))
            except torch.OutOfMemoryError:
                continue
            for name, numbers in found.items():
                numbers |= {"steps_per_second": 1 / numbers["step_seconds"], "tflop_per_step": flops / 1e12}
                if peak_tflops:  # of the arithmetic that is needed: what checkpointing does twice counts once
                    numbers["share_of_peak"] = flops / 1e12 / numbers["step_seconds"] / peak_tflops
                share = f", {numbers['share_of_peak']:.0%} of the peak" if peak_tflops else ""
                memory = f"{numbers['peak_bytes'] / 2**30:.1f} GiB{', all blocks checkpointed' if checkpointing else ''}"
                print(f"{case:<34} {name:<6} {numbers['steps_per_second']:7.3f} steps/s, {memory}{share}", flush=True)
            values[case] = found | {"checkpointing": checkpointing, "setup": asdict(setup)}
            ratios[f"step_vs_plain.{case}"] = found["ours"]["step_seconds"] / found["plain"]["step_seconds"]
            ratios[f"memory_vs_plain.{case}"] = found["ours"]["peak_bytes"] / found["plain"]["peak_bytes"]
            break
        else:
            skipped.append(f"{case}: does not fit into the memory")
            print(f"{case:<34} does not fit into the memory", flush=True)
    return ratios, values, skipped


def in_turn(ours_seconds: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(ours_seconds, theirs, strict=True))


def parse() -> tuple[list[Setup], argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer steps; the numbers say little")
    parser.add_argument("--scale", choices=["mini", "deep", "real"], help="the models; mini if not given")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="all three if not given")
    parser.add_argument("--diffusers-scripts", type=Path, help="the folder examples/dreambooth of a diffusers checkout")
    parser.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks of all sides; --scale real does both")
    parser.add_argument("--peak-tflops", type=float, help="the chip's dense bfloat16 peak, where the script does not know it")
    parser.add_argument("--batch-size", type=int, nargs="+", help="1; for --scale real 1 4")
    parser.add_argument("--resolution", type=int, nargs="+", help="256; for --scale real 512 1024")
    for name, default in (("rank", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("steps", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    if options.quick and options.scale:
        parser.error(f"--quick has a scale of its own: leave --scale {options.scale} out.")
    options.scale = "quick" if options.quick else options.scale or "mini"
    scale, real = SCALES[options.scale], options.scale == "real"
    options.batch_size = options.batch_size or ([1, 4] if real else [1])
    options.resolution = options.resolution or ([512, 1024] if real else [scale.resolution])
    if real:
        if options.diffusers_scripts is not None:
            parser.error("--scale real measures beside the plain loop; leave --diffusers-scripts out, or use --scale mini.")
        import torch

        if not torch.cuda.is_available():
            parser.error("--scale real needs a CUDA GPU, and torch finds none here; --scale mini, deep or --quick run on the CPU.")
    elif len(options.batch_size) > 1 or len(options.resolution) > 1:
        parser.error("several sizes are for --scale real; give one --batch-size and one --resolution.")
    if options.compile:
        from charforgex.errors import ConfigError
        from charforgex.training.blocks import check_compiler

        try:
            check_compiler("cuda" if real else "cpu")
        except ConfigError as error:
            parser.error(str(error))
    steps, rounds = options.steps or scale.steps, options.rounds or scale.rounds
    if steps < WARM_UP + 2:
        parser.error(f"--steps {steps} is too few: the first {WARM_UP} do not count; give at least {WARM_UP + 2}.")
    for family in options.family if options.diffusers_scripts is not None else ():
        script = options.diffusers_scripts / f"train_dreambooth_lora_{family}.py"
        if not script.is_file():
            parser.error(f"--diffusers-scripts: {script} is no file.")
    device, dtype = ("cuda", "bfloat16") if real else ("cpu", "float32")
    setups = [
        Setup(
            family, scale.name, device, dtype, options.resolution[0], options.batch_size[0], options.rank, steps, rounds, options.threads,
            options.compile,
        ) for family in options.family
    ]  # fmt: skip
    return setups, options


def main() -> None:
    setups, options = parse()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
        os.environ[variable] = str(options.threads)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    if options.scale == "real":
        import torch

        chip = torch.cuda.get_device_name()
        machine = f"{chip}, {machine}"
        peak = options.peak_tflops or next((tflops for name, tflops in PEAKS.items() if name in chip), None)
        ratios, values, skipped = measure_real(setups, options.resolution, options.batch_size, peak)
    else:
        ratios, values, skipped = report(setups, options)

    from charforgex.runs import versions

    values["load"] = os.getloadavg()
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
