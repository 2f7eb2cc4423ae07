"""What LoRA files cost: python benchmarks/lora.py [--quick] [--family sdxl flux] [--kohya sd-scripts]

Random float16 files with the attention and MLP layers of the real bases (SDXL: 722 modules; Flux: 418), one thread, CPU seconds; each side
runs in a process of its own, which also tells its peak memory. The last line is one JSON object: ratios are ours divided by theirs, smaller
is better; each ends in the family's name.

merge_vs_peft_svd    `charforgex merge` of three files of rank 16 to one of rank 16, reading and writing included
                     against  peft's add_weighted_adapter(combination_type="svd"), which has the three in memory already
resize_vs_full_svd   `charforgex lora resize` from rank 16 to 8, reading and writing included
                     against  torch.linalg.svd of the dense changes
extract_vs_full_svd  the core of `charforgex lora extract` at rank 16 on dense changes  against  torch.linalg.svd of them
merge_error          of the same merge in float32: how much further from the sum it is than the best of rank 16, as a share
ties_vs_peft_ties_svd, dare_vs_peft_dare_svd    SDXL alone: `charforgex merge` of the three to rank 16 by method=ties and dare_linear
                     against  peft's combination_type="ties_svd" and "dare_linear_svd"
ties_error           how much further from what method=ties makes of a shape it is than the best of rank 16, as a share; of the worst shape
merge_vs_kohya, resize_vs_kohya    SDXL alone: as the first two, against merge_lora_models and resize_lora_model of --kohya's networks/

Theirs would take from half an hour to hours a file, so each is measured once for every distinct shape, and multiplied by how many modules
have it; so is the core of extract, on both sides. peft decomposes with full_matrices=True, its default, for SDXL, and False for Flux, where
the default would take minutes a module; torch.linalg.svd always with False. Ours of ties and dare runs once, on the whole files.
--quick: SDXL alone, in the embedded base's small shapes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded

import argparse
import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also where a test loads this file
from step_sides import peak_bytes

GOALS = {
    "merge_vs_peft_svd": 0.005, "resize_vs_full_svd": 0.002, "extract_vs_full_svd": 1.0, "merge_error": 1e-5,
    "ties_vs_peft_ties_svd": 0.25, "dare_vs_peft_dare_svd": 0.25, "ties_error": 1e-5, "merge_vs_kohya": 0.005, "resize_vs_kohya": 0.002,
}  # fmt: skip
RANK, SMALL_RANK, FILES, ROUNDS = 16, 8, 3, 3
DENSITY = 0.5  # of ties and dare, as conf/method has it
MIB = 1 << 20
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """What a process is told. `folder` holds the files."""

    base: str
    folder: str
    full_matrices: bool
    kohya: str | None = None

    @property
    def family(self) -> str:
        return "sdxl" if "sdxl" in self.base else "flux"

    @property
    def format(self) -> str:
        return (
            "kohya" if self.family == "sdxl" else "diffusers"
        )  # Flux's has queries, keys and values apart: as many modules as are trained

    def path(self, number: int) -> Path:
        return Path(self.folder) / f"{number}.safetensors"

    def shapes(self) -> dict[str, Shape]:
        """Of the modules that most LoRAs adapt, by our names."""
        from charforgex.families import bases

        base = bases.get(self.base)
        start = base.spelling.denoiser_name + "."
        wanted = (".attentions.",) if base.family == "sdxl" else (".attn.", ".ff.", ".ff_context.", ".proj_mlp", ".proj_out")
        return {
            name: shape
            for name, shape in base.shapes.items()
            if name.startswith(start) and "block" in name and any(part in name for part in wanted)
        }

    def counts(self) -> dict[Shape, int]:
        return Counter(self.shapes().values())


def random_layer(shape: Shape, key: object):
    """A change of spectrum nearly flat, as the worst case is."""
    import torch

    from charforgex.draws import torch_generator
    from charforgex.lora.state import LoraLayer

    generator = torch_generator("benchmark", key)
    down = torch.randn(RANK, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.1
    return LoraLayer(down, up, float(RANK))


def make_files(setup: Setup) -> None:
    from charforgex.families import bases
    from charforgex.lora.writing import write_layers

    base, shapes = bases.get(setup.base), setup.shapes()
    for number in range(FILES):

        def get(name: str, number: int = number):
            return random_layer(shapes[name], f"{number} {name}")

        metadata = {"charforgex.family": base.family}
        write_layers(get, list(shapes), setup.path(number), setup.format, base.names, metadata=metadata)


def dense_change(shape: Shape):
    """What fine-tuning does to a weight: singular values that fall slowly, in all directions."""
    import torch

    from charforgex.draws import torch_generator

    generator = torch_generator("benchmark dense", shape)
    out, inner = shape[0], math.prod(shape[1:])
    few = min(256, out, inner)
    values = torch.arange(1, few + 1).float() ** -0.7
    change = torch.randn(out, few, generator=generator) * values @ torch.randn(few, inner, generator=generator)
    return change + 0.05 * torch.randn(out, inner, generator=generator)


# ---- jobs: each runs in a process of its own and returns CPU seconds, of a file or by shape ----


def clocked(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def by_shape(setup: Setup, prepare: Callable[[Shape], Callable[[], object]]) -> dict[str, float]:
    """Seconds of a module of each shape, what `prepare` does not counted."""
    return {"x".join(map(str, shape)): clocked(prepare(shape)) for shape in setup.counts()}


def merge(setup: Setup, dtype: str = "float16", out: str = "merged", method: str = "linear") -> dict[str, float]:
    from charforgex.config import compose
    from charforgex.merging.run import merge as run

    files = ",".join(str(setup.path(number)) for number in range(FILES))
    settings = [f"lora=[{files}]", f"weights={[1] * FILES}", f"rank={RANK}", f"dtype={dtype}", "overwrite=true", f"method={method}"]
    cfg = compose("merge", [*settings, f"out={setup.folder}/{out}.safetensors"])
    return {"whole": clocked(lambda: run(cfg))}


def resize(setup: Setup) -> dict[str, float]:
    from charforgex.config import compose
    from charforgex.toolbox.resizing import resize as run

    settings = [f"lora={setup.path(0)}", f"out={setup.folder}/resized.safetensors", f"rank={SMALL_RANK}", "overwrite=true"]
    cfg = compose("lora_resize", settings)
    return {"whole": clocked(lambda: run(cfg))}


def extract(setup: Setup) -> dict[str, float]:
    from charforgex.draws import torch_generator
    from charforgex.lora.lowrank import SPARE, dense_spectrum, leading_spectrum
    from charforgex.toolbox.extracting import CHEAPER

    def prepare(shape: Shape):
        change = dense_change(shape)

        def run():
            found = None
            if min(change.shape) >= CHEAPER * (RANK + SPARE):
                found = leading_spectrum(change, RANK, torch_generator("extract", shape))
            return (found or dense_spectrum(change)).truncated(RANK)

        return run

    return by_shape(setup, prepare)


def peft_merge(setup: Setup, combination_type: str = "svd", **settings: float) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model

    def prepare(shape: Shape):
        out, inner = shape[0], math.prod(shape[1:])
        module = torch.nn.Sequential()
        module.add_module("layer", torch.nn.Linear(inner, out, bias=False))
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
        names = [f"adapter{number}" for number in range(FILES)]
        model = get_peft_model(module, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        with torch.no_grad():
            for number, name in enumerate(names):
                layer = random_layer((out, inner), f"{number} {shape}")
                model.base_model.model.layer.lora_A[name].weight.copy_(layer.down)
                model.base_model.model.layer.lora_B[name].weight.copy_(layer.up)
        options = {"combination_type": combination_type, "svd_rank": RANK, "svd_full_matrices": setup.full_matrices, **settings}
        return lambda: model.add_weighted_adapter(names, [1.0] * FILES, "merged", **options)

    return by_shape(setup, prepare)


def full_svd(dense: Callable[[Shape], object]) -> Callable[[Setup], dict[str, float]]:
    def job(setup: Setup) -> dict[str, float]:
        import torch

        def prepare(shape: Shape):
            change = dense(shape)
            return lambda: torch.linalg.svd(change, full_matrices=False)

        return by_shape(setup, prepare)

    return job


def kohya_merge(setup: Setup) -> dict[str, float]:
    import torch

    module = kohya_module(setup, "svd_merge_lora")
    paths = {shape: [kohya_file(setup, shape, number) for number in range(FILES)] for shape in setup.counts()}

    def prepare(shape: Shape):
        return lambda: module.merge_lora_models(list(map(str, paths[shape])), [1.0] * FILES, [], RANK, RANK, "cpu", torch.float)

    return by_shape(setup, prepare)


def kohya_resize(setup: Setup) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file

    module = kohya_module(setup, "resize_lora")

    def prepare(shape: Shape):
        tensors = {key: tensor.float() for key, tensor in load_file(kohya_file(setup, shape, 0)).items()}  # as its load_state_dict has them
        return lambda: module.resize_lora_model(tensors, SMALL_RANK, SMALL_RANK, torch.float16, "cpu", None, None, False)

    return by_shape(setup, prepare)


def kohya_module(setup: Setup, name: str):
    """One of its scripts. What they import for training and for metadata needs torchvision and more, and is never called here."""
    import importlib
    from unittest.mock import MagicMock

    for other in ("library.utils", "library.train_util", "library.model_util", "library.sai_model_spec", "lora"):
        sys.modules[other] = MagicMock()
    sys.path[:0] = [setup.kohya, f"{setup.kohya}/networks"]
    return importlib.import_module(name)


def kohya_file(setup: Setup, shape: Shape, number: int) -> Path:
    """One module of that shape, in kohya's names."""
    import torch
    from safetensors.torch import save_file

    layer = random_layer(shape, f"{number} {shape}").map(torch.Tensor.half)
    path, name = Path(setup.folder) / f"kohya_{'x'.join(map(str, shape))}_{number}.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {".lora_down.weight": layer.down, ".lora_up.weight": layer.up, ".alpha": torch.tensor(layer.alpha)}
    save_file({name + end: tensor for end, tensor in tensors.items()}, path, {"ss_v2": "False"})
    return path


JOBS = {
    "merge": merge, "resize": resize, "extract": extract, "peft_merge": peft_merge,
    "svd_resize": full_svd(lambda shape: random_layer(shape, shape).delta().flatten(1)), "svd_extract": full_svd(dense_change),
    "ties": partial(merge, method="ties", out="ties"), "dare": partial(merge, method="dare_linear", out="dare"),
    "peft_ties": partial(peft_merge, combination_type="ties_svd", density=DENSITY),
    "peft_dare": partial(peft_merge, combination_type="dare_linear_svd", density=DENSITY),
    "kohya_merge": kohya_merge, "kohya_resize": kohya_resize,
}  # fmt: skip


def run_job(name: str, setup: Setup) -> dict:
    """In a process of its own: seconds of a whole file, and peak memory in bytes."""
    command = [sys.executable, str(Path(__file__)), "--job", name, "--setup", json.dumps(asdict(setup))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{name} failed for {setup.base}")
    told = json.loads(done.stdout.splitlines()[-1])
    counts = {"x".join(map(str, shape)): count for shape, count in setup.counts().items()} | {"whole": 1}
    told["cpu_seconds"] = sum(seconds * counts[shape] for shape, seconds in told["seconds"].items())
    print(f"{setup.base:<15} {name:<14} {told['cpu_seconds']:10.2f} CPU s {told['peak_bytes'] / MIB:8.0f} MiB", flush=True)
    return told


def run_here(name: str, setup: Setup) -> None:
    import charforgex.lora.lowrank  # noqa: F401 - imports are nobody's work

    with contextlib.redirect_stdout(sys.stderr):
        seconds = JOBS[name](setup)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(on_gpu=False)}))


# ---- what comes of it ----


def merge_error(setup: Setup) -> float:
    """The distance of the merged file to the sum, beside that of the best of its rank, which follows from singular values in float64."""
    import torch

    from charforgex.families import bases
    from charforgex.lora import lowrank
    from charforgex.lora.formats import open_lora

    names = bases.get(setup.base).names
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_lora(setup.path(number), names)) for number in range(FILES)]
        merged = stack.enter_context(open_lora(Path(setup.folder) / "merged_float32.safetensors", names))
        mine, best = 0.0, 0.0
        for name in setup.shapes():
            whole = lowrank.stacked([lowrank.product(file.layer(name), torch.float64) for file in files])
            difference = lowrank.stacked([whole, lowrank.product(merged.layer(name), torch.float64)], [1.0, -1.0])
            mine = math.hypot(mine, difference.norm())
            best = math.hypot(best, float(lowrank.spectrum(whole).values[RANK:].norm()))
    return mine / best - 1


def ties_error(setup: Setup) -> float:
    """Of the distance between what method=ties makes and what is kept of it, over the least for that rank, the largest share above 1."""
    import torch

    from charforgex.lora import lowrank
    from charforgex.merging import methods

    worst = 0.0
    for shape in setup.counts():
        changes = [random_layer(shape, f"{number} {shape}").delta().flatten(1) for number in range(FILES)]
        made = methods.ties(changes, [1.0] * FILES, DENSITY)
        kept = lowrank.dense_spectrum(made, RANK).truncated(RANK).dense().double()
        exact = made.double()
        gram = exact.T @ exact if exact.shape[0] > exact.shape[1] else exact @ exact.T
        best = math.sqrt(float(torch.linalg.eigvalsh(gram)[:-RANK].clamp(min=0).sum()))
        worst = max(worst, float((kept - exact).norm()) / best - 1)
    return worst


def smaller(setup: Setup) -> dict[str, dict[str, float]]:
    """What a file of random factors weighs in each kind of codes, as a share of float16, and the relative error of its changes."""
    from charforgex.toolbox.quantizing import quantize

    table = {}
    for kind in ("fp8", "int8", "nf4"):
        with contextlib.redirect_stdout(sys.stderr):
            told = quantize({"lora": str(setup.path(0)), "out": f"{setup.folder}/{kind}.safetensors", "kind": kind})
        table[kind] = {"size": told["bytes"] / told["bytes_before"], "error": told["error"]}
        print(f"{setup.base:<15} {kind:<14} {table[kind]['size']:10.3f} of the size, error {table[kind]['error']:.4f}", flush=True)
    return table


def measure(setup: Setup, rounds: int) -> tuple[dict[str, float], dict[str, dict]]:
    """Ratios without the family's name, and what was measured. Ours runs in every round, before and after theirs."""
    make_files(setup)
    ours = {"merge": [], "resize": [], "extract": []}
    theirs = {"merge": ["peft_merge"], "resize": ["svd_resize"], "extract": ["svd_extract"]}
    dense = {"ties": "peft_ties", "dare": "peft_dare"} if setup.family == "sdxl" else {}
    if setup.kohya:
        theirs["merge"].append("kohya_merge")
        theirs["resize"].append("kohya_resize")
    table = {}
    for number in range(rounds):
        for name, found in ours.items():
            found.append(run_job(name, setup))
        if number == 0:
            table = {name: run_job(name, setup) for names in theirs.values() for name in names}
            table |= {name: run_job(name, setup) for pair in dense.items() for name in pair}
    for name, found in ours.items():
        table[name] = found[0] | {
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found),
            "spread": [min(one["cpu_seconds"] for one in found), max(one["cpu_seconds"] for one in found)],
            "peak_bytes": max(one["peak_bytes"] for one in found),
        }
    words = {"peft_merge": "merge_vs_peft_svd", "svd_resize": "resize_vs_full_svd", "svd_extract": "extract_vs_full_svd"}
    words |= {"kohya_merge": "merge_vs_kohya", "kohya_resize": "resize_vs_kohya"}
    ratios = {words[other]: table[name]["cpu_seconds"] / table[other]["cpu_seconds"] for name, others in theirs.items() for other in others}
    ratios |= {f"{ours}_vs_{other}_svd": table[ours]["cpu_seconds"] / table[other]["cpu_seconds"] for ours, other in dense.items()}
    with contextlib.redirect_stdout(sys.stderr):
        merge(setup, "float32", "merged_float32")
    ratios["merge_error"] = merge_error(setup)
    if dense:
        ratios["ties_error"] = ties_error(setup)
    table["quantized"] = smaller(setup)
    table["files"] = {
        path.stem: path.stat().st_size for path in sorted(Path(setup.folder).glob("*.safetensors")) if "kohya" not in path.stem
    }
    return ratios, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, one round; its numbers say little")
    parser.add_argument("--family", nargs="+", choices=("sdxl", "flux"))
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--setup", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_here(options.job, Setup(**json.loads(options.setup)))
        return
    if options.kohya and not (options.kohya / "networks/svd_merge_lora.py").is_file():
        parser.error(f"{options.kohya}/networks/svd_merge_lora.py is no file; give --kohya a checkout of kohya-ss/sd-scripts.")

    from charforgex.runs import versions

    ratios, values, skipped = {}, {}, {}
    for family in options.family or (("sdxl",) if options.quick else ("sdxl", "flux")):
        base = f"charworld_{family}" if options.quick else {"sdxl": "sdxl_base", "flux": "flux_dev"}[family]
        with tempfile.TemporaryDirectory() as folder:
            kohya = options.kohya if family == "sdxl" else None
            setup = Setup(base, folder, family == "sdxl", str(kohya) if kohya else None)
            found, values[family] = measure(setup, 1 if options.quick else ROUNDS)
        ratios |= {f"{name}.{family}": ratio for name, ratio in found.items()}
        if family == "sdxl" and not kohya:
            skipped |= {f"{name}.{family}": "no --kohya checkout" for name in ("merge_vs_kohya", "resize_vs_kohya")}
    for name, ratio in ratios.items():
        print(f"{name:<26} {ratio:12.6f}   goal {GOALS[name.rpartition('.')[0]]:g}")
    for name, why in skipped.items():
        print(f"{name:<26} skipped: {why}")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    print(
        json.dumps(
            {"benchmark": "lora", "ratios": ratios, "values": values, "machine": machine, "versions": versions(), "skipped": skipped}
        )
    )


if __name__ == "__main__":
    main()
