"""The schema of conf/backend: the tool that trains in our place, and where it is. No torch here, so that a bad config stops in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from charforgex.config import Range, bind
from charforgex.errors import ConfigError


@dataclass(frozen=True)
class BackendSettings:
    """`folder` is the user's own checkout of the tool, `python` the interpreter of its environment."""

    name: Literal["ai_toolkit", "kohya"]
    folder: Path
    python: Path | None = None
    silence: Annotated[int, Range(at_least=1)] = 3600

    def interpreter(self) -> Path:
        """Raises ConfigError if there is none."""
        found = [self.python] if self.python else [self.folder / venv / end for venv in ("venv", ".venv") for end in ENDS]
        for path in found:
            if path.expanduser().is_file():
                return path.expanduser().absolute()
        if self.python:
            raise ConfigError(
                f"backend.python={self.python} is not there; name the python of the environment that the tool is installed in."
            )
        raise ConfigError(
            f"{self.folder} has no environment in venv/ or .venv/; name the python that the tool is installed for: backend.python=<path>."
        )


ENDS = ("bin/python", "Scripts/python.exe")


@dataclass(frozen=True)
class AiToolkitSettings(BackendSettings):
    quantize: bool | None = None  # None: for Flux and SD3
    low_vram: bool = False


@dataclass(frozen=True)
class KohyaSettings(BackendSettings):
    fp8_base: bool = False
    blocks_to_swap: Annotated[int, Range(at_least=0)] = 0


KINDS = {"ai_toolkit": AiToolkitSettings, "kohya": KohyaSettings}


def read(node: Mapping[str, Any]) -> BackendSettings:
    """The group `backend` as its tool's settings. Raises ConfigError."""
    return bind(KINDS.get(node["name"], BackendSettings), node, "backend")
