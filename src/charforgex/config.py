"""From command-line overrides to a config that is whole: composed by Hydra, every key known, every `???` filled, every reference resolved.

    cfg = compose("train", ["steps=200", "lora.rank=8"])

A key is known when a config group's own yaml has it; presets (files with `# @package _global_`, as in `experiment/` and `debug/`) and the
command line may only change what is there. A node that is `{}` in its yaml takes any names. Hydra and OmegaConf are imported when needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.binding import Range, arguments, bind, nearest, not_among, show, unknown
from charforgex.errors import CharForgeError, ConfigError

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import DictConfig

__all__ = ["Range", "Search", "arguments", "bind", "check", "compose", "conf_folder", "nearest", "unknown"]

SYNTAX = "settings are written name=value; a value with spaces, commas, brackets or equal signs is quoted twice: \"name='a, b'\""
NEEDED = "{0} is needed and cannot be removed with ~{0}; choose a value: {0}=..."
GROUP = "{0} is a group of settings and takes no value of its own; set one of {1}"
# Command -> patterns of settings that come with a group and have no effect there, and the way out. To choose the group is fine.
IDLE = {
    "generate": {
        r"family\.dtype": "it is of training; say dtype=...",
        r"family\.recipe\.(?!(sampling_steps|guidance|true_guidance)$).+": "it is of training; leave it out",
    }
}


def conf_folder() -> Path:
    """conf/, packaged beside this file or at the root of the checkout that this file lies in; sweeps/ lies beside it in both."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the folder conf/ is neither in {here} nor in {here.parents[1]}; reinstall with: pip install .")


@dataclasses.dataclass(frozen=True)
class Search:
    """Where a config is composed from: `<name>.yaml` in `folder`, and the folder of --config-dir, which comes first."""

    name: str
    folder: Path
    extra: str | None = None

    def loader(self) -> ConfigLoaderImpl:
        """Hydra's own is gone by the time that its error arrives."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra._internal.utils import create_config_search_path

        search_path = create_config_search_path(str(prepare(self.folder)))
        if self.extra is not None and Path(self.extra).is_dir():
            search_path.prepend("command-line", f"file://{Path(self.extra).resolve()}")
        return ConfigLoaderImpl(search_path)


def compose(config_name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> DictConfig:
    """The checked config that `<config_name>.yaml` and `overrides` make. `folder` is another conf/ to read. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    search = Search(config_name, prepare(folder))
    outer = GlobalHydra.instance().hydra  # of a command that composes another's config, such as bench
    GlobalHydra.instance().clear()
    try:
        with explained(search, overrides), initialize_config_dir(str(search.folder), version_base="1.3"):
            cfg = hydra_compose(config_name, list(overrides))
            check(cfg, GlobalHydra.instance().config_loader(), config_name, overrides)
    finally:
        GlobalHydra.instance().hydra = outer
    return cfg


def prepare(folder: Path | None = None) -> Path:
    """The conf/ folder to compose from. `${charforgex.sweeps:}` becomes the sweeps/ beside it, for hydra.searchpath."""
    from omegaconf import OmegaConf

    folder = folder or conf_folder()
    OmegaConf.register_new_resolver("charforgex.sweeps", lambda: str(folder.parent / "sweeps"), replace=True)
    return folder


def check(cfg: DictConfig, loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> None:
    """Raises ConfigError with all keys that no group declares or that have no effect, else all that are not filled, else what cannot be
    resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = declared(loader, config_name, overrides)
    wrong = [*strangers(cfg, schema), *_without_effect(cfg, schema, IDLE.get(config_name, {}))]
    if wrong:
        raise ConfigError("\n".join(wrong))
    missing = [key for key, value in dotted(OmegaConf.to_container(cfg, resolve=False)) if value == "???"]
    if missing:
        raise ConfigError("some settings have no value yet; add to the command: " + " ".join(f"{key}=..." for key in missing))
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the config'} cannot be resolved: {_first_line(error)}") from error


def declared(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What the chosen groups' own yamls hold: the config without presets and without values from the command line."""
    from hydra._internal.defaults_list import create_defaults_list

    # Hydra's public interface composes everything or nothing; these are its own two steps, with the presets left out between them.
    parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, list(overrides))
    groups = [override for override in parsed if repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)]
    groups = [override for override in groups if not override.is_delete()]
    parts = create_defaults_list(repository, config_name, groups, prepend_hydra=True, skip_missing=True).defaults
    parts = [part for part in parts if part.primary or not (_is_preset(part, repository) or _is_hydras(part))]
    cfg = loader._compose_config_from_defaults_list(parts, repository)
    cfg.pop("hydra", None)
    return cfg


def _is_preset(part: Any, repository: Any) -> bool:
    """Whether a file says `# @package _global_` in its first line: it changes what others declare."""
    loaded = repository.load_config(part.config_path)
    return loaded is not None and loaded.header.get("package") == "_global_"


def _is_hydras(part: Any) -> bool:
    return part.package.partition(".")[0] == "hydra"


def strangers(cfg: DictConfig, schema: DictConfig) -> Iterator[str]:
    """A sentence for each key that only one of the two has, and for each group that became a plain value."""
    from omegaconf import OmegaConf

    values, shape = (OmegaConf.to_container(node, resolve=False) for node in (cfg, schema))
    valid = [key for key, _ in dotted(shape)]
    yield from (unknown(key, valid) for key in _strange(values, shape))
    yield from (NEEDED.format(key) for key in _strange(shape, values))
    yield from (GROUP.format(key, ", ".join(inner)) for key, inner in _flat(values, shape))


def _flat(values: dict, shape: dict) -> Iterator[tuple[str, list[str]]]:
    """Where `values` has a plain value and `shape` a group: its name, and its settings'."""
    groups = {key: [f"{key}.{name}" for name in inner] for key, inner in dotted(shape) if isinstance(inner, dict) and inner}
    yield from ((key, groups[key]) for key, value in dotted(values) if key in groups and not isinstance(value, dict))


def _without_effect(cfg: DictConfig, schema: DictConfig, idle: dict[str, str]) -> Iterator[str]:
    """A sentence for each setting that was changed and that the command has no use for."""
    from omegaconf import OmegaConf

    if not idle:
        return
    values, shape = (dict(dotted(OmegaConf.to_container(node, resolve=False))) for node in (cfg, schema))
    for key, value in values.items():
        way_out = next((words for pattern, words in idle.items() if re.fullmatch(pattern, key)), None)
        if way_out and key in shape and value != shape[key]:
            yield f"{key}={show(value)} has no effect here: {way_out}"


def _strange(values: dict, shape: dict, prefix: str = "") -> Iterator[str]:
    """The names of what `values` has and `shape` has not."""
    for key, value in values.items():
        if key not in shape:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and isinstance(shape[key], dict) and shape[key]:
            yield from _strange(value, shape[key], f"{prefix}{key}.")


def dotted(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below `node` with its value, by its full name."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


# ---- what Hydra and OmegaConf raise, in words that name the setting and the way out ----


@contextlib.contextmanager
def explained(search: Search, overrides: Sequence[str]) -> Iterator[None]:
    """Turns what the libraries raise into a ConfigError that tells all that is wrong with the overrides at once."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"a yaml file cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # Hydra answers some overrides with a bare ValueError
        found = list(complaints(search, overrides)) if not isinstance(error, CharForgeError) else []
        if not found and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        raise ConfigError("\n".join(found) or reworded(error)) from error


def complaints(search: Search, overrides: Iterable[str]) -> Iterator[str]:
    """A sentence for each override that cannot be read, chooses what is not there, or sets what nothing declares."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = []
    for text in overrides:
        override = _parse(text)
        if isinstance(override, str):
            yield override
        else:
            parsed.append(override)

    loader = search.loader()
    try:
        choices = {group: options for group, options in group_choices(loader, search.name).items() if options}
        groups = [override for override in parsed if override.key_or_group in choices]
        wrong = [sentence for override in groups for sentence in _wrong_choice(override, choices[override.key_or_group])]
        yield from wrong
        chosen = [] if wrong else [override.input_line for override in groups if not override.is_sweep_override()]
        shape = OmegaConf.to_container(declared(loader, search.name, chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return  # the groups themselves do not compose: the first error says why
    valid = [*(key for key, _ in dotted(shape)), *choices]
    for override in parsed:
        key = override.key_or_group
        if override in groups or key.startswith("hydra"):
            continue
        if override.is_delete():
            yield NEEDED.format(key)
        elif next(_strange(_nested(key), shape), None) or _within_a_list(key, shape):
            yield unknown(key, valid)


def _within_a_list(key: str, shape: Any) -> bool:
    """Whether a dotted key goes on behind a list: Hydra takes what follows for a number, and has no words if it is none."""
    for part in key.split("."):
        if isinstance(shape, list):
            return not part.isdigit()
        shape = shape.get(part) if isinstance(shape, dict) else None
    return False


def group_choices(loader: ConfigLoaderImpl, config_name: str) -> dict[str, list[str]]:
    """Every config group but Hydra's own, with what can be chosen."""
    from hydra.core.object_type import ObjectType

    _, repository = loader._parse_overrides_and_create_caching_repo(config_name, [])  # once: it copies all of Hydra's own config

    def below(parent: str) -> Iterator[str]:
        for name in repository.get_group_options(parent, ObjectType.GROUP):
            group = f"{parent}/{name}" if parent else name
            if group != "hydra":
                yield group
                yield from below(group)

    return {group: repository.get_group_options(group, ObjectType.CONFIG) for group in below("")}


def help_text(search: Search, overrides: Sequence[str], program: str) -> str:
    """What --help prints: the choices, and the settings with `overrides` applied. Hydra's own page copies its config once per group."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    loader = search.loader()
    cfg = loader.load_configuration(search.name, list(overrides), RunMode.RUN)
    with open_dict(cfg):
        cfg.pop("hydra")
    groups = [f"  {group}: {', '.join(options)}" for group, options in group_choices(loader, search.name).items() if options]
    return "\n".join(
        [
            f"usage: {program} [name=value ...] [--multirun] [--cfg job] [--config-dir FOLDER] [--help] [--hydra-help]",
            "",
            "Choices (group=choice):",
            *groups,
            "",
            "Settings (name=value, for example seed=1; ??? must be given):",
            textwrap.indent(OmegaConf.to_yaml(cfg), "  "),
            "--multirun tries several values (name=1,2), --cfg job prints the settings alone, --hydra-help says what else Hydra can do.",
        ]
    )


def _parse(text: str) -> Any:
    """Hydra's override, or a sentence on why there is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        return f"{text} cannot be read ({_first_line(error).partition(' expecting')[0]}); {SYNTAX}"
    return override if override.key_or_group else f"{text} cannot be read (there is no name); {SYNTAX}"


def _wrong_choice(override: Any, options: Sequence[str]) -> Iterator[str]:
    group = override.key_or_group
    if override.is_delete():
        yield NEEDED.format(group)
        return
    if override.is_sweep_override():
        for choice in override.sweep_string_iterator():
            yield from _wrong_choice(_parse(f"{group}={choice}"), options)
        return
    value = override.value()
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, dict) and str(choice) not in options:
            yield not_among(f"{group}={show(choice)}", str(choice), options)


def _nested(key: str) -> dict:
    """`a.b` as {"a": {"b": None}}; a list's index counts as the list."""
    first, _, rest = key.partition("[")[0].partition(".")
    return {first: _nested(rest) if rest else None}


def reworded(error: Exception) -> str:
    """Hydra's own words, where the overrides by themselves are in order, and our way out where Hydra's is none."""
    text = str(error) if str(error).strip() else str(error.__cause__ or type(error).__name__)
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)=(.*)'", text):
        key, value = ambiguous.groups()
        return f"{key}={value} may mean three things: a list is {key}=[{value}], a text \"{key}='{value}'\", and a sweep needs --multirun"
    if twice := re.match(r"Multiple values for (\S+?)\. ", text):
        return f"{twice[1]} is chosen twice; write {twice[1]}=... once, without +"
    if stranger := re.match(r"Could not override '(.+?)'", text):
        placed = re.search(r"Did you mean to override (\S+)\?", text)
        return f"{stranger[1]} is unknown here" + (f"; it is chosen by {placed[1]}=..." if placed else "")
    lines = [line.strip() for line in text.partition("Config search path")[0].splitlines()]
    return " ".join(line for line in lines if line)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
