"""Hydra's own promises of a launcher, kept by both of ours; the clusters are scripts.

Hydra's suites bring functions without a name by which another process could import them, so here, and only here, they are pickled into a
file that a function with a name opens.
"""

import os
import pickle
from pathlib import Path

import cloudpickle
import pytest
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from charforgex.cloud import launching

ROOT = Path(__file__).resolve().parents[2]
CONF = f"hydra.searchpath=[file://{ROOT}/conf]"
ON_SLURM = [CONF, "hydra.launcher.gpus=0", "hydra.launcher.folder=jobs"]
ON_SKY = [CONF, "hydra.launcher.folder=jobs", "hydra.launcher.setup=[]", "hydra.launcher.workdir=null"]
BOTH = pytest.mark.parametrize(("launcher_name", "overrides"), [("slurm", ON_SLURM), ("skypilot", ON_SKY)])


def call_pickled(cfg):
    return pickle.loads((Path(os.environ["FAKE_SKY"]) / "function").read_bytes())(cfg)


@pytest.fixture(autouse=True)
def places(sweep, slurm, sky, monkeypatch):
    """The scripts on PATH, in a folder of its own; and the nameless functions."""

    def entry_of(task):
        (sky / "function").write_bytes(cloudpickle.dumps(task))
        return f"{__name__}:{call_pickled.__name__}"

    monkeypatch.setattr(launching, "entry_of", entry_of)


def test_hydra_finds_both():
    from hydra.plugins.launcher import Launcher

    assert {"SlurmLauncher", "SkyPilotLauncher"} <= {one.__name__ for one in Plugins.instance().discover(Launcher)}


@pytest.mark.slow
@BOTH
class TestLaunchers(LauncherTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [(name, [*given, "hydra.sweeper.max_batch_size=2"]) for name, given in (("slurm", ON_SLURM), ("skypilot", ON_SKY))],
)
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=slurm", *ON_SLURM])],
)
class TestApplications(IntegrationTestSuite):
    """On machines that share a disk; a rented machine has other folders, which is what this suite asks about."""
