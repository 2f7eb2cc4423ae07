"""`charforgex compare <folder> <folder> ...`: evaluations and trainings side by side, as far as they can be compared.

Two numbers are compared where they rest on the same: the metric's settings and the pictures that it is measured against; of means, the
same prompts and seeds, too. Where they do not, the reason stands in their place. Differences are of the same prompts and seeds alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from charforgex.config import bind
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation import ab, reading
from charforgex.evaluation.packs import UNCALLED
from charforgex.runs import LOCATIONS, create_run_dir, write_json

JSON, PAGE = "compare.json", "compare.html"
Place = tuple[str, int | None]
# What every metric of an evaluation is measured against; its own settings come on top
AGAINST = ("references", "others", "training")
# Settings that say where something lies and change nothing of what is compared
PLACES = {*LOCATIONS, "out", "overwrite", "logger", "name", "dry_run"}
# A training's numbers by the names of an evaluation's metrics: key in scores.json, title, direction, meaning, and what they rest
# on besides the prompts. `FOLLOWING` says which of the two its prompt_following is.
HELD_OUT = ("data.source", "data.val_count")
TRAINING = {
    "identity": ("identity", "identity", "higher", "mean cosine to the held-out pictures", ("evaluation.embedder", *HELD_OUT)),
    "attributes": ("prompt_following", "attributes", "higher", "share of what is asked for that is shown", ("evaluation.follower",)),
    "prompt_following": ("prompt_following", "CLIP score", "higher", "how alike a CLIP finds picture and prompt", ("evaluation.follower",)),
    "pairwise": ("diversity", "diversity", "higher", "mean cosine distance between the pictures", ("evaluation.follower",)),
    "nearest": ("nearest", "nearest training picture", "lower", "mean cosine to it", ("evaluation.follower", *HELD_OUT)),
    "validation": (
        "validation", "validation loss", "lower", "mean loss of the held-out pictures",
        ("evaluation.times", "family.name", "family.source", *HELD_OUT),
    ),
}  # fmt: skip
FOLLOWING = {True: "attributes", False: "prompt_following"}  # by whether the follower is charworld's judge
ASKED = ("evaluation.prompts", "evaluation.seeds", "seed")  # of a training's pictures; validation asks for none


@dataclass(frozen=True)
class Settings:
    runs: str | list[str]
    out: Path | None = None

    def __post_init__(self):
        if isinstance(self.runs, str) or len(self.runs) < 2:
            raise ConfigError(f"runs={self.runs} names one folder; compare needs two or more: charforgex compare <folder> <folder>.")


@dataclass(frozen=True)
class Run:
    """A folder. `result` has the form of an evaluation's result.json, also for a training, whose contestants are its checkpoints."""

    name: str
    folder: Path
    kind: str  # "evaluation", "training"
    result: dict[str, Any]
    shots: list[dict[str, Any]]
    settings: dict[str, Any]  # by dotted name

    @property
    def contestant(self) -> str:
        return reading.chosen(self.result)

    def value(self, metric: str) -> dict[str, Any] | None:
        return self.result["metrics"].get(metric, {"values": {}})["values"].get(self.contestant)

    def rests_on(self, metric: str) -> dict[str, Any]:
        """What must be the same in two runs for the metric's numbers to mean the same."""
        if self.kind == "training":
            return {"measured": "while training"} | {name: self.settings.get(name) for name in TRAINING[metric][-1]}
        own = {name: value for name, value in self.settings.items() if name.startswith(f"metrics.{metric}.")}
        return {"measured": "by an evaluation", **own, **{name: self.settings.get(name) for name in AGAINST}}

    def asked(self, metric: str) -> set[Place] | dict[str, Any]:
        """Which pictures its mean is of."""
        if self.kind == "training":
            return {name: self.settings.get(name) for name in ASKED if metric != "validation"}
        return set(self.places(metric)) or {self.place(shot) for shot in self.own if shot["pack"] not in UNCALLED}

    def places(self, metric: str) -> dict[Place, float]:
        """The chosen contestant's score of each prompt and seed, of metrics that score single pictures."""
        scores = {self.place(shot): shot["scores"].get(metric) for shot in self.own}
        return {place: score for place, score in scores.items() if score is not None}

    @property
    def own(self) -> list[dict[str, Any]]:
        return [shot for shot in self.shots if shot["contestant"] == self.contestant]

    @staticmethod
    def place(shot: Mapping[str, Any]) -> Place:
        """What was asked, whatever the character is called; where chance chose words, what it chose."""
        template = shot["template"]
        return (shot["prompt"] if "|" in template or "__" in template else template), shot["seed"]


def compare(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The entry. Prints a table and returns what compare.json says. Raises CharForgeError."""
    from rich.console import Console

    from charforgex.evaluation.compare_page import show, write_page

    settings = bind(Settings, cfg, "")
    runs = read_runs([Path(run).expanduser() for run in settings.runs])
    out = settings.out or create_run_dir("compared", runs[0].name)
    found = compared(runs) | {"page": str(out / PAGE)}
    write_page(found, runs, out / PAGE)
    write_json(out / JSON, found)
    show(found, Console())
    return found


# ---- reading ----


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises DataError for a folder that is no finished evaluation or training, ConfigError for one that is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ConfigError(f"{folder} is named twice; a run compared with itself tells nothing.")
    names, depth = [folder.name for folder in resolved], 1
    while len(set(names)) < len(names):  # as much of the path as tells them apart
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in resolved]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    result = _json(folder / "result.json")
    settings = dict(reading.flat(_config(folder)))
    if {"metrics", "contestants", "comparison"} <= result.keys():
        return Run(name, folder, "evaluation", result, _shots(folder), dict(reading.flat(result["settings"])) | settings)
    if "best_step" in result and (folder / "scores.json").is_file():
        return Run(name, folder, "training", _as_evaluation(name, result, _json(folder / "scores.json"), settings), [], settings)
    raise DataError(f"{folder} is neither an evaluation nor the training of a LoRA: its result.json has no metrics of either.")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} has no {path.name}: it is no run, or one that is not finished.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} cannot be read: it holds no settings by name.")
    return found


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _shots(folder: Path) -> list[dict[str, Any]]:
    path = folder / "shots.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; evaluate again, which draws nothing anew.") from error


def _as_evaluation(name: str, result: Mapping[str, Any], scores: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A training's result.json and scores.json in the words of an evaluation's result."""
    rows, anchors = scores["checkpoints"], scores["anchors"]
    steps = {f"step {row['step']}": row for row in rows}
    best = f"step {result['best_step']}"
    metrics = {}
    other = FOLLOWING[settings.get("evaluation.follower") != "charworld"]
    for metric, (field, title, better, meaning, _) in TRAINING.items():
        if metric == other:
            continue
        card = {"title": title, "meaning": meaning, "range": "", "better": better, "source": "", "lies": ""}
        values = {step: _bare(row[field]) for step, row in steps.items()}
        ends = {end: anchors[end] if metric == "identity" else None for end in ("floor", "ceiling")}
        metrics[metric] = {"card": card, "values": values | {"base": _bare(anchors.get("base" if metric == "identity" else field))}} | ends
    contestants = [{"name": "base", "kind": reading.BASE, "loras": [], "scale": None, "step": None, "run": name, "pictures": 0}]
    contestants += [
        {"name": step, "kind": "checkpoint", "loras": [], "scale": None, "step": row["step"], "run": name, "pictures": 0}
        for step, row in steps.items()
    ]
    recommended = {"contestant": best, "why": "the best checkpoint by the training's own measure"}
    return {"contestants": contestants, "metrics": metrics, "recommended": recommended}


def _bare(number: float | None) -> dict[str, Any]:
    """A number of which no interval is known."""
    if number is None:
        return {"why": "not measured"}
    return {"estimate": number, "low": None, "high": None, "count": 0, "notes": [], "parts": {}}


# ---- comparing ----


def compared(runs: Sequence[Run]) -> dict[str, Any]:
    """What compare.json says, but for the page's place."""
    names = list(dict.fromkeys(name for run in runs for name in run.result["metrics"]))
    metrics, scores, better, apart = {}, {}, {}, []
    for name in names:
        having = [run for run in runs if run.value(name) is not None]
        card = having[0].result["metrics"][name]["card"]
        same = _groups(having, lambda run, metric=name: run.rests_on(metric))
        groups = [group for alike in same for group in _groups(alike, lambda run, metric=name: run.asked(metric))]
        metrics[name] = {"card": card, "groups": [_group(name, group) for group in groups]}
        apart += [{"metric": name, "runs": [one.name, other.name], "why": why} for one, other, why in _reasons(name, groups)]
        for number, alike in enumerate(same):
            if len(alike) > 1 and any(run.places(name) for run in alike):
                key = f"{name}#{number}" if number else name
                scores[key] = {run.name: run.places(name) for run in alike}
                better[key] = card["better"]
    comparison = ab.compare(scores, better)
    if comparison:
        comparison["rows"] = [row | {"metric": row["metric"].partition("#")[0]} for row in comparison["rows"]]
    told = [{"name": run.name, "folder": str(run.folder), "kind": run.kind, "contestant": run.contestant} for run in runs]
    return {"runs": told, "metrics": metrics, "comparison": comparison, "not_compared": apart, "settings": differing(runs)}


def _groups(runs: Sequence[Run], what: Callable[[Run], Any]) -> list[list[Run]]:
    """Runs that have the same of it."""
    found: list[tuple[Any, list[Run]]] = []
    for run in runs:
        own = what(run)
        group = next((group for other, group in found if other == own), None)
        if group is None:
            found.append((own, [run]))
        else:
            group.append(run)
    return [group for _, group in found]


def _group(metric: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Values that may be read against each other, and between which ends."""
    ends = {end: next((found for run in runs if (found := run.result["metrics"][metric][end]) is not None), None)
            for end in ("floor", "ceiling")}  # fmt: skip
    return {"runs": [run.name for run in runs], "values": {run.name: run.value(metric) for run in runs}, **ends}


def _reasons(metric: str, groups: Sequence[Sequence[Run]]) -> list[tuple[Run, Run, str]]:
    """Why the first run of each group and that of another have means that cannot be compared."""
    return [(one, other, _why(metric, one, other)) for (one, *_), (other, *_) in combinations(groups, 2)]


def _why(metric: str, one: Run, other: Run) -> str:
    if one.kind != other.kind:
        return "one is measured while training and the other by an evaluation, on other pictures"
    first, second = one.rests_on(metric), other.rests_on(metric)
    changed = [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]
    if changed:
        return "; ".join(f"other {name}: {first.get(name)} and {second.get(name)}" for name in changed)
    first, second = one.asked(metric), other.asked(metric)
    if isinstance(first, dict):
        return "; ".join(f"other {name}: {first.get(name)} and {second.get(name)}" for name in first if first[name] != second.get(name))
    common = len(first & second)
    told = f"other prompts or seeds: {common} of {len(first)} and {len(second)} pictures are of the same"
    return f"{told}; the paired difference is of those" if common and one.places(metric) else told


def differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings in which runs of one kind differ, but for where things lie."""
    found = []
    for kind in ("evaluation", "training"):
        alike = [run for run in runs if run.kind == kind]
        for name in dict.fromkeys(name for run in alike for name in run.settings):
            values = {run.name: run.settings.get(name) for run in alike}
            if (
                name.partition(".")[0] not in PLACES
                and len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) > 1
            ):
                found.append({"name": name, "values": values})
    return found
