"""The record of the character benchmark: what a line says, and what may be held against what."""

import json
from pathlib import Path

import pytest

from charforgex.config import compose
from charforgex.errors import ConfigError
from charforgex.training import bench
from charforgex.training.bench import BenchSettings

ROOT = Path(__file__).resolve().parents[2]


def line(gains, family="sdxl", suite="abc", **more):
    characters = {str(number): {"gain": gain} for number, gain in enumerate(gains)}
    return {"suite_hash": suite, "family": family, "characters": characters, "settings": [], "note": "", "date": "2026-01-01", **more}


def test_only_the_same_suite_and_family_are_held_against_each_other():
    before = [line([0.1]), line([0.2]), line([0.3], family="flux"), line([0.4], suite="other")]
    assert bench.latest(before, line([0.5])) is before[1]
    assert bench.latest(before, line([0.5], family="sd3")) is None


def test_differences_are_over_the_characters_that_both_have():
    more, low, high = bench.differences(line([0.5, 0.7, 0.9]), line([0.4, 0.6]))["gain"]
    assert (more, low, high) == pytest.approx((0.1, 0.1, 0.1))
    more, low, high = bench.differences(line([0.5, 0.1, 0.6]), line([0.4, 0.3, 0.5]))["gain"]
    assert more == pytest.approx(0.0, abs=1e-9) and low < 0 < high


def test_lines_are_added_and_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "docs/characters.jsonl"
    for gain in (0.1, 0.2):
        bench.append(path, line([gain]))
    assert [one["characters"]["0"]["gain"] for one in bench.recorded(path)] == [0.1, 0.2]
    path.write_text(path.read_text() + json.dumps({"hello": 1}) + "\n")
    with pytest.raises(ConfigError, match="line 3"):
        bench.recorded(path)


def test_a_suite_is_what_it_asks_for(monkeypatch):
    before = bench.suite_hash()
    assert bench.suite_hash() == before
    monkeypatch.setattr(bench, "CHARACTERS", (0, 1))
    assert bench.suite_hash() != before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite": "faces"}, "there is characters"),
        ({"families": []}, "must name some"),
        ({"characters": [1, 1]}, "each once"),
        ({"settings": "lora.rank=4 data.source=pictures"}, "the suite's own"),
    ],
)
def test_settings_that_would_make_it_another_suite_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        BenchSettings(**{"suite": "characters", **given})


def test_trainings_that_differ_have_folders_of_their_own():
    plain, small = (bench.training(BenchSettings("characters", settings=given), "sdxl", 1).run_dir for given in ("", "lora.rank=4"))
    assert plain != small and plain.startswith("runs/bench/sdxl-1-")
    with pytest.raises(ConfigError, match=r"lora\.rnak"):
        bench.training(BenchSettings("characters", settings="lora.rnak=4"), "sdxl", 1)


def test_a_look_at_one_character_is_measured_and_not_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = "trainer.steps=2 evaluation.every=2 family.recipe.sampling_steps=2"
    found = bench.bench(compose("bench", ["suite=characters", "families=[sdxl]", "characters=[0]", f"settings='{tiny}'"]))
    assert not found["recorded"] and not (tmp_path / "docs").exists()
    (one,) = found["lines"]
    assert set(one["means"]) == set(bench.TOLD) and one["means"]["gain"]["low"] is None
    assert one["characters"]["0"]["base_identity"] < 0.3 and len(one["base"]["denoiser"]) == 64


def test_the_record_is_of_this_suite_or_of_another_version():
    """Whoever changes what the suite asks for counts its version up, or old lines would be taken for comparable ones."""
    lines = bench.recorded(ROOT / "docs/benchmarks/characters.jsonl")
    assert lines
    assert {line["suite_hash"] for line in lines if line["version"] == bench.VERSION} <= {bench.suite_hash()}
