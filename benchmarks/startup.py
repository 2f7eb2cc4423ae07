"""How soon the program answers: python benchmarks/startup.py [--quick] [--diffusers-script train_dreambooth_lora_sdxl.py]

Whole processes in turn, CPU seconds (user and system) of each process and its children, medians. The last line is one JSON object:
ratios are ours divided by theirs, smaller is better. Needs nothing that training does not need.

help_vs_hydra              python train.py --help               against  python -c "import hydra"
config_error_vs_hydra      python train.py lora.rnk=8           against  the same
first_step_vs_diffusers    python train.py with one step        against  the diffusers example script with one step, given by its path
merge_help_vs_hydra        there is no merge command yet: skipped by that name
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"help_vs_hydra": 2.0, "config_error_vs_hydra": 2.0, "first_step_vs_diffusers": 0.9}


def cpu_seconds(command: list[str], folder: Path, codes: tuple[int, ...] = (0,)) -> float:
    """CPU seconds of a whole process. Raises CalledProcessError when it ends otherwise than asked, with what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in codes:
        sys.stderr.write(done.stdout + done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alternating(programs: dict[str, tuple[list[str], tuple[int, ...]]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Every program once a round, so that a busy machine is busy for all; the first round only warms the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, (command, codes) in programs.items():
            took = cpu_seconds(command, folder, codes)
            if number:
                seconds[name].append(took)
    return seconds


def diffusers_command(script: Path, folder: Path) -> list[str]:
    """One step of the example script on the embedded base and one drawn picture, as our own run has them."""
    from PIL import Image

    import charforgex.charworld as charworld

    pictures = folder / "diffusers_pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64), (200, 120, 90)).save(pictures / "0.png")
    base = Path(charworld.__file__).parent / "assets" / "sdxl"
    arguments = {
        "pretrained_model_name_or_path": base, "instance_data_dir": pictures, "instance_prompt": "a portrait", "resolution": 64,
        "train_batch_size": 4, "max_train_steps": 1, "rank": 16, "output_dir": folder / "diffusers_out",
    }  # fmt: skip
    return [sys.executable, str(script), *(f"--{name}={value}" for name, value in arguments.items())]


def first_step(script: Path, rounds: int, folder: Path) -> dict[str, list[float]]:
    """One training step each, from nothing: pictures encoded, no measuring, no sample grids on either side."""
    ours = [sys.executable, str(ROOT / "train.py"), "trainer.steps=1", "evaluation.every=1000", f"runs_dir={folder / 'runs'}"]
    seconds: dict[str, list[float]] = {"first_step": [], "diffusers": []}
    theirs = diffusers_command(script, folder)
    for _ in range(rounds):
        for made in ("runs", "diffusers_out"):
            shutil.rmtree(folder / made, ignore_errors=True)
        seconds["first_step"].append(cpu_seconds(ours, folder))
        seconds["diffusers"].append(cpu_seconds(theirs, folder))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--diffusers-script", type=Path, help="examples/dreambooth/train_dreambooth_lora_sdxl.py of a diffusers checkout")
    options = parser.parse_args()
    rounds = 3 if options.quick else 9

    python, train = sys.executable, str(ROOT / "train.py")
    programs = {
        "hydra": ([python, "-c", "import hydra"], (0,)),
        "help": ([python, train, "--help"], (0,)),
        "config_error": ([python, train, "lora.rnk=8"], (2,)),
    }
    skipped = {"merge_help_vs_hydra": "there is no merge command yet"}
    with tempfile.TemporaryDirectory() as temporary:
        seconds = alternating(programs, rounds, Path(temporary))
        if options.diffusers_script is None:
            skipped["first_step_vs_diffusers"] = "no --diffusers-script"
        else:
            seconds |= first_step(options.diffusers_script.resolve(), max(rounds // 3, 1), Path(temporary))

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"{name}_vs_hydra": middle[name] / middle["hydra"] for name in ("help", "config_error")}
    if "diffusers" in middle:
        ratios["first_step_vs_diffusers"] = middle["first_step"] / middle["diffusers"]
    for name, value in ratios.items():
        print(f"{name:<26} {value:6.2f}   goal {GOALS[name]:.2f}")
    for name, why in skipped.items():
        print(f"{name:<26} skipped: {why}")

    from charforgex.runs import versions

    spread = {name: [min(values), max(values)] for name, values in seconds.items()}
    values = {"cpu_seconds": middle, "spread": spread, "rounds": rounds, "skipped": skipped}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    print(json.dumps({"benchmark": "startup", "ratios": ratios, "values": values, "machine": machine, "versions": versions()}))


if __name__ == "__main__":
    main()
