"""The documents tell the truth: their commands are settings that exist, their example runs, their tables list what is there."""

import json
import re
from pathlib import Path

import pytest

from charforgex.cli import CONFIGS, FILES, with_files
from charforgex.config import compose
from charforgex.overrides import quote_texts

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = r"train|plan|import-config|generate|interpolate|curate clips|curate|evaluate|compare|votes|bench|merge|lora \w+"
COMMAND = re.compile(rf"(?:python (?=\w+\.py)|charforgex )({OURS})(?:\.py)?((?: [^\n`#]*)?)")


def commands() -> list[tuple[str, str, str]]:
    """(page, command, arguments) of every line in the documents that runs one of ours; `charforgex lora resize ...` is "lora_resize"."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            for command, arguments in COMMAND.findall(line):
                if command.startswith(("lora ", "merge", "compare", "votes", "bench", "interpolate", "import-c")) and not arguments.strip():
                    continue  # spoken of, without the files that it needs
                found.append((page.name, command.replace(" ", "_"), arguments.split("  #")[0].strip()))
    return found


def words(arguments: str) -> list[str]:
    import shlex

    return [word for word in shlex.split(arguments) if not word.startswith("-")]


@pytest.mark.parametrize(("page", "command", "arguments"), commands())
def test_every_command_is_one_that_exists(page, command, arguments):
    files = FILES.get(command, (".safetensors", "lora")) if command.startswith(("lora_", *FILES)) else None
    given = words(arguments.rstrip(").,;"))
    overrides = [word for word in (with_files(given, *files) if files else given) if "=" in word]
    # python train.py -m lora.rank=4,8,16: each value alone, which may be a list itself
    if "-m" in arguments.split():
        overrides = [re.sub(r"^([\w.]+=)(\[[^\]]*\]|[^\[,]+),.*", r"\1\2", word) for word in overrides]
    compose(CONFIGS.get(command, command), quote_texts(overrides))


def test_there_are_commands_to_check():
    assert len(commands()) > 15


def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    """As it is written, but on the tiny base."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    tiny = example.replace("charforgex.train(", 'charforgex.train(debug="tiny", ').replace('"steps": 200', '"steps": 2')
    tiny = tiny.replace("charforgex.generate(", "charforgex.generate(width=32, height=32, steps=2, count=1, ")
    assert tiny.count("tiny") == 1 and tiny.count("width=32") == 1
    names: dict = {}
    exec(tiny, names)
    assert Path(names["run"]["lora"]).is_file()


def test_result_json_is_documented_key_by_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import charforgex

    charforgex.train(debug="tiny", trainer={"steps": 2}, run_dir="run")
    written = json.loads(Path("run/result.json").read_text())
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8").split("## result.json")[1].split("\n## ")[0]
    documented = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in page.splitlines() if row.startswith("| `")]
    assert sorted(name for names in documented for name in names) == sorted(written)
    nested = {
        row.split("|")[1].strip(" `"): re.findall(r"`(\w+)`", row.split("|")[2]) for row in page.splitlines() if row.startswith("| `")
    }
    for name in ("identity", "prompt_following", "diversity", "validation", "extra"):
        assert nested[name] == list(written[name]), name
