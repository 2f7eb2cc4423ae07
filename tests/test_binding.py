"""Signatures as the schema of config groups. This file's annotations are strings, as everywhere in the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf

from charforgex.config import Range, arguments, bind, nearest
from charforgex.errors import ConfigError
from charforgex.toolbox.common import Outputs

if TYPE_CHECKING:
    from nowhere import Network


@dataclass(frozen=True)
class Crop:
    size: Annotated[int, Range(at_least=8)]
    centre: bool = True


class Adapter:
    def __init__(
        self,
        network: Network,
        rank: Annotated[int, Range(at_least=1, at_most=128)],
        alpha: Annotated[float, Range(above=0)] | None = None,
        preset: Literal["attention", "all"] = "attention",
        layers: tuple[str, ...] = (),
        betas: tuple[float, float] = (0.9, 0.99),
        sizes: list[Annotated[int, Range(at_least=8)]] | None = None,
        folder: Path | None = None,
        name: str = "x",
        fused: bool = False,
        crop: Crop | None = None,
        scales: dict[str, float] | None = None,
        extra: Any = None,
        either: int | Literal["auto"] = "auto",
        words: Sequence[str] = (),
        either_list: str | list[str] = "all",
    ):
        self.values = {name: value for name, value in locals().items() if name != "self"}


GIVEN = {"network": object()}


def test_values_arrive_as_the_signature_wants_them():
    node = OmegaConf.create(
        {
            "rank": 8,
            "alpha": 4,
            "layers": ["a", "b"],
            "betas": [0, 0.5],
            "folder": "pictures",
            "crop": {"size": 16},
            "scales": {"a": 1},
            "sizes": [8],
            "extra": {"free": [1]},
            "either": 3,
            "words": ["w"],
        }
    )
    values = bind(Adapter, node, "lora", **GIVEN).values
    assert values["network"] is GIVEN["network"]
    assert values["alpha"] == 4.0 and type(values["alpha"]) is float
    assert values["layers"] == ("a", "b") and values["betas"] == (0.0, 0.5) and values["sizes"] == [8]
    assert values["folder"] == Path("pictures") and values["crop"] == Crop(16, True)
    assert values["scales"] == {"a": 1.0} and values["extra"] == {"free": [1]} and values["either"] == 3
    assert values["preset"] == "attention" and values["name"] == "x"


def test_a_whole_float_is_a_whole_number_and_null_is_null():
    assert bind(Adapter, {"rank": 1e1, "alpha": None}, "lora", **GIVEN).values["rank"] == 10
    assert type(arguments(Adapter, {"rank": 8.0}, "lora", GIVEN)["rank"]) is int


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rnk": 8, "rank": 8}, "lora.rnk is unknown; did you mean lora.rank?"),
        ({}, "lora.rank is missing; it needs a whole number at least 1 and at most 128"),
        ({"rank": "8"}, "lora.rank=8 is a text; a whole number"),
        ({"rank": "eight"}, "lora.rank=eight is a text; a whole number"),
        ({"rank": 8.5}, "lora.rank=8.5 is a number; a whole number"),
        ({"rank": True}, "lora.rank=true is true or false; a whole number"),
        ({"rank": None}, "lora.rank=null is null; a whole number"),
        ({"rank": [8]}, r"lora.rank=\[8\] is a list; a whole number"),
        ({"rank": 0}, "lora.rank=0 is out of range; it must be at least 1 and at most 128"),
        ({"rank": 129}, "lora.rank=129 is out of range"),
        ({"rank": float("nan")}, "lora.rank=nan is not a finite number"),
        ({"rank": 8, "alpha": 0}, "lora.alpha=0.0 is out of range; it must be above 0"),
        ({"rank": 8, "alpha": float("inf")}, "lora.alpha=inf is not a finite number"),
        ({"rank": 8, "alpha": "4"}, "lora.alpha=4 is a text; a number"),
        ({"rank": 8, "preset": "atention"}, "lora.preset=atention is not among the choices: attention, all; did you mean attention?"),
        ({"rank": 8, "preset": 3}, "lora.preset=3 is not among the choices: attention, all$"),
        ({"rank": 8, "layers": "a"}, r"lora.layers=a is a text; a list is needed: lora.layers=\[a\]"),
        ({"rank": 8, "layers": ["a", 1]}, r"lora.layers\[1\]=1 is a whole number; a text is needed; quote it"),
        ({"rank": 8, "betas": [0.9]}, "has 1 values; 2 are needed"),
        ({"rank": 8, "sizes": [16, 4]}, r"lora.sizes\[1\]=4 is out of range; it must be at least 8"),
        ({"rank": 8, "folder": 3}, "lora.folder=3 is a whole number; a path"),
        ({"rank": 8, "folder": " "}, "a path is needed"),
        ({"rank": 8, "name": 7}, """lora.name=7 is a whole number; a text is needed; quote it: lora.name="'7'\""""),
        ({"rank": 8, "fused": "yes"}, "lora.fused=yes is a text; true or false"),
        ({"rank": 8, "fused": 1}, "lora.fused=1 is a whole number; true or false"),
        ({"rank": 8, "crop": {"sise": 16}}, "lora.crop.sise is unknown; did you mean lora.crop.size?"),
        ({"rank": 8, "crop": 16}, "lora.crop=16 is a whole number; a group of settings"),
        ({"rank": 8, "scales": {"a": "x"}}, "lora.scales.a=x is a text; a number"),
        ({"rank": 8, "scales": [1]}, "a group of settings"),
        ({"rank": 8, "either": "autp"}, "lora.either=autp is a text; a whole number or one of auto is needed"),
        ({"rank": 8, "either_list": 3}, "lora.either_list=3 is a whole number; a text or a list of texts is needed"),
        ({"rank": 8, "network": 1}, "lora.network is unknown"),
    ],
)
def test_what_does_not_fit_is_named_with_the_way_out(values, says):
    with pytest.raises(ConfigError, match=says):
        bind(Adapter, values, "lora", **GIVEN)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        bind(Adapter, {"rnk": 1, "fused": 3, "betas": 1}, "lora", **GIVEN)
    assert [line.split()[0].split("=")[0] for line in str(caught.value).splitlines()] == [
        "lora.rnk",
        "lora.fused",
        "lora.betas",
        "lora.rank",
    ]


@pytest.mark.parametrize("node", [3, "x", [1]])
def test_a_node_must_be_a_group(node):
    with pytest.raises(ConfigError, match=r"lora=.* a group of settings is needed"):
        bind(Adapter, node, "lora", **GIVEN)


def test_null_is_a_group_without_settings():
    assert bind(lambda *, a=1: a, None, "x") == 1


def test_unresolvable_references_are_named():
    with pytest.raises(ConfigError, match="lora cannot be resolved"):
        bind(Adapter, OmegaConf.create({"rank": "${nope}"}), "lora", **GIVEN)


def test_functions_and_dataclasses_bind_too():
    def area(width: float, height: float = 2.0) -> float:
        return width * height

    assert bind(area, {"width": 3}, "box") == 6.0
    assert bind(Crop, {"size": 8}, "crop") == Crop(8)


def test_an_inherited_field_is_understood_where_it_was_written():
    """`Outputs.dtype` is of a type that this module has no name for."""

    @dataclass(frozen=True, kw_only=True)
    class Shrunk(Outputs):
        rank: int

    assert bind(Shrunk, {"rank": 2, "dtype": "bfloat16", "out": "a.safetensors"}, "").out == Path("a.safetensors")
    with pytest.raises(ConfigError, match="dtype=int7"):
        bind(Shrunk, {"rank": 2, "dtype": "int7"}, "")


def test_nearest_looks_beside_first():
    assert nearest("lora.rnk", ["lora.rank", "data.rank", "rank"])[0] == "lora.rank"
    assert nearest("rank", ["lora.rank", "lora.alpha"]) == ["lora.rank"]
    assert nearest("qqq", ["lora.rank"]) == []
