"""hydra/launcher=processes: jobs side by side, their values and their deaths."""

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus

from charforgex import cli
from tests import small_conf

JOB = """
import os, signal
def job(cfg):
    if cfg.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 2:
        raise KeyError("seed")
    return [cfg.seed, cfg.lora.rank, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """What the launcher returns for jobs of these overrides."""
    monkeypatch.syspath_prepend(tmp_path / "project")
    folder = small_conf.write(tmp_path / "project")
    (tmp_path / "project" / "processes_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)

    def launch(*overrides):
        Plugins.instance()  # which runs the plugins' modules again, so that their classes are others than before
        from hydra_plugins.charforgex_processes import ProcessesLauncher

        found, real = [], ProcessesLauncher.launch
        monkeypatch.setattr(ProcessesLauncher, "launch", lambda *told, **named: found.extend(real(*told, **named)) or found)
        arguments = ["-m", "hydra/launcher=processes", *small_conf.WHOLE, *overrides]
        try:
            cli.guarded("processes_job:job", "train", arguments, "train.py", folder)
        except Exception as error:  # the grid's own answer to a failed job
            return found, error
        return found, None

    return launch


def test_a_killed_job_fails_alone_and_each_has_a_gpu(launched, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    jobs, error = launched("seed=0,1,2,3", "+sweeps=ranks", "lora.rank=8")
    assert [job.status for job in jobs] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert jobs[0].return_value[:2] == [0, 8] and jobs[3].return_value[:2] == [3, 8]
    assert {job._return_value[2] for job in (jobs[0], jobs[3])} <= {"0", "3"} and jobs[0]._return_value[3] != jobs[3]._return_value[3]
    assert str(jobs[1]._return_value) == "its process ended with signal 9" and isinstance(jobs[2]._return_value, KeyError)
    assert "signal 9" in str(error)


def test_none_at_a_time_is_refused(launched, capsys):
    launched("hydra.launcher.at_once=0")
    assert "hydra.launcher.at_once=0" in capsys.readouterr().err
