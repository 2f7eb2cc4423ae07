"""What evaluation costs, and what it finds: python benchmarks/evaluation.py [--quick] [--part fid copies whole]

One thread, CPU seconds, both sides in turn on the same numbers, several rounds, medians. The last line is one JSON object: ratios are ours
divided by theirs, smaller is better.

fid_vs_torchmetrics.N  FID of N and N vectors of 2,048 numbers  against  compute() of torchmetrics' FrechetInceptionDistance, which has
                       summed means and covariances up before the clock starts; ours begins with the vectors

end_to_end_vs_drawing  charforgex evaluate of the base and a LoRA by its usual metrics, from loading to the page, with nothing in the cache,
                       against  loading the same base and drawing the same pictures

"fid" has both values: with fewer vectors than numbers, covariances have directions without variance, whose eigenvalues are rounding, and
the roots of these add up in torchmetrics' sum. "copies": 100 training pictures, each recompressed, mirrored, cropped, brightened or all of
it, among 10,000 pictures of the same drawn character (--quick: 20 among 500); how many are found, and how many others are taken for copies,
at each rate of false alarms, by a limit that 300 training pictures and 300 held-out ones (--quick: 60) have taught.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded

import argparse
import io
import itertools
import json
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from charforgex.charworld import demo, drawing, world
from charforgex.curation.fingerprints import thumbnail
from charforgex.embedders import get_clip
from charforgex.evaluation.distribution import fid
from charforgex.evaluation.memory import Originals, copy_limit
from charforgex.runs import versions

GOALS = {"fid_vs_torchmetrics": 0.01, "end_to_end_vs_drawing": 1.2}
WIDTH = 2048
REPEATS = 5  # of what takes hundredths of a second, a round
SIDE, CHARACTER = 128, 3  # of drawn pictures
RATES = (0.01, 0.002)
T = TypeVar("T")
CHANGES = ("recompressed", "mirrored", "cropped", "brightened", "all")


def seconds(call: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, and what it returned."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


# ---- FID ----


def measure_fid(sizes: tuple[int, ...], rounds: int) -> tuple[dict, dict]:
    """Ratios and values, for each number of vectors."""
    ratios, values = {}, {}
    for count in sizes:
        pictures, references = made_vectors(count, 0), made_vectors(count, 1)
        theirs = their_metric(pictures, references)
        ours_s, theirs_s = [], []
        for _ in range(rounds):
            for _ in range(REPEATS):
                spent, ours = seconds(lambda pictures=pictures, references=references: fid(pictures, references))
                ours_s.append(spent)
            theirs._computed = None  # or it remembers
            spent, other = seconds(lambda theirs=theirs: theirs.compute().item())
            theirs_s.append(spent)
        ratios[f"fid_vs_torchmetrics.{count}"] = statistics.median(ours_s) / statistics.median(theirs_s)
        values[count] = {
            "cpu_seconds": {"ours": statistics.median(ours_s), "torchmetrics": statistics.median(theirs_s)},
            "spread": {"ours": [min(ours_s), max(ours_s)], "torchmetrics": [min(theirs_s), max(theirs_s)]},
            "value": {"ours": ours, "torchmetrics": other},
        }
    return ratios, values


def made_vectors(count: int, key: int) -> np.ndarray:
    """float32 (count, WIDTH): correlated, with a spectrum that falls as embedders' do, and not negative, as Inception's are."""
    rng = np.random.default_rng([count, key])
    spectrum = 1 / np.sqrt(np.arange(1, WIDTH + 1))
    mixed = rng.normal(size=(count, WIDTH)) * spectrum
    turn = np.random.default_rng(0).permutation(WIDTH)
    return np.maximum(0.4 + 0.1 * key + mixed[:, turn] + 0.5 * mixed, 0).astype(np.float32)


def their_metric(pictures: np.ndarray, references: np.ndarray):
    """torchmetrics' FID with a module that hands vectors through, already updated; its sums are float64 inside, as it makes them itself."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = WIDTH

        def forward(self, vectors):
            return vectors.flatten(1)

    metric = FrechetInceptionDistance(Given(), input_img_size=(1, 1, WIDTH))
    for vectors, real in ((pictures, False), (references, True)):
        metric.update(torch.from_numpy(vectors).reshape(-1, 1, 1, WIDTH), real=real)
    return metric


# ---- copies ----


def picture(index: int) -> Image.Image:
    context = world.draw_context(random.Random(f"copies {index}"))
    return Image.fromarray(drawing.render(demo.held_out_character(CHARACTER), context, SIDE))


def changed(original: Image.Image, change: str, rng: random.Random) -> Image.Image:
    """A copy as people and models make them."""
    if change in ("mirrored", "all"):
        original = ImageOps.mirror(original)
    if change in ("cropped", "all"):
        left, top, right, bottom = (int(SIDE * rng.uniform(0, 0.05)) for _ in range(4))
        original = original.crop((left, top, SIDE - right, SIDE - bottom)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    if change in ("brightened", "all"):
        original = ImageEnhance.Brightness(original).enhance(rng.choice((0.8, 1.2)))
    if change in ("recompressed", "all"):
        file = io.BytesIO()
        original.save(file, "JPEG", quality=rng.randint(40, 80))
        original = Image.open(file).convert("RGB")
    return original


def looked_at(pictures: Iterable[Image.Image]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Thumbnail and the embedded CLIP's vector of each, a few at a time."""
    pictures, clip = iter(pictures), get_clip("charworld")
    while batch := list(itertools.islice(pictures, 32)):
        yield from zip([thumbnail(one) for one in batch], clip.see(batch).numpy(), strict=True)


def find_copies(copies: int, among: int, real: int) -> dict:
    """Recall and false alarms of planted copies. `real` pictures were trained on, and as many were held out."""
    training = list(looked_at(picture(i) for i in range(real)))
    originals = Originals([small for small, _ in training], np.stack([vector for _, vector in training]))
    held_out = [originals.find(*seen).difference for seen in looked_at(picture(real + i) for i in range(real))]
    known = np.concatenate([originals.differences(), held_out])

    every = among // copies
    kinds = [CHANGES[i // every % len(CHANGES)] if i % every == 0 else "" for i in range(among)]
    found, spent = [], 0.0
    for start in range(0, among, 256):  # drawing them is not what is measured
        drawn = [
            changed(picture(i // every % real), kinds[i], random.Random(f"change {i}")) if kinds[i] else picture(2 * real + i)
            for i in range(start, min(start + 256, among))
        ]
        took, some = seconds(lambda drawn=drawn: [originals.find(*seen) for seen in looked_at(drawn)])
        found, spent = found + some, spent + took
    differences, planted = np.array([match.difference for match in found]), np.array([kind != "" for kind in kinds])
    right = np.array([bool(kind) and match.index == i // every % real for i, (kind, match) in enumerate(zip(kinds, found, strict=True))])
    told = {}
    for rate in RATES:
        limit = copy_limit(known, rate)
        called = differences < limit.difference
        told[str(rate)] = limit._asdict() | {
            "found": int((called & right).sum()), "false": int((called & ~planted).sum()),
            "found_by_change": {change: int((called & right & (np.array(kinds) == change)).sum()) for change in CHANGES},
        }  # fmt: skip
    return {
        "planted": int(planted.sum()), "among": among, "real": 2 * real, "rates": told, "ms_per_picture": 1e3 * spent / among,
        "difference": {
            "copies": np.quantile(differences[planted], [0.5, 0.95, 1]).tolist(),
            "others": np.quantile(differences[~planted], [0, 0.001, 0.01, 0.5]).tolist(),
        },
    }  # fmt: skip


def random_lora(path: Path) -> Path:
    """Rank 4 on the keys and values of the embedded SDXL base."""
    from charforgex.families import bases
    from charforgex.lora.state import LoraLayer
    from charforgex.lora.writing import write_layers

    base, draw = bases.get("charworld_sdxl"), torch.Generator().manual_seed(0)
    layers = {}
    for name, (rows, columns, *_) in base.shapes.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layers[name] = LoraLayer(torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw) / 100, 4.0)
    metadata = {"charforgex.family": "sdxl", "charforgex.base": "charworld", "charforgex.trigger": "zatoki woman"}
    write_layers(layers.get, list(layers), path, "diffusers", base.names, torch.float32, metadata)
    return path


def drawn_alone(result: dict, shots: list[dict], lora: Path) -> None:
    """The same pictures by the same settings: base, then LoRA."""
    from charforgex.families import registry
    from charforgex.generation.sampling import sample
    from charforgex.lora import formats, inject

    used, family = result["settings"], registry.get("sdxl")
    parts = family.load("charworld")
    for name in dict.fromkeys(shot["contestant"] for shot in shots):
        mine = [shot for shot in shots if shot["contestant"] == name]
        if name != "base":
            inject.load_adapter(parts, formats.read(lora, family, parts.denoiser.config), "lora")
        sample(
            family, parts, [shot["prompt"] for shot in mine], [shot["seed"] for shot in mine], size=(used["height"], used["width"]),
            steps=used["steps"], guidance=used["guidance"], batch_size=used["batch_size"], scheduler=used["scheduler"],
        )  # fmt: skip


def end_to_end(rounds: int, **fewer) -> tuple[dict[str, float], dict[str, float]]:
    """Ratio, and seconds a picture of both sides."""
    import charforgex
    from charforgex.quiet import quiet

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        lora = random_lora(folder / "made.safetensors")
        asked = {"lora": str(lora), "references": "charworld:0"}
        for number in range(rounds + 1):  # the first warms up: imports, and models that stay in memory
            less = fewer if number else {"pack": ["leakage"], "count": 1}
            out = {"out": str(folder / f"out{number}"), "cache_dir": str(folder / f"cache{number}")}
            spent, result = seconds(lambda less=less, out=out: charforgex.evaluate(**asked, **less, **out))
            shots = [json.loads(line) for line in (folder / f"out{number}/shots.jsonl").read_text().splitlines()]
            alone, _ = seconds(lambda result=result, shots=shots: drawn_alone(result, shots, lora))
            if number:
                ours.append(spent / len(shots))
                theirs.append(alone / len(shots))
    told = {"pictures": len(shots), "evaluate": statistics.median(ours), "drawing": statistics.median(theirs)}
    return {"end_to_end_vs_drawing": told["evaluate"] / told["drawing"]}, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round and few pictures; its numbers say little")
    parser.add_argument("--part", nargs="+", choices=("fid", "copies", "whole"), default=("fid", "copies", "whole"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    ratios, values = {}, {}
    if "fid" in options.part:
        ratios, values["fid"] = measure_fid((500,) if options.quick else (500, 50), 1 if options.quick else 3)
    if "copies" in options.part:
        values["copies"] = find_copies(20, 500, 60) if options.quick else find_copies(100, 10_000, 300)
    if "whole" in options.part:
        torch.set_num_threads(1)
        whole, values["whole"] = end_to_end(1, pack=["character"], count=1) if options.quick else end_to_end(3)
        ratios |= whole
    for name, ratio in ratios.items():
        print(f"{name:<26} {ratio:10.5f}   goal {GOALS[name.partition('.')[0]]:g}")
    for rate, told in values.get("copies", {"rates": {}})["rates"].items():
        print(
            f"copies at {float(rate):.1%}: {told['found']} of {values['copies']['planted']} found, {told['false']} others taken for copies"
        )
    assert all(math.isfinite(ratio) for ratio in ratios.values())
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    used = versions() | {"torchmetrics": version("torchmetrics")}
    print(json.dumps({"benchmark": "evaluation", "ratios": ratios, "values": values, "machine": machine, "versions": used}))


if __name__ == "__main__":
    main()
