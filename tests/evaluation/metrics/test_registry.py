"""Every metric has a class, a yaml of the same settings, a card and a row of docs/metrics.md."""

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from charforgex.errors import ConfigError
from charforgex.evaluation.calibration import Sets
from charforgex.evaluation.metrics.registry import METRICS, load, table
from tests.evaluation.scenes import case

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "conf/metric"


def test_metrics_and_yamls_are_the_same_names():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_yaml_says_what_the_class_does_anyway(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    first, second = text.splitlines()[:2]
    assert first == f"# @package metrics.{name}" and second.startswith(f"# python evaluate.py metric=[{name}] ")
    told = yaml.safe_load(text) or {}
    (metric,) = load({name: told}).values()
    assert metric == load({name: {}})[name]
    assert set(told) == {field.name for field in dataclasses.fields(metric)}


@pytest.mark.parametrize("name", METRICS)
def test_its_card_is_filled(name):
    module, _, cls = METRICS[name].partition(":")
    metric = getattr(import_module(module), cls)
    assert metric.name == name and metric.card.better in ("higher", "lower", "neither")
    assert all(dataclasses.astuple(metric.card))
    ends = {metric.floor, metric.ceiling} - {None}
    assert ends <= set(Sets(case()).names)
    assert not dataclasses.is_dataclass(metric) or metric.__dataclass_params__.frozen


def test_the_page_has_the_table():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- metrics -->\n")
    shown, end, _ = rest.partition("<!-- /metrics -->")
    assert end and shown == table(), "write what charforgex.evaluation.metrics.registry.table() gives between the markers"
    assert all(f"| `{name}` |" in shown for name in METRICS)


def test_a_metric_that_is_not_there():
    with pytest.raises(ConfigError, match=r"metrics\.identiy.*identity"):
        load({"identiy": {}})
