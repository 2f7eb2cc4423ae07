"""events.jsonl: what happens in a run, a line of JSON each, for whoever follows it from outside. docs/monitoring.md has the schema.

Lines are appended whole and never changed, so that a file can be followed as it grows. A run that goes on from an earlier step says so:
`read_events` leaves out what that has undone.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from charforgex.runs import EXIT_INTERRUPTED, plain
from charforgex.training.trial import Pruned

NAME = "events.jsonl"
UNDONE = ("step", "measured", "picture", "checkpoint")  # what no longer holds above a step that was gone back to
BACK = ("resumed", "rolled_back")


class Events:
    """A run's stream. As a context it also says how the run ended, if it has begun: `ended`, `stopped` or `failed`, with the reason.

    `speaking` false tells nothing: of several processes one speaks for all.
    """

    def __init__(self, run_dir: Path, speaking: bool = True):
        self.run_dir, self.path, self.speaking = run_dir, run_dir / NAME, speaking
        self.step, self.begun = 0, False

    def begin(self, **values: Any) -> None:
        """The first line of every sitting: `started`."""
        self.begun = True
        before = self.path.read_bytes() if self.path.exists() else b""
        if self.speaking and before and not before.endswith(b"\n"):  # a machine that lost power in the middle of a line
            self._append("\n")
        self.tell("started", pid=os.getpid(), config="config.yaml", **values)

    def tell(self, event: str, step: int | None = None, **values: Any) -> None:
        """Appends one line. Without a step it is that of the line before."""
        self.step = self.step if step is None else step
        if self.speaking:
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            row = {"time": time, "event": event, "step": self.step} | plain(values)
            self._append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def picture(self, name: str, path: Path, step: int) -> None:
        """A picture, or a clip, that was made; `path` lies in the run folder."""
        self.tell("picture", step, name=name, file=path.relative_to(self.run_dir).as_posix())

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self.begun:
            return
        if error is None:
            self.tell("ended", result="result.json")
        elif isinstance(error, Pruned):
            self.tell("stopped", reason=str(error), exit_code=0)
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            code = error.code if isinstance(error, SystemExit) else EXIT_INTERRUPTED
            self.tell("stopped", reason="it was asked to", exit_code=code)
        else:
            self.tell("failed", reason=str(error), error=type(error).__name__)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All that still holds: where a run went back to a step, what it had done above that one is left out. A line cut short is no line."""
    found: list[dict[str, Any]] = []
    for line in (run_dir / NAME).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["event"] in BACK:
            found = [one for one in found if one["event"] not in UNDONE or one["step"] <= row["step"]]
        found.append(row)
    return found
