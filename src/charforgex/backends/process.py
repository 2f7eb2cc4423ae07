"""A tool run in its own environment: its output read as it comes, stopped so that what it has saved stays whole."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GRACE = 60.0  # seconds between asking a tool to stop, telling it, and ending it
SAVING = 180.0  # seconds that it may go on because it is saving
# Output as it comes, in UTF-8, and bars that are not wrapped
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "250", "TERM": "dumb"}


class Asked:
    """Ctrl-C and SIGTERM while a tool runs. `signal` is the first that came, `times` how many did."""

    def __init__(self):
        self.signal: int | None = None
        self.times = 0

    def __enter__(self) -> Asked:
        wanted = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._hear) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number, frame) -> None:
        self.signal, self.times = self.signal or number, self.times + 1


def run(
    command: Sequence[str], folder: Path, log: Path, hear: Callable[[str], bool], silence: float, asked: Asked, extra: dict[str, str],
    grace: float = GRACE, tick: Callable[[], None] = lambda: None,
) -> tuple[int, bool]:  # fmt: skip
    """Runs `command` in `folder` and returns its exit code, and whether it was stopped for `silence` seconds without output.

    Each line, also one that a carriage return ends, goes to `hear`, which says whether the tool is saving just now; what `hear` raises
    stops the tool. All bytes go to `log`. `tick` is called about every second. When `asked` hears a signal, the tool's whole process
    group is asked to stop, after `grace` seconds told to, and after as many again ended.
    """
    environment = {**os.environ, **ENVIRONMENT, **extra}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        start_new_session=True,
    )  # fmt: skip
    chunks: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_pump, args=(process.stdout.fileno(), chunks), daemon=True).start()
    lines, saving, is_hung = Lines(), False, False
    last_word = last_tick = time.monotonic()
    stopping = Stopping(process, grace)
    try:
        with log.open("ab") as record:
            while True:
                is_gone = process.poll() is not None
                try:
                    chunk = chunks.get(timeout=0.2)
                except queue.Empty:
                    chunk = None
                now = time.monotonic()
                if chunk:
                    record.write(chunk)
                    record.flush()
                    last_word = now
                    for line in lines.feed(chunk):
                        saving = hear(line)
                if now - last_tick > 1:
                    last_tick = now
                    tick()
                if now - last_word > silence and not stopping.begun:
                    is_hung = True
                stopping.go_on(now, asked.times if asked.signal else int(is_hung), saving and not is_hung)
                # its children may hold the pipe open when it is gone itself
                if chunk == b"" or (chunk is None and is_gone):
                    break
            code = stopping.wait(asked)
            for line in lines.rest():
                hear(line)
            return code, is_hung
    finally:
        stopping.end()


def _pump(pipe: int, chunks: queue.Queue[bytes]) -> None:
    """Chunks as they come, an empty one at the end. Waiting for a pipe with a time limit is not possible on every system."""
    try:
        while chunk := os.read(pipe, 1 << 16):
            chunks.put(chunk)
    except OSError:  # closed under us, when the tool is ended
        pass
    chunks.put(b"")


class Lines:
    """Bytes as lines; a bar that redraws itself after a carriage return is a line each time."""

    def __init__(self):
        self._left = b""

    def feed(self, chunk: bytes) -> list[str]:
        *whole, self._left = re.split(rb"[\r\n]", self._left + chunk)
        return [line.decode("utf-8", "replace") for line in whole if line.strip()]

    def rest(self) -> list[str]:
        """What ended without an end of line."""
        left, self._left = self._left, b""
        return [left.decode("utf-8", "replace")] if left.strip() else []


class Stopping:
    """The way from asking a process group to stop to ending it."""

    def __init__(self, process: subprocess.Popen, grace: float):
        self.process, self.grace = process, grace
        self.asked_at: float | None = None
        self.sent: list[int] = []

    @property
    def begun(self) -> bool:
        return self.asked_at is not None

    def go_on(self, now: float, times: int, saving: bool) -> None:
        """`times`: how often a stop was asked for; a second time does not wait for what is being saved."""
        if not times:
            return
        self.asked_at = now if self.asked_at is None else self.asked_at
        waited = now - self.asked_at
        if not self.sent:
            if not saving or times > 1 or waited > SAVING:
                self._send(signal.SIGINT)
                self.asked_at = now
        elif len(self.sent) == 1 and (waited > self.grace or times > 1):
            self._send(signal.SIGTERM)
        elif len(self.sent) == 2 and (waited > 2 * self.grace or times > 2):
            self._send(getattr(signal, "SIGKILL", signal.SIGTERM))

    def wait(self, asked: Asked) -> int:
        """The exit code, when its output has ended."""
        while (code := self.process.poll()) is None:
            self.go_on(time.monotonic(), asked.times, saving=False)
            time.sleep(0.05)
        return code

    def _send(self, number: int) -> None:
        self.sent.append(number)
        if os.name == "nt":
            self.process.terminate()
            return
        with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Leaves none of its processes behind."""
        if self.process.poll() is None:
            self._send(signal.SIGINT)
            try:
                self.process.wait(min(self.grace, 10))
            except subprocess.TimeoutExpired:
                self._send(getattr(signal, "SIGKILL", signal.SIGTERM))
                self.process.wait()
        elif os.name != "nt":
            self._send(getattr(signal, "SIGKILL", signal.SIGTERM))  # workers of its own that outlived it
        self.process.stdout.close()
