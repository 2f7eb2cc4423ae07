"""What an evaluation found, as result.json and shots.jsonl say it; which contestant is the best; and what a sweep gets of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charforgex.binding import not_among
from charforgex.errors import ConfigError
from charforgex.evaluation import ab, choosing, reading
from charforgex.evaluation.metric import Metric, Value
from charforgex.runs import plain, write_atomic, write_result

if TYPE_CHECKING:
    from charforgex.evaluation.contestants import Contestant

RESULT, SHOTS, PAGE = "result.json", "shots.jsonl", "report.html"
Measured = Mapping[str, Mapping[str, Value | str]]  # metric -> contestant -> its value, or why there is none
ALIASES = {"prompt_following": reading.FOLLOWING, "diversity": reading.VARIETY}  # words of `objective` -> metrics, the first that is there
NUMBERS = ("value", "seconds", *ALIASES)  # besides the metrics' names


def metrics_of(metrics: Mapping[str, Metric], measured: Measured, ends: Mapping[str, Mapping[str, Value | str | None]]) -> dict[str, Any]:
    """`metrics` of result.json. `ends` are `calibration.calibrate`'s."""
    return {
        name: {
            "card": {key: getattr(metric.card, key) for key in metric.card.__dataclass_fields__},
            "values": {contestant: _value(value) for contestant, value in measured[name].items()},
            **{end: value.estimate if isinstance(value, Value) else None for end, value in ends[name].items()},
            "unknown": {end: value for end, value in ends[name].items() if isinstance(value, str)},
        }
        for name, metric in metrics.items()
    }


def _value(value: Value | str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"why": value}
    numbers = {name: getattr(value, name) for name in ("estimate", "low", "high", "count")}
    return numbers | {"notes": list(value.notes), "parts": value.parts}


def comparison(measured: Measured, metrics: Mapping[str, Metric], places: Mapping[str, Sequence[ab.Place | None]]) -> dict[str, Any] | None:
    """Contestants against each other on the same template and seed. `places` has each contestant's, None for pictures of unknown ones."""
    scores: dict[str, dict[str, dict[ab.Place, float]]] = {}
    for name, values in measured.items():
        for contestant, value in values.items():
            if isinstance(value, Value) and value.rows is not None:
                rows = zip(places[contestant], value.rows, strict=True)
                scores.setdefault(name, {})[contestant] = {place: float(row) for place, row in rows if place is not None}
    return ab.compare(scores, {name: metrics[name].card.better for name in scores})


# ---- the best ----


def chosen(contestants: Sequence[Contestant], metrics: Mapping[str, Any]) -> tuple[list[str], dict[str, Any] | None]:
    """The front of identity and diversity, and the recommended checkpoint and strength with the rule by which it was found.

    `metrics` as in result.json. The front is of those that were drawn for the same prompts; a finished folder is in nobody's race.
    """
    drawn = [one.name for one in contestants if one.kind != "folder"]
    known = {word: reading.first_of(names, metrics) for word, names in (("identity", reading.IDENTITY), *ALIASES.items())}
    if known["identity"] is None:
        return [], None
    numbers = {word: _estimates(metrics, name) for word, name in known.items()}
    both = [name for name in drawn if name in numbers["identity"] and name in numbers["diversity"]]
    front = [both[i] for i in choosing.pareto([(numbers["identity"][name], numbers["diversity"][name]) for name in both])]
    base = next((one.name for one in contestants if one.kind == "base"), None)
    racing = [one.name for one in contestants if one.kind in ("lora", "checkpoint") and one.name in numbers["identity"]]
    if not racing:
        return front, None
    ceiling = metrics[known["identity"]]["ceiling"]
    whole = [name for name in racing if all(name in numbers[word] for word in numbers)]
    lacking = [word for word, name in known.items() if name is None]
    lacking += ["the base model"] * (base is None) + ["real pictures"] * (ceiling is None)
    if not whole or lacking or not all(base in numbers[word] for word in numbers):
        best = max(racing, key=lambda name: numbers["identity"][name])
        why = f"has the highest identity; to weigh more, {' and '.join(lacking) or 'all of the base model'} must be measured, too"
        return front, {"contestant": best, "value": None, "why": why.replace("_", "-")}

    def worth(name: str) -> float:
        gained = choosing.gain(numbers["identity"][name], numbers["identity"][base], ceiling)
        following, diversity = numbers["prompt_following"], numbers["diversity"]
        return choosing.worth(gained, following[name], diversity[name], following[base], diversity[base])

    best = max(whole, key=worth)
    why = (
        f"has the most of what counts, {worth(best):.2f}: the share of the way from the base's identity to real pictures', less what "
        f"{known['prompt_following']} falls below {choosing.FAITHFUL:.0%} of the base's, and scaled down where {known['diversity']} is "
        f"below {choosing.VARIED:.0%} of the base's"
    )
    return front, {"contestant": best, "value": worth(best), "why": why}


def _estimates(metrics: Mapping[str, Any], name: str | None) -> dict[str, float]:
    """Contestant -> number, of those that have a finite one."""
    if name is None:
        return {}
    found = {contestant: value["estimate"] for contestant, value in reading.measured(metrics[name]).items()}
    return {contestant: number for contestant, number in found.items() if math.isfinite(number)}


# ---- what a sweep gets ----


def check_objective(names: Sequence[str], metrics: Sequence[str]) -> None:
    """Raises ConfigError for a word that is no number of an evaluation with these metrics."""
    for name in names:
        if name not in (*metrics, *NUMBERS):
            raise ConfigError(not_among(f"objective={name}", name, list(dict.fromkeys([*NUMBERS, *metrics]))))


def objective(result: Mapping[str, Any], names: Sequence[str]) -> float | tuple[float, ...]:
    """Of the recommended contestant, else of the first with a LoRA: one number, or one for each name.

    `value` is what the best has most of, `seconds` are a picture's, `diversity` and `prompt_following` the first metric of that kind;
    others are estimates of metrics. Raises ConfigError for a number that was not measured.
    """
    found = tuple(_number(result, name) for name in names)
    return found[0] if len(found) == 1 else found


def _number(result: Mapping[str, Any], name: str) -> float:
    who = reading.chosen(result)
    if name == "value":
        number = (result["recommended"] or {}).get("value")
    elif name == "seconds":
        number = result["seconds"]["picture"]
    else:
        metric = name if name in result["metrics"] else reading.first_of(ALIASES.get(name, ()), result["metrics"])
        number = result["metrics"][metric]["values"].get(who, {}).get("estimate") if metric is not None else None
    if number is None or not math.isfinite(number):
        raise ConfigError(f"objective={name} was not measured of {who}; choose another, or add what it needs to metric=[...].")
    return float(number)


# ---- files ----


def write(out: Path, result: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> None:
    """shots.jsonl, then result.json: who finds the latter finds all."""
    write_atomic(out / SHOTS, "".join(json.dumps(plain(shot), ensure_ascii=False) + "\n" for shot in shots))
    write_result(out, result)


def spread(value: Value | str, places: Sequence[int], count: int) -> Value | str:
    """The value of some shots of a gallery as one of all `count` of them: the others were not asked."""
    if isinstance(value, str) or value.rows is None:
        return value
    from dataclasses import replace

    rows = np.full(count, np.nan)
    rows[list(places)] = value.rows
    nearest = None
    if value.nearest is not None:
        known = dict(zip(places, value.nearest, strict=True))
        nearest = tuple(known.get(i) for i in range(count))
    return replace(value, rows=rows, nearest=nearest)
