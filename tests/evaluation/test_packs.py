"""Prompts in packs: what they ask for, and what is refused."""

import pytest

from charforgex.charworld.world import read_prompt
from charforgex.config import Search, compose, conf_folder, group_choices
from charforgex.errors import ConfigError
from charforgex.evaluation.packs import OWN, UNCALLED, Pack, class_of, templates
from charforgex.evaluation.settings import Settings

PACKS = group_choices(Search("evaluate", conf_folder()).loader(), "evaluate")["pack"]


def shipped(*names):
    cfg = compose("evaluate", [f"pack=[{','.join(names)}]"])
    return Settings(packs={name: Pack(tuple(pack.prompts)) for name, pack in cfg.packs.items()})


def test_every_pack_that_is_shipped_asks_for_something():
    """Those about the character call it, the others do not; charworld's packs are in words that its judge can check."""
    found = templates(shipped(*PACKS).packs, None, None)
    assert {template.pack for template in found} == set(PACKS) == {"character", "contexts", "styles", "stress", *UNCALLED}
    assert [template.number for template in found] == list(range(len(found)))
    for template in found:
        assert ("{trigger}" in template.text) == template.calls == (template.pack not in UNCALLED)
        assert ("{class}" in template.text) == (template.pack == "leakage")
        prompt = template.prompt(0, "zqx woman", "woman")
        assert "{" not in prompt and ("zqx woman" in prompt) == template.calls
        if template.pack in ("character", "contexts", "leakage"):
            assert {"expression", "garment", "garment_colour", "scene", "frame"} <= read_prompt(prompt).keys(), prompt


def test_a_command_line_chooses_packs():
    assert list(compose("evaluate", ["pack=[stress,unrelated]"]).packs) == ["stress", "unrelated"]
    with pytest.raises(ConfigError, match=r"pack=stres is not among the choices: .*; did you mean stress\?"):
        compose("evaluate", ["pack=[stres]"])
    with pytest.raises(ConfigError, match=r"packs.stress.prompt is unknown; did you mean packs.stress.prompts"):
        compose("evaluate", ["pack=[stress]", "packs.stress.prompt=[a]"])


def test_prompts_of_ones_own_join_them(tmp_path):
    (tmp_path / "mine.txt").write_text("# mine\n{trigger} on a horse\n{trigger} in a {red|blue} car\n")
    found = templates({"character": Pack(("a {trigger}",))}, None, tmp_path / "mine.txt")
    assert [(template.pack, template.number) for template in found] == [("character", 0), (OWN, 1), (OWN, 2)]
    said = {found[2].prompt(seed, "zqx", "person") for seed in range(8)}
    assert said == {"zqx in a red car", "zqx in a blue car"}
    assert found[2].prompt(3, "zqx", "person").removeprefix("zqx") == found[2].prompt(3, "other", "person").removeprefix("other")


@pytest.mark.parametrize(
    ("packs", "prompt", "words"),
    [
        ({}, None, "no prompt is asked for"),
        ({"leakage": Pack(("a {trigger}",))}, None, r'packs.leakage: "a \{trigger\}" calls the character'),
        ({"a": Pack(("x", "y")), "b": Pack(("x",))}, None, 'the prompt "x" stands twice'),
        ({"a": Pack(("x",))}, "a {broken", "is never closed"),
        ({"a": Pack(("<lora:x:1>",))}, None, "not read from prompts"),
    ],
)
def test_what_is_refused(packs, prompt, words):
    with pytest.raises(ConfigError, match=words):
        templates(packs, prompt, None)


def test_a_prompt_that_calls_needs_a_trigger():
    (template,) = templates({"a": Pack(("a {trigger}",))}, None, None)
    with pytest.raises(ConfigError, match="say trigger=<word>"):
        template.prompt(0, None, "person")


def test_the_class_is_what_the_trigger_says():
    assert class_of("zqx woman", None) == "woman" and class_of("zqx woman", "girl") == "girl"
    assert class_of("zqx", None) == class_of(None, None) == "person"
