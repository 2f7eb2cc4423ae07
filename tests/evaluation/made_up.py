"""Folders of evaluations that nobody drew: pictures of one colour, scores with known means, all else as an evaluation writes it."""

import itertools
import json
import random
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from charforgex.evaluation import ab
from charforgex.evaluation.intervals import bootstrap_mean
from charforgex.runs import write_json

CARD = {"range": "[0, 1]", "better": "higher", "source": "nobody", "lies": "always", "meaning": "made up"}
METRICS = {  # name -> (title, better, floor, ceiling)
    "identity": ("identity", "higher", 0.2, 0.9),
    "attributes": ("attributes", "higher", 0.3, 1.0),
    "pairwise": ("diversity", "higher", None, 9.0),
    "memorisation": ("learnt by heart", "lower", 1.0, 0.2),
}
PROMPTS = {"contexts": ["zatoki girl, smiling, at the beach", "zatoki girl, in a forest"], "stress": ["zatoki girl, upside down"]}


def contestant(name, kind="checkpoint", scale=1.0, step=None, run=None):
    loras = [] if kind == "base" else [{"path": f"{name}.safetensors", "sha256": "ab" * 32, "scale": scale}]
    return {"name": name, "kind": kind, "loras": loras, "scale": scale, "step": step, "run": run, "pictures": 0}


def drawn(name, prompt, seed):
    shade = random.Random(f"{name} {prompt} {seed}").randrange(256)
    return Image.new("RGB", (64, 64), (shade, 90, 140))


def scored(means, name, metric, prompt, seed):
    """Around the contestant's mean: contestants find the same prompts hard, and each has its luck with seeds."""
    hard, luck = random.Random(f"{prompt} {metric}").uniform(-0.05, 0.05), random.Random(f"{name} {prompt} {seed}").uniform(-0.04, 0.04)
    return means[metric] + hard + luck


def evaluation(
    folder: Path, means: dict, contestants=None, prompts=PROMPTS, seeds=(0, 1), metrics=METRICS, draw=drawn, settings=None,
    recommended=None, pareto=(),
) -> tuple[dict, list]:  # fmt: skip
    """Writes result.json, shots.jsonl, config.yaml and the pictures; returns the first two. `means` is {contestant: {metric: mean}}."""
    contestants = contestants or [contestant(name, "base" if name == "base" else "lora") for name in means]
    shots = []
    for one, (pack, texts) in itertools.product(contestants, prompts.items()):
        for prompt, seed in itertools.product(texts, seeds):
            file = Path("pictures") / f"{number(one['name'])}-{number(prompt)}-{seed}.png"
            (folder / file.parent).mkdir(parents=True, exist_ok=True)
            draw(one["name"], prompt, seed).save(folder / file)
            scores = {
                metric: scored(means[one["name"]], one["name"], metric, prompt, seed) for metric in metrics if metric in means[one["name"]]
            }
            shots.append({
                "contestant": one["name"], "file": str(file), "prompt": prompt, "template": prompt, "pack": pack, "seed": seed,
                "scores": scores,
            })  # fmt: skip
    told = {}
    for metric, (title, better, floor, ceiling) in metrics.items():
        values = {}
        for one in contestants:
            rows = [
                (shot["prompt"], shot["scores"][metric]) for shot in shots if shot["contestant"] == one["name"] and metric in shot["scores"]
            ]
            if not rows:
                values[one["name"]] = {"why": "there are no references"}
                continue
            _, groups = np.unique([prompt for prompt, _ in rows], return_inverse=True)
            estimate, low, high = bootstrap_mean(np.array([score for _, score in rows]), groups)
            values[one["name"]] = {"estimate": estimate, "low": low, "high": high, "count": len(rows), "notes": [], "parts": {}}
        told[metric] = {
            "card": CARD | {"title": title, "better": better},
            "values": values,
            "floor": floor,
            "ceiling": ceiling,
            "unknown": {},
        }
    scores = {
        metric: {
            one["name"]: {(shot["prompt"], shot["seed"]): shot["scores"][metric] for shot in shots if shot["contestant"] == one["name"]}
            for one in contestants
            if metric in means[one["name"]]
        }
        for metric in metrics
    }
    for one in contestants:
        one["pictures"] = sum(shot["contestant"] == one["name"] for shot in shots)
    result = {
        "contestants": contestants, "metrics": told,
        "notes": [], "comparison": ab.compare(scores, {metric: better for metric, (_, better, _, _) in metrics.items()}),
        "recommended": recommended and {"contestant": recommended, "why": "has the most of what counts"},
        "pareto": list(pareto), "prompts": [prompt for texts in prompts.values() for prompt in texts], "seeds": list(seeds),
        "settings": settings or {"embedder": "charworld", "metrics": {metric: {} for metric in metrics}},
        "command": ["charforgex evaluate", "lora=[a b.safetensors]"],
        "versions": {"charforgex": "0.5.0", "torch": "2.13"}, "seconds": {"draw": 1.0, "measure": 2.0}, "page": str(folder / "report.html"),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    (folder / "shots.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in shots))
    write_json(folder / "config.yaml", result["settings"])  # JSON is YAML
    return json.loads((folder / "result.json").read_text()), shots


def number(words: str) -> int:
    """A file's name for any words."""
    return zlib.crc32(words.encode())
