"""sweeps/wandb_*.yaml: the command that W&B's own agent spells from them is one that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from charforgex.config import compose
from charforgex.training.run import check

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("wandb_*.yaml"))
# W&B's agent with its questions to the server answered here: who asks, what the sweep is, which agent this is, what to run.
AGENT = """
import json, queue, sys, wandb, yaml
from pathlib import Path
from wandb.apis.public import sweeps
from wandb.wandb_agent import Agent
text, commands, root = Path(sys.argv[1]).read_text(), json.loads(sys.argv[2]), sys.argv[3]
spec = yaml.safe_load(text)
spec["command"][1:3] = [sys.executable, root + "/train.py"]
spec["command"] += ["logger.offline=true", "debug=tiny", "trainer.threads=1"]
wandb.Api = lambda: None
sweeps._sweep_with_runs = lambda *_: {"config": yaml.dump(spec)}
sweeps._register_agent = lambda *_, **__: {"id": "agent"}
def heartbeat(api, agent, metrics, running):
    if any(running.values()) or not commands:
        return [] if any(running.values()) else [{"type": "exit"}]
    return [commands.pop(0)]
sweeps._agent_heartbeat = heartbeat
Agent(None, queue.Queue(), sweep_id="offline", in_jupyter=False).run()
"""


def values(spec):
    """A value of each parameter, as the server would send it."""
    return {name: {"value": one["values"][0] if "values" in one else one["max"]} for name, one in spec["parameters"].items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_command_is_one_of_ours(path):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    spec = yaml.safe_load(path.read_text())
    parts = utils.create_sweep_command_args({"args": values(spec)}) | {"env": [], "interpreter": [], "program": []}
    arguments = [word for part in spec["command"] for word in (parts[part[2:-1]] if part.startswith("${") else [part])]
    cfg = compose(Path(spec["program"]).stem, arguments)
    check(cfg)
    assert cfg.logger.wandb and cfg.lora.alpha == cfg.lora.rank == 4 and cfg.optimizer.lr == 2e-2
    assert spec["metric"] == {"name": "value", "goal": "maximize"}  # as training logs it


@pytest.mark.slow
def test_an_offline_agent_trains(tmp_path):
    pytest.importorskip("wandb")
    spec = yaml.safe_load(FILES[0].read_text())
    commands = [{"type": "run", "run_id": "first", "program": "train.py", "args": values(spec)}]
    environment = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "offline", "WANDB_PROJECT": "p", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", AGENT, FILES[0], json.dumps(commands), ROOT], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | environment, timeout=560,
    )  # fmt: skip
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/result.json"))]
    assert done.returncode == 0 and len(results) == 1, done.stdout + done.stderr
    assert [path.name for path in tmp_path.rglob("*.wandb")] == ["run-first.wandb"]  # the sweep's own name, not ours
