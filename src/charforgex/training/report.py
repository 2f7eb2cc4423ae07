"""What is about to be trained, said before the first step; and what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from charforgex.data.prepared import PreparedData
from charforgex.families.base import Family
from charforgex.families.process import Process
from charforgex.families.quantized import packed_by
from charforgex.lora.targets import each
from charforgex.training.blocks import resized
from charforgex.training.losses import Objective
from charforgex.training.module import DenoiserModule
from charforgex.training.settings import LoraSettings, OptimizerSettings, TrainerSettings
from charforgex.types import Components

BARS = " ▁▂▃▄▅▆▇█"


def histogram(values: torch.Tensor, bins: int = 10) -> str:
    """Values in [0, 1] as a row of bars."""
    counts = torch.histc(values, bins, 0, 1)
    return "".join(BARS[round(float(c / counts.max()) * (len(BARS) - 1))] for c in counts)


def objective_lines(
    family: Family, parts: Components, process: Process, objective: Objective, lora: LoraSettings, adapted: Sequence[str],
    optimizer: OptimizerSettings, trainer: TrainerSettings, trainable: int, grid: tuple[int, int],
) -> list[tuple[str, str]]:  # fmt: skip
    """The effective objective, as (what, value). `grid` is the largest picture's, in latents: times may depend on it."""
    tokens = grid[0] * grid[1] // 4
    times = torch.cat([objective.times(4, process, "report", i, tokens=tokens) for i in range(250)])
    shift = process.resolution_shift(tokens) if objective.shift == "resolution" else objective.shift
    shifted = "" if shift == 1 else f", shifted by {shift:.4g}" + (" for the largest picture" if objective.shift == "resolution" else "")
    weights = process.weight(times, objective.weighting, objective.min_snr_gamma)
    loss = objective.kind if objective.kind == "mse" else f"pseudo-Huber, delta {objective.huber_delta:g}"
    weighting = f"min-SNR {objective.min_snr_gamma:g}" if objective.weighting == "min_snr" else objective.weighting
    weighting += "" if weighting == "none" else f": {weights.min():.3f} to {weights.max():.3f}"
    guidance = f", guidance vector {family.training_guidance:g}" if family.is_distilled(parts) else ""
    packed = f", linear layers in {kind}" if (kind := packed_by(parts.denoiser)) else ""
    return [
        ("base", f"{family.name} from {parts.source}, {next(parts.denoiser.parameters()).dtype}{packed}".replace("torch.", "")),
        ("target", process.describe() + guidance),
        ("loss", f"{loss}, weighting {weighting}" + (f", noise offset {objective.noise_offset:g}" if objective.noise_offset else "")),
        ("noise levels", f"t = 0 clean {histogram(times)} t = 1 noise, {objective.timesteps}{shifted}"),
        *([("adapter", adapter_line(lora, adapted))] if adapted else []),
        ("trains", f"{trainable / 1e6:.3g} M parameters" + (f", {len(adapted)} layers such as {adapted[0]}" if adapted else "")),
        ("optimizer", f"{optimizer.name}, lr {optimizer.lr:g} {optimizer.schedule}, warm-up {optimizer.warmup}"),
        ("gradients", f"clipped to norm {optimizer.grad_clip:g}" if optimizer.grad_clip else "not clipped"),
        ("EMA", f"{trainer.ema:g}" if trainer.ema else "off"),
    ]  # fmt: skip


def adapter_line(lora: LoraSettings, adapted: Sequence[str]) -> str:
    """Kind, ranks, alphas and scales of the denoiser's adapter: the commonest, and how many layers have another."""
    paths = [path for path in adapted if not path.startswith("text_encoder")]
    ranks, alphas = each("lora.ranks", lora.ranks, lora.rank, paths), each("lora.alphas", lora.alphas, lora.alpha, paths)
    scales = {path: alphas[path] / (math.sqrt(ranks[path]) if lora.rslora else ranks[path]) for path in paths}

    def some(values: Mapping[str, float]) -> str:
        (first, _), *others = Counter(f"{value:g}" for value in values.values()).most_common()
        return first + (f" ({', '.join(f'{value} on {count} layers' for value, count in others)})" if others else "")

    name = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[lora.kind]
    start = ", from the weights' largest directions (PiSSA)" if lora.init == "pissa" else ""
    faster = f", up learns {lora.up_ratio:g} times as fast (LoRA+)" if lora.up_ratio != 1 else ""
    rule = "alpha/sqrt(rank)" if lora.rslora else "alpha/rank"
    return f"{name}{start}, rank {some(ranks)}, alpha {some(alphas)}, scale {rule} {some(scales)}{faster}"


def data_lines(
    family: Family, parts: Components, data: PreparedData, count: int = 5, told: tuple[str, str] | None = None
) -> list[tuple[str, str]]:
    """The data and `count` final prompts as the encoders see them; `parts` hold the tokenizers. `told`: what there is, and how much."""
    sizes = sorted({item.cut.size for item in data.items})
    shown = ", ".join(f"{w}x{h}" for h, w in sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else "")
    what, number = told or ("pictures", f"{len(data.train)} to train on, {len(data.val)} held out")
    lines = [(what, f"{number}; sizes {shown}")]
    lines.append(("captions", cut_off(family, parts, [text for texts in data.texts.values() for text in texts])))
    for number, prompt in enumerate(data.final_prompts(count)):
        seen, _ = min(family.seen_text(parts, prompt), key=lambda text_and_cut: text_and_cut[1])  # by the encoder that sees the most
        lines.append((f"prompt {number + 1}", seen or "(dropped)"))
    lines += [("skipped", f"{problem.path}: {problem.reason}") for problem in data.problems]
    lines += [("note", note) for note in data.notes]
    return lines


def cut_off(family: Family, parts: Components, texts: Sequence[str]) -> str:
    """How many texts each tokenizer in `parts` cuts off."""
    names = [name for name in family.components["text"] if name.startswith("tokenizer") and name in parts]
    cut = zip(names, zip(*([n for _, n in family.seen_text(parts, text)] for text in texts), strict=True), strict=True)
    told = [f"{sum(n > 0 for n in by)} of {len(by)} are cut off by {name}, up to {max(by)} tokens" for name, by in cut if any(by)]
    return "; ".join(told) or f"0 of {len(texts)} are cut off"


def trial(module: DenoiserModule, steps: int, grids: Sequence[tuple[int, int]] = ()) -> tuple[str, float]:
    """Time expected for `steps`, from one forward and backward pass that changes nothing, and its seconds.

    Latent `grids` pass first and do not count. They, and the first step's batch, come in one order wherever a run goes on from: a
    compiled block's graphs, and so its bits, depend on which sizes it saw first.
    """
    device = next(iter(module.trainable.values())).device
    batch = [micro.to(device) for micro in next(iter(module.make_loader(0)))]

    def once() -> float:
        with module.casting():
            for grid in grids:
                module.losses(resized(module.pieces(batch[0])[0], grid), ("trial",)).mean().backward()
            started = time.perf_counter()
            for piece in (piece for micro in batch for piece in module.pieces(micro)):
                with closing(module.parts(piece, ("trial",))) as parts:
                    for _, losses in parts:
                        losses.mean().backward()
            return time.perf_counter() - started

    seconds = module.fitting(batch, once)
    for parameter in module.trainable.values():
        parameter.grad = None
    return f"about {seconds * steps / 60:.1f} min for {steps} steps, by one trial step of {seconds:.2f} s (measuring comes on top)", seconds


def peak_memory_bytes() -> int:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the size of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def show(console: Console, title: str, lines: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, value.replace("[", "\\["))
    console.print(table)
