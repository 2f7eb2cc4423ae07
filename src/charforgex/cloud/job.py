"""`python -m charforgex.cloud.job <folder>`: runs the job that the folder's files describe, wherever it lies, and leaves return.json there.

Exit codes are the command's: 0, 2 for what the user can mend, 130 and 143 when stopped with all saved, where there is no return.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from charforgex.cli import complain
from charforgex.cloud.parcels import Parcel
from charforgex.errors import CharForgeError
from charforgex.runs import EXIT_ERROR, EXIT_OK

RETURNED = "charforgex-returned "  # begins the line of the log that tells what return.json holds, where nothing else comes back


def run(folder: Path) -> int:
    """Returns the exit code; SystemExit, of a job that was asked to stop, passes."""
    from hydra._internal.callbacks import Callbacks
    from hydra.conf import HydraConf
    from hydra.core.utils import JobRuntime, JobStatus, run_job, setup_globals
    from hydra.types import HydraContext
    from omegaconf import OmegaConf, open_dict

    parcel = Parcel(folder.resolve())
    job = parcel.job()
    if job["folder"] is not None:
        os.chdir(job["folder"])
    sys.path.insert(0, os.getcwd())
    sys.argv = job["command"]
    setup_globals()
    cfg = OmegaConf.create({"hydra": HydraConf})
    with open_dict(cfg), open_dict(cfg.hydra):
        cfg.merge_with(OmegaConf.load(parcel.folder / "hydra.yaml"), OmegaConf.load(parcel.folder / "config.yaml"))
    JobRuntime.instance().set("name", cfg.hydra.job.name)
    done = run_job(
        hydra_context=HydraContext(config_loader=None, callbacks=Callbacks(cfg)), task_function=function(job["entry"]),
        config=cfg, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip
    code, error = EXIT_OK, None if done.status == JobStatus.COMPLETED else done._return_value  # return_value raises it
    if error is None:
        try:
            parcel.complete(done.return_value)
        except TypeError as problem:
            error = problem
    if error is not None:
        code = tell(error)
        parcel.fail(type(error).__name__, str(error))
    if job["tell"]:
        print(RETURNED + json.dumps(parcel.returned()), flush=True)
    return code


def tell(error: BaseException) -> int:
    """Into the job's log: one line for what the user can mend, else all that Python knows. Returns the exit code."""
    if isinstance(error, CharForgeError):
        complain(error)
        return EXIT_ERROR
    traceback.print_exception(error)
    return 1


def function(entry: str) -> Callable[[Any], Any]:
    """What "module:function" or "file.py:function" names."""
    place, _, name = entry.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


if __name__ == "__main__":
    raise SystemExit(run(Path(sys.argv[1])))
