"""Which metrics there are, and how a config's `metrics` become them. A new one is a file here, its row below, and conf/metric/<name>.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from charforgex.binding import bind, not_among, plain
from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from charforgex.evaluation.metric import Metric

METRICS: dict[str, str] = {}  # name -> "module:Class"


def load(metrics: Any) -> dict[str, Metric]:
    """Name -> metric, bound from `metrics.<name>` of a config, in its order. No model is loaded. Raises ConfigError."""
    values = plain(metrics, "metrics")
    return {name: _bound(name, node) for name, node in values.items()}


def _bound(name: str, node: Mapping[str, Any] | None) -> Metric:
    if name not in METRICS:
        raise ConfigError(not_among(f"metrics.{name}", name, list(METRICS)))
    module, _, cls = METRICS[name].partition(":")
    return bind(getattr(import_module(module), cls), node, f"metrics.{name}")
