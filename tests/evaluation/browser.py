"""A headless Chromium, driven over the pipe of its DevTools protocol: JSON and null bytes on file descriptors 3 and 4."""

import base64
import json
import os
import select
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

NAMES = ["google-chrome", "google-chrome-stable", "chrome", "chromium", "chromium-browser", "microsoft-edge"]
NAMES += ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, " ": 32, "Enter": 13, "0": 48, "1": 49, "2": 50, "Tab": 9}
PATIENCE = 60  # seconds


def found() -> str | None:
    """Path of a browser; None where there is none, or no way to talk to it. Ubuntu's snaps see no folder for a profile."""
    paths = [] if os.name == "nt" else filter(None, map(shutil.which, NAMES))
    return next((path for path in paths if "/snap/" not in path), None)


@contextmanager
def opened(url: str, folder: Path):
    """A tab with the page, with `folder` for its profile; downloads land in folder/downloads."""
    arguments = [found(), "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--no-first-run"]
    arguments += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
    arguments += ["--no-sandbox"]  # containers have none, and pages here are our own
    to_read, to_write = map(_high, os.pipe())
    from_read, from_write = map(_high, os.pipe())
    actions = [(os.POSIX_SPAWN_DUP2, to_read, 3), (os.POSIX_SPAWN_DUP2, from_write, 4)]
    actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    process = os.posix_spawn(arguments[0], [*arguments, "about:blank"], os.environ, file_actions=actions)
    os.close(to_read)
    os.close(from_write)
    try:
        yield Tab(to_write, from_read, url, folder / "downloads")
    finally:
        os.kill(process, signal.SIGTERM)
        until = time.monotonic() + 10
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        os.close(to_write)
        os.close(from_read)


def _high(number: int) -> int:
    """The same file under a number that the browser's own do not overwrite."""
    import fcntl  # not on Windows, where no browser is found

    copy = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(number)
    return copy


class Tab:
    def __init__(self, to: int, back: int, url: str, downloads: Path):
        self.to, self.back, self.rest, self.count, self.session = to, back, b"", 0, None
        downloads.mkdir(parents=True, exist_ok=True)
        self.downloads, self.told = downloads, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        for domain in ("Runtime", "Log", "Page"):
            self.ask(f"{domain}.enable")
        self.go(url)

    def go(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def ask(self, method: str, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.heard()).get("id") != self.count:
            self.told.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def heard(self) -> dict:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], max(0, until - time.monotonic()))
            data = os.read(self.back, 1 << 16) if ready else b""
            assert data, "the browser has ended" if ready else "the browser says nothing"
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        until = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """One key, down and up, as a keyboard does it."""
        what = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **what, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **what)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def downloaded(self) -> Path:
        """The one file that was saved, when it is whole."""
        until = time.monotonic() + PATIENCE
        while not (files := [path for path in self.downloads.iterdir() if path.suffix == ".json"]):
            assert time.monotonic() < until, "nothing was saved"
            self.run("1")
            time.sleep(0.05)
        (file,) = files
        return file

    def complaints(self) -> list[str]:
        """Errors on the page's console, and what its policy refused."""
        self.run("1")
        logged = [one["params"]["entry"]["text"] for one in self.told if one.get("method") == "Log.entryAdded"]
        return logged + [str(one["params"]) for one in self.told if one.get("method") == "Runtime.exceptionThrown"]

    def looks(self, width: int, height: int, dark: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self) -> bytes:
        """PNG of what is seen."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
