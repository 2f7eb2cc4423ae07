"""Numbers of result.json as people read them: no more digits than the interval supports, and where between floor and ceiling they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ROUNDING = 1e-9  # widths below this share of the numbers are of arithmetic
BASE = "base"  # the kind of contestant that has no LoRA
# What people ask -> the metrics that answer it, the first that was measured counts
IDENTITY = ("identity",)
FOLLOWING = ("attributes", "prompt_following")
LEAKAGE = ("leakage",)
VARIETY = ("pairwise", "vendi")
MEMORY = ("memorisation",)


def decimals(low: float | None, high: float | None) -> int | None:
    """Places behind the point that an interval supports (before it, if negative): the first digit of its half width, two if that is a 1.

    None for no interval, or one without a width.
    """
    if low is None or high is None or not math.isfinite(high - low) or high - low <= ROUNDING * max(abs(low), abs(high)):
        return None
    half = (high - low) / 2
    places = -math.floor(math.log10(half))
    return places + (half * 10**places < 2)


def rounded(value: float | None, places: int | None) -> str:
    """With so many places; None is three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    if places is None:
        found = f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    else:
        found = f"{round(value, places) or 0.0:,.{max(0, places)}f}"
    return found.replace("-", "−")


def heading(card: Mapping[str, Any]) -> str:
    return card["title"][:1].upper() + card["title"][1:]


def said(value: Mapping[str, Any]) -> str:
    """The estimate of a result's value, or why there is none."""
    return value["why"] if "why" in value else rounded(value["estimate"], decimals(value["low"], value["high"]))


def between(value: Mapping[str, Any]) -> str:
    """Its 95 % interval; nothing where there is none."""
    places = decimals(value.get("low"), value.get("high"))
    return "" if places is None else f"{rounded(value['low'], places)} to {rounded(value['high'], places)}"


def with_interval(value: Mapping[str, Any]) -> str:
    return f"{said(value)} ({between(value)})" if between(value) else said(value)


def share(number: float | None, floor: float | None, ceiling: float | None) -> float | None:
    """Of the way from floor to ceiling, whichever of them is larger: 0 at the floor, 1 at the ceiling. None where one is lacking."""
    if None in (number, floor, ceiling) or floor == ceiling:
        return None
    return (number - floor) / (ceiling - floor)


def reached(number: float | None, metric: Mapping[str, Any]) -> float | None:
    """`share` of the way from the metric's floor to its ceiling."""
    return share(number, metric["floor"], metric["ceiling"])


def measured(metric: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Contestant -> value, of those that have one."""
    return {name: value for name, value in metric["values"].items() if "why" not in value and value["estimate"] is not None}


def first_of(names: Sequence[str], metrics: Mapping[str, Any]) -> str | None:
    """The first of these metrics that any contestant has a value of."""
    return next((name for name in names if name in metrics and measured(metrics[name])), None)


def chosen(result: Mapping[str, Any]) -> str:
    """Whose numbers are told first: the recommended contestant, else the first that is not the base model."""
    if result["recommended"]:
        return result["recommended"]["contestant"]
    return min(result["contestants"], key=lambda one: one["kind"] == BASE)["name"]


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings by their dotted names."""
    found = []
    for name, value in node.items():
        found += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
    return found
