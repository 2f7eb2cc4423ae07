"""`charforgex bench characters`: is a change of the training a better one? A fixed suite of characters, trained, evaluated and recorded.

Every line of the record says with what it was made, so that the next one can be held against it: the suite's version and hash, settings,
code, packages, and hashes of the base. Intervals and comparisons are over characters: what helps one of five may be chance.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from charforgex import runs
from charforgex.binding import Range, bind
from charforgex.charworld.demo import DEMO
from charforgex.config import compose
from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Of train.py and evaluate.py. A change of any of these is another suite: its version grows.
VERSION = 1
CHARACTERS = (0, 1, 2, 3, 4)
TRAINED = ("curation=none", "logger=files")
ASKED = ("pack=[character,contexts,leakage]", "metric=[identity,verification,attributes,pairwise,memorisation,leakage]", "count=2")
TOLD = ("gain", "identity", "verification", "attributes", "pairwise", "memorisation", "leakage")


@dataclass(frozen=True)
class BenchSettings:
    """conf/bench.yaml."""

    suite: str
    families: list[str] = field(default_factory=lambda: ["sdxl", "flux", "sd3"])
    settings: str = ""
    note: str = ""
    characters: list[Annotated[int, Range(at_least=0)]] | None = None
    runs_dir: Path = Path("runs/bench")
    out: Path = Path("docs/benchmarks/characters.jsonl")

    def __post_init__(self):
        if self.suite != "characters":
            raise ConfigError(f"suite={self.suite} is none; there is characters: charforgex bench characters.")
        for name in ("families", "characters"):
            if (given := getattr(self, name)) is not None and (not given or len(set(given)) < len(given)):
                raise ConfigError(f"{name}={given} must name some, each once.")
        taken = [text for text in self.overrides if re.match(r"(data\.source|data\.trigger|family|run_dir|runs_dir|curation)=", text)]
        if taken:
            raise ConfigError(f"settings={' '.join(taken)} is the suite's own; leave it out, and choose families with families=[...].")

    @property
    def overrides(self) -> list[str]:
        """`settings` as words. Raises ConfigError for a quote that does not end."""
        try:
            return shlex.split(self.settings)
        except ValueError as error:
            raise ConfigError(f"settings={self.settings} cannot be read: {error}.") from error

    @property
    def whole(self) -> bool:
        return self.characters is None or tuple(self.characters) == CHARACTERS


def bench(cfg: DictConfig) -> dict[str, Any]:
    """Trains and evaluates every character on every family. Returns {"lines": what was measured, "recorded": whether `out` has it}.

    All settings are composed before the first training starts. Raises a CharForgeError.
    """
    from rich.console import Console

    settings = bind(BenchSettings, cfg, "")
    numbers = settings.characters or list(CHARACTERS)
    jobs = {name: [training(settings, name, number) for number in numbers] for name in settings.families}
    before = recorded(settings.out)
    console, lines = Console(), []
    for name, configs in jobs.items():
        found = {}
        for number, config in zip(numbers, configs, strict=True):
            console.rule(f"{name}, character {number}")
            found[number] = measured(config, settings, number)
        line = entry(name, settings, found, configs[0])
        show(console, line, latest(before, line))
        if settings.whole:
            append(settings.out, line)
        lines.append(line)
    if not settings.whole:
        console.print(f"A look at characters {numbers}: not recorded in {settings.out}.", highlight=False)
    return {"lines": lines, "recorded": settings.whole}


def training(settings: BenchSettings, family: str, number: int) -> DictConfig:
    """The config of one training, its folder named by what is trained. Raises ConfigError."""
    said = [*TRAINED, *settings.overrides, f"family={family}", f"data.source={DEMO}{number}"]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
    return compose("train", [*said, f"runs_dir={settings.runs_dir}", f"run_dir={settings.runs_dir}/{family}-{number}-{key}"])


def measured(config: DictConfig, settings: BenchSettings, number: int) -> dict[str, float]:
    """The numbers of one character's LoRA: those of `TOLD`, `base_*` of the base alone, seconds of training. A finished run is taken."""
    from charforgex.evaluation.choosing import gain
    from charforgex.evaluation.run import run as evaluate
    from charforgex.training.run import run

    folder = Path(config.run_dir)
    told = folder / "result.json"
    result = json.loads(told.read_text(encoding="utf-8")) if told.exists() else run(config)
    against = [f"references={DEMO}{number}", f"training={folder}/pictures"]
    asked = [f"lora={result['lora']}", *ASKED, *against, f"out={folder}/bench", "overwrite=true", f"cache_dir={settings.runs_dir}/cache"]
    found = evaluate(compose("evaluate", asked))
    (lora,) = (row["name"] for row in found["contestants"] if row["kind"] == "lora")
    values = {}
    for name, metric in found["metrics"].items():
        values[name] = metric["values"][lora].get("estimate")
        values[f"base_{name}"] = metric["values"]["base"].get("estimate")
    identity = found["metrics"]["identity"]
    values["gain"] = gain(values["identity"], values["base_identity"], identity["ceiling"])
    return values | {"seconds": result["seconds"], "best_step": result["best_step"]}


def suite_hash() -> str:
    """Of all that the suite asks for: settings, and the prompts of its packs."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.to_container(compose("evaluate", list(ASKED)), resolve=True)
    content = [CHARACTERS, TRAINED, ASKED, cfg["packs"], cfg["metrics"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def entry(family: str, settings: BenchSettings, found: Mapping[int, Mapping[str, float]], config: DictConfig) -> dict[str, Any]:
    """One line of the record."""
    import numpy as np

    from charforgex.evaluation.intervals import bootstrap_mean
    from charforgex.families import registry
    from charforgex.families.loading import weights_hash

    means = {}
    for name in TOLD:
        rows = np.array([values[name] for values in found.values() if values[name] is not None], np.float64)
        if len(rows):
            estimate, low, high = bootstrap_mean(rows, np.arange(len(rows)), key=name)
            means[name] = {"estimate": estimate, "low": low, "high": high, "count": len(rows)}
    known = registry.get(config.family.name)
    hashes = {group: weights_hash(known, config.family.source, group, config.family.tokenizer) for group in ("denoiser", "vae", "text")}
    return runs.plain(
        {
            "suite": settings.suite, "version": VERSION, "suite_hash": suite_hash(), "family": family, "settings": settings.overrides,
            "note": settings.note, "means": means, "characters": {str(number): dict(values) for number, values in found.items()},
            "date": datetime.now(UTC).date().isoformat(), "code": runs.git_state(), "versions": runs.versions(), "base": hashes,
        }
    )  # fmt: skip


# ---- the record ----


def recorded(path: Path) -> list[dict[str, Any]]:
    """The lines of a record, none where there is no file. Raises ConfigError for a file that is none."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            _ = line["suite_hash"], line["family"], line["characters"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"out={path}, line {number} is no line of such a record ({error}); name another file.") from error
        lines.append(line)
    return lines


def latest(lines: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The newest line that this one can be held against: the same suite and family."""
    same = [one for one in lines if (one["suite_hash"], one["family"]) == (line["suite_hash"], line["family"])]
    return same[-1] if same else None


def differences(line: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """By number: how much more it is than before, and the 95 % interval, over the characters that both have."""
    import numpy as np

    from charforgex.evaluation.intervals import bootstrap_mean

    both = [number for number in line["characters"] if number in before["characters"]]
    found = {}
    for name in TOLD:
        pairs = [(line["characters"][number].get(name), before["characters"][number].get(name)) for number in both]
        rows = np.array([now - was for now, was in pairs if now is not None and was is not None], np.float64)
        if len(rows):
            found[name] = bootstrap_mean(rows, np.arange(len(rows)), key=name)
    return found


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One line more, the file whole at any instant."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(path, before + json.dumps(line, ensure_ascii=False) + "\n")


def show(console: Any, line: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    from rich.table import Table

    against = f"against {before['date']} {before['note'] or ' '.join(before['settings']) or 'defaults'}" if before else "nothing before"
    table = Table(title=f"{line['family']}: {line['note'] or ' '.join(line['settings']) or 'defaults'}", title_justify="left")
    for column in ("", "mean over characters", "95 %", against, "95 %"):
        table.add_column(column, justify="left" if not column else "right")
    changed = differences(line, before) if before else {}
    for name, value in line["means"].items():
        row = [name, f"{value['estimate']:.3f}", _interval(value["low"], value["high"])]
        if name in changed:
            more, low, high = changed[name]
            row += [f"{more:+.3f}", _interval(low, high) + (" *" if low > 0 or high < 0 else "")]
        table.add_row(*row)
    console.print(table)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None or low != low or high != high else f"{low:.3f} to {high:.3f}"
