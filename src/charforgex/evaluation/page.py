"""The report of an evaluation: one page that needs nothing else, made of result.json and shots.jsonl alone."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from charforgex.errors import DataError
from charforgex.evaluation import charts, reading
from charforgex.evaluation.gallery import Shot
from charforgex.pages import embedded, render
from charforgex.runs import plain, write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("page.html")
EMBEDDED = 8 * 2**20  # bytes of pictures in one page, about; the others are linked
CELLS, ROWS = 240, 24  # pictures, and rows of them, in the contact sheets
COLUMNS = 8  # of a single contestant's pictures
SIDES = {4: 288, 8: 208}  # number of columns, up to which a thumbnail's longer side is so many pixels
SMALLEST = 144
SMALL = 129  # pixels, below which they are shown as the squares that they are
NAMED = 3  # contestants that the title tells by name
WORST = 6  # pictures of each metric
PAIRS = 24  # rows of paired comparisons that stand open
NARROW = 0.1  # share of the numbers that a bar without floor and ceiling spans at least
Row = dict[str, Any]
# What parts.html, of which all pages here are made, calls
WORDS = {"said": reading.said, "between": reading.between, "rounded": reading.rounded, "heading": reading.heading}

# What people ask, the metrics that answer it, and the words of the answer with the share of success from which on each is true
MERIT = (("Yes", 0.8, "good"), ("Mostly", 0.5, "fair"), ("A little", 0.2, "fair"), ("No", -math.inf, "bad"))
QUESTIONS = (
    ("Is it the character?", reading.IDENTITY, MERIT),
    ("Does it obey?", reading.FOLLOWING, MERIT),
    ("Is it varied?", reading.VARIETY, MERIT),
    ("Did it learn pictures by heart?", reading.MEMORY, (("No", 0.97, "good"), ("Some", 0.8, "fair"), ("Yes", -math.inf, "bad"))),
    ("Does it show uncalled?", reading.LEAKAGE, (("No", 0.9, "good"), ("A little", 0.7, "fair"), ("Yes", -math.inf, "bad"))),
)


class Thumbnails:
    """Pictures for the page, until their bytes are spent; and how each is linked from it."""

    def __init__(self, folder: Path, most: int = EMBEDDED):
        self.folder, self.left = folder, most
        self.spared = 0  # pictures for which no bytes were left

    def __call__(self, file: str, side: int) -> dict[str, Any]:
        """`source` of the <img>, None with a `why` where there is none; and `link`, relative to the page."""
        path = self.folder / file
        found = {"source": None, "small": False, "why": "", "link": quote(Path(os.path.relpath(path, self.folder)).as_posix())}
        if self.left <= 0:
            self.spared += 1
            return found | {"why": "open"}
        try:
            picture = Shot(path).open()
        except DataError:
            return found | {"why": "cannot be read"}
        source = embedded(picture, side)
        self.left -= len(source)
        return found | {"source": source, "small": max(picture.size) < SMALL}


def write_page(result: Mapping[str, Any], shots: Iterable[Mapping[str, Any]], out: Path, embedded_bytes: int = EMBEDDED) -> Path:
    """Writes the page to `out`. Files of `shots` are relative to its folder, or absolute. At most about `embedded_bytes` of pictures."""
    result, shots = plain(result), [plain(shot) for shot in shots]
    thumbnails = Thumbnails(out.parent, embedded_bytes)
    metrics = {name: bars(name, metric, result["contestants"]) for name, metric in result["metrics"].items()}
    cases = worst(result, shots, thumbnails)  # few, and before the contact sheets take all that a page may weigh
    values = WORDS | {
        "title": title(result),
        "result": result,
        "chosen": reading.chosen(result),
        "answers": answers(result),
        "metrics": metrics,
        "curves": _curves(result),
        "pareto": _pareto(result),
        "sheets": sheets(result, shots, thumbnails),
        "comparison": paired(result["comparison"], {name: metric["card"] for name, metric in metrics.items()}, reading.chosen(result)),
        "worst": cases,
        "notes": notes(result),
        "shots": len(shots),
        "repeat": _repeat(result),
    }
    return write_atomic(out, render(TEMPLATE, thumbnails=thumbnails, **values))


def title(result: Mapping[str, Any]) -> str:
    entrants = [one for one in result["contestants"] if one["kind"] != reading.BASE]
    runs = {one["run"] for one in entrants}
    if len(entrants) > 1 and len(runs) == 1 and None not in runs:  # one run's checkpoints and strengths
        return f"Evaluation of {Path(runs.pop()).name}"
    names = [one["name"] for one in entrants] or ["the base model"]
    return f"Evaluation of {together(names) if len(names) <= NAMED else f'{len(names)} contestants'}"


def together(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- answers in words ----


def answers(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """What people ask, answered of the chosen contestant: `question`, `word`, `tone`, a sentence."""
    found = [_answer(question, reading.first_of(names, result["metrics"]), words, result) for question, names, words in QUESTIONS]
    return [answer for answer in found if answer]


def _answer(question: str, name: str | None, words: Sequence[tuple[str, float, str]], result: Mapping[str, Any]) -> dict[str, str] | None:
    if name is None:
        return None
    metric, contestant = result["metrics"][name], reading.chosen(result)
    value = metric["values"].get(contestant, {"why": "not measured"})
    title = reading.heading(metric["card"])
    if "why" in value:
        return {"question": question, "word": "Not known", "tone": "none", "sentence": f"{title}: {value['why']}."}
    bases = [one["name"] for one in result["contestants"] if one["kind"] == reading.BASE and one["name"] != contestant]
    base = next((known[one]["estimate"] for one in bases if one in (known := reading.measured(metric))), None)
    success, told = _success(name, value, metric, base)
    word, tone = (
        next(((word, tone) for word, least, tone in words if success >= least)) if success is not None else (reading.said(value), "none")
    )
    sentence = [f"{title} {reading.with_interval(value)}", told]
    if base is not None:
        sentence.append(f"the base model alone has {reading.said(known[bases[0]])}")
    return {"question": question, "word": word, "tone": tone, "sentence": "; ".join(sentence) + "."}


def _success(name: str, value: Mapping[str, Any], metric: Mapping[str, Any], base: float | None) -> tuple[float | None, str]:
    """How far a number is what one wishes for, 0 to 1, and by what that is told."""
    leaked = (value.get("parts") or {}).get("share") if name in reading.LEAKAGE else None
    if leaked is not None:
        return 1 - leaked, f"{leaked:.0%} of the way from the base model to real pictures".replace("%", " %")
    found = reading.reached(value["estimate"], metric)
    if found is not None:
        return found, f"{_percent(value, metric)} of the way from floor to ceiling"
    for known, whose in ((base, "the base model has"), (metric["ceiling"], "real pictures have")):
        if known and metric["card"]["better"] == "higher":
            return value["estimate"] / known, f"{100 * value['estimate'] / known:.0f} % of what {whose}"
    return None, "there is nothing measured to read it against"


def _percent(value: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """An estimate's and an interval's share of the way from floor to ceiling, in whole percent, or fives where the interval is wide."""
    ends = [reading.reached(value[end], metric) for end in ("estimate", "low", "high")]
    step = 1 if None in ends or abs(ends[2] - ends[1]) < 0.2 else 5
    estimate, *interval = [None if end is None else step * round(100 * end / step) for end in ends]
    told = f"{estimate} %" if None in interval else f"{estimate} % ({min(interval)} to {max(interval)} %)"
    return told.replace("-", "−")


# ---- numbers ----


def bars(name: str, metric: Mapping[str, Any], contestants: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric's rows for a page: its values, and where they lie between floor and ceiling, in percent of the bar."""
    card, values = metric["card"], metric["values"]
    ends = axis(metric)
    rows = []
    for one in contestants:
        value = values.get(one["name"], {"why": "not measured"})
        row = {"name": one["name"], "kind": one["kind"], "value": value, "at": None, "parts": value.get("parts") or {}}
        if "why" not in value and ends:
            row["at"] = _place(value["estimate"], ends)
            sides = [_place(value[side], ends) for side in ("low", "high")]
            row["low"], row["high"] = (None, None) if None in sides else sorted(sides)
        rows.append(row)
    marks = [(end, metric[end], _place(metric[end], ends)) for end in ("floor", "ceiling")]
    known = reading.measured(metric)
    best = None
    if card["better"] != "neither" and len(known) > 1:
        best = (max if card["better"] == "higher" else min)(known, key=lambda contestant: known[contestant]["estimate"])
    return {
        "name": name, "card": card, "rows": rows, "of": {row["name"]: row["value"] for row in rows}, "best": best,
        "floor": metric["floor"],
        "ceiling": metric["ceiling"],
        "marks": [{"words": words, "said": reading.rounded(value, None), "at": at} for words, value, at in marks if at is not None],
    }  # fmt: skip


def axis(metric: Mapping[str, Any], values: Iterable[Mapping[str, Any]] | None = None) -> tuple[float, float] | None:
    """The numbers at the left and right end of a metric's bars. The better side is right, whichever direction that is."""
    values = list(reading.measured(metric).values() if values is None else values)
    numbers = [value[end] for value in values for end in ("estimate", "low", "high")]
    floor, ceiling = metric["floor"], metric["ceiling"]
    known = [number for number in (*numbers, floor, ceiling) if number is not None]
    if not known:
        return None
    low, high = charts.span(known)
    if floor is None and ceiling is None and high - low < (least := NARROW * max(abs(low), abs(high))):  # else a trifle would fill the bar
        low, high = (low + high - least) / 2, (low + high + least) / 2
    falling = metric["card"]["better"] == "lower"
    if None not in (floor, ceiling) and floor != ceiling:
        falling = floor > ceiling
    return (high, low) if falling else (low, high)


def _place(number: float | None, ends: tuple[float, float] | None) -> float | None:
    return None if number is None or ends is None else 100 * (number - ends[0]) / (ends[1] - ends[0])


def paired(comparison: Mapping[str, Any] | None, cards: Mapping[str, Mapping[str, Any]], first: str) -> dict[str, Any] | None:
    """Rows of ab.py's comparison for the page: those of `first` against the others come first; each with its bar around 0."""
    if not comparison:
        return None
    rows = [turned(row) if row["b"] == first else row for row in comparison["rows"]]
    rows = sorted(rows, key=lambda row: row["a"] != first)
    widest: dict[str, float] = {}
    for row in rows:
        ends = [abs(end) for end in row.get("difference", {}).values() if end is not None]
        widest[row["metric"]] = max([widest.get(row["metric"], 0.0), *ends])
    told = []
    for row in rows:
        difference, most = row.get("difference"), widest[row["metric"]]
        bar = None
        if difference and most:
            ends = {end: None if number is None else 50 + 46 * number / most for end, number in difference.items()}
            bar = ends if None not in ends.values() else {"estimate": ends["estimate"], "low": None, "high": None}
        heading = reading.heading(cards[row["metric"]])
        told.append(row | {"heading": heading, "bar": bar, "difference": difference})
    return {
        "open": told[:PAIRS],
        "more": told[PAIRS:],
        "note": _too_many(comparison),
        "method": comparison["method"],
        "tests": comparison["tests"],
    }


def turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same comparison, the other way round."""
    found = dict(row) | {"a": row["b"], "b": row["a"]}
    if row.get("difference"):
        negative = {end: None if number is None else -number for end, number in row["difference"].items()}
        found["difference"] = negative | {"low": negative["high"], "high": negative["low"]}
    for unit in ("pictures", "prompts"):
        if f"{unit}_won" in row:
            found |= {f"{unit}_won": row[f"{unit}_lost"], f"{unit}_lost": row[f"{unit}_won"]}
    return found


def _too_many(comparison: Mapping[str, Any]) -> str | None:
    """Where there are so many tests for so few prompts that no result whatever would be a claim."""
    prompts = max((row["prompts"] for row in comparison["rows"] if row["p"] is not None), default=0)
    if not prompts or comparison["tests"] * 2.0 ** (1 - prompts) <= comparison["alpha"]:
        return None
    enough = math.ceil(1 + math.log2(comparison["tests"] / comparison["alpha"]))
    return (
        f"{prompts} prompts are too few for {comparison['tests']} tests: even where every prompt agrees, it may be chance. "
        f"Ask {enough} prompts or more, or compare fewer contestants by fewer metrics."
    )


def notes(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What was noted of values -> of which metric and contestants."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric in result["metrics"].values():
        for end, why in metric["unknown"].items():
            found.setdefault(f"no {end}: {why}", {})[reading.heading(metric["card"])] = [one["name"] for one in result["contestants"]]
        for contestant, value in metric["values"].items():
            for note in [value["why"]] if "why" in value else value.get("notes", ()):
                found.setdefault(note, {}).setdefault(reading.heading(metric["card"]), []).append(contestant)
    everyone = len(result["contestants"])
    return [(note, []) for note in result["notes"]] + [
        (note, [heading if len(who) == everyone else f"{heading} of {', '.join(who)}" for heading, who in where.items()])
        for note, where in found.items()
    ]


# ---- curves and the front ----


def _curves(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chart for each metric over checkpoints, and over scales, where there are several; each with its key."""
    found = []
    for along, other, words in (("step", "scale", "step"), ("scale", "step", "scale")):
        lines = contestants_along(result["contestants"], along, other)
        for name, metric in result["metrics"].items():
            known = reading.measured(metric)
            series = {label: points(line, known, along) for label, line in lines.items()}
            series = {label: line for label, line in series.items() if len(line) > 1}
            if series:
                svg = charts.curves(
                    series, levels(metric, result), words, f"{reading.heading(metric['card'])} by {words}", _mark(result, along)
                )
                found.append({"name": name, "along": words, "title": reading.heading(metric["card"]), "svg": svg, "key": list(series)})
    return found


def contestants_along(contestants: Iterable[Mapping[str, Any]], along: str, other: str) -> dict[str, list[Mapping[str, Any]]]:
    """Label of a curve -> its contestants: those of one run (or of one set of files) that differ in `along` alone."""
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for one in contestants:
        if one["kind"] != reading.BASE and one.get(along) is not None:
            files = "" if along == "step" else "+".join(lora["path"] for lora in one["loras"])
            lines.setdefault((one.get("run") or "", files, one.get(other)), []).append(one)
    lines = {key: line for key, line in lines.items() if len({one[along] for one in line}) > 1}
    runs = {run for run, _, _ in lines}
    labels = {}
    for (run, files, fixed), line in lines.items():
        label = " ".join([Path(run).name] * (len(runs) > 1) + ([f"{other} {fixed:g}"] if fixed is not None else []))
        label = label or Path(files or run or line[0]["name"]).stem
        labels[label if label not in labels else f"{label} ({len(labels) + 1})"] = line
    return labels


def points(line: Iterable[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], along: str) -> list[charts.Point]:
    return [
        charts.Point(one[along], *(known[one["name"]][end] for end in ("estimate", "low", "high"))) for one in line if one["name"] in known
    ]


def levels(metric: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float | None]:
    known = reading.measured(metric)
    bases = {one["name"]: known[one["name"]]["estimate"] for one in result["contestants"] if one["kind"] == "base" and one["name"] in known}
    return {"floor": metric["floor"], "ceiling": metric["ceiling"], **({"base": next(iter(bases.values()))} if len(bases) == 1 else {})}


def _mark(result: Mapping[str, Any], along: str) -> float | None:
    best = result["recommended"] and result["recommended"]["contestant"]
    return next((one.get(along) for one in result["contestants"] if one["name"] == best), None)


def _pareto(result: Mapping[str, Any]) -> Markup | None:
    """Identity against variety, where two contestants have both."""
    metrics = result["metrics"]
    across, up = reading.first_of(reading.VARIETY, metrics), reading.first_of(reading.IDENTITY, metrics)
    if across is None or up is None:
        return None
    known = [reading.measured(metrics[name]) for name in (across, up)]
    best = result["recommended"] and result["recommended"]["contestant"]
    dots = []
    for one in result["contestants"]:
        name = one["name"]
        if all(name in values for values in known):
            kind = "best" if name == best else "front" if name in result["pareto"] else "base" if one["kind"] == reading.BASE else ""
            dots.append(charts.Dot(name, *(tuple(values[name][end] for end in ("estimate", "low", "high")) for values in known), kind))
    if len(dots) < 2:
        return None
    return charts.scatter(dots, *(reading.heading(metrics[name]["card"]) for name in (across, up)))


# ---- pictures ----


def sheets(result: Mapping[str, Any], shots: Sequence[Row], thumbnails: Thumbnails) -> dict[str, Any]:
    """Contact sheets by pack, with thumbnails."""
    heads, packs, total = arranged([one["name"] for one in result["contestants"]], shots)
    side = next((side for most, side in SIDES.items() if len(heads) <= most), SMALLEST)
    told = {
        pack: [
            {"prompt": prompt, "seed": seed, "cells": [None if file is None else thumbnails(file, side) for file in files]}
            for prompt, seed, files in rows
        ]
        for pack, rows in packs.items()
    }
    return {"side": side, "columns": heads, "packs": told, "shown": sum(map(len, packs.values())), "rows": total}


def arranged(names: Sequence[str], shots: Iterable[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[tuple]], int]:
    """Which pictures are shown, and where: heads of columns, pack -> rows of a prompt, a seed and a file a column (None for none), and how
    many rows there are in all. The same prompt and seed stand side by side; of a single contestant, the seeds of a prompt."""
    if len(names) == 1:
        columns, rows = _of_one(shots)
        heads = [column.strip() for column in columns]
    else:
        columns, rows = list(names)[:CELLS], {}
        for shot in shots:
            rows.setdefault((shot["pack"], shot["prompt"], shot["seed"]), {}).setdefault(shot["contestant"], shot["file"])
        heads = columns
    packs: dict[str, list[tuple]] = {}
    for pack, prompt, seed in _spread(list(rows), max(1, min(ROWS, CELLS // max(1, len(columns))))):
        files = rows[pack, prompt, seed]
        packs.setdefault(pack, []).append((prompt, seed if len(names) > 1 else None, [files.get(column) for column in columns]))
    return heads, packs, len(rows)


def _of_one(shots: Iterable[Mapping[str, Any]]) -> tuple[list[str], dict[tuple, dict[str, str]]]:
    """Columns and rows of a single contestant: a column a seed, or, where seeds are many or unknown, as many as there is room for."""
    asked: dict[tuple, list[tuple[int | None, str]]] = {}
    for shot in shots:
        asked.setdefault((shot["pack"], shot["prompt"]), []).append((shot["seed"], shot["file"]))
    seeds = list(dict.fromkeys(seed for files in asked.values() for seed, _ in files))
    if None not in seeds and len(seeds) <= COLUMNS:
        rows = {(*row, 0): {f"seed {seed}": file for seed, file in files} for row, files in asked.items()}
        return [f"seed {seed}" for seed in seeds], rows
    columns = [" " * place for place in range(min(COLUMNS, max(map(len, asked.values()))))]
    rows = {
        (*row, start): dict(zip(columns, (file for _, file in files[start : start + COLUMNS]), strict=False))
        for row, files in asked.items()
        for start in range(0, len(files), COLUMNS)
    }
    return columns, rows


def _spread(rows: list[tuple], most: int) -> list[tuple]:
    """`most` of the rows in their order: each pack's and each prompt's turn comes before a second seed."""
    seeds: dict[tuple, int] = {}
    prompts: dict[str, dict[str, int]] = {}
    order = []
    for place, (pack, prompt, _) in enumerate(rows):
        turn = seeds[pack, prompt] = seeds.get((pack, prompt), -1) + 1
        number = prompts.setdefault(pack, {}).setdefault(prompt, len(prompts[pack]))
        order.append((turn, number, place))
    return [rows[place] for place in sorted(place for _, _, place in sorted(order)[:most])]


def worst(result: Mapping[str, Any], shots: Sequence[Row], thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """The chosen contestant's worst pictures by each metric that scores single pictures, worst first."""
    name, found = reading.chosen(result), []
    for metric, told in result["metrics"].items():
        better = told["card"]["better"]
        scored = [(shot["scores"][metric], shot) for shot in shots if shot["contestant"] == name and shot["scores"].get(metric) is not None]
        if better == "neither" or not scored:
            continue
        best = (max if better == "higher" else min)(score for score, _ in scored)
        count, scored = len(scored), [(score, shot) for score, shot in scored if score != best]
        if not scored:
            continue
        scored.sort(key=lambda pair: (pair[0] if better == "higher" else -pair[0], str(pair[1]["file"])))
        pictures = []
        for score, shot in scored[:WORST]:
            nearest = shot.get("nearest")
            pictures.append({
                "score": reading.rounded(score, None), "prompt": shot["prompt"], "seed": shot["seed"],
                "picture": thumbnails(shot["file"], SMALLEST + 32),
                "nearest": thumbnails(nearest, SMALLEST + 32) if nearest and metric in reading.MEMORY else None,
            })  # fmt: skip
        found.append({"title": reading.heading(told["card"]), "better": better, "pictures": pictures, "count": count})
    return found


def _repeat(result: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to do the same again: files with their hashes, seeds, settings as lines, versions."""
    loras = {lora["sha256"]: lora for one in result["contestants"] for lora in one["loras"]}
    settings = [f"{name} = {value}" for name, value in reading.flat(result["settings"])]
    versions = [f"{name} {version}" for name, version in result["versions"].items() if version is not None]
    program, *arguments = result["command"]
    told = {"command": f"{program} {shlex.join(arguments)}", "loras": list(loras.values())}
    return told | {"settings": settings, "versions": versions, "seeds": ", ".join(map(str, result["seeds"]))}
