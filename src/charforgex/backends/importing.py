"""`charforgex import-config`: ai-toolkit's or kohya's settings as an experiment of ours, with a list of what has no equal here and why.

Their defaults are not ours, so what they leave unsaid is written out, too. The inverse of `ai_toolkit.translate` and `kohya.translate`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.backends.common import put
from charforgex.binding import bind
from charforgex.errors import ConfigError
from charforgex.runs import write_atomic

if TYPE_CHECKING:
    from omegaconf import DictConfig

FAMILIES = {"sdxl": "sdxl_base", "flux": "flux_dev", "sd3": "sd35_large"}  # the choice of conf/family where the base's name tells no other


@dataclass(frozen=True)
class Settings:
    files: str | list[str]
    name: str | None = None
    out: Path = Path("experiment")
    overwrite: bool = False


@dataclass
class Theirs:
    """A tool's settings by dotted names, ticked off as they are understood."""

    values: dict[str, Any]
    taken: set[str] = field(default_factory=set)
    lost: list[tuple[str, Any, str]] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def lose(self, key: str, why: str) -> None:
        """A setting that is there and has no equal here."""
        if key in self.values:
            self.taken.add(key)
            self.lost.append((key, self.values[key], why))

    def pass_over(self, *keys: str) -> None:
        """Settings of no concern: places, logs, caches. `a.*` is all below a."""
        for key in keys:
            self.taken |= {known for known in self.values if known == key or (key.endswith("*") and known.startswith(key[:-1]))}

    def rest(self) -> None:
        for key in self.values:
            if key not in self.taken:
                self.lose(key, "no equal here is known")


@dataclass
class Imported:
    """An experiment: choices of groups, settings, and what was lost as (their name, value, why)."""

    name: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    lost: list[tuple[str, Any, str]] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        put(self.values, key, value)

    def text(self, source: str) -> str:
        import yaml

        lines = ["# @package _global_", f"# python train.py --config-dir . experiment={self.name}", f"# Imported from {source}."]
        lines += ["defaults:", *(f"  - override /{group}: {choice}" for group, choice in self.groups.items()), ""]
        body = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True, width=130)
        if self.lost:
            told = [f"# {key}: {_short(value)}    {why}" for key, value, why in self.lost]
            body += "\n".join(["\n# What has no equal here, and why:", *told]) + "\n"
        return "\n".join(lines) + "\n" + body


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 80 else text[:77] + "..."


def import_config(cfg: DictConfig) -> dict[str, Any]:
    """What `charforgex import-config` does. Returns {"experiment": path, "lost": [[name, value, why], ...]}. Raises ConfigError."""
    settings = bind(Settings, cfg, "")
    files = [Path(name).expanduser() for name in ([settings.files] if isinstance(settings.files, str) else settings.files)]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"files={path} is not there.")
    imported = read(files)
    name = settings.name or re.sub(r"[^A-Za-z0-9._-]+", "-", imported.name).strip("-.") or "imported"
    imported.name = name
    imported.set("name", name)
    path = settings.out / f"{name}.yaml"
    if path.exists() and not settings.overwrite:
        raise ConfigError(f"{path} is there already; say overwrite=true, or name=<another>.")
    write_atomic(path, imported.text(" and ".join(str(file) for file in files)))
    for key, value, why in imported.lost:
        print(f"{key}={_short(value)} has no equal: {why}")
    home = f" --config-dir {path.parent.parent}" if path.parent.name == "experiment" else ""
    print(f"{path}: python train.py{home} experiment={name}")
    return {"experiment": str(path), "lost": [list(one) for one in imported.lost]}


def read(files: Sequence[Path]) -> Imported:
    """The tool is known by the files' ends. Raises ConfigError for files that are of neither, or cannot be read."""
    from charforgex.backends.importing_ai_toolkit import from_ai_toolkit
    from charforgex.backends.importing_kohya import from_kohya

    yamls = [path for path in files if path.suffix in (".yaml", ".yml")]
    tomls = [path for path in files if path.suffix == ".toml"]
    if len(yamls) == 1 and len(files) == 1:
        return from_ai_toolkit(_yaml(yamls[0]), yamls[0])
    if len(tomls) == len(files) and 1 <= len(files) <= 2:
        contents = [_toml(path) for path in tomls]
        runs = [content for content in contents if "datasets" not in content]
        sets = [content for content in contents if "datasets" in content]
        if len(runs) == 1:
            return from_kohya(runs[0], sets[0] if sets else None, tomls[0])
        raise ConfigError(f"files={tomls[0]} holds datasets alone; name the TOML of the training, too.")
    raise ConfigError(f"files={', '.join(map(str, files))}: one .yaml of ai-toolkit, or one .toml of kohya and that of its dataset.")


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"files={path} is no YAML: {' '.join(str(error).split())}") from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"files={path} is no TOML: {error}") from error


# ---- what both imports need ----


def number(value: Any) -> Any:
    """A number that YAML takes for a text: 1e-4 without a dot."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value, re.IGNORECASE):
        return float(value)
    return value


def choose_base(imported: Imported, family: str, base: str) -> None:
    """The choice of conf/family whose base this is; else that of the family's best known one, with this base."""
    from omegaconf import OmegaConf

    from charforgex.config import conf_folder

    choices = {path.stem: OmegaConf.load(path) for path in sorted((conf_folder() / "family").glob("*.yaml"))}
    known = [name for name, config in choices.items() if config.name == family and config.source == base]
    imported.groups["family"] = known[0] if known else FAMILIES[family]
    if not known:
        imported.set("family.source", base)


def choose_optimizer(imported: Imported, theirs: Theirs, key: str, names: Mapping[str, tuple[str, dict]], options: dict[str, Any]) -> None:
    """Ours by the tool's name and options, of which the known ones are taken out."""
    name = str(theirs.get(key, "adamw"))
    ours = next((ours for ours, (their, _) in names.items() if their.lower() == name.lower()), None)
    if ours is None:
        theirs.lose(key, f"it is adamw now; there are {', '.join(names)}")
        ours = "adamw"
    imported.groups["optimizer"] = ours
    decays = {"prodigy": 0.0, "adafactor": 0.0, "schedule_free": 0.0}
    imported.set("optimizer.weight_decay", number(options.pop("weight_decay", decays.get(ours, 0.01))))
    if ours == "prodigy":
        imported.set("optimizer.d_coef", number(options.pop("d_coef", 1.0)))
    for option, value in names[ours][1].items():
        if options.get(option, value) == value:
            options.pop(option, None)
    for option, value in options.items():
        theirs.lost.append((f"optimizer {option}", value, "an option that the optimizer does not have here"))


def join_folders(imported: Imported, folders: Sequence[tuple[str, int]]) -> list[str]:
    """Sets data.source to the folders' parent, with repeats, where they lie side by side. Returns what is left out."""
    if not folders:
        return []
    paths = [Path(folder) for folder, _ in folders]
    if len(paths) > 1 and len({path.parent for path in paths}) == 1:
        imported.set("data.source", str(paths[0].parent))
        imported.set("data.repeats", {path.name: count for path, (_, count) in zip(paths, folders, strict=True) if count > 1})
        return []
    imported.set("data.source", folders[0][0])
    return [folder for folder, _ in folders[1:]]
