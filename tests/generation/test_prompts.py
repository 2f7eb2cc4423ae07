"""prompts.py: where prompts come from, and which choice a wildcard makes."""

from __future__ import annotations

import pytest

from charforgex.errors import ConfigError
from charforgex.generation.prompts import check_templates, expand, read_prompts


@pytest.fixture
def wildcards(tmp_path):
    folder = tmp_path / "wildcards"
    (folder / "places").mkdir(parents=True)
    (folder / "colours.txt").write_text("red\n# not this\nblue\n\ngreen\n")
    (folder / "places" / "indoor.txt").write_text("a {big|small} room\na __colours__ hall\n")
    (tmp_path / "secret.txt").write_text("secret\n")
    return folder


def test_text_list_and_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# portraits\n  a portrait, smiling  \n\nan old man in Zürich\n".encode())
    assert read_prompts("a cat", None) == ["a cat"]
    assert read_prompts(["a cat", "a dog"], None) == ["a cat", "a dog"]
    assert read_prompts(None, path) == ["a portrait, smiling", "an old man in Zürich"]


def test_prompts_come_from_one_place(tmp_path):
    with pytest.raises(ConfigError, match="no prompt is given"):
        read_prompts(None, None)
    with pytest.raises(ConfigError, match="both given"):
        read_prompts("a", tmp_path / "b.txt")
    with pytest.raises(ConfigError, match=r"prompt_file=.*missing.txt cannot be read: No such file"):
        read_prompts(None, tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match="prompt 2 of 2 is empty"):
        read_prompts(["a", " "], None)
    with pytest.raises(ConfigError, match="prompt 1 is 7, which is not text"):
        read_prompts([7], None)
    with pytest.raises(ConfigError, match="empty list"):
        read_prompts([], None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        read_prompts(None, tmp_path / "latin.txt")
    (tmp_path / "comments.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no line besides comments"):
        read_prompts(None, tmp_path / "comments.txt")


def test_choices_are_a_function_of_seed_number_and_place():
    template = "a {red|blue|green} hat and a {red|blue|green} coat"
    assert [expand(template, 3, 0) for _ in range(3)] == [expand(template, 3, 0)] * 3
    assert len({expand(template, seed, 0) for seed in range(60)}) == 9  # all pairs: the two places draw apart
    assert len({expand(template, 3, number) for number in range(60)}) == 9
    hats = {seed: expand("a {red|blue|green} hat", seed, 0) for seed in range(20)}
    for seed, hat in hats.items():  # what is added behind changes nothing before it
        assert expand("a {red|blue|green} hat and {one|two} cats", seed, 0).startswith(hat)


def test_choices_are_even():
    counts = [sum(expand("{a|b|c}", seed, 0) == letter for seed in range(900)) for letter in "abc"]
    assert min(counts) > 240


def test_pinned_choices():
    """The choice of a seed is a promise across versions."""
    assert [expand("{a|b|c|d}", seed, 0) for seed in range(6)] == list("dbdbbc")


def test_nested_choices_and_files(wildcards):
    drawn = {expand("in __places/indoor__", seed, 0, wildcards) for seed in range(60)}
    assert drawn == {"in a big room", "in a small room", "in a red hall", "in a blue hall", "in a green hall"}
    assert {expand("{a {b|c}|d}", seed, 0) for seed in range(30)} == {"a b", "a c", "d"}


def test_trigger_and_escapes():
    assert expand("photo of {trigger}, {trigger}", 0, 0, trigger="zqx") == "photo of zqx, zqx"
    assert expand(r"\{a\|b\} \(x:1.2\) \<lora:a:1\>", 0, 0) == "{a|b} (x:1.2) <lora:a:1>"
    assert expand("snake_case __init (smiling) a < b", 0, 0) == "snake_case __init (smiling) a < b"


def test_empty_alternatives_leave_no_double_space():
    assert {expand("a {tall|} man", seed, 0) for seed in range(20)} == {"a tall man", "a man"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {red|blue hat", r"the \{ at character 3 is never closed"),
        ("a red} hat", r"the \} at character 6 closes nothing"),
        ("a {triger} hat", r"\{triger\} offers no choice"),
        ("a {trigger} hat", "no LoRA here carries a trigger word"),
        ("a <lora:anna:0.8> hat", "load it with lora=<path of anna.safetensors> scale=0.8"),
        ("a (red:1.3) hat", r"attention weights such as \(red:1.3\) are not supported"),
        ("a __nowhere__ hat", r"there is no file .*nowhere.txt; wildcard_dir has colours, places/indoor"),
        ("a __places/../../secret__ hat", "leads out of wildcard_dir"),
        ("{fine|__nowhere__}", "there is no file"),
    ],
)
def test_what_cannot_be_read(wildcards, template, message):
    with pytest.raises(ConfigError, match=message):
        check_templates([template], wildcards, None)


def test_every_branch_is_checked_before_any_seed(wildcards):
    """An error that only one seed in a hundred would meet is met at once."""
    (wildcards / "places" / "indoor.txt").write_text("\n".join(["a room"] * 99 + ["a {broken"]))
    with pytest.raises(ConfigError, match="never closed"):
        check_templates(["in __places/indoor__"], wildcards, None)


def test_wildcards_without_a_folder_and_in_circles(wildcards):
    with pytest.raises(ConfigError, match="say wildcard_dir="):
        expand("__colours__", 0, 0)
    (wildcards / "one.txt").write_text("__two__\n")
    (wildcards / "two.txt").write_text("__one__\n")
    with pytest.raises(ConfigError, match="without end: one -> two -> one"):
        check_templates(["__one__"], wildcards, None)


def test_links_do_not_lead_out(wildcards):
    (wildcards / "link.txt").symlink_to(wildcards.parent / "secret.txt")
    with pytest.raises(ConfigError, match="leads out of wildcard_dir"):
        expand("__link__", 0, 0, wildcards)
