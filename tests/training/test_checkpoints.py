"""Checkpoints: whole or not at all."""

import json

import pytest
import torch

from charforgex.errors import CheckpointError
from charforgex.lora.checkpoints import folder_name, saved_steps
from charforgex.runs import remove_unfinished
from charforgex.training.checkpoints import SafeCheckpointIO, load_last_good, prune


def save(folder, step, value=1.0):
    SafeCheckpointIO().save_checkpoint({"tensors": {"w": torch.full((3,), value)}, "step": step}, folder / folder_name(step))


def test_round_trip(tmp_path):
    save(tmp_path, 7, 2.5)
    loaded = SafeCheckpointIO().load_checkpoint(tmp_path / folder_name(7))
    assert loaded["step"] == 7
    assert torch.equal(loaded["tensors"]["w"], torch.full((3,), 2.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, file, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / folder_name(2) / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()
    checkpoint, problems = load_last_good(tmp_path)
    assert checkpoint["step"] == 1
    assert len(problems) == 1 and folder_name(2) in problems[0]


def test_none_whole_is_an_error_and_none_at_all_is_not(tmp_path):
    assert load_last_good(tmp_path) == (None, [])
    save(tmp_path, 1)
    (tmp_path / folder_name(1) / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="fresh=true"):
        load_last_good(tmp_path)


def test_a_save_cut_short_leaves_no_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    from charforgex.training import checkpoints

    monkeypatch.setattr(checkpoints.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert saved_steps(tmp_path) == []
    assert len(remove_unfinished(tmp_path)) >= 1
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    prune(tmp_path, 2, {1})
    assert [path.name for path in saved_steps(tmp_path)] == [folder_name(step) for step in (5, 4, 1)]
