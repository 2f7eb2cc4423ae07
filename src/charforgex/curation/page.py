"""report.html: one file that needs nothing else, neither network nor scripts. Every text in it may be hostile and goes through `text`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from charforgex.curation.items import CLASSES
from charforgex.pages import POLICY, STYLE, text

SIDE = 240  # pixels of a thumbnail's longer side
JPEG = {"format": "JPEG", "quality": 78, "optimize": True}
OWN_STYLE = Path(__file__).with_name("page.css")

TITLES = {
    "framing": "Framing", "yaw": "Looking", "pitch": "Head up or down", "expression": "Expression", "hair": "Hair", "garment": "Clothes",
    "background": "Background", "lighting": "Light", "colour": "Colour",
}  # fmt: skip
Thumbnail = Callable[[str], Image.Image | None]


def write_page(
    file: TextIO, report: Mapping[str, Any], shown: Mapping[str, Sequence[Mapping[str, Any]]],
    clusters: Sequence[Sequence[Mapping[str, Any]]], thumbnail: Thumbnail,
) -> None:  # fmt: skip
    """Writes the page piece by piece; one thumbnail is in memory at a time."""
    classes, steps = report["classes"], report["funnel"]
    title = text(report["title"])
    style = "".join(path.read_text(encoding="utf-8") for path in (STYLE, OWN_STYLE))
    file.write(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}"><meta name="referrer" content="no-referrer">'
        f"<title>{title}</title><style>{style}</style></head><body><main>\n<h1>{title}</h1>"
        f'<p class="lead">{steps[-1]["count"]:,} of {steps[0]["count"]:,} files are kept{_sides(report["split"])}</p>\n'
        f"{_funnel(steps)}\n<nav>"
        '<a href="#advice">What to do</a><a href="#kept">Kept</a><a href="#mix">Composition</a><a href="#quality">Quality</a>'
        '<a href="#copies">Copies</a><a href="#aside">Set aside</a>'
        '<label><input type="checkbox" id="boxes" checked> faces and crops</label></nav>\n'
    )
    file.write(f'<h2 id="advice">What to do</h2>\n{_advice(report["recommendations"])}\n')
    file.write("".join(f'<p class="soft small notes">{text(note)}</p>\n' for note in report["notes"]))
    file.write(f'<h2 id="kept">Kept</h2>\n{_more(shown.get("kept", ()), classes.get("kept", 0))}<div class="grid">\n')
    _figures(file, shown.get("kept", ()), thumbnail)
    file.write(f'</div>\n<h2 id="mix">Composition</h2>\n{_composition(report["analysis"])}\n')
    file.write(f'<h2 id="quality">Quality</h2>\n{_quality(report["analysis"]["quality"])}\n<h2 id="copies">Copies</h2>\n')
    if not clusters:
        file.write('<p class="soft">No two files show the same picture.</p>\n')
    file.write('<div class="copies">\n')
    for members in clusters:
        file.write('<div class="twins">\n')
        _figures(file, members, thumbnail)
        file.write("</div>\n")
    file.write("</div>\n")
    file.write('<h2 id="aside">Set aside</h2>\n')
    aside = [kind for kind in classes if kind not in ("kept", "sidecar", "container")]
    if not aside:
        file.write('<p class="soft">Nothing was.</p>\n')
    for kind in aside:
        name, meaning = text(kind.replace("_", " ")), text(CLASSES[kind])
        file.write(f"<details><summary>{classes[kind]:,} {name}<small>{meaning}</small></summary>")
        file.write(f'<div class="inside">{_more(shown[kind], classes[kind])}<div class="grid">\n')
        _figures(file, shown[kind], thumbnail)
        file.write("</div></div></details>\n")
    file.write('<p class="soft small">All of it, for programs: <a href="report.json">report.json</a></p>\n</main></body></html>\n')


def _sides(split: Mapping[str, int]) -> str:
    words = {"train": "to train on", "val": "to validate", "test": "for the end"}
    told = [f"{count:,} {words.get(side, side)}" for side, count in split.items() if count]
    return f", as pictures: {', '.join(map(text, told))}." if told else "."


def _funnel(steps: Sequence[Mapping[str, Any]]) -> str:
    most = max(1, steps[0]["count"])
    rows = [
        f'<div class="step"><span class="soft">{text(step["step"])}</span><div><i style="width:{88 * step["count"] / most:.1f}%"></i>'
        f"<b>{step['count']:,}</b></div></div>"
        for step in steps
    ]
    return f'<div class="funnel">{"".join(rows)}</div>'


def _advice(pieces: Sequence[Mapping[str, Any]]) -> str:
    if not pieces:
        return '<p class="fine">Nothing: this is a good set.</p>'
    told = "".join(f"<li>{text(piece['text'])}</li>" for piece in pieces)
    return f'<ol class="advice">{told}</ol>'


def _more(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    return f'<p class="soft small">The first {len(rows):,} of {count:,}; report.json has all.</p>' if count > len(rows) else ""


# ---- pictures ----


def _figures(file: TextIO, rows: Sequence[Mapping[str, Any]], thumbnail: Thumbnail) -> None:
    for row in rows:
        file.write(f"<figure>{_picture(row, thumbnail)}<figcaption><b>{text(row['name'])}</b>{_below(row)}</figcaption></figure>\n")


def _picture(row: Mapping[str, Any], thumbnail: Thumbnail) -> str:
    picture = thumbnail(row["name"]) if row["width"] and row["height"] else None
    if picture is None:
        return '<div class="frame none">no picture</div>'
    width, height = row["width"], row["height"]
    scale = SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    data = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=2).save(data, **JPEG)
    source = base64.b64encode(data.getvalue()).decode()
    share = 100 * min(1.0, width / height)
    return (
        f'<div class="frame"><div class="pic" style="width:{share:.2f}%;aspect-ratio:{width}/{height}">'
        f'<img alt="{text(row["name"])}" src="data:image/jpeg;base64,{source}">{_boxes(row)}</div></div>'
    )


def _boxes(row: Mapping[str, Any]) -> str:
    boxes = [("face", face["box"]) for face in row["faces"]] + [("cut", cut["box"]) for cut in row["cuts"] if cut.get("box")]
    if not boxes:
        return ""
    drawn = [
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{max(0, right - left):.1f}" height="{max(0, bottom - top):.1f}"/>'
        for kind, (left, top, right, bottom) in boxes
    ]
    return f'<svg viewBox="0 0 {row["width"]} {row["height"]}" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'


def _below(row: Mapping[str, Any]) -> str:
    size = f"{row['width']} × {row['height']}" if row["width"] else ""
    chips = [("", size)] if size else []
    for cut in row["cuts"]:
        held = cut["split"] != "train"
        chips.append(("held" if held else "", f"{cut['framing']}, {cut['split']}" if held else cut["framing"]))
    tags = "".join(f'<span class="{text(kind)}">{text(word)}</span>' for kind, word in dict.fromkeys(chips))
    why = f'<div class="why">{text(row["reason"])}</div>' if row["reason"] else ""
    said = dict.fromkeys(line for cut in row["cuts"] for line in cut["captions"])
    quotes = "".join(f"<q>{text(line)}</q>" for line in list(said)[:3])
    about = [cut.get("about", {}) for cut in row["cuts"]]
    notes = dict.fromkeys(note for known in about for kind in ("contradictions", "notes") for note in known.get(kind, ()))
    remarks = "".join(f'<div class="why">{text(note)}</div>' for note in notes)
    return f'{why}<div class="chips">{tags}</div>{quotes}{remarks}'


# ---- numbers ----


def _composition(analysis: Mapping[str, Any]) -> str:
    diversity, bias = analysis["diversity"], analysis["bias"]
    known = {question: covered for question, covered in diversity["coverage"].items() if any(covered["counts"].values())}
    cards = [_variety(diversity["vendi"], analysis)] if "vendi" in diversity else []
    cards += [_answers(question, covered, bias.get(question)) for question, covered in known.items()]
    rest = ", ".join(TITLES.get(question, question).lower() for question in diversity["coverage"] if question not in known)
    unknown = f'<p class="soft small notes">Not known of any picture: {text(rest)}.</p>' if rest else ""
    return f'<div class="cards">{"".join(cards)}</div>{unknown}'


def _answers(question: str, covered: Mapping[str, Any], tested: Mapping[str, Any] | None) -> str:
    counts = covered["counts"]
    title = f"<h3>{text(TITLES.get(question, question))}</h3>"
    expected = tested["expected"] if tested and tested["wished"] else {}
    most = max(*counts.values(), *expected.values(), 1)
    bars = []
    for answer, count in counts.items():
        wish = f'<s style="left:{100 * expected[answer] / most:.1f}%"></s>' if answer in expected else ""
        shape = "bar" if count else "bar empty"
        filled = f'<u><i style="width:{100 * count / most:.1f}%"></i>{wish}</u>'
        bars.append(f'<div class="{shape}"><span>{text(answer)}</span>{filled}<b>{count}</b></div>')
    notes = [f"evenness {covered['evenness']:.0%}"]
    if covered["unknown"]:
        notes.append(f"{covered['unknown']} not known")
    if expected:
        chance = tested["p"] if tested["p"] is not None else tested["alternative"]["p"]
        how = "χ²" if tested["p"] is not None else tested["alternative"]["method"]
        notes.append(f"against the wish (lines): {how} p = {chance:.3g}, V = {tested['cramers_v']:.2f}")
    return f'<div class="card">{title}{"".join(bars)}<p class="soft small">{text(" · ".join(notes))}</p></div>'


def _variety(score: float, analysis: Mapping[str, Any]) -> str:
    size = analysis["size"]
    told = f"{size['have']} pictures amount to <b>{score:.1f}</b> different ones (Vendi score)."
    if size["enough"]:
        low, high = size["n_interval"]
        told += f" {size['share']:.0%} of the variety of endlessly many such pictures is reached with {size['n']} ({low} to {high})."
    else:
        told += f' <span class="soft">How many would be enough cannot be told: {text(size["why"])}.</span>'
    return f'<div class="card"><h3>Variety</h3><p class="small">{told}</p>{_curve(size) if len(size["values"]) > 1 else ""}</div>'


def _curve(size: Mapping[str, Any], width: int = 320, height: int = 110) -> str:
    """What was measured at each size, and the curve through it."""
    sizes, values = size["sizes"], size["values"]
    right, top = max(sizes), max(values) * 1.08 or 1.0

    def place(n: float, value: float) -> str:
        return f"{30 + (width - 40) * n / right:.1f},{height - 18 - (height - 26) * value / top:.1f}"

    line = ""
    if size.get("c") is not None:
        steps = [sizes[0] + (right - sizes[0]) * part / 40 for part in range(41)]
        points = [place(n, max(0.0, size["a"] + size["b"] * n ** -size["c"])) for n in steps]
        line = f'<polyline class="curve" points="{" ".join(points)}"/>'
    dots = "".join(
        '<circle class="rest" r="3" cx="{}" cy="{}"/>'.format(*place(n, v).split(",")) for n, v in zip(sizes, values, strict=True)
    )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="variety against number of pictures">'
        f'<line class="axis" x1="30" x2="{width - 10}" y1="{height - 18}" y2="{height - 18}"/>{line}{dots}'
        f'<text x="30" y="{height - 4}">0</text><text x="{width - 10}" y="{height - 4}" text-anchor="end">{right} pictures</text>'
        f'<text x="2" y="14">{max(values):.1f}</text></svg>'
    )


def _quality(quality: Mapping[str, Mapping[str, Any]]) -> str:
    cards = [_histogram(name, score) for name, score in quality.items() if "edges" in score]
    if not cards:
        return '<p class="soft">Nothing was measured.</p>'
    key = '<span class="key kept"></span>kept<span class="key rest"></span>set aside · dashed: the limit, shaded: what it refuses'
    return f'<p class="soft small">{key}</p><div class="cards">{"".join(cards)}</div>'


def _histogram(name: str, score: Mapping[str, Any], width: int = 320, height: int = 96) -> str:
    edges, base = score["edges"], height - 16
    low, span = edges[0], edges[-1] - edges[0]
    most = max(1, *(kept + rest for kept, rest in zip(score["kept"], score["rest"], strict=True)))
    step = width / len(score["kept"])
    drawn = []
    if "limit" in score:
        x = width * (score["limit"] - low) / span
        start, end = (0.0, x) if score["side"] == "at least" else (x, float(width))
        drawn.append(f'<rect class="off" x="{start:.1f}" y="0" width="{end - start:.1f}" height="{base}"/>')
    for place, (kept, rest) in enumerate(zip(score["kept"], score["rest"], strict=True)):
        tall, other = base * kept / most, base * rest / most
        for kind, y, size in (("kept", base - tall, tall), ("rest", base - tall - other, other)):
            if size:
                drawn.append(f'<rect class="{kind}" x="{place * step + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{size:.1f}"/>')
    if "limit" in score:
        drawn.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}"/>')
    drawn.append(f'<text x="0" y="{height - 3}">{low:.3g}</text>')
    drawn.append(f'<text x="{width}" y="{height - 3}" text-anchor="end">{edges[-1]:.3g}</text>')
    told = [f"limit: {score['side']} {score['limit']:g}, {score['near']} kept near it"] if "limit" in score else []
    if "percentiles" in score:
        found = score["percentiles"]
        told.append(f"kept: median {found['50']:.3g}, 5 % below {found['5']:.3g}, 5 % above {found['95']:.3g}")
    return (
        f'<div class="card"><h3>{text(name.replace("_", " "))}</h3><svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="histogram of {text(name)}">{"".join(drawn)}</svg><p class="soft small">{text(" · ".join(told))}</p></div>'
    )
