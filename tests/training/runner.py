"""Runs trainings in forked processes: everything heavy is imported once, so that killing many of them takes seconds.

python -m tests.training.runner        reads lines of JSON {"overrides": [...], "kill_after": seconds | null, "signal": 9}
                                       writes a line of JSON {"status": exit code, or minus the signal, "seconds": ...} for each
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time


def child(overrides: list[str], kill_at_save: int | None, signal_at_step: list | None) -> None:
    """One training, which sends itself a signal: in the middle of the nth file of its checkpoints, or soon after its nth step began."""
    import torch

    from charforgex.cli import guarded
    from charforgex.training import checkpoints
    from charforgex.training.module import StepModule

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
    if signal_at_step is not None:
        number, fraction, which = signal_at_step
        step, begun = StepModule.training_step, []

        def watched(self, batch, index):
            begun.append(time.monotonic())
            if len(begun) == number:
                last = begun[-1] - begun[-2] if number > 1 else 0.1
                threading.Timer(fraction * last, os.kill, (os.getpid(), which)).start()
            return step(self, batch, index)

        StepModule.training_step = watched
    try:
        status = guarded("charforgex.training.run:train", "train", overrides, "train.py")
    except SystemExit as exit:
        status = int(exit.code or 0)
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import charforgex.training.character  # what the children need, imported once
    import charforgex.training.motion_run  # noqa: F401
    from charforgex.families.parts import component_class
    from charforgex.families.registry import FAMILIES, get

    for family in map(get, FAMILIES):
        for name in (name for group in family.components.values() for name in group):
            component_class(family, name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(job["overrides"], job.get("kill_at_save"), job.get("signal_at_step"))
        if job.get("kill_after") is not None:
            while time.monotonic() - started < job["kill_after"] and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = 0  # reaped above: it was done before it could be killed
        print(json.dumps({"status": code}), flush=True)


if __name__ == "__main__":
    main()
