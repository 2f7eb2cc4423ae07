"""A small conf/ with every kind of file: groups, a preset, a sweep, a missing value, an open node. And a job that tells what it got."""

from pathlib import Path

FILES = {
    "conf/train.yaml": """
defaults:
  - _self_
  - hydra: default
  - family: sdxl
  - lora: standard
  - logger: csv
  - experiment: null
hydra:
  searchpath: ["file://${charforgex.sweeps:}"]
run_dir: null
seed: 0
steps: 100
data:
  folder: ???
  resolution: ${family.recipe.resolution}
  buckets: {step: 64, smallest: 512}
tags: {}
""",
    "conf/family/sdxl.yaml": "name: sdxl\nsource: ???\nrecipe: {resolution: 1024}\n",
    "conf/family/flux.yaml": "name: flux\nsource: base\nrecipe: {resolution: 512}\n",
    "conf/lora/standard.yaml": "rank: 16\nalpha: 8.0\ndropout: 0.0\n",
    "conf/lora/large.yaml": "rank: 64\nalpha: 32.0\ndropout: 0.0\n",
    "conf/logger/csv.yaml": "kind: csv\n",
    "conf/logger/wandb.yaml": "kind: wandb\nproject: charforgex\n",
    "conf/experiment/flux.yaml": "# @package _global_\ndefaults:\n  - override /family: flux\n  - override /lora: large\nsteps: 7\n",
    "conf/experiment/wrong.yaml": "# @package _global_\nlora: {rnk: 4}\nstpes: 3\n",
    "conf/experiment/broken.yaml": "# @package _global_\nlora: {rank: [4\n",
    "conf/experiment/gone.yaml": "# @package _global_\ndefaults:\n  - override /family: fluxx\n",
    "sweeps/sweeps/ranks.yaml": "# @package _global_\nhydra:\n  sweeper:\n    params:\n      lora.rank: 2,4\n",
    "small_job.py": """
import sys
from charforgex.errors import DataError
def job(cfg):
    heavy = [name for name in ("torch", "lightning", "diffusers") if name in sys.modules]
    print("RAN", cfg.family.name, cfg.lora.rank, cfg.steps, heavy)
    if cfg.seed == 1:
        raise DataError("no pictures in here")
    if cfg.seed == 2:
        raise KeyboardInterrupt
    if cfg.seed == 3:
        return cfg.lora.rnk
    if cfg.seed == 4:
        raise SystemExit(143)
    return float(cfg.lora.rank)
""",
}
WHOLE = ["data.folder=pictures", "family.source=base"]  # what fills the missing values


def write(root: Path) -> Path:
    """Writes the files below `root` and returns its conf/. Hydra's settings are the project's own."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "conf" / "hydra").mkdir()
    own = Path(__file__).parents[1] / "conf" / "hydra" / "default.yaml"
    (root / "conf" / "hydra" / "default.yaml").write_text(own.read_text())
    return root / "conf"
