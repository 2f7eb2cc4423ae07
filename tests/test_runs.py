"""Atomic writes, run folders and what they keep."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from charforgex import runs


def test_a_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    assert runs.write_atomic(path, "ä1") == path
    assert path.read_bytes() == "ä1".encode()
    runs.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"

    with pytest.raises(RuntimeError, match="half way"), runs.replace_atomic(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_bytes(b"third")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"second"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_new_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    assert runs.write_atomic(tmp_path / "file", "").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_new_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(Path(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    runs.write_atomic(tmp_path / "file", "x")
    assert calls[0].name.startswith(runs.TEMPORARY) and calls[1] == "replace" and calls[2] == tmp_path


def test_killed_writers_leave_whole_files(tmp_path):
    """SIGKILL at different moments: what carries the name is always one of the whole contents, and leftovers are swept."""
    program = """
import sys
from charforgex.runs import write_atomic
print("ready", flush=True)
while True:
    for letter in "ab":
        write_atomic(sys.argv[1], letter * 3_000_000)
"""
    path = tmp_path / "file"
    for number in range(8):
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.013 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = path.read_text()
        assert len(text) == 3_000_000 and len(set(text)) == 1
    runs.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_run_folders_never_share(tmp_path):
    first, second = runs.create_run_dir(tmp_path, "red cap/7"), runs.create_run_dir(tmp_path, "red cap/7")
    assert first.is_dir() and second.is_dir() and first != second
    assert first.name.endswith("red-cap-7")


def test_a_run_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.ConfigError, match="run_dir="):
        runs.create_run_dir(tmp_path / "file", "x")


def test_results_are_strict_json(tmp_path):
    class Scalar:
        def item(self):
            return 2.5

    path = runs.write_result(
        tmp_path, {"loss": math.nan, "worst": [math.inf, -1.5], "lora": Path("a/b"), "steps": 3, "x": Scalar(), "ok": True}
    )
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert path.name == "result.json"
    assert values == {"loss": None, "worst": [None, -1.5], "lora": "a/b", "steps": 3, "x": 2.5, "ok": True}
    with pytest.raises(TypeError, match="no place"):
        runs.write_result(tmp_path, {"x": object()})
    assert json.loads(path.read_text())["steps"] == 3


def test_the_saved_config_is_resolved(tmp_path):
    from omegaconf import OmegaConf

    path = runs.save_config(tmp_path, OmegaConf.create({"a": {"b": "${c}"}, "c": 0.5}))
    assert yaml.safe_load(path.read_text()) == {"a": {"b": 0.5}, "c": 0.5}


def test_provenance_says_what_ran_from_what(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("abc")
    path = runs.write_provenance(tmp_path, seed=7, inputs={"pictures": tmp_path / "in", "base": tmp_path / "in" / "a.txt"}, device="cpu")
    values = json.loads(path.read_text())
    assert values["seed"] == 7 and values["device"] == "cpu" and values["command"] == sys.argv
    assert values["inputs"]["base"]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert values["versions"]["hydra-core"].startswith("1.3") and values["versions"]["torch"]
    assert len(values["inputs"]["pictures"]["sha256"]) == 64


def test_a_folders_hash_is_of_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    before = runs.sha256_path(tmp_path)
    (tmp_path / f"{runs.TEMPORARY}b").write_text("unfinished")
    assert runs.sha256_path(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = runs.sha256_path(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({before, renamed, runs.sha256_path(tmp_path)}) == 3


def test_the_config_hash_is_of_what_is_asked_not_of_where():
    one = {"run_dir": "/a", "steps": 100, "data": {"root": "/home/me/red_cap", "rate": 1.0}}
    same = {"data": {"rate": 1, "root": "/mnt/red_cap"}, "steps": 100, "run_dir": "/b"}
    assert runs.config_hash(one) == runs.config_hash(same)
    assert runs.config_hash(one) != runs.config_hash(one | {"steps": 101})
    assert runs.config_hash({"a": 1}) != runs.config_hash({"a": "1"})
    assert runs.config_hash({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"  # the same in every release


def test_a_checkout_names_its_commit():
    state = runs.git_state()
    if state is None:
        pytest.skip("not run from a git checkout")
    assert len(state["commit"]) == 40 and isinstance(state["changed"], bool)
