"""TensorBoard and W&B get the result's numbers, under the names that training logs."""

import json

import pytest
from PIL import Image

from charforgex.evaluation import page, trackers
from charforgex.generation.settings import LoggerSettings
from tests.evaluation import made_up

NUMBERS = {"attributes": 0.8, "pairwise": 4.0, "memorisation": 0.1}
PROMPTS = {"contexts": ["a, at the beach", "a, in a forest"]}


def checkpoints(folder, scales=(1.0,)):
    contestants = [made_up.contestant("base", "base", scale=None)]
    for step in (100, 200):
        contestants += [made_up.contestant(f"step {step} x{scale:g}", scale=scale, step=step, run="runs/a") for scale in scales]
    means = {one["name"]: NUMBERS | {"identity": 0.3 + (one["step"] or 0) / 1000} for one in contestants}
    return made_up.evaluation(folder, means, contestants, PROMPTS, recommended=contestants[-1]["name"])


def test_checkpoints_are_a_curve_of_trainings_names(tmp_path):
    result, _ = checkpoints(tmp_path)
    result["metrics"]["memorisation"]["values"]["step 200 x1"]["parts"] = {"nearest": 0.6, "limit": 9.0}
    found = trackers.as_metrics(result)
    assert list(found) == [100, 200]
    identity = {name: value["estimate"] for name, value in result["metrics"]["identity"]["values"].items()}
    assert found[100]["identity/lora"] == identity["step 100 x1"] and found[200]["identity/lora"] == identity["step 200 x1"]
    assert found[100]["identity/base"] == found[200]["identity/base"] == identity["base"]
    assert (found[100]["identity/floor"], found[100]["identity/ceiling"]) == (0.2, 0.9)
    assert found[200]["nearest_training_picture/lora"] == 0.6 and "limit/lora" not in found[200]


def test_names_are_those_of_training():
    from charforgex.training.knowing import Anchors, Scores, as_metrics

    scores = Scores(step=1, identity=0.5, prompt_following=0.8, diversity=0.4, nearest=0.7, validation=0.1, extra={"clip_score": 60.0})
    anchors = Anchors(floor=0.2, base=0.3, ceiling=0.9, prompt_following=0.9, diversity=0.5, validation=0.2, extra={"clip_score": 61.0})
    trained = set(as_metrics(scores, anchors))
    words = {*trackers.LOGGED.values(), *(word for parts in trackers.PARTS.values() for word in parts.values()), "identity"}
    assert {f"{word}/lora" for word in words} <= trained
    assert {"identity/floor", "identity/ceiling", "clip_score/base", "diversity/base"} <= trained


def test_several_strengths_and_files_are_told_apart(tmp_path):
    result, _ = checkpoints(tmp_path, (0.7, 1.0))
    assert {"identity/lora x0.7", "identity/lora x1", "identity/base"} <= set(trackers.as_metrics(result)[100])
    plain = [made_up.contestant("anna", "lora"), made_up.contestant("bea", "lora"), made_up.contestant("mine", "folder", scale=None)]
    assert trackers._who(plain) == {"anna": "anna", "bea": "bea", "mine": "mine"}
    assert trackers._who(plain[1:]) == {"bea": "lora", "mine": "mine"}


def test_tensorboard_has_every_number_and_picture(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, shots = checkpoints(tmp_path)
    trackers.write_tensorboard(result, shots, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = trackers.as_metrics(result)
    assert set(events.Tags()["scalars"]) == set(expected[100])
    assert [(event.step, event.value) for event in events.Scalars("identity/lora")] == [
        (step, pytest.approx(expected[step]["identity/lora"], abs=1e-6)) for step in (100, 200)
    ]
    assert events.Tags()["images"] == ["pictures/contexts"]


def test_wandb_offline_has_tables_of_numbers_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result, shots = checkpoints(tmp_path)
    run = trackers.start(LoggerSettings(wandb=True, offline=True), tmp_path)
    trackers.finish_wandb(run, result, shots, tmp_path)
    assert trackers.start(LoggerSettings(), tmp_path) is None
    tables = {
        path.name.rpartition("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("wandb/*/files/media/table/**/*.table.json")
    }
    (numbers,) = [table for name, table in tables.items() if name.startswith("numbers")]
    row = next(row for row in numbers["data"] if row[:2] == ["identity", "step 200 x1"])
    assert row[2] == result["metrics"]["identity"]["values"]["step 200 x1"]["estimate"]
    (pictures,) = [table for name, table in tables.items() if name.startswith("contexts")]
    assert pictures["columns"] == ["prompt", "seed", "base", "step 100 x1", "step 200 x1"] and len(pictures["data"]) == 4


def test_one_contestants_pictures_of_unknown_seeds_all_have_a_place():
    shots = [{"contestant": "mine", "pack": "", "prompt": "", "seed": None, "file": f"{i}.png"} for i in range(11)]
    heads, packs, total = page.arranged(["mine"], shots)
    assert heads == [""] * 8 and total == 2
    assert [file for *_, files in packs[""] for file in files if file] == [f"{i}.png" for i in range(11)]
    known = [shot | {"seed": i % 2, "prompt": f"p{i // 2}"} for i, shot in enumerate(shots)]
    heads, packs, _ = page.arranged(["mine"], known)
    assert heads == ["seed 0", "seed 1"] and packs[""][0] == ("p0", None, ["0.png", "1.png"])


def test_sheets_are_of_bounded_size(tmp_path):
    result, shots = checkpoints(tmp_path)
    Image.new("RGB", (900, 600)).save(tmp_path / shots[0]["file"])
    ((pack, sheet),) = trackers.contact_sheets(result, shots, tmp_path)
    assert pack == "contexts" and sheet.width < 1600
