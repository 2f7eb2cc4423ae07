"""Runs side by side: known differences are found, and what cannot be compared is said so."""

import json
import subprocess
import sys

import pytest

from charforgex.config import compose
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation import compare
from charforgex.runs import write_json
from tests.evaluation import made_up
from tests.evaluation.test_page import Reader

MEANS = {"base": {"identity": 0.3, "attributes": 0.93}, "lora": {"identity": 0.6, "attributes": 0.8}}
BETTER = {"base": {"identity": 0.3, "attributes": 0.93}, "lora": {"identity": 0.75, "attributes": 0.8}}
METRICS = {name: made_up.METRICS[name] for name in ("identity", "attributes")}
PROMPTS = {"contexts": [f"{{trigger}}, in place {i}" for i in range(8)]}
SETTINGS = {
    "references": "zatoki/held-out",
    "rank": 16,
    "out": "here",
    "metrics": {"identity": {"embedder": "charworld"}, "attributes": {}},
}


def evaluation(folder, means=MEANS, prompts=PROMPTS, seeds=(0, 1), **settings):
    made_up.evaluation(folder, means, prompts=prompts, seeds=seeds, metrics=METRICS, settings=SETTINGS | settings, recommended="lora")
    return folder


def training(folder, identities, embedder="charworld", prompts=("a",)):
    folder.mkdir()
    numbers = {"prompt_following": 0.8, "diversity": 0.4, "nearest": 0.7, "validation": 0.1, "extra": {}}
    checkpoints = [{"step": 100 * i, "identity": identity, **numbers} for i, identity in enumerate(identities, 1)]
    anchors = {"floor": 0.2, "base": 0.3, "ceiling": 0.9, "prompt_following": 0.9, "diversity": 0.5, "validation": 0.2, "extra": {}}
    write_json(folder / "scores.json", {"anchors": anchors, "checkpoints": checkpoints})
    write_json(folder / "result.json", {"best_step": 100 * len(identities), "value": 1.0})
    write_json(
        folder / "config.yaml",
        {
            "evaluation": {"embedder": embedder, "follower": "charworld", "prompts": list(prompts), "seeds": 2},
            "seed": 0,
            "lora": {"rank": 4},
        },
    )
    return folder


def compared(*folders):
    return compare.compared(compare.read_runs(folders))


def test_a_known_difference_is_found(tmp_path):
    found = compared(evaluation(tmp_path / "one"), evaluation(tmp_path / "two", BETTER, rank=32))
    identity, attributes = found["comparison"]["rows"]
    assert (identity["a"], identity["b"], identity["prompts"], identity["pictures"]) == ("one", "two", 8, 16)
    assert identity["difference"]["estimate"] == pytest.approx(-0.15, abs=1e-9)  # the luck of a contestant's name is the same in both
    assert identity["verdict"] == "two better" and identity["prompts_lost"] == 8
    assert attributes["difference"]["estimate"] == 0 and attributes["better"] is None
    assert found["not_compared"] == []
    (group,) = found["metrics"]["identity"]["groups"]
    assert group["runs"] == ["one", "two"] and (group["floor"], group["ceiling"]) == (0.2, 0.9)
    assert group["values"]["two"]["estimate"] - group["values"]["one"]["estimate"] == pytest.approx(0.15)
    assert found["settings"] == [{"name": "rank", "values": {"one": 16, "two": 32}}]  # where it lies is no difference


def test_another_embedder_is_another_number(tmp_path):
    other = {"identity": {"embedder": "dinov2"}, "attributes": {}}
    found = compared(
        evaluation(tmp_path / "one"), evaluation(tmp_path / "two", BETTER, metrics=other), evaluation(tmp_path / "three", BETTER)
    )
    (why,) = [row for row in found["not_compared"] if row["metric"] == "identity"]
    assert why["runs"] == ["one", "two"] and why["why"] == "other metrics.identity.embedder: charworld and dinov2"
    assert [group["runs"] for group in found["metrics"]["identity"]["groups"]] == [["one", "three"], ["two"]]
    pairs = {(row["metric"], row["a"], row["b"]) for row in found["comparison"]["rows"]}
    assert {pair for pair in pairs if pair[0] == "identity"} == {("identity", "one", "three")}
    assert len([pair for pair in pairs if pair[0] == "attributes"]) == 3


def test_other_prompts_are_paired_where_they_are_the_same(tmp_path):
    fewer = {"contexts": [*PROMPTS["contexts"][:6], "{trigger}, elsewhere"]}
    found = compared(evaluation(tmp_path / "one"), evaluation(tmp_path / "two", BETTER, fewer))
    assert [len(group["runs"]) for group in found["metrics"]["identity"]["groups"]] == [1, 1]
    assert found["not_compared"][0]["why"].startswith("other prompts or seeds: 12 of 16 and 14 pictures are of the same")
    assert found["comparison"]["rows"][0]["pictures"] == 12
    strangers = compared(tmp_path / "one", evaluation(tmp_path / "three", seeds=(7,)))
    assert strangers["comparison"]["rows"][0]["verdict"].startswith("not comparable")
    assert "0 of 16 and 8" in strangers["not_compared"][0]["why"]


def test_another_trigger_is_no_other_prompt_and_another_choice_is():
    shot = {"prompt": "anna, smiling", "template": "{trigger}, smiling", "seed": 3}
    assert compare.Run.place(shot) == ("{trigger}, smiling", 3)
    chance = {"prompt": "anna, in red", "template": "{trigger}, in {red|blue}", "seed": 3}
    assert compare.Run.place(chance) == ("anna, in red", 3)


def test_trainings_stand_beside_evaluations_and_apart(tmp_path):
    first, second = training(tmp_path / "a", [0.5, 0.7]), training(tmp_path / "b", [0.6, 0.8], prompts=("a", "b"))
    found = compared(first, second, evaluation(tmp_path / "e"))
    assert found["runs"][0] == {"name": "a", "folder": str(first), "kind": "training", "contestant": "step 200"}
    reasons = {(row["metric"], *row["runs"]): row["why"] for row in found["not_compared"]}
    assert reasons["identity", "a", "b"] == "other evaluation.prompts: ['a'] and ['a', 'b']"
    assert "while training" in reasons["identity", "a", "e"]
    assert ("validation", "a", "b") not in reasons and found["metrics"]["validation"]["groups"][0]["runs"] == ["a", "b"]
    assert found["metrics"]["identity"]["groups"][0]["values"]["a"]["estimate"] == 0.7
    assert found["metrics"]["attributes"]["groups"][0]["values"]["a"]["estimate"] == 0.8 and "prompt_following" not in found["metrics"]
    assert found["settings"] == [{"name": "evaluation.prompts", "values": {"a": ["a"], "b": ["a", "b"]}}]


def test_the_command_writes_a_page_a_table_and_json(tmp_path, capsys):
    folders = [evaluation(tmp_path / "one"), evaluation(tmp_path / "two", BETTER), training(tmp_path / "t", [0.4, 0.5, 0.6])]
    runs = ",".join(map(str, folders))
    found = compare.compare(compose("compare", [f"runs=[{runs}]", f"out={tmp_path / 'out'}"]))
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(found))
    printed = " ".join(capsys.readouterr().out.split())
    assert "two better than one in 8 of 8 prompts" in printed and "Not comparable, one and t" in printed and "compare.html" in printed
    reader = Reader((tmp_path / "out" / "compare.html").read_text())
    assert "one against two" in reader.text and "Identity by step" in reader.text and "Not comparable" in reader.text
    assert len(reader.all("img")) == 2 * 16 and all(image["src"].startswith("data:") for image in reader.all("img"))
    for link in reader.all("a"):
        assert link["href"].startswith("#") or (tmp_path / "out" / link["href"]).resolve().is_file(), link
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    good = evaluation(tmp_path / "good", draw_none(), {"": ["a"]}, seeds=(0,))
    with pytest.raises(DataError, match=r"empty has no result\.json: it is no run"):
        compared(good, tmp_path / "empty")
    write_json(tmp_path / "empty" / "result.json", {"pictures": []})
    with pytest.raises(DataError, match="neither an evaluation nor the training"):
        compared(good, tmp_path / "empty")
    (good / "shots.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"shots\.jsonl cannot be read"):
        compared(good, good.parent / "other")
    with pytest.raises(ConfigError, match="named twice"):
        compared(good, tmp_path / "empty" / ".." / "good")
    with pytest.raises(ConfigError, match="names one folder"):
        compare.compare(compose("compare", ["runs=[a]"]))


def draw_none():
    return {"lora": {"identity": 0.5, "attributes": 0.5}}


def test_folders_of_one_name_are_told_apart(tmp_path):
    for where in ("x", "y"):
        evaluation(tmp_path / where / "run", draw_none(), {"": ["a"]}, seeds=(0,))
    names = [run.name for run in compare.read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])]
    assert names == ["x/run", "y/run"]


def test_folders_stand_alone_on_the_command_line():
    from charforgex.cli import FILES, with_files

    assert with_files(["runs/a", "runs/b/", "out=c"], *FILES["compare"]) == ["runs=[runs/a,runs/b/]", "out=c"]
    assert with_files(["a", "b", "--cfg", "job"], *FILES["compare"]) == ["runs=[a,b]", "--cfg", "job"]


def test_it_needs_no_torch():
    program = "import sys, charforgex.evaluation.compare, charforgex.evaluation.compare_page; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
