"""`charforgex curate`: a mess of pictures, archives and videos to a manifest that training reads, and a report to look at.

`curate(cfg)` is the command; `make_dataset` is what it and training share. Files are only read, never changed or moved. Everything that
takes long is kept under the cache folder by content, so a second run, also after a kill, does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex import runs
from charforgex.config import bind
from charforgex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from charforgex.curation.captions.rules import CaptionRules
    from charforgex.curation.settings import CurationSettings


@dataclass(frozen=True)
class RunSettings:
    """The keys at the root of `curate.yaml`."""

    name: str
    cache_dir: Path
    runs_dir: Path
    out: Path | None = None
    only_report: bool = False


@dataclass(frozen=True)
class Source:
    """What is curated, and how captions shall call who is in it."""

    root: str
    trigger: str | None = None
    class_word: str | None = None


def curate(cfg: DictConfig) -> dict[str, Any]:
    """Runs the curation that `cfg` describes, and returns the content of result.json. Raises a CharForgeError."""
    from rich.console import Console

    from charforgex.curation.ingest import check_root
    from charforgex.curation.settings import CurationSettings

    settings = bind(CurationSettings, cfg.curation, "curation")
    told = bind(RunSettings, {name: cfg[name] for name in ("name", "cache_dir", "runs_dir", "out", "only_report")}, "")
    source = bind(Source, cfg.data, "data")
    root = check_root(source.root)
    settled = hashlib.sha256(f"{runs.config_hash(cfg)}\0{root}".encode()).hexdigest()
    out = told.out or told.runs_dir / f"{told.name}-{settled[:8]}"
    check_out(out, root)
    out.mkdir(parents=True, exist_ok=True)
    runs.write_provenance(out, seed=0, root=str(root))
    runs.save_config(out, cfg)
    return make_dataset(source, settings, out, told.cache_dir, Console(), told.only_report)


def check_out(out: Path, root: Path) -> None:
    """Raises ConfigError for a folder with files that no run over `root` has written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    told = out / "provenance.json"
    before = json.loads(told.read_text(encoding="utf-8")).get("root") if told.is_file() else None
    if before is None:
        raise ConfigError(f"out={out} holds other files; name another folder.")
    if before != str(root) and Path(before).exists():  # else the folder was moved
        raise ConfigError(f"out={out} holds what was made of {before}, and this run is over {root}; name another folder.")


def check_apart(root: Path, out: Path) -> None:
    """Raises ConfigError where a run would remove what it reads."""
    if root.is_dir() and root.is_relative_to(out):
        raise ConfigError(f"data.root={root} lies in out={out}, where a dataset is written and old files are removed; move one away.")


def make_dataset(
    source: Source, settings: CurationSettings, out: Path, cache_dir: Path, console: Console, only_report: bool = False
) -> dict[str, Any]:
    """Writes pictures/ (with captions, masks and manifest.jsonl), report.html, report.json and result.json into `out`, or the report alone.

    Raises DataError if no picture is kept.
    """
    from charforgex.curation import deciding, exports, ingest, pipeline, report
    from charforgex.curation.executors import get_executor

    started = time.perf_counter()
    out, cache_dir = out.resolve(), cache_dir.resolve()
    root = ingest.check_root(source.root)
    check_apart(root, out)
    rules = bind_rules(settings.rules, source)
    if settings.manifest == "parquet":
        exports.need_pyarrow()
    captioner = None if only_report else pipeline.captioner_of(settings.captions)
    character = deciding.character(settings)
    units = ingest.units(root, settings.ingest, leave_out=[out, cache_dir])
    if not units:
        raise DataError(f"data.root={source.root} has no files; names that begin with a dot are not looked at.")
    folder = root if root.is_dir() else root.parent
    executor = get_executor(settings.where(cache_dir))
    with pipeline.progress(console) as bar:
        findings = pipeline.scan(folder, cache_dir, units, settings, executor, bar)
        bar.start("deciding")
        decided = deciding.decide(findings, settings, character)
        if only_report:
            cuts, manifest = pipeline.as_they_are(folder, findings, decided)
        else:
            cuts = pipeline.cut(folder, cache_dir, out, units, findings, decided, settings, executor, bar)
            captions = pipeline.caption(out, cache_dir, findings, cuts, captioner, replace(settings, rules=rules), bar)
            manifest = pipeline.assemble(out, findings, decided, cuts, captions, settings, bar)
        told = pipeline.tell(out, root.name, findings, decided, cuts, manifest, settings, bar)
    report.summary(console, told, out / report.HTML)
    if not manifest.records:
        raise DataError(deciding.nothing_kept(source.root, decided, out))
    result = {
        "manifest": None if only_report else str(manifest.root / pipeline.MANIFEST),
        "report": str(out / report.HTML),
        "out": str(out),
        "classes": told["classes"],
        "split": told["split"],
        "content": manifest.content_hash(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    runs.write_result(out, result)
    return result


def bind_rules(rules: CaptionRules, source: Source) -> CaptionRules:
    """The caption rules with the trigger and class of `source`, which may be given in one place only."""
    given = {"trigger": source.trigger, "class_word": source.class_word}
    for name, value in given.items():
        if value is not None and getattr(rules, name) is not None:
            raise ConfigError(f"data.{name}={value} and curation.rules.{name}={getattr(rules, name)} say it twice; drop one.")
    return replace(rules, **{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    from charforgex.cli import run

    run("curate")
