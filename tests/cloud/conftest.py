"""A Hydra application of two lines, whose jobs are tests/cloud/tasks.py, and clusters that are scripts in tests/cloud/bin."""

import os
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """sweep(task, *overrides): the returns of a multirun of `task` with x=1, in a folder of its own."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.setenv("PATH", f"{Path(__file__).parent / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    hydra = f"hydra:\n  searchpath: ['file://{ROOT}/conf']\n  output_subdir: null\n  job: {{chdir: false}}\n"
    (tmp_path / "conf" / "config.yaml").write_text(f"x: 1\n{hydra}")

    def run(task, *overrides):
        GlobalHydra.instance().clear()
        hydra = Hydra.create_main_hydra2("app", create_config_search_path(str(tmp_path / "conf")))
        try:
            (batch,) = hydra.multirun("config", task, ["hydra.sweep.dir=sweep", *overrides], with_log_configuration=False)
        finally:
            GlobalHydra.instance().clear()
        return batch

    return run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a cluster of one machine; asked often, since its jobs take seconds."""
    from charforgex.cloud import slurm

    for name, seconds in {"ASK_EVERY": 0.5, "LOOK_EVERY": 0.05, "LAG": 1.0}.items():
        monkeypatch.setattr(slurm, name, seconds)
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "last").write_text(str(random.randrange(1000, 10**6)))  # submitit remembers how jobs ended
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


@pytest.fixture
def sky(tmp_path, monkeypatch):
    """The folder of rented machines that are folders."""
    folder = tmp_path / "sky"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SKY", str(folder))
    return folder
