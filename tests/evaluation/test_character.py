"""Whose pictures are judged, and folders of finished ones: from runs, folders, manifests and the demo; what cannot be used is told."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from charforgex.charworld.demo import references_of, trigger_of, write_character
from charforgex.curation.manifest import from_folder
from charforgex.errors import ConfigError, DataError
from charforgex.evaluation.character import read_character
from charforgex.evaluation.finished import read_finished
from charforgex.evaluation.settings import Settings
from charforgex.evaluation.trainings import Training
from charforgex.generation.metadata import Recipe, save_png
from charforgex.runs import save_config


def character(tmp_path, trainings=(), **settings):
    return read_character(Settings(**settings), trainings, tmp_path / "vectors")


def training_of(folder, source, **data):
    values = {"data": {"source": str(source), "trigger": "zqx woman", "val_count": 3, **data}, "evaluation": {"others": None}}
    folder.mkdir()
    save_config(folder, values | {"lora": {"rank": 4}, "family": {"name": "sdxl"}})
    return Training(folder)


def test_a_run_knows_its_own(tmp_path):
    """What it held out and trained on, without overlap, and its trigger; also when the run is named as references."""
    source = write_character(tmp_path / "pictures", 0, 8, 64)
    run = training_of(tmp_path / "run", source)
    found = character(tmp_path, [run])
    assert (len(found.references), len(found.training), found.others, found.trigger) == (3, 5, None, "zqx woman")
    assert not found.references.same(found.training).any()
    assert all(shot.prompt.startswith("a ") and shot.key for shot in found.references.shots)
    assert found.source == str(run.folder) and not found.training.same(character(tmp_path, references=found.source).references).any()
    assert len(found.notes) == 1 and "only 3 references" in found.notes[0]
    shutil.rmtree(source)
    with pytest.raises(DataError, match=r"what .*run was trained on is not to be had: .* Say references="):
        character(tmp_path, [run])


def test_the_demo_has_pictures_that_nobody_trained_on(tmp_path):
    found = character(tmp_path, references="charworld:3")
    assert (len(found.references), len(found.others), found.training, found.trigger) == (20, 20, None, trigger_of(3))
    shown = {np.asarray(picture).tobytes() for picture, _ in references_of(3)}
    assert len(shown) == 20 and all(np.asarray(shot.open()).tobytes() in shown for shot in found.references.shots)
    trained = write_character(tmp_path / "trained", 3, 12, 64)
    assert not shown & {np.asarray(Image.open(path)).tobytes() for path in trained.glob("*.png")}
    assert character(tmp_path, references="charworld:3", trigger="abc").trigger == "abc"
    with pytest.raises(ConfigError, match="must be charworld: and a number"):
        character(tmp_path, references="charworld:x")


def test_folders_and_manifests(tmp_path):
    """All of a folder is what it was named for; a manifest says itself what is held out."""
    folder = write_character(tmp_path / "pictures", 0, 8, 64)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot at all")
    from_folder(folder).write(folder / "manifest.jsonl")
    found = character(tmp_path, references=str(folder))
    assert len(found.references) == 8 and found.training is None and found.trigger is None
    assert len(found.notes) == 1 and "broken.png" in found.notes[0]
    found = character(tmp_path, references=str(folder / "manifest.jsonl"))
    assert (len(found.references), len(found.training)) == (1, 7)
    found = character(tmp_path, references="charworld:0", training=str(folder), others=str(folder / "manifest.jsonl"))
    assert (len(found.training), len(found.others)) == (8, 8)


def test_a_subfolder_of_others_is_one_person(tmp_path):
    for number, name in enumerate(("anna", "bea")):
        write_character(tmp_path / "others" / name, number, 2, 64)
    found = character(tmp_path, references="charworld:5", others=str(tmp_path / "others"))
    assert {name: len(places) for name, places in found.others.persons.items()} == {"anna": 2, "bea": 2}


def test_without_references_nothing_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing says how the character looks; say references="):
        character(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"references=.*empty has no picture that can be read"):
        character(tmp_path, references=str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"references=.*nowhere"):
        character(tmp_path, references=str(tmp_path / "nowhere"))


# ---- finished pictures ----


def recipe(**values):
    plain = dict.fromkeys(Recipe.__dataclass_fields__, "") | {"loras": (), "versions": {"charforgex": "1"}}
    numbers = {"guidance": 3.0, "guidance_rescale": 0.0, "steps": 2, "width": 8, "height": 8, "schedule_type": None, "base_is_file": False}
    return Recipe(**plain | numbers | {"true_guidance": None} | values)


def test_prompts_of_finished_pictures(tmp_path):
    """From captions.jsonl before a text file before our own PNG text before A1111's; what cannot be read is told."""
    picture = Image.new("RGB", (8, 8), (200, 10, 10))
    save_png(picture, tmp_path / "ours.png", recipe(prompt="a red zqx", template="a {red|blue} {trigger}", seed=7))
    info = PngInfo()
    info.add_text(
        "parameters", "a \\(tall\\) zqx <lora:anna:1>\nNegative prompt: blurry, a cat\nSteps: 20, Sampler: Euler, Seed: 12, Size: 8x8"
    )
    picture.save(tmp_path / "theirs.png", pnginfo=info)
    (tmp_path / "sub").mkdir()
    for name in ("plain.jpg", "sub/told.png", "beside.webp"):
        picture.save(tmp_path / name)
    (tmp_path / "beside.txt").write_text("\n a zqx at home \n")
    rows = [{"file": "sub/told.png", "prompt": "a told zqx"}, {"file_name": "ours.png", "text": "another"}, {"file": 3}, [1]]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n\n")
    (tmp_path / "broken.png").write_bytes((tmp_path / "ours.png").read_bytes()[:60])
    (tmp_path / ".hidden.png").write_bytes(b"")

    found, problems = read_finished(tmp_path, {"a {red|blue} {trigger}": "contexts"})
    told = {one.shot.picture.name: (one.shot.prompt, one.template, one.shot.seed, one.shot.pack) for one in found}
    assert told == {
        "beside.webp": ("a zqx at home", "a zqx at home", None, ""),
        "ours.png": ("another", "a {red|blue} {trigger}", 7, "contexts"),
        "plain.jpg": ("", "", None, ""),
        "theirs.png": ("a (tall) zqx", "a (tall) zqx", 12, ""),
        "told.png": ("a told zqx", "a told zqx", None, ""),
    }
    assert [problem.partition(" is ")[0].partition(" cannot")[0] for problem in problems] == [
        "captions.jsonl, line 3", "captions.jsonl, line 4", "captions.jsonl, line 5", "broken.png",
    ]  # fmt: skip


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no picture that can be read: broken.png cannot be read"):
        read_finished(tmp_path, {})
