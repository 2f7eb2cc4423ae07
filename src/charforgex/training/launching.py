"""One process for each device of this machine, and somebody who is there for them until the last has ended.

The processes are started anew and told the composed settings through a folder, so that it is the same from a command line, a sweep, a
notebook or a launcher. Their input is a pipe that nobody writes to: its end tells them that the one who started them is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charforgex
from charforgex import errors, runs
from charforgex.errors import CharForgeError, TrainingError
from charforgex.training.processes import Parted, check_devices
from charforgex.training.trial import Pruned

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from charforgex.training.settings import TrainerSettings

CONFIG, COMMAND = "config.yaml", "command.json"
GRACE = 20.0  # seconds for the others to end by themselves when one process has ended
SAVING = 120.0  # seconds to reach a step boundary and save when the one who started them is gone


def launch(cfg: DictConfig, settings: TrainerSettings) -> dict[str, Any]:
    """Trains `cfg` on `settings.devices` devices of this machine and returns what result.json holds.

    Signals that ask for a stop are handed on, and end in SystemExit when all is saved. Raises what a process raised that the user can mend,
    and TrainingError for one that ended otherwise.
    """
    check_devices(settings, settings.count)
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory(prefix="charforgex-") as name:
        folder = Path(name)
        (folder / CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        (folder / COMMAND).write_text(json.dumps(sys.argv), encoding="utf-8")
        port = free_port()
        processes: list[subprocess.Popen] = []
        with handing_on(processes) as asked:
            try:
                for rank in range(settings.count):
                    processes.append(start(folder, rank, settings, port))
                culprit = outlast(processes)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
                    process.stdin.close()
        return judge(folder, [process.returncode for process in processes], culprit, asked)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(folder: Path, rank: int, settings: TrainerSettings, port: int) -> subprocess.Popen:
    count = str(settings.count)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // settings.count))} | os.environ
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [str(Path(charforgex.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "charforgex.training.launching", str(folder), str(rank)],
        env=environment | {"PYTHONPATH": os.pathsep.join(places)}, stdin=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C comes to the one who started them, who hands it on once
    )  # fmt: skip


@contextlib.contextmanager
def handing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM go on to the processes. Yields those that came."""
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlast(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits until all have ended. When one has ended badly, the others get `GRACE`. Returns the first such one's rank."""
    culprit, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if culprit is None:
            culprit = next((rank for rank, process in enumerate(processes) if process.poll()), None)
            deadline = time.monotonic() + GRACE if culprit is not None else deadline
    return next((rank for rank, process in enumerate(processes) if process.poll()), None) if culprit is None else culprit


def judge(folder: Path, codes: Sequence[int], culprit: int | None, asked: Sequence[int]) -> dict[str, Any]:
    """What came of it, by the processes' exit codes and what they left in `folder`."""
    told = [json.loads(path.read_text()) if (path := outcome_path(folder, rank)).exists() else {} for rank in range(len(codes))]
    for outcome in told:
        if "pruned" in outcome:
            raise Pruned(*outcome["pruned"])
        if "error" in outcome:
            name, text = outcome["error"]
            raise getattr(errors, name)(text)
    if not any(codes):
        return told[0]["result"]
    if asked:
        raise SystemExit(runs.EXIT_INTERRUPTED if asked[0] == signal.SIGINT else runs.EXIT_TERMINATED)
    # One that only noticed another's end may have ended before it was seen.
    rank = next((rank for rank, outcome in enumerate(told) if codes[rank] and "parted" not in outcome), culprit)
    if codes[rank] in (runs.EXIT_INTERRUPTED, runs.EXIT_TERMINATED):
        raise SystemExit(codes[rank])  # one of them was asked to stop, and so all have saved and ended
    how = f"was killed by {signal.Signals(-codes[rank]).name}" if codes[rank] < 0 else f"ended with exit code {codes[rank]}"
    raise TrainingError(
        f"Process {rank} of {len(codes)} (counted from 0) {how}, and the others ended with it. The same command goes on from the last "
        "checkpoint."
    )


# ---- one of the processes ----


def outcome_path(folder: Path, rank: int) -> Path:
    return folder / f"outcome-{rank}.json"


def main(folder: Path, rank: int) -> int:
    """Trains as process `rank`, and leaves what came of it in `folder`. Returns the exit code."""
    from omegaconf import OmegaConf

    from charforgex.training.run import run

    threading.Thread(target=_stop_when_left, daemon=True).start()
    sys.argv = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    try:
        outcome: dict[str, Any] = {"result": run(OmegaConf.load(folder / CONFIG))}
    except Parted as error:
        outcome = {"parted": str(error)}
    except Pruned as pruned:
        outcome = {"pruned": [pruned.step, pruned.number]}
    except CharForgeError as error:
        outcome = {"error": [type(error).__name__, str(error)]}
        if os.environ.get("CHARFORGEX_DEBUG") == "1":
            traceback.print_exception(error)
    except KeyboardInterrupt:
        return runs.EXIT_INTERRUPTED
    runs.write_json(outcome_path(folder, rank), outcome)
    return runs.EXIT_OK if "result" in outcome else runs.EXIT_ERROR


def _stop_when_left() -> None:
    """Asks this process to save and stop when the one who started it is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING)
    os._exit(runs.EXIT_TERMINATED)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    raise SystemExit(status)
