"""`charforgex evaluate`: contestants x prompts x seeds to pictures, pictures to numbers with intervals, numbers to a recommendation."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.config import bind
from charforgex.errors import ConfigError, DataError
from charforgex.runs import create_run_dir, plain, save_config, versions, write_provenance

if TYPE_CHECKING:
    from charforgex.evaluation.character import Character
    from charforgex.evaluation.contestants import Contestant
    from charforgex.evaluation.drawing import Ask, Studio
    from charforgex.evaluation.gallery import Gallery
    from charforgex.evaluation.metric import Case, Metric, Value
    from charforgex.evaluation.packs import Template
    from charforgex.evaluation.settings import Settings
    from charforgex.generation.stack import Stack

ROOT = "evaluations"


@dataclass(frozen=True)
class Entry:
    """A contestant's pictures: shot i of `gallery` was asked for by `templates[i]`, and is called `files[i]` in the evaluation's folder."""

    contestant: Contestant
    gallery: Gallery
    templates: Sequence[str]
    files: Sequence[str]


def evaluate(cfg: Any) -> float | tuple[float, ...] | None:
    """What a sweep optimises: the numbers that `objective` names; None for a dry run. See `run`."""
    from charforgex.evaluation.results import objective

    result = run(cfg)
    return objective(result, result["objective"]) if _in_sweep() and result["page"] is not None else None


def run(cfg: Any) -> dict[str, Any]:
    """Evaluates what evaluate.yaml's settings name and returns the content of result.json; of a dry run the plan alone.

    All that can be known without the base model's weights is checked before they are loaded, and metrics see the references before anything
    is drawn. Raises a CharForgeError.
    """
    from rich.console import Console

    from charforgex.evaluation import contestants, packs, results, trackers
    from charforgex.evaluation.metrics import registry
    from charforgex.evaluation.settings import Settings

    values = {key: value for key, value in cfg.items() if key not in ("metrics", "vote")}
    settings = bind(Settings, values, "")
    metrics = registry.load(cfg.get("metrics"))
    if not metrics:
        raise ConfigError("nothing is measured; say metric=[identity], or several.")
    results.check_objective(settings.objectives, list(metrics))
    templates = packs.templates(settings.packs, settings.prompt, settings.prompt_file) if settings.draws else []
    _check_out(settings)
    console = Console()

    entrants, notes = contestants.find(settings)
    if cfg.get("vote"):
        _check_vote(cfg.vote, entrants)
    trainings = list({one.training.folder: one.training for one in entrants if one.training is not None}.values())
    from charforgex.evaluation.character import read_character
    from charforgex.evaluation.drawing import HeldOut

    character = read_character(settings, trainings, settings.cache_dir / "vectors")
    notes += character.notes
    finished, problems = _finished(entrants, templates)
    notes += problems
    studio, wanted = _studio(settings, entrants, trainings, templates, character) if settings.draws else (None, {})
    if studio is not None:
        notes += studio.stack.warnings
        if "levels" in metrics:
            studio.held_out = HeldOut(character.references, metrics["levels"].levels, character.trigger or "")
    plan = _plan(entrants, studio, wanted, finished)
    _show_plan(console, plan, character, metrics, notes)
    if settings.dry_run:
        return {"plan": plan, "notes": notes, "page": None, "objective": settings.objectives}

    started = time.perf_counter()
    _try(metrics, character)
    out = settings.out or create_run_dir(ROOT, next((one.slug for one in entrants if one.kind != "base"), "base"))
    out.mkdir(parents=True, exist_ok=True)
    save_config(out, {**cfg, "references": character.source})
    inputs = {adapter.name: adapter.path for adapter in studio.stack.adapters} if studio is not None else {}
    write_provenance(out, seed=settings.seed, inputs=inputs)
    tracker = trackers.start(settings.logger, out)
    tried = time.perf_counter() - started

    if studio is not None:
        from charforgex.generation.report import progress

        drawing = [one for one in entrants if one.name in wanted]
        if (lacking := plan["pictures"] - plan["cached"]) or any(studio.unheard(one) for one in drawing):
            with progress(lacking) as bar:
                studio.draw([(one, wanted[one.name]) for one in drawing], bar)
    drawn = time.perf_counter()
    entries = _entries(entrants, studio, wanted, finished, out, settings.cache_dir / "vectors")
    with console.status("measuring") as status:
        case = _case(character, entries)
        measured = {
            name: _measured(metric, entries, case, lambda text, name=name: status.update(f"{name}: {text}"))
            for name, metric in metrics.items()
        }
        status.update("measuring floors and ceilings")
        ends = _ends(metrics, case)
    result = _result(settings, cfg, entries, studio, metrics, measured, ends, notes)
    result["page"] = str(out / results.PAGE)
    result["vote"] = str(_vote_page(cfg.vote, entries, character, out)) if cfg.get("vote") else None
    result["seconds"] |= {"measure": tried + time.perf_counter() - drawn}
    result = plain(result)  # as whoever reads the file has it
    shots = _write(out, result, entries, measured)
    if settings.logger.tensorboard:
        trackers.write_tensorboard(result, shots, out)
    if tracker is not None:
        trackers.finish_wandb(tracker, result, shots, out)
    from charforgex.evaluation.summary import show

    show(console, result)
    return result


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


# ---- before anything is loaded ----


def _check_out(settings: Settings) -> None:
    out = settings.out
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder.")
    if not settings.overwrite and (out / "result.json").exists():
        raise ConfigError(f"out={out} holds an earlier evaluation; choose another folder, or say overwrite=true.")


def _finished(entrants: Sequence[Contestant], templates: Sequence[Template]) -> tuple[dict[str, list], list[str]]:
    """The pictures of each folder by the contestant's name, and which of its files are none."""
    from charforgex.evaluation.finished import read_finished

    found, notes = {}, []
    for one in entrants:
        if one.kind == "folder":
            found[one.name], problems = read_finished(one.folder, {template.text: template.pack for template in templates})
            notes += [f"{one.name}: {problem}" for problem in problems]
    return found, notes


def _studio(
    settings: Settings, entrants: Sequence[Contestant], trainings: Sequence, templates: Sequence[Template], character: Character
) -> tuple[Studio, dict[str, list[Ask]]]:
    """The base with its settings, and what is asked for of each contestant that draws."""
    from dataclasses import replace

    from charforgex.evaluation.drawing import Studio
    from charforgex.generation.run import device_of, dtype_of, shared, size_of
    from charforgex.generation.sampling import check_sampling

    if settings.family is None and settings.base is None and trainings:
        families = [training.family for training in trainings]
        if all((family.name, family.source) == (families[0].name, families[0].source) for family in families):
            settings = replace(settings, family=families[0])  # the run's own numbers
    stack = _read_stack(settings, entrants)
    settings = settings.filled(stack.recipe)
    scheduler = check_sampling(stack.family, stack.bare, settings)
    size, device, dtype = size_of(settings, stack), device_of(settings), dtype_of(settings)
    common = shared(stack, settings, size, scheduler, dtype)
    tokenizer = settings.tokenizer or (settings.family.tokenizer if settings.family is not None else None)
    studio = Studio(stack, settings, size, common, device, dtype, tokenizer, settings.cache_dir)
    drawing = [one for one in entrants if one.kind != "folder"]
    triggers = {one.name: settings.trigger or studio.trigger(one) or character.trigger for one in drawing}
    known = next((trigger for trigger in triggers.values() if trigger), None)  # the base is asked as the first LoRA is
    return studio, {
        one.name: studio.asks(one, templates, settings.seeds, triggers[one.name] or known, settings.class_word) for one in drawing
    }


def _read_stack(settings: Settings, entrants: Sequence[Contestant]) -> Stack:
    from charforgex.families.registry import refuse_clips
    from charforgex.generation.settings import Settings as Generation
    from charforgex.generation.stack import read_stack

    paths = list(dict.fromkeys(str(path) for one in entrants for path in one.loras))
    stack = read_stack(Generation(lora=paths or None, base=settings.base, family=settings.family, tokenizer=settings.tokenizer))
    refuse_clips(stack.family, "evaluate", "what a motion LoRA does is measured by its training, in the run's result.json.")
    return stack


def _plan(
    entrants: Sequence[Contestant], studio: Studio | None, wanted: Mapping[str, list[Ask]], finished: Mapping[str, list]
) -> dict[str, Any]:
    """How many pictures of whom, how many of them are there, and how long the others take; None where nothing tells."""
    rows = [
        {"contestant": one.name, "pictures": len(asks), "cached": len(asks) - len(studio.missing(asks))}
        if (asks := wanted.get(one.name)) is not None
        else {"contestant": one.name, "pictures": len(finished[one.name]), "cached": len(finished[one.name])}
        for one in entrants
    ]
    every = [ask for asks in wanted.values() for ask in asks]
    lacking = len(studio.missing(every)) if studio is not None else 0
    pictures = len({ask.key for ask in every})
    seconds = studio.expected(lacking) if studio is not None else 0.0
    return {"rows": rows, "pictures": pictures, "cached": pictures - lacking, "seconds": seconds}


def _show_plan(console: Any, plan: Mapping[str, Any], character: Character, metrics: Mapping[str, Metric], notes: Sequence[str]) -> None:
    from rich.markup import escape

    lacking, seconds = plan["pictures"] - plan["cached"], plan["seconds"]
    expected = "nothing" if not lacking else "not known before the first are drawn" if seconds is None else f"about {seconds / 60:.1f} min"
    for row in plan["rows"]:
        console.print(f"  {escape(row['contestant'])}: {row['pictures']} pictures, {row['cached']} there", highlight=False, soft_wrap=True)
    sets = {"references": character.references, "training": character.training, "others": character.others}
    told = ", ".join(f"{name} {len(gallery) if gallery else 'none'}" for name, gallery in sets.items())
    console.print(f"  [bold]to draw[/bold] {lacking}, {expected}; {told}; {', '.join(metrics)}", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False, soft_wrap=True)


def _try(metrics: Mapping[str, Metric], character: Character) -> None:
    """Each metric sees the references, so that a model that cannot be loaded is known before hours of drawing. Raises ModelError and
    ConfigError. What was seen stays in the cache."""
    from charforgex.evaluation.metric import Case

    case = Case(character.references, character.training, character.others, trigger=character.trigger)
    for metric in metrics.values():
        try:
            metric(character.references, case)
        except DataError:
            continue  # of the references alone; it is asked again


def _check_vote(vote: Any, entrants: Sequence[Contestant]) -> None:
    from charforgex.binding import arguments
    from charforgex.evaluation.voting import write_page

    arguments(write_page, vote, "vote", ("galleries", "references", "out"))
    if len(entrants) < 2:
        raise ConfigError(f"vote: {entrants[0].name} alone is no choice; name another LoRA, or leave vote out.")


# ---- pictures and numbers ----


def _entries(
    entrants: Sequence[Contestant],
    studio: Studio | None,
    wanted: Mapping[str, list[Ask]],
    finished: Mapping[str, list],
    out: Path,
    cache: Path,
) -> list[Entry]:
    """All pictures, those that were drawn under readable names in `out`/pictures."""
    from charforgex.evaluation.drawing import place
    from charforgex.evaluation.gallery import Gallery, Shot

    entries = []
    for one in entrants:
        if one.kind == "folder":
            shots = [picture.shot for picture in finished[one.name]]
            entries.append(
                Entry(
                    one,
                    Gallery(one.name, shots, cache),
                    [p.template for p in finished[one.name]],
                    [str(s.picture.resolve()) for s in shots],
                )
            )
            continue
        shots, files = [], []
        for ask in wanted[one.name]:
            file = f"pictures/{one.slug}/{ask.template.pack}_{ask.template.number + 1:03d}_seed{ask.seed}.png"
            path = place(studio.file(ask), out / file)
            shots.append(Shot(path, ask.prompt, ask.template.pack, ask.seed, ask.key))
            files.append(file)
        gallery = Gallery(one.name, shots, cache, studio.losses(one))
        entries.append(Entry(one, gallery, [ask.template.text for ask in wanted[one.name]], files))
    return entries


def _case(character: Character, entries: Sequence[Entry]) -> Case:
    from charforgex.evaluation.metric import Case

    base = next((entry.gallery for entry in entries if entry.contestant.kind == "base"), None)
    return Case(character.references, character.training, character.others, base, character.trigger)


def _calling(gallery: Gallery | None) -> tuple[Gallery | None, list[int]]:
    """The pictures for which the character was called, and which they are."""
    from charforgex.evaluation.gallery import Gallery
    from charforgex.evaluation.packs import UNCALLED

    if gallery is None:
        return None, []
    places = [i for i, shot in enumerate(gallery.shots) if shot.pack not in UNCALLED]
    return Gallery(gallery.name, [gallery.shots[i] for i in places], gallery.cache, gallery.losses), places


def _vote_page(vote: Any, entries: Sequence[Entry], character: Character, out: Path) -> Path:
    """People are asked about pictures of the character; the base model is in it only where there is no other choice."""
    from charforgex.evaluation.voting import write_page

    asked = [entry for entry in entries if entry.contestant.kind != "base"]
    galleries = [_calling(entry.gallery)[0] for entry in (asked if len(asked) > 1 else entries)]
    return bind(write_page, vote, "vote", galleries=galleries, references=character.references, out=out)


def pack_of(metric: Metric) -> str | None:
    """The prompt pack that a metric is about."""
    return getattr(metric, "pack", None)


def _seen_by(metric: Metric, gallery: Gallery | None) -> tuple[Gallery | None, list[int]]:
    """What a metric is asked about: the pictures of the character, unless it is about a pack of its own."""
    return _calling(gallery) if pack_of(metric) is None else (gallery, list(range(len(gallery))) if gallery is not None else [])


def _measured(metric: Metric, entries: Sequence[Entry], case: Case, say: Any) -> dict[str, Value | str]:
    """Each contestant's value, or in one line why there is none."""
    from dataclasses import replace

    from charforgex.evaluation.results import spread

    case = replace(case, base=_seen_by(metric, case.base)[0])
    found: dict[str, Value | str] = {}
    for entry in entries:
        say(entry.contestant.name)
        gallery, places = _seen_by(metric, entry.gallery)
        try:
            found[entry.contestant.name] = spread(metric(gallery, case), places, len(entry.gallery))
        except DataError as error:
            found[entry.contestant.name] = str(error)
    return found


def _ends(metrics: Mapping[str, Metric], case: Case) -> dict[str, dict[str, Value | str | None]]:
    """Floors and ceilings, each metric's of the pictures that it is asked about."""
    from dataclasses import replace

    from charforgex.evaluation.calibration import calibrate

    groups: dict[str | None, dict[str, Metric]] = {}
    for name, metric in metrics.items():
        groups.setdefault(pack_of(metric), {})[name] = metric
    found = {}
    for some in groups.values():
        found |= calibrate(some, replace(case, base=_seen_by(next(iter(some.values())), case.base)[0]))
    return found


# ---- what is told ----


def _result(
    settings: Settings, cfg: Any, entries: Sequence[Entry], studio: Studio | None, metrics: Mapping[str, Metric],
    measured: Mapping[str, Mapping[str, Value | str]], ends: Mapping[str, Mapping[str, Value | str | None]], notes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    from omegaconf import OmegaConf

    from charforgex.evaluation import results

    told = results.metrics_of(metrics, measured, ends)
    front, recommended = results.chosen([entry.contestant for entry in entries], told)
    places = {
        entry.contestant.name: [
            (template, shot.seed) if shot.seed is not None else None
            for template, shot in zip(entry.templates, entry.gallery.shots, strict=True)
        ]
        for entry in entries
    }
    asked = OmegaConf.to_container(cfg, resolve=True)
    used = dict(studio.shared) | {"device": studio.device, "batch_size": studio.batch_size} if studio is not None else {}
    return {
        "contestants": [_contestant(entry, studio) for entry in entries],
        "metrics": told,
        "comparison": results.comparison(measured, metrics, places),
        "recommended": recommended,
        "pareto": front,
        "prompts": list(dict.fromkeys(template for entry in entries for template in entry.templates)),
        "seeds": settings.seeds if studio is not None else [],
        "settings": asked | {name: value for name, value in used.items() if name != "versions"},
        "notes": list(notes),
        "objective": settings.objectives,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        "seconds": {
            "draw": studio.seconds if studio is not None else 0.0,
            "drawn": studio.drawn if studio is not None else 0,
            "picture": studio.expected(1) if studio is not None else None,
        },
    }


def _contestant(entry: Entry, studio: Studio | None) -> dict[str, Any]:
    one = entry.contestant
    loras = [{"path": str(path), "sha256": studio.uses[path].sha256, "scale": one.scale} for path in one.loras]
    run = str(one.training.folder) if one.training is not None else None
    return {
        "name": one.name, "kind": one.kind, "loras": loras, "scale": one.scale if one.loras else None, "step": one.step, "run": run,
        "pictures": len(entry.gallery),
    }  # fmt: skip


def _write(
    out: Path, result: Mapping[str, Any], entries: Sequence[Entry], measured: Mapping[str, Mapping[str, Value | str]]
) -> list[dict[str, Any]]:
    """shots.jsonl, whose lines are returned, result.json and the page."""
    from charforgex.evaluation import results
    from charforgex.evaluation.page import write_page

    shots = []
    for entry in entries:
        told = {name: value for name, values in measured.items() if not isinstance(value := values[entry.contestant.name], str)}
        rows = {name: value.rows for name, value in told.items() if value.rows is not None}
        nearest = next((value.nearest for value in told.values() if value.nearest is not None), None)
        for i, (shot, template, file) in enumerate(zip(entry.gallery.shots, entry.templates, entry.files, strict=True)):
            scores = {name: float(numbers[i]) for name, numbers in rows.items()}
            shots.append(
                {"contestant": entry.contestant.name, "file": file, "prompt": shot.prompt, "template": template, "pack": shot.pack,
                 "seed": shot.seed, "scores": scores}
            )  # fmt: skip
            if nearest is not None and nearest[i] is not None:
                shots[-1]["nearest"] = str(nearest[i].resolve())
    results.write(out, result, shots)
    write_page(result, shots, out / results.PAGE)
    return shots


if __name__ == "__main__":
    from charforgex.cli import run as run_command

    run_command("evaluate")
