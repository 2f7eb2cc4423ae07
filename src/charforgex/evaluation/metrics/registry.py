"""Which metrics there are, and how a config's `metrics` become them. A new one is a file here, its row below, conf/metric/<name>.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from charforgex.binding import bind, not_among, plain
from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from charforgex.evaluation.metric import Metric

METRICS: dict[str, str] = {  # name -> "module:Class"
    "identity": "charforgex.evaluation.metrics.identity:Identity",
    "verification": "charforgex.evaluation.metrics.verification:Verification",
    "retrieval": "charforgex.evaluation.metrics.retrieval:Retrieval",
    "confusion": "charforgex.evaluation.metrics.confusion:Confusion",
    "prompt_following": "charforgex.evaluation.metrics.prompt_following:PromptFollowing",
    "attributes": "charforgex.evaluation.metrics.attributes:Attributes",
    "leakage": "charforgex.evaluation.metrics.leakage:Leakage",
    "style_damage": "charforgex.evaluation.metrics.style_damage:StyleDamage",
    "tone": "charforgex.evaluation.metrics.tone:Tone",
    "sharpness": "charforgex.evaluation.metrics.sharpness:Sharpness",
    "artefacts": "charforgex.evaluation.metrics.artefacts:Artefacts",
    "fid": "charforgex.evaluation.metrics.fid:Fid",
    "kid": "charforgex.evaluation.metrics.kid:Kid",
    "manifold": "charforgex.evaluation.metrics.manifold:ManifoldMetric",
    "vendi": "charforgex.evaluation.metrics.vendi:Vendi",
    "pairwise": "charforgex.evaluation.metrics.pairwise:Pairwise",
    "levels": "charforgex.evaluation.metrics.levels:Levels",
    "memorisation": "charforgex.evaluation.metrics.memorisation:Memorisation",
}


def load(metrics: Any) -> dict[str, Metric]:
    """Name -> metric, bound from `metrics.<name>` of a config, in its order. No model is loaded. Raises ConfigError."""
    values = plain(metrics, "metrics")
    return {name: _bound(name, node) for name, node in values.items()}


def table() -> str:
    """All metrics as docs/metrics.md lists them: a row of a Markdown table for each."""
    head = ("metric", "meaning", "range", "better", "worst to best", "source", "when it lies")
    rows = [head, ("---",) * len(head)]
    for name, place in METRICS.items():
        metric = _class(place)
        card, ends = metric.card, (metric.floor or "-", metric.ceiling or "-")
        rows.append((f"`{name}`", card.meaning, card.range, card.better, " to ".join(ends), card.source, card.lies))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _class(place: str) -> type[Metric]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _bound(name: str, node: Mapping[str, Any] | None) -> Metric:
    if name not in METRICS:
        raise ConfigError(not_among(f"metrics.{name}", name, list(METRICS)))
    return bind(_class(METRICS[name]), node, f"metrics.{name}")
