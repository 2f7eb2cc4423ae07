"""Contact sheets: pictures in rows and columns with labels, at a size that a person can judge. Needs PIL alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, QUIET, EMPTY = (250, 249, 246), (34, 34, 38), (118, 118, 124), (244, 242, 238)
SMALLEST, LARGEST = 192, 512  # pixels of a cell's longer side, between which pictures keep their own size
MOST_LINES = 6


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Image.Image:
    """One RGB picture of all. Rows may differ in length; None leaves its cell empty.

    Small pictures are enlarged by a whole number without smoothing, so that what is judged is what was made; large ones are reduced.
    Labels are wrapped; one that is still longer than six lines ends in an ellipsis.
    """
    pictures = [picture for row in rows for picture in row if picture is not None]
    assert pictures, "a contact sheet needs a picture"
    assert not row_labels or len(row_labels) == len(rows), f"{len(row_labels)} labels for {len(rows)} rows"
    columns = max(len(row) for row in rows)
    assert not column_labels or len(column_labels) == columns, f"{len(column_labels)} labels for {columns} columns"

    scale = cell_scale(max(max(picture.size) for picture in pictures))
    width, height = (round(scale * max(picture.size[axis] for picture in pictures)) for axis in (0, 1))
    small = round(9 + max(width, height) / 38)
    gap, margin = 6 + width // 64, 16 + width // 12
    label, heading = ImageFont.load_default(small), ImageFont.load_default(round(small * 1.7))

    gutter_most = round(width * 1.05)
    sides = [wrap(text, label, gutter_most, most=min(MOST_LINES, height // line_height(label))) for text in row_labels]
    gutter = ceil(max((label.getlength(line) for side in sides for line in side), default=0))
    gutter += gap * 2 if gutter else 0
    tops = [wrap(text, label, width, most=MOST_LINES) for text in column_labels]
    body = columns * width + (columns - 1) * gap
    titles = wrap(title, heading, gutter + body) if title else []
    subtitles = wrap(subtitle, label, gutter + body) if subtitle else []

    header = len(titles) * line_height(heading) + len(subtitles) * line_height(label)
    header += gap * 2 if header else 0
    top_height = max((len(lines) for lines in tops), default=0) * line_height(label)
    top_height += gap if top_height else 0
    total = header + top_height + len(rows) * height + (len(rows) - 1) * gap
    sheet = Image.new("RGB", (2 * margin + gutter + body, 2 * margin + total), PAPER)
    draw = ImageDraw.Draw(sheet)

    y = margin
    for lines, font, colour in ((titles, heading, INK), (subtitles, label, QUIET)):
        for line in lines:
            draw.text((margin, y), line, colour, font)
            y += line_height(font)
    y = margin + header + top_height
    for column, lines in enumerate(tops):
        centre = margin + gutter + column * (width + gap) + width / 2
        _lines(draw, lines, label, centre, y - gap - len(lines) * line_height(label), "ma", INK)
    for index, row in enumerate(rows):
        if sides:
            _lines(draw, sides[index], label, margin, y + (height - len(sides[index]) * line_height(label)) / 2, "la", INK)
        for column in range(columns):
            x = margin + gutter + column * (width + gap)
            picture = row[column] if column < len(row) else None
            if picture is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
            else:
                resized = _resized(picture.convert("RGB"), scale)
                sheet.paste(resized, (x + (width - resized.width) // 2, y + (height - resized.height) // 2))
        y += height + gap
    return sheet


def cell_scale(side: int) -> float:
    """By how much pictures with this longer side are enlarged (a whole number) or reduced."""
    if side < SMALLEST:
        return float(ceil(SMALLEST / side))
    return min(1.0, LARGEST / side)


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def line_height(font) -> int:
    ascent, descent = font.getmetrics()
    return round((ascent + descent) * 1.15)


def _lines(draw, lines: Sequence[str], font, x: float, y: float, anchor: str, colour) -> None:
    for line in lines:
        draw.text((x, y), line, colour, font, anchor=anchor)
        y += line_height(font)


def wrap(text: str, font, width: float, most: int | None = None) -> list[str]:
    """Lines that are at most `width` pixels wide. Words longer than that are cut; lines beyond `most` become an ellipsis."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if most is not None and len(lines) > max(1, most):
        lines = lines[: max(1, most)]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip(" ,.;") + "…"
    return lines
