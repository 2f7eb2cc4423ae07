"""Runs trainings in forked processes: everything heavy is imported once, so that killing many of them takes seconds.

python -m tests.training.runner        reads lines of JSON {"overrides": [...], "kill_after": seconds | null, "signal": 9}
                                       writes a line of JSON {"status": exit code, or minus the signal, "seconds": ...} for each
"""

import contextlib
import json
import os
import signal
import sys
import time


def child(overrides: list[str], kill_at_save: int | None) -> None:
    """One training; `kill_at_save` kills it in the middle of writing its nth checkpoint."""
    import torch

    from charforgex.cli import guarded
    from charforgex.training import checkpoints

    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if kill_at_save is not None:
        write, calls = checkpoints._write, [0]

        def half(path, data):
            calls[0] += 1
            if calls[0] == kill_at_save:
                path.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, data)

        checkpoints._write = half
    try:
        status = guarded("charforgex.training.run:train", "train", overrides, "train.py")
    except SystemExit as exit:
        status = int(exit.code or 0)
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import charforgex.training.character  # noqa: F401 - what the children need, imported once
    from charforgex.families.sdxl import Sdxl  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job["overrides"], job.get("kill_at_save"))
        if job.get("kill_after") is not None:
            while time.monotonic() - started < job["kill_after"] and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, job.get("signal", signal.SIGKILL))
        try:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = 0  # reaped above: it was done before it could be killed
        print(json.dumps({"status": code, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
