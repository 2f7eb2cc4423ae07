"""Signatures are the schema of the config groups: a callable is called with a config node once every value fits its annotation.

    class Lora:
        def __init__(self, rank: Annotated[int, Range(at_least=1)], alpha: float | None = None, preset: Literal["few", "all"] = "all"): ...

    bind(Lora, cfg.lora, "lora")

Unknown keys, missing ones and values of the wrong type or size are told all at once in one ConfigError, each by its full dotted name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from charforgex.errors import ConfigError

T = TypeVar("T")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, written into an annotation: `Annotated[float, Range(above=0, at_most=1)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and (self.above < value or self.above == -math.inf) and value < self.below

    def __str__(self) -> str:
        bounds = [f"{field.name.replace('_', ' ')} {getattr(self, field.name):g}" for field in dataclasses.fields(self)]
        return " and ".join(bound for bound in bounds if "inf" not in bound)


def bind(target: Callable[..., T], node: Mapping[str, Any] | None, where: str, **given: Any) -> T:
    """`target(**given, **values of node)`. `where` is the node's dotted name; keys in `given` are the program's own and not the config's.

    Whole numbers are taken for floats, lists for tuples, texts for paths, mappings for dataclasses. Raises ConfigError.
    """
    return target(**given, **arguments(target, node, where, given))


def arguments(target: Callable, node: Mapping[str, Any] | None, where: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """The values of `node` as `target` wants them, checked, without calling it. `given` names the parameters that come from elsewhere."""
    values = plain(node, where)
    parameters = {name: p for name, p in inspect.signature(target).parameters.items() if name not in set(given)}
    for parameter in parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), f"{target} takes {parameter}: no schema"

    problems, fitted = [], {}
    prefix = f"{where}." if where else ""  # the root of a config has no name
    for name, value in values.items():
        if name not in parameters:
            problems.append(unknown(f"{prefix}{name}", [f"{prefix}{known}" for known in parameters]))
            continue
        try:
            fitted[name] = fit(value, annotation(target, name), f"{prefix}{name}")
        except ConfigError as error:
            problems.append(str(error))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in values:
            problems.append(f"{prefix}{name} is missing; it needs {say(annotation(target, name))}")
    if problems:
        raise ConfigError("\n".join(problems))
    return fitted


def plain(node: Any, where: str) -> dict[str, Any]:
    """A config node as a dict of plain, resolved values; `{}` for null."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if OmegaConf.is_config(node):
        try:
            node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where} cannot be resolved: {str(error).splitlines()[0]}") from error
    if node is None:
        return {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}={show(node)} is {kind(node)}; a group of settings is needed, such as {where}.name=value")
    return dict(node)


def annotation(target: Callable, name: str) -> Any:
    """The resolved annotation of one parameter, `Any` where there is none. Others of the signature may stay unresolvable."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    if inspect.ismethod(function):
        function = function.__func__
    declared = getattr(function, "__annotations__", {})
    if name not in declared:
        return Any
    names = function.__globals__
    if dataclasses.is_dataclass(target):  # an inherited field is written in the words of the module that declares it
        owner = next((cls for cls in target.__mro__ if name in vars(cls).get("__annotations__", {})), target)
        names = vars(sys.modules[owner.__module__])
    holder = types.SimpleNamespace(__annotations__={name: declared[name]})
    hint = typing.get_type_hints(holder, globalns=names, include_extras=True)[name]
    return Any if isinstance(hint, TypeVar) else hint


# ---- one value against one annotation ----


def fit(value: Any, wanted: Any, where: str) -> Any:
    """`value` as `wanted`, or a ConfigError that says what `where` needs."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin is typing.Annotated:
        return _in_range(fit(value, inner[0], where), inner[1:], where)
    if origin in (typing.Union, types.UnionType):
        return _fit_any(value, inner, where)
    if origin is typing.Literal:
        return _fit_choice(value, inner, where)
    if dataclasses.is_dataclass(wanted):
        return value if isinstance(value, wanted) else bind(wanted, plain(value, where), where)

    container = origin or wanted
    if isinstance(container, type) and issubclass(container, Mapping):
        return _fit_mapping(value, inner, where)
    if container in (list, tuple, set, frozenset, Sequence, Iterable, Collection):
        return _fit_list(value, container, inner, where)
    return _fit_scalar(value, wanted, where)


def _fit_scalar(value: Any, wanted: Any, where: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is not a finite number; {say(wanted)} is needed")
    if wanted is float and number:
        return float(value)
    if wanted is int and number and float(value).is_integer():
        return int(value)  # 1e4 is how people write a whole number
    if wanted is Path and isinstance(value, (str, Path)) and str(value).strip():
        return Path(value).expanduser()
    if type(value) is wanted if wanted in NAMES else isinstance(value, wanted):
        return value
    hint = f"; quote it: {where}=\"'{value}'\"" if wanted is str and isinstance(value, (int, float)) else ""
    raise ConfigError(f"{where}={show(value)} is {kind(value)}; {say(wanted)} is needed{hint}")


def _fit_any(value: Any, options: Sequence[Any], where: str) -> Any:
    # A text is a path only when nothing else takes it, a whole number a float only when no int is asked for.
    for option in sorted(options, key=lambda option: (option is not type(None), option is not type(value))):
        try:
            return fit(value, option, where)
        except ConfigError as error:
            problem = error
    substantial = [option for option in options if option is not type(None)]
    if len(substantial) == 1 and value is not None:
        raise problem  # `X | None`: what X has to say is the better message
    raise ConfigError(f"{where}={show(value)} is {kind(value)}; {say(typing.Union[tuple(options)])} is needed")  # noqa: UP007


def _fit_choice(value: Any, choices: Sequence[Any], where: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    raise ConfigError(not_among(f"{where}={show(value)}", str(value), [show(choice) for choice in choices]))


def _fit_list(value: Any, container: Any, inner: Sequence[Any], where: str) -> Any:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"{where}={show(value)} is {kind(value)}; a list is needed: {where}=[{'...' if value is None else show(value)}]")
    values = list(value)
    fixed = container is tuple and inner and Ellipsis not in inner
    if fixed and len(values) != len(inner):
        raise ConfigError(f"{where}={show(values)} has {len(values)} values; {len(inner)} are needed")
    wanted = list(inner) if fixed else [inner[0] if inner else Any] * len(values)
    fitted = [fit(item, want, f"{where}[{index}]") for index, (item, want) in enumerate(zip(values, wanted, strict=True))]
    return fitted if container not in (tuple, set, frozenset) else container(fitted)


def _fit_mapping(value: Any, inner: Sequence[Any], where: str) -> dict:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={show(value)} is {kind(value)}; a group of settings is needed, such as {where}.name=value")
    keys, items = inner or (Any, Any)
    return {fit(key, keys, f"{where}.{key}"): fit(item, items, f"{where}.{key}") for key, item in value.items()}


def _in_range(value: Any, bounds: Sequence[Any], where: str) -> Any:
    for bound in bounds:
        if isinstance(bound, Range) and value is not None and not bound.holds(value):
            raise ConfigError(f"{where}={value} is out of range; it must be {bound}")
    return value


# ---- words ----


def say(wanted: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return " ".join([say(inner[0]), *(str(bound) for bound in inner[1:] if isinstance(bound, Range))])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(say(option) for option in inner)
    if origin is typing.Literal:
        return f"one of {', '.join(map(show, inner))}"
    if wanted in NAMES:
        return NAMES[wanted]
    if origin in (list, tuple, set, frozenset, Sequence, Iterable, Collection):
        words = dict.fromkeys(say(item).removeprefix("a ") for item in inner if item is not Ellipsis)
        return "a list" + "".join(
            f" of {word}s" if word in ("whole number", "number", "text", "path") else f", each {word}" for word in words
        )
    if wanted is Any:
        return "a value"
    return "a group of settings" if dataclasses.is_dataclass(wanted) or origin is dict else f"a {getattr(wanted, '__name__', wanted)}"


def show(value: Any) -> str:
    """A value as a user would type it, cut short when long."""
    text = {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, (bool, type(None))) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a group of settings"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an empty text" if value == "" else NAMES.get(type(value), f"a {type(value).__name__}")


def unknown(key: str, valid: Iterable[str]) -> str:
    """What to say of a dotted key that nothing reads: the nearest valid ones, or those beside it."""
    near = nearest(key, valid := list(valid))
    if near:
        return f"{key} is unknown; did you mean {' or '.join(near)}?"
    parent, _, _ = key.rpartition(".")
    beside = list(dict.fromkeys(name for name in valid if name.rpartition(".")[0] == parent))
    if not beside:
        return f"{key} is unknown; nothing beneath {parent or key} reads it"
    return f"{key} is unknown; valid are {', '.join(beside)}" if len(beside) <= 12 else f"{key} is unknown; --help lists all that are valid"


def nearest(key: str, valid: Collection[str]) -> list[str]:
    """At most three valid dotted keys that may have been meant: alike beside it, alike as a whole, or the same name elsewhere."""
    parent, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in valid if name.rpartition(".")[0] == parent}
    found = [beside[name] for name in difflib.get_close_matches(leaf, beside, 2, 0.6)]
    found += difflib.get_close_matches(key, valid, 2, 0.75)
    found += [name for name in valid if name.rpartition(".")[2] == leaf]
    return list(dict.fromkeys(found))[:3]


def not_among(setting: str, value: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, choices, 1, 0.5)
    return f"{setting} is not among the choices: {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
