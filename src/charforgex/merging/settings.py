"""The schema of merge.yaml and of method/*.yaml. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.binding import Range, bind, not_among, plain, show
from charforgex.errors import ConfigError

FOLDER = Path("merged")  # of files that nobody named
Share = Annotated[float, Range(above=0, at_most=1)]
Sign = Literal["total", "frequency"]


# ---- one dataclass for each signature in methods.py ----


@dataclass(frozen=True)
class Plain:
    """Without settings of its own: stack, subtract."""


@dataclass(frozen=True)
class Sum:
    normalise: bool = False


@dataclass(frozen=True)
class Slerp:
    angle: Literal["layer", "adapter"] = "layer"


@dataclass(frozen=True)
class Orthogonal:
    remove: Literal["inputs", "outputs", "either", "both"] = "inputs"


@dataclass(frozen=True)
class Trim:
    density: Share = 0.5


@dataclass(frozen=True)
class Elect:
    density: Share = 0.5
    sign: Sign = "total"


@dataclass(frozen=True)
class Drop:
    density: Share = 0.5
    seed: int = 0


@dataclass(frozen=True)
class DropElect:
    density: Share = 0.5
    sign: Sign = "total"
    seed: int = 0


@dataclass(frozen=True)
class Della:
    density: Share = 0.5
    epsilon: Annotated[float, Range(at_least=0, below=1)] = 0.2
    sign: Sign = "total"
    seed: int = 0

    def __post_init__(self):
        low, high = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if low <= 0 or high > 1:
            raise ConfigError(
                f"method.epsilon={self.epsilon:g} around method.density={self.density:g} are chances to stay from {low:g} to {high:g}; "
                "they must be above 0 and at most 1."
            )


@dataclass(frozen=True)
class Kind:
    """What a method is. `shares`: weights that nobody gave are 1 / n, so that the result is as strong as one file; else each is 1.

    `dense`: it works on whole changes, whose result has any rank. `least`: files that it needs.
    """

    options: type
    shares: bool = False
    dense: bool = False
    least: int = 2

    @property
    def is_random(self) -> bool:
        return "seed" in self.options.__dataclass_fields__


KINDS = {
    "linear": Kind(Sum, shares=True, least=1),
    "slerp": Kind(Slerp, shares=True),
    "stack": Kind(Plain, least=1),
    "svd": Kind(Sum, shares=True, least=1),
    "subtract": Kind(Plain),
    "orthogonal": Kind(Orthogonal),
    "magnitude_prune": Kind(Trim, shares=True, dense=True, least=1),
    "ties": Kind(Elect, dense=True),
    "dare_linear": Kind(Drop, shares=True, dense=True, least=1),
    "dare_ties": Kind(DropElect, dense=True),
    "della": Kind(Della, dense=True),
}
TRUNCATED = ("svd", *(name for name, kind in KINDS.items() if kind.dense))  # to the largest input's rank, unless another is asked for


@dataclass(frozen=True)
class Method:
    """The group `method`: a name, and what this method can be told."""

    name: str
    options: Any

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def bind_method(node: Any) -> Method:
    """Raises ConfigError for a name that is none, and for settings of another method."""
    values = plain(node, "method")
    name = values.pop("name", None)
    if name not in KINDS:
        raise ConfigError(not_among(f"method.name={show(name)}", str(name), list(KINDS)))
    return Method(name, bind(KINDS[name].options, values, "method"))


# ---- merge.yaml ----

Weight = Annotated[float, Range(at_least=-100, at_most=100)]
Ends = tuple[Weight, Weight]


@dataclass(frozen=True)
class Selection:
    """Which layers of each file count, and how much: see blocks.py. One value is for all files, a list has one for each.

    `blocks` is a word, or a list with a word, a list of words or null for each file.
    """

    weights: list[Weight] | None = None
    blocks: str | list[str | list[str] | None] | None = None
    block_weights: dict[str, Weight] | list[dict[str, Weight] | None] | None = None
    gradient: Ends | list[Ends | None] | None = None

    def file_weights(self, method: Method, number: int) -> list[float]:
        """One for each file, normalised where the method does it. Raises ConfigError."""
        kind, name = method.kind, method.name
        if number < kind.least:
            raise ConfigError(f"method={name} needs {kind.least} files, and lora names {number}; say lora=[a.safetensors,b.safetensors].")
        weights = self.weights if self.weights is not None else [1 / number if kind.shares else 1.0] * number
        if len(weights) != number:
            raise ConfigError(f"weights={weights} are {len(weights)} for {number} files; give one for each.")
        if not any(weights):
            raise ConfigError(f"weights={weights} leave nothing of any file; one at least must not be 0.")
        if name == "slerp":
            self._check_none_below_0(weights)
        if name == "slerp" or getattr(method.options, "normalise", False):
            if abs(sum(weights)) < 1e-9:
                raise ConfigError(f"weights={weights} sum up to 0 and cannot be normalised; say method.normalise=false.")
            weights = [weight / sum(weights) for weight in weights]
        return list(weights)

    def _check_none_below_0(self, weights: list[float]) -> None:
        tables = self.block_weights if isinstance(self.block_weights, list) else [self.block_weights]
        gradients = [self.gradient] if isinstance(self.gradient, tuple) else self.gradient or []
        found = {
            "weights": weights,
            "block_weights": [value for table in tables for value in (table or {}).values()],
            "gradient": [value for ends in gradients for value in ends or ()],
        }
        for setting, values in found.items():
            if min(values, default=0) < 0:
                raise ConfigError(
                    f"{setting} has {min(values):g}: a way on the sphere goes from one to the other, so none may be below 0; "
                    "use method=linear."
                )

    def of_file(self, number: int) -> list[tuple[list[str] | None, dict[str, float], Ends | None]]:
        """For each of `number` files: its blocks (None for all), its block weights, its gradient. Raises ConfigError."""
        blocks = [self.blocks] * number if isinstance(self.blocks, str) or self.blocks is None else self.blocks
        tables = self.block_weights if isinstance(self.block_weights, list) else [self.block_weights] * number
        gradients = self.gradient if isinstance(self.gradient, list) else [self.gradient] * number
        for name, values in (("blocks", blocks), ("block_weights", tables), ("gradient", gradients)):
            if len(values) != number:
                raise ConfigError(
                    f"{name} has {len(values)} values for {number} files; give one for each, null for all of a file's layers."
                )
        words = [[word] if isinstance(word, str) else word for word in blocks]
        if [] in words:
            raise ConfigError("blocks: an empty list takes nothing of a file; leave the file out, or say null for all of its layers.")
        return [(chosen, table or {}, ends) for chosen, table, ends in zip(words, tables, gradients, strict=True)]


@dataclass(frozen=True)
class Size:
    """How much of the result is kept in each layer; one of the three, or none."""

    rank: Annotated[int, Range(at_least=1)] | None = None
    energy: Share | None = None
    error: Annotated[float, Range(at_least=0, below=1)] | None = None

    def __post_init__(self):
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(f'{name}={value:g}' for name, value in given.items())} say it twice; keep one.")

    @property
    def given(self) -> bool:
        return any(value is not None for value in asdict(self).values())

    def check(self, method: Method) -> None:
        if method.name == "stack" and self.given:
            raise ConfigError("method=stack keeps all factors as they are, so their ranks add up; for a smaller file say method=svd.")


def own_name(paths: list[Path], method: Method, settings: Mapping[str, Any]) -> str:
    """A file's name that says what it is made of, the same for equal settings and no other."""
    told = json.dumps({"files": [str(path.resolve()) for path in paths], **settings}, sort_keys=True, default=str)
    return f"{'+'.join(path.stem for path in paths)[:80]}_{method.name}_{hashlib.sha256(told.encode()).hexdigest()[:8]}"
