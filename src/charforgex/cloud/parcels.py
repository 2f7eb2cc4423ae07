"""A job as files: all that another process, on another machine, needs to run it, and what comes back.

    <folder>/<name>-<key>/
        job.json       what to call, where, with which overrides
        config.yaml    the settings, composed, checked and resolved here: nothing is composed again, and no shell quotes anything
        hydra.yaml     Hydra's own settings of this job
        submitted.json who runs it, since it was asked for
        return.json    what came of it: the value, or the error
        delivered      the launch that asked for it has it, with all that belonged to it

The key is a function of the settings, so the same command finds its job again: it waits for one that still runs, takes the value of
one that is through, and gives one that failed another try.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from charforgex import errors
from charforgex.errors import CharForgeError, ConfigError, LaunchError
from charforgex.runs import LOCATIONS, plain, write_atomic, write_json

State = Literal["new", "waiting", "failed", "done", "delivered"]
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; shorter values stand in any text by chance


@dataclass(frozen=True)
class Parcel:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def state(self) -> State:
        if (self.folder / "delivered").exists():
            return "delivered"
        if (self.folder / "return.json").exists():
            return "done" if self.returned()["status"] == "COMPLETED" else "failed"
        return "waiting" if (self.folder / "submitted.json").exists() else "new"

    def job(self) -> dict[str, Any]:
        return json.loads((self.folder / "job.json").read_text(encoding="utf-8"))

    def submitted(self) -> dict[str, Any]:
        return json.loads((self.folder / "submitted.json").read_text(encoding="utf-8"))

    def returned(self) -> dict[str, Any]:
        return json.loads((self.folder / "return.json").read_text(encoding="utf-8"))

    def pack(self, job: Mapping[str, Any], settings: Mapping[str, Any], hydra: str) -> None:
        """Writes what the job needs, for a first or another try. Raises ConfigError if the value of a secret stood in it."""
        from omegaconf import OmegaConf

        texts = {
            "job.json": json.dumps(plain(job), indent=2, ensure_ascii=False),
            "config.yaml": OmegaConf.to_yaml(OmegaConf.create(dict(settings))),
            "hydra.yaml": hydra,
        }
        for name, text in texts.items():
            refuse_secrets(name, text)
        for old in ("return.json", "submitted.json"):
            (self.folder / old).unlink(missing_ok=True)
        for name, text in texts.items():
            write_atomic(self.folder / name, text)

    def submit(self, **who: Any) -> None:
        write_json(self.folder / "submitted.json", who)

    def complete(self, value: Any) -> None:
        """Raises TypeError for a value that JSON has no word for."""
        write_json(self.folder / "return.json", {"status": "COMPLETED", "value": value})

    def fail(self, kind: str, message: str) -> None:
        write_json(self.folder / "return.json", {"status": "FAILED", "kind": kind, "message": message})

    def error(self) -> CharForgeError:
        """What made it fail, as the error that it was there, as far as it is one of ours."""
        returned = self.returned()
        kind = getattr(errors, returned["kind"], None)
        if not (isinstance(kind, type) and issubclass(kind, CharForgeError)):
            return LaunchError(f"{returned['kind']}: {returned['message']}")
        return kind(returned["message"])


def key_of(entry: str, settings: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of what is run, wherever its results go."""
    what = {name: value for name, value in settings.items() if name not in LOCATIONS}
    text = json.dumps(plain([entry, what]), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def find(folder: Path, key: str, taken: Iterable[Parcel], fresh: bool) -> Parcel:
    """The parcel of these settings that is still to be delivered, else a new one, which `fresh` asks for; `taken` are of other jobs."""
    taken = set(taken)
    for number in range(1, 1000):
        parcel = Parcel(folder / (key if number == 1 else f"{key}-{number}"))
        state = parcel.state()
        if parcel not in taken and (state == "new" or (state != "delivered" and not fresh)):
            return parcel
    raise ConfigError(f"{folder} holds 999 jobs of these settings; remove some, or set hydra.launcher.folder.")


def waiting(folder: Path) -> list[Parcel]:
    """All that were submitted and have not come back."""
    return [parcel for parcel in map(Parcel, sorted(folder.glob("*/"))) if parcel.state() == "waiting"]


# ---- secrets ----


def secrets(names: Iterable[str] = ()) -> dict[str, str]:
    """Values in this environment that nobody else is to read: of the variables `names`, and of those that are called so."""
    found = {name: value for name, value in os.environ.items() if name in set(names) or SECRET_NAME.search(name)}
    return {name: value for name, value in found.items() if len(value) >= SHORTEST_SECRET}


def refuse_secrets(where: str, text: str) -> None:
    """Raises ConfigError, which does not say the value, if that of a secret stands in `text`."""
    for name, value in secrets().items():
        if value in text:
            raise ConfigError(
                f"the value of the environment variable {name} would be written into {where}; settings name a secret and do not hold it: "
                f"leave it out, libraries read {name} by themselves (hydra.launcher.secrets=[{name}] takes it along to a cloud)."
            )


def without_secrets(text: str, names: Iterable[str] = ()) -> str:
    """`text` with `<NAME>` where a secret's value stood."""
    for name, value in secrets(names).items():
        text = text.replace(value, f"<{name}>")
    return text
