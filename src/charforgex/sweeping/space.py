"""What a sweep tries: `hydra.sweeper.params` and the command line, in the grammar of Hydra's overrides, as Optuna's distributions.

lora.rank=4,16,64                            one of these: values without order
lora.rank=range(8,40,8)                      8, 16, 24, 32
optimizer.lr=interval(1e-4,1e-2)             any number between; int(interval(4,64)): any whole one
optimizer.lr=tag(log,interval(1e-4,1e-2))    small ones as often as large ones
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

WAY_OUT = "write a,b,c or range(...), interval(...), tag(log,interval(...)), int(...) of these"
# Settings of a run that a sweep decides itself
ITS_OWN = ("run_dir", "resume", "fresh", "trial")


@dataclass(frozen=True)
class Space:
    params: dict[str, BaseDistribution]
    texts: dict[str, str]  # as they were written, by name
    fixed: list[str]  # overrides that all trials share

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """A trial's values as Hydra reads them."""
        return [f"{name}={text(value)}" for name, value in values.items()]

    def ends(self) -> Iterable[str]:
        """Overrides that each set one value: every choice, or both ends of what is ordered."""
        for name, distribution in self.params.items():
            choices = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
            yield from (f"{name}={text(value)}" for value in choices)

    def recipe(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """`values` as a trial's, or None where one of them lies outside."""
        found = {name: _within(name, distribution, values[name]) for name, distribution in self.params.items()}
        return None if None in found.values() else found


def text(value: Any) -> str:
    """Six digits of a number; a choice is a text of Hydra's grammar already."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_space(params: Mapping[str, Any], arguments: Sequence[str], loader: ConfigLoader) -> Space:
    """From the sweep's file and the command line, which wins. Raises ConfigError for what is no space or one of a single point."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from charforgex.overrides import written

    parser = OverridesParser.create(config_loader=loader)
    lines = [f"{name}={value if isinstance(value, str) else written(value)}" for name, value in params.items()]
    overrides = {}
    for line in [*lines, *arguments]:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            raise ConfigError(f"{line} cannot be read; {WAY_OUT}.") from error
        overrides[override.get_key_element()] = override
    found, texts, fixed = {}, {}, []
    for name, override in overrides.items():
        if override.key_or_group in ITS_OWN:
            raise ConfigError(
                f"{override.input_line} has no place in a sweep: each trial has a folder of its own in the sweep's; leave it out."
            )
        if not override.is_sweep_override():
            fixed.append(override.input_line)
            continue
        found[name], texts[name] = _distribution(override), override.input_line.partition("=")[2]
    if not found:
        raise ConfigError("the sweep has nothing to try; name values in hydra.sweeper.params or as optimizer.lr=interval(1e-4,1e-2).")
    return Space(found, texts, fixed)


def _distribution(override: Override) -> BaseDistribution:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    line, sweep = override.input_line, override.value()
    if tags := sorted(sweep.tags - {"log"}):
        raise ConfigError(f"{line}: the tag {', '.join(tags)} means nothing here; {WAY_OUT}.")
    if getattr(sweep, "shuffle", False):
        raise ConfigError(f"{line}: a search has no use for an order; leave shuffle out.")
    log = "log" in sweep.tags
    if isinstance(sweep, IntervalSweep):
        kind = IntDistribution if isinstance(sweep.start, int) and isinstance(sweep.end, int) else FloatDistribution
        if not sweep.start < sweep.end:
            raise ConfigError(f"{line}: the interval's end is not above its start.")
        if log and sweep.start <= 0:
            raise ConfigError(f"{line}: log counts in ratios, and {sweep.start:g} has none; begin above 0.")
        return kind(sweep.start, sweep.end, log=log)
    if log:
        raise ConfigError(f"{line}: log is of intervals; {WAY_OUT}.")
    values = list(override.sweep_string_iterator())
    if len(values) < 2 or len(set(values)) < len(values):
        raise ConfigError(f"{line}: a search needs two values or more, each once.")
    if isinstance(sweep, RangeSweep):
        numbers = sorted(map(float, values))
        step = abs(float(sweep.step))
        if all(number.is_integer() for number in (*numbers, step)):
            return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(step))
        return FloatDistribution(numbers[0], numbers[-1], step=step)
    return CategoricalDistribution(values)


def _within(name: str, distribution: BaseDistribution, value: Any) -> Any:
    """`value` as the distribution holds it, None if it does not."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if hasattr(distribution, "choices"):
        parse = OverridesParser.create().parse_override
        return next((choice for choice in distribution.choices if parse(f"{name}={choice}").value() == value), None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not distribution.low <= value <= distribution.high:
        return None
    if distribution.step and round((value - distribution.low) / distribution.step, 6) % 1:
        return None
    whole = type(distribution).__name__ == "IntDistribution"
    return None if whole and value != int(value) else int(value) if whole else float(value)
