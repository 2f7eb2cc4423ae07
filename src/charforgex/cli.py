"""The entry points: `python train.py a=b` and `charforgex train a=b` are the same call, and Hydra's own flags work in both.

What the user can mend ends in one red line and exit code 2, an interruption in 130 or 143, our own mistakes in a traceback and 1.
CHARFORGEX_DEBUG=1 shows the traceback of the former, too. The function that does the work is imported once the config is known to be whole.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from charforgex.errors import CharForgeError, ConfigError
from charforgex.overrides import quote_texts
from charforgex.runs import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK

COMMANDS = {
    "curate": (
        "charforgex.curation.run:curate",
        "a mess of pictures, archives and videos to a dataset; curate report only looks, curate clips makes clips of videos",
    ),
    "train": ("charforgex.training.run:train", "pictures of a character to a LoRA"),
    "plan": ("charforgex.training.plan_run:plan", "memory and time of a training before it begins; takes what train takes"),
    "import-config": ("charforgex.backends.importing:import_config", "settings of ai-toolkit or kohya as an experiment of ours"),
    "generate": ("charforgex.generation.run:generate", "pictures with a base model and LoRAs"),
    "interpolate": ("charforgex.generation.interpolate:interpolate", "frames between a video's frames: smoother, at the same speed"),
    "evaluate": ("charforgex.evaluation.run:evaluate", "is it the character, does it obey, which is better: numbers with pictures"),
    "merge": ("charforgex.merging.run:merge", "several LoRAs to one, without a base model"),
    "compare": ("charforgex.evaluation.compare:compare", "evaluations and trainings side by side, as far as they can be compared"),
    "bench": ("charforgex.training.bench:bench", "bench characters: is a change of the training a better one?"),
    "votes": ("charforgex.evaluation.votes:votes", "what people's votes on a voting page say, and whether they are enough"),
}
CONFIGS = {"plan": "train"}  # of commands whose settings are another's
CURATE_CLIPS = "charforgex.curation.clips.run:curate_clips"  # `charforgex curate clips`, which conf/curate_clips.yaml is of
# What may stand alone on the command line, by its end, and its setting
FILES = {
    "merge": (".safetensors", "lora"), "evaluate": ("", "lora"), "votes": (".json", "votes"), "compare": ("", "runs"),
    "bench": ("", "suite"), "interpolate": ("", "files"), "import-config": ((".yaml", ".yml", ".toml"), "files"),
}  # fmt: skip
IS_SETTING = re.compile(r"~[^/]|.*=", re.DOTALL)  # name=value, or ~name, which is not the path ~/name
# Hydra's flags that a word follows
FLAGS = ["--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"]
TOOLS = {  # on LoRA files, as `charforgex lora <tool> a.safetensors [name=value ...]`: entry and purpose; conf/lora_<tool>.yaml
    "bake": ("charforgex.toolbox.baking:bake", "into a base model for good: a diffusers folder or a single file"),
    "inspect": ("charforgex.toolbox.inspecting:inspect", "what a file is, says of itself, and what is wrong with it"),
    "convert": ("charforgex.toolbox.converting:convert", "another format or dtype; DoRA, LoHa and LoKr as LoRA"),
    "extract": ("charforgex.toolbox.extracting:extract", "what a checkpoint has learnt beyond its base, as a LoRA"),
    "resize": ("charforgex.toolbox.resizing:resize", "fewer directions: by rank, energy, ratio or error"),
    "prune": ("charforgex.toolbox.pruning:prune", "without layers, weak directions or small entries"),
    "quantize": ("charforgex.toolbox.quantizing:quantize", "factors in 8 or 4 bits"),
    "distill": (
        "charforgex.training.distilling:distill",
        "several LoRAs into one, or high rank into low, by what the base predicts with them",
    ),
    "analyze": ("charforgex.toolbox.analyzing:analyze", "what it changes, where and how much; how far several get in each other's way"),
    "ablate": ("charforgex.toolbox.ablating:ablate", "which of its parts make the character: each left out in turn, drawn and measured"),
    "decompose": ("charforgex.toolbox.decomposing:decompose", "its directions by strength, and chosen ones alone as a LoRA"),
    "words": ("charforgex.toolbox.directions:words", "which words it changes the meaning of, and sliders along such directions"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: the first word is the command, the rest is Hydra's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print("usage: charforgex <command> [name=value ...] [--multirun] [--cfg job] [--help]\n")
        print(_listed(COMMANDS | {"lora": ("", f"LoRA files: {', '.join(TOOLS)}")}))
        raise SystemExit(EXIT_OK)
    if command == "lora":
        _tool(arguments[1:])
    if command == "--version":
        from importlib.metadata import version

        print(f"charforgex {version('charforgex')}")
        raise SystemExit(EXIT_OK)
    if command not in COMMANDS:
        from charforgex.binding import not_among

        complain(ConfigError(not_among(f"the command {command}", command, list(COMMANDS))))
        raise SystemExit(EXIT_ERROR)
    if arguments[:2] == ["curate", "report"]:
        arguments[1] = "only_report=true"
    run(command, arguments[1:])


def _listed(commands: Mapping[str, tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<13} {purpose}" for name, (_, purpose) in commands.items())


def _tool(arguments: Sequence[str]) -> None:
    """`charforgex lora <tool> a.safetensors [b.safetensors ...] [name=value ...]`."""
    tool = arguments[0] if arguments else "--help"
    if tool in ("-h", "--help"):
        print(f"usage: charforgex lora <tool> a.safetensors [name=value ...] [--help]\n\n{_listed(TOOLS)}")
        raise SystemExit(EXIT_OK)
    if tool not in TOOLS:
        from charforgex.binding import not_among

        complain(ConfigError(not_among(f"the tool {tool}", tool, list(TOOLS))))
        raise SystemExit(EXIT_ERROR)
    run(f"lora_{tool}", with_files(arguments[1:]))


def with_files(arguments: Sequence[str], suffix: str | tuple[str, ...] = ".safetensors", setting: str = "lora") -> list[str]:
    """Files that stand alone on the command line as a setting, and `--dry-run` as `dry_run=true`."""
    from charforgex.overrides import written

    alone = [argument for before, argument in zip(["", *arguments], arguments, strict=False) if before not in FLAGS]
    files = [argument for argument in alone if argument.endswith(suffix) and not IS_SETTING.match(argument) and argument[:1] != "-"]
    rest = ["dry_run=true" if argument == "--dry-run" else argument for argument in arguments if argument not in files]
    return ([f"{setting}={written(files[0] if len(files) == 1 else files)}"] if files else []) + rest


def settings_first(arguments: Sequence[str]) -> list[str]:
    """Settings before Hydra's flags, wherever they were typed: `a=1 -m b=2,3` is an error of argparse, which takes all settings or none
    behind a flag."""
    settings = [argument for argument in arguments if argument[:1] != "-" and IS_SETTING.match(argument)]
    return settings + [argument for argument in arguments if argument not in settings]


def run(command: str, arguments: Sequence[str] | None = None, root: Path | None = None) -> None:
    """Runs one command with Hydra's command line and exits. `root` is a checkout whose conf/ comes before the packaged one."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = sys.argv[0] if arguments is None else f"{Path(sys.argv[0]).name} {command.replace('lora_', 'lora ')}"
    if command == "curate" and given[:1] == ["clips"]:
        command, given, entry = "curate_clips", given[1:], CURATE_CLIPS
    else:
        entry, _ = COMMANDS[command] if command in COMMANDS else TOOLS[command.removeprefix("lora_")]
    arguments = quote_texts(given)
    if command in FILES:
        arguments = with_files(arguments, *FILES[command])
    folder = root / "conf" if root and (root / "conf").is_dir() else None
    raise SystemExit(guarded(entry, CONFIGS.get(command, command), arguments, name, folder))


def guarded(entry: str, config_name: str, arguments: list[str], program: str, folder: Path | None = None) -> int:
    """Runs `entry` ("module:function") on the config and returns the exit code; a SystemExit raised on the way passes."""
    try:
        _hydra(entry, config_name, arguments, program, folder)
        sys.stdout.flush()  # what is left of a short text would meet a closed pipe at the interpreter's exit, where nobody can catch it
    except CharForgeError as error:
        complain(error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `train.py --help | head`: nobody reads on, and closing stdout at exit must not fail for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def complain(error: CharForgeError) -> None:
    """One line (more when several settings are wrong) on stderr; red on a terminal unless NO_COLOR is set."""
    if os.environ.get("CHARFORGEX_DEBUG") == "1":
        traceback.print_exception(error)
        return
    text = f"{type(error).__name__}: {error}"
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31m{text}\033[0m" if colour else text, file=sys.stderr, flush=True)


def _hydra(entry: str, config_name: str, arguments: list[str], program: str, folder: Path | None) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser

    from charforgex.config import Search, complaints, explained, help_text, prepare

    folder, arguments = prepare(folder), settings_first(arguments)
    task = Task(entry)
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it otherwise prints its own report and exits
    try:
        options, _ = get_args_parser().parse_known_args(arguments)
        config_name = options.config_name or config_name
        search = Search(config_name, Path(options.config_path or folder), options.config_dir)
        with explained(search, options.overrides):
            if options.help:
                print(help_text(search, options.overrides, program))
                return
            if found := list(complaints(search, options.overrides)):
                raise ConfigError("\n".join(found))  # sooner than Hydra finds it, and before it makes a sweep's folder
            hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(task)()
    except ValueError as error:
        if task.started or isinstance(error, CharForgeError):
            raise
        raise ConfigError(str(error)) from error  # flags that do not go together
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR") if before[1] is None else os.environ.update(HYDRA_FULL_ERROR=before[1])
    if task.error is not None:
        raise task.error


@dataclasses.dataclass
class Task:
    """What Hydra calls with a composed config: checks it, then imports and calls the entry. Its value is what a sweep optimises."""

    entry: str
    started: bool = False
    error: Exception | None = None

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        self.started = True
        hydra_cfg = HydraConfig.get()
        try:
            launcher = hydra_cfg.runtime.choices.get("hydra/launcher")
            if hydra_cfg.mode != RunMode.MULTIRUN and launcher != "basic":
                raise ConfigError(f"hydra/launcher={launcher} runs the jobs of a sweep, also of one job; add -m.")
            self.check_keys(cfg)
            module, _, function = self.entry.partition(":")
            return getattr(importlib.import_module(module), function)(cfg)
        except Exception as error:
            if hydra_cfg.mode == RunMode.MULTIRUN:
                if isinstance(error, CharForgeError):
                    complain(error)  # now: Hydra raises it only when the sweep's other jobs are through
                raise
            self.error = error  # raised when Hydra is done, which would print a line of its own before ours
            return None

    def check_keys(self, cfg: Any) -> None:
        """Raises ConfigError unless every key of the job that Hydra is at is known, filled and resolved."""
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from charforgex.config import check

        hydra_cfg = HydraConfig.get()
        given = OmegaConf.to_container(hydra_cfg.overrides, resolve=False)  # an override may hold a reference of the job's config
        check(cfg, GlobalHydra.instance().config_loader(), hydra_cfg.job.config_name, given["hydra"] + given["task"])

    def check(self, cfg: Any) -> None:
        """For launchers: all that can be said of the settings before anything is run, so that a mistake in one job costs no other."""
        self.check_keys(cfg)
        module = importlib.import_module(self.entry.partition(":")[0])
        if hasattr(module, "check") and cfg.get("resume") is None:
            module.check(cfg)
