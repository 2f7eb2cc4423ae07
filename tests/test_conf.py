"""Every file in conf/ and sweeps/ that a user may name composes, and its values fit the training's signatures."""

from dataclasses import asdict
from pathlib import Path

import pytest

from charforgex.config import Search, compose, conf_folder, group_choices
from charforgex.errors import ConfigError
from charforgex.training.run import check

ROOT = Path(__file__).parents[1]


def choices(name):
    return group_choices(Search(name, conf_folder()).loader(), name)


def filled(name, overrides):
    """The config, with a word for every value that its user must give."""
    try:
        return compose(name, overrides)
    except ConfigError as error:
        if "no value yet" not in str(error):
            raise
        wanted = [word.removesuffix("=...") for word in str(error).split() if word.endswith("=...")]
        return compose(name, [*overrides, *(f"{key}=given" for key in wanted)])


CHOSEN_BY = {name: name for name in ("experiment", "debug", "family", "data", "evaluation", "loss", "optimizer", "text_encoder", "trainer")}
CHOSEN_BY |= {"sweeps": "+sweeps", "adapter": "adapter@lora", "curation": "curation", "motion": "motion", "backend": "backend"}
MOTION = ("family=animatediff", "family=animatediff_v3", "family=animatediff_sdxl", "data=clips", "evaluation=motion", "motion=default")
WITH = {"optimizer=muon": ["pretrain=charworld"], "optimizer=schedule_free": ["trainer.ema=0"]}  # what these cannot do without
WITH |= {chosen: ["experiment=animatediff_motion"] for chosen in MOTION}
WITH |= {f"backend={name}": ["family=sdxl_base"] for name in ("ai_toolkit", "kohya")}


@pytest.mark.parametrize("group", CHOSEN_BY)
def test_every_choice_of_training_composes(group):
    options = choices("train")[group]
    assert options
    for option in options:
        choice = f"{CHOSEN_BY[group]}={option}"
        check(filled("train", [choice, *WITH.get(choice, [])]))


def test_every_group_belongs_to_an_entry_point():
    """A group that neither test above nor generate.py names would be dead."""
    assert {group for group, options in choices("train").items() if options} <= {
        *CHOSEN_BY,
        "sampling",
        "video",
        "logger",
        "pretrain",
        "method",
        "metric",
        "pack",
        "vote",
    }


def test_each_yaml_says_what_it_is_for():
    """The first line, or the one after the package header, is a comment: the command that uses the file or what it chooses."""
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
        lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
        if path.parent.name in ("conf", "experiment", "debug", "sweeps"):
            opening = ("# python ", "# charforgex ", "# wandb ")
            assert lines[0].startswith(opening), f"{path.relative_to(ROOT)} does not open with the command that uses it"


def test_curations_yaml_and_its_signatures_agree():
    """Every option stands in conf/curation/default.yaml, with the value that it has where nobody composes a config."""
    from charforgex.config import bind
    from charforgex.curation.settings import CurationSettings

    shown = filled("curate", []).curation
    assert bind(CurationSettings, shown, "curation") == CurationSettings()
    told = asdict(CurationSettings())
    assert set(shown) == set(told)
    for part, options in told.items():
        if isinstance(options, dict):
            assert set(shown[part]) == set(options), part
