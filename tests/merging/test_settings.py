"""What contradicts itself stops before any file is opened, and says the way out."""

import pytest

from charforgex.config import compose, conf_folder
from charforgex.errors import ConfigError
from charforgex.merging.settings import KINDS, Selection, Size, bind_method

SHOWN = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))


def test_each_method_has_its_yaml_with_the_values_of_its_signature():
    assert sorted(KINDS) == SHOWN
    for name in KINDS:
        method = bind_method(compose("merge", ["lora=[a,b]", f"method={name}"]).method)
        assert method.name == name and method.options == KINDS[name].options()


@pytest.mark.parametrize(
    "name, weights, number, wanted",
    [
        ("linear", None, 4, [0.25] * 4),
        ("stack", None, 2, [1.0, 1.0]),
        ("ties", None, 2, [1.0, 1.0]),
        ("linear", [1.4, 0.6], 2, [1.4, 0.6]),
        ("slerp", [3.0, 1.0], 2, [0.75, 0.25]),
    ],
)
def test_weights(name, weights, number, wanted):
    method = bind_method({"name": name})
    assert Selection(weights=weights).file_weights(method, number) == pytest.approx(wanted)


def test_normalised_weights():
    method = bind_method({"name": "svd", "normalise": True})
    assert Selection(weights=[3.0, -1.0]).file_weights(method, 2) == [1.5, -0.5]
    with pytest.raises(ConfigError, match=r"sum up to 0 .*normalise=false"):
        Selection(weights=[1.0, -1.0]).file_weights(method, 2)


@pytest.mark.parametrize(
    "name, weights, number, message",
    [
        ("linear", [1.0], 2, "are 1 for 2 files"),
        ("linear", [0.0, 0.0], 2, "leave nothing"),
        ("slerp", [1.5, -0.5], 2, "none may be below 0; use method=linear"),
        ("slerp", None, 1, "method=slerp needs 2 files"),
    ],
)
def test_weights_that_cannot_be(name, weights, number, message):
    with pytest.raises(ConfigError, match=message):
        Selection(weights=weights).file_weights(bind_method({"name": name}), number)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("block_weights", {"unet": -0.5}),
        ("block_weights", [None, {"unet": -0.5}]),
        ("gradient", (1.0, -0.5)),
        ("gradient", [None, (1.0, -0.5)]),
    ],
)
def test_slerp_takes_no_factor_below_0(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} has -0.5: .* none may be below 0"):
        Selection(**{setting: value}).file_weights(bind_method({"name": "slerp"}), 2)
    assert Selection(**{setting: value}).file_weights(bind_method({"name": "linear"}), 2) == [0.5, 0.5]


def test_methods_that_cannot_be():
    with pytest.raises(ConfigError, match=r"method.name=slurp is not among .*did you mean slerp"):
        bind_method({"name": "slurp"})
    with pytest.raises(ConfigError, match=r"method.density is unknown"):
        bind_method({"name": "slerp", "density": 0.5})
    with pytest.raises(ConfigError, match=r"method.density=0.0 is out of range"):
        bind_method({"name": "ties", "density": 0.0})
    with pytest.raises(ConfigError, match=r"chances to stay from 0.8 to 1.2"):
        bind_method({"name": "della", "density": 1.0, "epsilon": 0.4})


def test_one_size_and_none_for_stack():
    with pytest.raises(ConfigError, match=r"rank=4 and energy=0.9 say it twice"):
        Size(rank=4, energy=0.9)
    with pytest.raises(ConfigError, match="ranks add up; for a smaller file say method=svd"):
        Size(rank=4).check(bind_method({"name": "stack"}))


def test_one_value_is_for_all_files_and_a_list_has_one_for_each():
    told = Selection(blocks="style", block_weights={"unet": 0.5}, gradient=(1.0, 0.0)).of_file(2)
    assert told == [(["style"], {"unet": 0.5}, (1.0, 0.0))] * 2
    told = Selection(blocks=["style", ["a", "b"], None], gradient=[(1.0, 0.0), None, (0.0, 1.0)]).of_file(3)
    assert told == [(["style"], {}, (1.0, 0.0)), (["a", "b"], {}, None), (None, {}, (0.0, 1.0))]
    with pytest.raises(ConfigError, match=r"blocks has 1 values for 2 files"):
        Selection(blocks=["style"]).of_file(2)
    with pytest.raises(ConfigError, match=r"empty list takes nothing"):
        Selection(blocks=[[], "style"]).of_file(2)
