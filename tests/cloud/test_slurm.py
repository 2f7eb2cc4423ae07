"""Jobs on Slurm, which here is a few scripts: what is asked for, what comes back, and what is done when a job must make room."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from charforgex.errors import ConfigError, DataError, LaunchError
from tests.cloud import tasks

ON = ["hydra/launcher=slurm"]


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def script(slurm):
    (path,) = slurm.glob("*.sh")
    return path.read_text()


def test_an_array_of_jobs_returns_its_values_in_their_order(sweep, slurm, tmp_path):
    batch = sweep(
        tasks.double, *ON, "x=3,4", "hydra.launcher.partition=gpu", "hydra.launcher.cpus=4", "hydra.launcher.memory=1.5",
        "hydra.launcher.time=90", "hydra.launcher.constraint='a100&nvlink'", "hydra.launcher.parallel=1", "+hydra.launcher.extra.nice=7",
        "hydra.launcher.setup=['export STARTED=1']",
    )  # fmt: skip
    assert [done.return_value for done in batch] == [6, 8]
    assert [list(done.overrides) for done in batch] == [["x=3"], ["x=4"]]
    assert [dict(done.cfg) for done in batch] == [{"x": 3}, {"x": 4}]
    asked = set(script(slurm).splitlines())
    assert asked >= {
        "#SBATCH --array=0-1%1", "#SBATCH --partition=gpu", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=1536MB", "#SBATCH --time=90",
        "#SBATCH --constraint='a100&nvlink'", "#SBATCH --gpus-per-node=1", "#SBATCH --nice=7", "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue", "export STARTED=1",
    }  # fmt: skip
    assert "--cpus-per-task=4" in next(line for line in asked if line.startswith("srun"))
    assert (tmp_path / "sweep" / "multirun.yaml").exists()


def test_a_warning_lets_the_job_save_and_go_on_where_it_was(sweep, slurm, tmp_path):
    """Sent to the job as Slurm does, before its time is out; what it counts is whole, so nothing was lost or done twice."""

    def warn():
        for count in (5, 15):
            until(lambda count=count: (tmp_path / "steps_7").exists() and len((tmp_path / "steps_7").read_text().split()) >= count)
            os.kill(int(next(slurm.glob("*/pid")).read_text()), signal.SIGUSR2)

    warning = threading.Thread(target=warn)
    warning.start()
    (done,) = sweep(tasks.steps, *ON, "x=7")
    warning.join()
    assert done.return_value is True
    (codes,) = slurm.glob("*/codes")
    until(lambda: codes.read_text().split() == ["143", "143", "0"])


@pytest.mark.slow
def test_too_many_sittings_end_with_all_that_is_known(sweep, slurm, tmp_path):
    def warn():
        until(lambda: (tmp_path / "steps_7").exists())
        os.kill(int(next(slurm.glob("*/pid")).read_text()), signal.SIGUSR2)

    warning = threading.Thread(target=warn)
    warning.start()
    with pytest.raises(LaunchError, match=r"its time ran out 1 times, and hydra.launcher.requeues=0 allows no more"):
        sweep(tasks.steps, *ON, "x=7", "hydra.launcher.requeues=0")
    warning.join()


@pytest.mark.slow
def test_a_cancelled_job_is_not_queued_again(sweep, slurm, tmp_path):
    def cancel():
        until(lambda: (tmp_path / "steps_7").exists())
        job = next(slurm.glob("*/pid")).parent
        (job / "cancelled").touch()
        os.kill(int((job / "pid").read_text()), signal.SIGTERM)

    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    with pytest.raises(LaunchError, match=r"ended without a result .CANCELLED.; the last of .*log.out"):
        sweep(tasks.steps, *ON, "x=7")
    cancelling.join()


def test_one_failed_job_costs_no_other_and_is_all_that_the_same_command_repeats(sweep, slurm, tmp_path, capsys):
    with pytest.raises(DataError, match="2 is too many"):
        sweep(tasks.picky, *ON, "x=1,2,3")
    assert "job 1 (x=2): 2 is too many.\n" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    assert [done.return_value for done in sweep(tasks.picky, *ON, "x=1,2,3")] == [2, 4, 6]
    assert [(tmp_path / f"ran_{x}").read_text() for x in (1, 2, 3)] == ["once\n"] * 3
    assert [done.return_value for done in sweep(tasks.picky, *ON, "x=1")] == [2]  # delivered by then: asked again, it is done again
    assert (tmp_path / "ran_1").read_text() == "once\n" * 2


@pytest.mark.slow
def test_a_killed_job_is_reported_with_its_last_words(sweep, slurm):
    with pytest.raises(LaunchError, match=r"(?s)ended without a result.*the last words.*ended with signal 9 and left no result"):
        sweep(tasks.dies, *ON)


def test_a_detached_launch_is_taken_up_by_the_same_command(sweep, slurm, capsys):
    (done,) = sweep(tasks.steps, *ON, "x=5", "hydra.launcher.detach=true")
    assert done.return_value is None
    assert re.search(
        r"1 jobs go on; the same command, without detach=true, waits for them. To end them: scancel \d+\n", capsys.readouterr().out
    )
    (done,) = sweep(tasks.steps, *ON, "x=5")
    assert done.return_value is True
    assert len(list(slurm.glob("*.sh"))) == 1


def test_what_is_wrong_ends_before_anything_is_asked_for(sweep, slurm, monkeypatch, tmp_path):
    for override, words in {
        "hydra.launcher.time=0": "hydra.launcher.time=0 is out of range",
        "hydra.launcher.warning=20000": "before the beginning",
        "+hydra.launcher.extra.array=1-5": r"hydra.launcher.extra.array .*set hydra.launcher.parallel",
        "hydra.launcher.cluster=lsf": "hydra.launcher.cluster=lsf is not among the choices: slurm, local",
        "+trainer={devices: 2, nodes: 1, accelerator: auto}": "trainer.devices=2 are more than hydra.launcher.gpus=1",
        "+trainer={nodes: 2}": "trainer.nodes=2",
    }.items():
        with pytest.raises(ConfigError, match=words):
            sweep(tasks.double, *ON, override)
    monkeypatch.setenv("MY_API_KEY", "abcdefgh1234")
    for value, file in {"${oc.env:MY_API_KEY}": "config", "abcdefgh1234": "multirun"}.items():
        with pytest.raises(ConfigError, match=f"MY_API_KEY would be written into {file}") as error:
            sweep(tasks.double, *ON, f"+login={value}")
        assert "abcdefgh" not in str(error.value)
    with pytest.raises(ConfigError, match="no name by which another process could import it"):
        sweep(lambda cfg: 1, *ON)
    assert not list(slurm.glob("*.sh"))
    assert not any("abcdefgh" in path.read_text() for path in tmp_path.rglob("*.yaml"))


def test_a_dry_run_shows_the_script_and_submits_nothing(sweep, slurm, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # also where no Slurm is
    (done, _) = sweep(tasks.double, *ON, "x=3,4", "hydra.launcher.dry_run=true", "hydra.launcher.qos=long")
    assert done.return_value is None and not list(slurm.glob("*.sh"))
    assert "#SBATCH --qos=long\n" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_of_this_machine_stand_in_for_a_cluster(sweep, slurm):
    (done,) = sweep(tasks.double, *ON, "x=8", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0")
    assert done.return_value == 16


def test_what_began_the_sweep_does_not_reach_its_jobs(sweep, slurm, tmp_path):
    (tmp_path / "conf" / "sweeps").mkdir()
    (tmp_path / "conf" / "sweeps" / "two.yaml").write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      x: 5,6\n")
    batch = sweep(tasks.double, *ON, "+sweeps=two")
    assert [done.return_value for done in batch] == [10, 12]
    assert [list(done.overrides) for done in batch] == [["x=5"], ["x=6"]]
    jobs = [json.loads(path.read_text()) for path in Path("runs/jobs").glob("*/job.json")]
    assert sorted(job["overrides"] for job in jobs) == [["x=5"], ["x=6"]]
    assert not any("sweeps" in path.read_text() for path in Path("runs/jobs").glob("*/*.yaml") if path.name == "config.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("warning", [signal.SIGUSR2, signal.SIGTERM])
def test_a_training_that_made_room_ends_in_the_bits_of_one_that_did_not(slurm, tmp_path, monkeypatch, warning):
    """SIGUSR2: its time is out, and it asks to be queued again; SIGTERM: it is preempted, and Slurm queues it again by itself."""
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(__file__).parent / 'bin'}{os.pathsep}{os.environ['PATH']}")
    settings = [
        "debug=tiny",
        "trainer.steps=24",
        "evaluation.every=24",
        "sampling.steps=1",
        "logger.tensorboard=false",
        "trainer.accelerator=cpu",
    ]

    def run(runs_dir, *more):
        given = [*ON, "hydra.launcher.gpus=0", *settings, f"runs_dir={runs_dir}", *more]
        program = "from charforgex.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", program, "train", "-m", *given], env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0
        (path,) = (tmp_path / runs_dir).glob("*/result.json")
        return path.parent

    def interrupt():
        until(lambda: any("\n5,loss," in path.read_text() for path in tmp_path.glob("second/*/metrics.csv")))
        (job,) = slurm.glob("*/pid")
        if warning == signal.SIGTERM:
            (job.parent / "again").touch()  # as Slurm does with what it preempts
        os.kill(int(job.read_text()), warning)

    first = run("first")
    interrupting = threading.Thread(target=interrupt)
    shutil.rmtree(slurm)
    slurm.mkdir()
    interrupting.start()
    second = run("second")
    interrupting.join()
    assert next(slurm.glob("*/codes")).read_text().split()[0] == "143"
    for name in ("debug.safetensors", "metrics.csv"):
        numbers = [folder / name for folder in (first, second)]
        if name.endswith(".csv"):
            rows = [[row for row in path.read_text().splitlines() if ",loss," in row] for path in numbers]
            assert rows[0] == rows[1] and len(rows[0]) == 24
        else:
            one, other = map(load_file, numbers)
            assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def train(*arguments):
    from charforgex.cli import guarded

    return guarded("charforgex.training.run:train", "train", [*ON, *arguments], "train.py")


def test_a_launcher_without_a_sweep_and_a_job_that_could_not_run_are_refused(slurm, sweep, capsys, tmp_path):
    assert train("debug=tiny") == 2
    assert "hydra/launcher=slurm runs the jobs of a sweep, also of one job; add -m." in capsys.readouterr().err
    assert train("-m", "hydra.launcher.tine=10") == 2
    assert "hydra.launcher.tine" in capsys.readouterr().err
    assert train("-m", "debug=tiny", "lora.rank=0,4") == 2
    assert "lora.rank=0 is out of range" in capsys.readouterr().err
    assert not list(slurm.glob("*.sh")) and not (tmp_path / "runs" / "jobs").exists()
