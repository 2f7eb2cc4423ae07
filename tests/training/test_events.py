"""The stream of events of a real run, and what its readers rely on."""

import json
import re
from pathlib import Path

import pytest

from charforgex.config import compose
from charforgex.errors import TrainingError
from charforgex.training.events import NAME, Events, read_events
from charforgex.training.logs import read_log
from charforgex.training.numbers import NUMBERS, number_of, table
from charforgex.training.run import run

PAGE = Path(__file__).resolve().parents[2] / "docs/monitoring.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a whole run with TensorBoard."""
    folder = tmp_path_factory.mktemp("events")
    settings = [
        "debug=tiny", "trainer.steps=2", "trainer.checkpoint_every=1", "evaluation.every=2", "sampling.steps=1", "evaluation.times=1",
        "evaluation.prompts=['a portrait of a {trigger}, smiling']", f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}",
    ]  # fmt: skip
    run(compose("train", settings))
    return folder / "run"


def of(rows, *events):
    return [row for row in rows if row["event"] in events]


def test_a_run_tells_what_it_does_from_beginning_to_end(made):
    rows = [json.loads(line) for line in (made / NAME).read_text(encoding="utf-8").splitlines()]
    assert rows == read_events(made)
    assert [row["event"] for row in rows if row["event"] != "step"] == [
        "started", "plan", "plan", "plan", "checkpoint", "measured", "picture", "checkpoint", "picture", "ended",
    ]  # fmt: skip
    assert [row["title"] for row in of(rows, "plan")] == ["Objective", "Data", "Plan"]
    assert [row["step"] for row in of(rows, "checkpoint")] == [1, 2] == [row["step"] for row in of(rows, "step")]
    for row in of(rows, "picture"):
        assert (made / row["file"]).is_file()
    assert (made / of(rows, "checkpoint")[-1]["folder"]).is_dir() and (made / rows[-1]["result"]).is_file()
    found, log = of(rows, "measured")[-1]["numbers"], read_log(made / "metrics.csv")
    assert found["identity/lora"] == log["identity/lora"][-1][1] and len(found) > 10
    first = of(rows, "step")[0]
    assert first["numbers"]["loss"] == log["loss"][0][1] and first["steps"] == 2


def test_every_number_has_its_name_in_the_table_and_is_the_same_everywhere(made):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log, rows = read_log(made / "metrics.csv"), read_events(made)
    told = {name for row in of(rows, "step", "measured", "checkpoint") for name in row["numbers"]}
    shown = EventAccumulator(str(made / "tensorboard"))
    shown.Reload()
    tags = shown.Tags()
    assert set(log) <= told == set(tags["scalars"]) and tags["images"] == ["samples"]
    for name in told:
        assert number_of(name), f"{name} is new: say in numbers.py what it means"
        assert number_of(name).certain == (name in log), name
    used = {number_of(name).name for name in told}
    assert {"loss", "loss/t=<from>-<to>", "lr", "weight_norm/<block>", "identity/gain", "validation/t=<time>", "speed/examples"} <= used
    assert len([event.step for event in shown.Scalars("weight_norm/mid_block.attentions.0")]) == 2
    levels = [name for name in log if name.startswith("loss/t=")]
    for step, loss in log["loss"]:  # of four levels each has as many examples as the others, or the step has fewer examples than four
        assert min(dict(log[name])[step] for name in levels if step in dict(log[name])) <= loss


def test_the_tables_of_the_page_are_true(made):
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page, "run: python -c 'from charforgex.training.numbers import table; print(table())'"
    assert len({number.name for number in NUMBERS}) == len(NUMBERS)
    documented = {
        row.split("|")[1].strip(" `"): re.findall(r"`(\w+)`", row.split("|")[2])
        for row in page.split("## events.jsonl")[1].split("\n## ")[0].splitlines()
        if row.startswith("| `")
    }
    for row in read_events(made):
        assert [*documented[row["event"]]] == [name for name in row if name not in ("time", "event", "step")], row["event"]
    kinds = set(re.findall(r'warn\(\s*"(\w+)"', (PAGE.parents[1] / "src/charforgex/training/watching.py").read_text()))
    trouble = page.split("## Trouble")[1]
    assert len(kinds) == 3 and all(f"| `{kind}` |" in trouble for kind in (*kinds, "out_of_memory", "not_finite"))


def test_what_was_undone_is_left_out(tmp_path):
    events = Events(tmp_path)
    events.begin(name="a", steps=9)
    for step in (1, 2, 3, 4):
        events.tell("step", step, numbers={"loss": float("nan")})
    events.tell("checkpoint", 3)
    events.tell("warning", kind="stalled")
    assert events.step == 3
    events.tell("resumed", 2)
    events.tell("step", 3, numbers={"loss": 3.0})
    found = [(row["event"], row["step"]) for row in read_events(tmp_path)]
    assert found == [("started", 0), ("step", 1), ("step", 2), ("warning", 3), ("resumed", 2), ("step", 3)]
    assert len((tmp_path / NAME).read_text().splitlines()) == 9
    assert read_events(tmp_path)[1]["numbers"] == {"loss": None}


def test_a_line_cut_short_spoils_no_other(tmp_path):
    Events(tmp_path).tell("step", 1)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"event": "st')
    Events(tmp_path).begin()
    assert [row["event"] for row in read_events(tmp_path)] == ["step", "started"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, {"event": "ended", "result": "result.json"}),
        (SystemExit(143), {"event": "stopped", "exit_code": 143}),
        (KeyboardInterrupt(), {"event": "stopped", "exit_code": 130}),
        (TrainingError("lower it."), {"event": "failed", "reason": "lower it.", "error": "TrainingError"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_it_ended_is_told_where_it_had_begun(tmp_path, error, told):
    for begun in (False, True):
        try:
            with Events(tmp_path) as events:
                if begun:
                    events.begin()
                events.tell("step", 5)
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
        last = read_events(tmp_path)[-1]
        assert last["event"] == "step" if not begun else last.items() >= (told | {"step": 5}).items()


def test_of_several_processes_one_speaks(tmp_path):
    with Events(tmp_path, speaking=False) as events:
        events.begin()
    assert not (tmp_path / NAME).exists()
