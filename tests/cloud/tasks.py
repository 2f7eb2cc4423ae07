"""What the tests' jobs do: functions that another process can import."""

import os
import signal
import sys
import time
from pathlib import Path


def double(cfg):
    return 2 * cfg.x


def picky(cfg):
    from charforgex.errors import DataError

    if cfg.x == 2 and not Path("mended").exists():
        raise DataError("2 is too many.\nTake fewer.")
    with Path(f"ran_{cfg.x}").open("a") as file:
        file.write("once\n")
    return 2 * cfg.x


def steps(cfg):
    """Counts to 40 in a file, a tenth of a second each; asked to stop, it saves and exits, as a training does; begins where it left."""
    path, asked = Path(f"steps_{cfg.x}"), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    done = len(path.read_text().split()) if path.exists() else 0
    with path.open("a") as file:
        for step in range(done, 40):
            file.write(f"{step}\n")
            file.flush()
            time.sleep(0.1)
            if asked:
                sys.exit(143)
    return path.read_text().split() == [str(step) for step in range(40)]


def dies(cfg):
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def tells_its_secret(cfg):
    print(f"the token is {os.environ['HF_TOKEN']}", flush=True)
    return 1


def reads(cfg):
    text = (Path(cfg.data.source) / "a.txt").read_text()
    Path(cfg.out).mkdir(parents=True)
    (Path(cfg.out) / "read.txt").write_text(text)
    return text


def loses_its_machine(cfg):
    """On the first machine that it gets, it takes that away."""
    lost = Path(os.environ["FAKE_SKY"]) / "lost"
    if lost.exists():
        return "second machine"
    lost.touch()
    Path.home().parent.rename(lost.with_name("gone"))
    os.kill(os.getpid(), signal.SIGKILL)
