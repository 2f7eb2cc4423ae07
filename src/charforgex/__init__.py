"""CharForgeX: from a folder of pictures of a character to a LoRA that is that character.

    import charforgex

    run = charforgex.train(data={"source": "pictures", "trigger": "ohwx woman"}, trainer={"steps": 400})
    charforgex.generate(lora=run["lora"], prompt="a portrait of {trigger} at the beach")

Settings are those of the command line; dotted ones are nested as above, or spelled out (`**{"trainer.steps": 400}`).
"""

from __future__ import annotations

from typing import Any

__all__ = ["curate", "curate_clips", "evaluate", "generate", "interpolate", "lora_tool", "merge", "train"]


def curate(**settings: Any) -> dict[str, Any]:
    """What `charforgex curate name=value ...` does. Returns the content of its result.json; raises a CharForgeError."""
    return _run("curate", "charforgex.curation.run:curate", settings)


def curate_clips(**settings: Any) -> dict[str, Any]:
    """What `charforgex curate clips name=value ...` does. Returns the content of its result.json; raises a CharForgeError."""
    return _run("curate_clips", "charforgex.curation.clips.run:curate_clips", settings)


def train(**settings: Any) -> dict[str, Any]:
    """What `python train.py name=value ...` does. Returns the content of the run's result.json; raises a CharForgeError."""
    return _run("train", "charforgex.training.run:run", settings)


def generate(**settings: Any) -> dict[str, Any]:
    """What `python generate.py name=value ...` does. Returns the content of its result.json; raises a CharForgeError."""
    return _run("generate", "charforgex.generation.run:generate", settings)


def evaluate(**settings: Any) -> dict[str, Any]:
    """What `python evaluate.py name=value ...` does. Returns the content of its result.json; raises a CharForgeError."""
    return _run("evaluate", "charforgex.evaluation.run:run", settings)


def interpolate(**settings: Any) -> dict[str, Any]:
    """What `charforgex interpolate name=value ...` does, in and out as `files=[...]`. Returns what was made; raises a CharForgeError."""
    return _run("interpolate", "charforgex.generation.interpolate:interpolate", settings)


def merge(**settings: Any) -> dict[str, Any]:
    """What `python merge.py name=value ...` does. Returns what was made, see charforgex.merging.run; raises a CharForgeError."""
    return _run("merge", "charforgex.merging.run:merge", settings)


def lora_tool(tool: str, **settings: Any) -> dict[str, Any]:
    """What `charforgex lora <tool> name=value ...` does, files as `lora=`. Returns what it found out or made; raises a CharForgeError."""
    from charforgex.binding import not_among
    from charforgex.cli import TOOLS
    from charforgex.errors import ConfigError

    if tool not in TOOLS:
        raise ConfigError(not_among(f"the tool {tool}", tool, list(TOOLS)))
    return _run(f"lora_{tool}", TOOLS[tool][0], settings)


def _run(command: str, entry: str, settings: dict[str, Any]) -> dict[str, Any]:
    from importlib import import_module

    from charforgex.config import compose
    from charforgex.overrides import as_overrides

    cfg = compose(command, as_overrides(settings))  # a wrong setting stops before anything heavy is imported
    module, _, function = entry.partition(":")
    return getattr(import_module(module), function)(cfg)
