"""Jobs on rented machines, which here are folders, by a command that does with them what SkyPilot does with machines."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from charforgex.errors import ConfigError, DataError, LaunchError
from tests.cloud import tasks

ON = ["hydra/launcher=skypilot", "hydra.launcher.setup=[]", "hydra.launcher.workdir=null"]


def calls(sky):
    path = sky / "calls"
    return path.read_text().splitlines() if path.exists() else []


def task(name="*"):
    (path,) = Path("runs/jobs").glob(f"{name}/task.yaml")
    return yaml.safe_load(path.read_text())


def test_each_job_has_a_machine_returns_its_value_and_gives_the_machine_back(sweep, sky):
    batch = sweep(tasks.double, *ON, "x=3,4")
    assert [done.return_value for done in batch] == [6, 8]
    assert [list(done.overrides) for done in batch] == [["x=3"], ["x=4"]]
    launches = [call for call in calls(sky) if call.startswith("launch")]
    assert len(launches) == 2 and all(re.match(r"launch -y -d -c charforgex-\w{10} -i 60 --down \S+/task.yaml", one) for one in launches)
    assert sum(call.startswith("down") for call in calls(sky)) == 2 and not list(sky.glob("charforgex-*"))


def test_inputs_go_along_and_outputs_come_home(sweep, sky, tmp_path):
    (tmp_path / "pictures, all").mkdir()
    (tmp_path / "pictures, all" / "a.txt").write_text("a smile")
    given = ["+data.source='pictures, all'", "+out=results/first", "hydra.launcher.infra=aws/us-east-1", "hydra.launcher.max_price=1.5"]
    (done,) = sweep(tasks.reads, *ON, *given)
    assert done.return_value == "a smile"
    assert (tmp_path / "results" / "first" / "read.txt").read_text() == "a smile"
    assert task()["resources"] == {"infra": "aws/us-east-1", "accelerators": "A100", "disk_size": 200, "max_hourly_cost": 1.5}
    assert task()["file_mounts"] == {
        "~/charforgex_job": str(next((tmp_path / "runs" / "jobs").glob("*/task.yaml")).parent),
        "~/charforgex_inputs/0/pictures, all": str(tmp_path / "pictures, all"),
    }


def test_a_secret_reaches_the_job_and_nothing_that_is_written(sweep, sky, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh1234")
    (done,) = sweep(tasks.tells_its_secret, *ON, "hydra.launcher.secrets=[HF_TOKEN]")
    assert done.return_value == 1
    assert "--secret HF_TOKEN " in calls(sky)[0]
    (log,) = tmp_path.glob("runs/jobs/*/log.txt")
    assert "the token is <HF_TOKEN>\n" in log.read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"abcdefgh1234" in path.read_bytes()]


@pytest.mark.slow
def test_machines_that_are_not_to_be_had_or_taken_away_are_replaced(sweep, sky, capsys):
    (sky / "full").write_text("1")
    (done,) = sweep(tasks.loses_its_machine, *ON, "x=9")
    assert done.return_value == "second machine"
    assert [call.split()[0] for call in calls(sky) if "--status" not in call] == [
        "launch",
        "down",
        "launch",
        "logs",
        "launch",
        "logs",
        "down",
    ]
    assert "is gone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_job_that_no_machine_could_be_had_for_fails_with_what_was_said(sweep, sky):
    (sky / "full").write_text("9")
    with pytest.raises(LaunchError, match=r"(?s)2 machines did not bring it to an end.*\nNo resource satisfying 1x A100"):
        sweep(tasks.double, *ON, "hydra.launcher.retries=1")


def test_failures_cost_no_other_job(sweep, sky, tmp_path):
    with pytest.raises(DataError, match=r"2 is too many.\nTake fewer."):
        sweep(tasks.picky, *ON, "x=1,2")
    before = len(calls(sky))
    with pytest.raises(DataError):
        sweep(tasks.picky, *ON, "x=1,2")
    assert sum(call.startswith("launch") for call in calls(sky)[before:]) == 1  # the other's value was here


@pytest.mark.slow
def test_a_job_that_dies_is_told_with_its_last_words(sweep, sky):
    with pytest.raises(LaunchError, match=r"(?s)ended without a result; the last of .*the last words"):
        sweep(tasks.dies, *ON)
    assert calls(sky)[-1].startswith("down")


def test_detached_machines_are_found_again(sweep, sky, capsys):
    (done,) = sweep(tasks.double, *ON, "x=5", "hydra.launcher.detach=true")
    assert done.return_value is None
    assert re.search(r"To end them now: sky down charforgex-\w+\n", capsys.readouterr().out)
    (done,) = sweep(tasks.double, *ON, "x=5")
    assert done.return_value == 10
    assert sum(call.startswith("launch") for call in calls(sky)) == 1


@pytest.mark.slow
def test_results_that_did_not_come_home_keep_their_machine(sweep, sky):
    (sky / "no_rsync").touch()
    with pytest.raises(LaunchError, match=r"has not come home from charforgex-\w+"):
        sweep(tasks.double, *ON, "x=5")
    (sky / "no_rsync").unlink()
    (done,) = sweep(tasks.double, *ON, "x=5")
    assert done.return_value == 10
    assert [call.split()[0] for call in calls(sky)].count("launch") == 1


def test_a_dry_run_tells_plan_and_price_and_rents_nothing(sweep, sky, capsys):
    (done, _) = sweep(tasks.double, *ON, "x=3,4", "hydra.launcher.dry_run=true", "hydra.launcher.spot=true")
    told = capsys.readouterr().out
    assert done.return_value is None
    assert "use_spot: true" in told and "2 machines, 2 at a time" in told and "$ 1.29" in told
    assert len(calls(sky)) == 1 and "--dryrun" in calls(sky)[0]


def test_what_is_wrong_ends_before_anything_is_rented(sweep, sky, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "here").mkdir()
    for override, words in {
        "hydra.launcher.sky=/nowhere/sky": "hydra.launcher.sky=/nowhere/sky is not there",
        "hydra.launcher.secrets=[HF_TOKEN]": "hydra.launcher.secrets names HF_TOKEN, which this environment",
        "hydra.launcher.secrets=['HF_TOKEN=abc']": "holds something that is no name",
        "hydra.launcher.cpus=lots": "hydra.launcher.cpus=lots",
        "hydra.launcher.accelerators='a big one'": "hydra.launcher.accelerators=a big one",
        "hydra.launcher.setup=['pip install .']": "no checkout with a pyproject.toml",
        "+out=null": "say out=<folder>",
        f"+elsewhere={tmp_path}/here": "elsewhere=.*is a path of this machine",
        "+logger={wandb: true, offline: false}": "hydra.launcher.secrets=.WANDB_API_KEY.",
    }.items():
        with pytest.raises(ConfigError, match=words):
            sweep(tasks.double, *ON, override)
    assert not calls(sky)


def real_sky():
    """Python beside a real `sky`, which SKY names, if there is one."""
    import os
    import shutil

    found = shutil.which(os.environ.get("SKY", "sky"))
    return Path(found).resolve().parent / "python" if found else None


@pytest.mark.slow
@pytest.mark.timeout(1000)  # it imports the libraries of all clouds
@pytest.mark.skipif(real_sky() is None, reason="no sky: name SkyPilot's command in SKY to have it read the task")
def test_skypilot_itself_reads_the_task(sweep, sky, tmp_path):
    given = ["hydra.launcher.infra=runpod", "hydra.launcher.accelerators=RTX4090:2", "hydra.launcher.cpus=8+", "hydra.launcher.spot=true"]
    python = real_sky()
    sweep(tasks.double, *ON[:1], *given, "hydra.launcher.setup=['pip install charforgex']", "hydra.launcher.dry_run=true")
    (path,) = Path("runs/jobs").glob("*/task.yaml")
    program = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); (asked,) = task.resources; print(asked, task.name)"
    done = subprocess.run([python, "-c", program, path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("RunPod([Spot], cpus=8+, {'RTX4090': 2}", "charforgex-"))
