"""sheets.py: every picture is where its row and column say, whole, and every label fits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from charforgex.generation.sheets import EMPTY, PAPER, cell_scale, contact_sheet, wrap

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def box(sheet, colour):
    """Left, top, right, bottom of all pixels of one colour."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def test_pictures_stand_in_their_rows_and_columns():
    sheet = contact_sheet([[plain(c) for c in COLOURS[:3]], [plain(c) for c in COLOURS[3:]]])
    boxes = [box(sheet, colour) for colour in COLOURS]
    assert all((right - left, bottom - top) == (192, 192) for left, top, right, bottom in boxes)
    lefts, tops = [b[0] for b in boxes], [b[1] for b in boxes]
    assert lefts[:3] == lefts[3:] and lefts[0] < lefts[1] < lefts[2]
    assert tops[:3] == [tops[0]] * 3 and tops[3:] == [tops[3]] * 3 and tops[3] >= tops[0] + 192
    assert sheet.getpixel((0, 0)) == PAPER and sheet.mode == "RGB"


def test_small_pictures_are_enlarged_without_smoothing():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([[Image.fromarray(noise)]]))
    margin = (sheet.shape[0] - 192) // 2
    assert np.array_equal(sheet[margin : margin + 192, margin : margin + 192], noise.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(("side", "scale"), [(8, 24.0), (64, 3.0), (96, 2.0), (128, 2.0), (192, 1.0), (300, 1.0), (512, 1.0), (1024, 0.5)])
def test_scale(side, scale):
    assert cell_scale(side) == scale


def test_sides_are_kept_in_proportion():
    sheet = contact_sheet([[plain(COLOURS[0], (1024, 512)), plain(COLOURS[1], (512, 1024))]])
    left, top, right, bottom = box(sheet, COLOURS[0])
    assert (right - left, bottom - top) == (512, 256)
    left, top, right, bottom = box(sheet, COLOURS[1])
    assert (right - left, bottom - top) == (256, 512)


def test_missing_pictures_leave_their_cells_empty():
    sheet = contact_sheet([[plain(COLOURS[0]), None], [plain(COLOURS[1])]])
    left, top, right, bottom = box(sheet, EMPTY)
    assert (right - left) == 192 and left > box(sheet, COLOURS[0])[2] and bottom - top > 2 * 192


def test_labels_and_title_take_room_and_cover_no_picture():
    bare = contact_sheet([[plain(COLOURS[0]), plain(COLOURS[1])]])
    sheet = contact_sheet([[plain(COLOURS[0]), plain(COLOURS[1])]], ["a row\nof two lines"], ["one", "two " * 60], "Title", "and more")
    assert sheet.width > bare.width and sheet.height > bare.height
    for colour in COLOURS[:2]:
        left, top, right, bottom = box(sheet, colour)
        assert np.array_equal(np.asarray(sheet)[top:bottom, left:right], np.full((192, 192, 3), colour))
    ink = (
        (np.asarray(sheet).astype(int).sum(-1) < 300)
        & ~(np.asarray(sheet) == COLOURS[0]).all(-1)
        & ~(np.asarray(sheet) == COLOURS[1]).all(-1)
    )
    assert ink[: box(sheet, COLOURS[0])[1]].any() and ink[:, : box(sheet, COLOURS[0])[0]].any()
    assert not ink[:4].any() and not ink[-4:].any() and not ink[:, :4].any() and not ink[:, -4:].any()


def test_same_pictures_same_bytes():
    make = lambda: contact_sheet([[plain(COLOURS[0])]], ["row"], ["column"], "title")  # noqa: E731
    assert make().tobytes() == make().tobytes()


def test_wrap():
    font = ImageFont.load_default(14)
    text = "a portrait of a woman with brown skin, looking angry, in a city at night"
    lines = wrap(text, font, 120)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font.getlength(line) <= 120 for line in lines)
    cut = wrap(text, font, 120, most=2)
    assert cut[0] == lines[0] and cut[1].endswith("…") and font.getlength(cut[1]) <= 130
    assert "".join(wrap("x" * 100, font, 50)) == "x" * 100
    assert wrap("one\ntwo", font, 500) == ["one", "two"]
    assert wrap("", font, 100) == []
