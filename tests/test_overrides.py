"""overrides.py: what Hydra's own parser makes of what is written, and prompts typed as people type them."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from charforgex.errors import ConfigError
from charforgex.overrides import as_overrides, quote_texts

TEXTS = [
    "a cat, a {red|blue} hat (old) = __places__: 50 %",
    'it\'s "quoted"',
    "ends in a backslash \\",
    "ends in \\' both",
    "\\(escaped\\), \\{braces\\}",
    "null",
    "12",
    "1e3",
    "true",
    "plain",
    "ünï çödé, 東京",
    "[not, a list]",
    "costs ${price}",
    " edges ",
    "",
]


def parsed(overrides):
    """Through Hydra's grammar and into a config, as `compose` does it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    cfg = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(overrides):
        assert not override.is_sweep_override(), override.input_line
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_arrive_as_they_are(text):
    assert parsed(as_overrides({"prompt": text})) == {"prompt": text}
    assert parsed(as_overrides({"prompt": [text, "b"]})) == {"prompt": [text, "b"]}


def test_values_of_every_kind():
    settings = {
        "steps": 20,
        "guidance": 2.5,
        "lora": None,
        "sheet": False,
        "scales": [0, [0.5, 1.0]],
        "trainer": {"ema": 0.9, "name": "a/b c"},
    }
    assert parsed(as_overrides(settings)) == settings
    assert as_overrides({"lora.rank": 8, "experiment": "charworld", "resume": "runs/2026-01-01_x"}) == [
        "lora.rank=8",
        "experiment=charworld",
        "resume=runs/2026-01-01_x",
    ]


def test_names_of_ones_own():
    """A node that is {} in its yaml takes any names, also those that dots would divide."""
    from charforgex.config import compose

    for repeats in ({"portraits": 2, "b": 1}, {"a.b*": 2, "re:.*[0-3]\\.(x|y), z": 1}):
        found = compose("train", as_overrides({"data": {"repeats": repeats, "trigger": "x"}})).data
        assert dict(found.repeats) == repeats and found.trigger == "x"
    with pytest.raises(ConfigError, match=r"data.sourc is unknown; did you mean data.source\?"):
        compose("train", as_overrides({"data": {"sourc": "x"}}))


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip() == text and text and text != "null" and not text.startswith("[")])
def test_typed_prompts_arrive_as_they_are(text):
    assert parsed(quote_texts([f"prompt={text}", "steps=3"])) == {"prompt": text, "steps": 3}


def test_what_is_not_a_bare_text_stays():
    kept = ["prompt=[a,b]", "prompt='a, b'", 'prompt="a, b"', "prompt=null", "prompt=", "steps=3", "prompt_file=a,b", "~prompt", "--help"]
    assert quote_texts(kept) == kept
    assert quote_texts(["prompt=a,b", "--multirun"]) == ["prompt=a,b", "--multirun"]
    assert quote_texts(["sampling.negative=dark, blurry", "+trigger=a b"]) == ["sampling.negative='dark, blurry'", "+trigger='a b'"]


def test_the_home_folder(monkeypatch):
    """Hydra's grammar has no ~, and only some shells have replaced it."""
    monkeypatch.setenv("HOME", "/home/me")
    assert quote_texts(["out=~/a b.png", "prompt=~/x"]) == ["out='/home/me/a b.png'", "prompt='~/x'"]
    assert parsed(as_overrides({"lora": "~/a.safetensors"})) == {"lora": "~/a.safetensors"}
