"""Our dataset as the tools read it."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from charforgex.backends.pictures import write_pictures
from charforgex.curation.manifest import Record


@pytest.fixture
def records(tmp_path):
    """A plain JPEG, a PNG with transparent parts, and a JPEG that lies on its side; the first with a mask."""
    (tmp_path / "face").mkdir()
    Image.new("RGB", (8, 6), (10, 200, 30)).save(tmp_path / "plain.jpg")
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(tmp_path / "face" / "glass.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6), (0, 0, 0)).save(tmp_path / "lying.jpg", exif=exif)
    Image.new("L", (8, 6), 255).save(tmp_path / "plain.mask.png")
    sizes = {"plain.jpg": (8, 6), "face/glass.png": (8, 6), "lying.jpg": (6, 8)}
    masks = {"plain.jpg": "plain.mask.png"}
    return [
        Record(name, hashlib.sha256(name.encode()).hexdigest(), *size, captions=(f"a  {name}", "another"), mask=masks.get(name))
        for name, size in sizes.items()
    ]


def test_pictures_are_what_we_see(records, tmp_path):
    made = write_pictures(records, lambda name: tmp_path / name, tmp_path / "out", (0, 0, 255), {"face": 3}, with_masks=True)
    assert [(one.repeats, one.regular) for one in made] == [(1, False), (3, False)]
    once, thrice = (one.folder for one in made)
    assert (once / "00000.jpg").read_bytes() == (tmp_path / "plain.jpg").read_bytes()
    assert Image.open(once / "00001.png").size == (6, 8)
    assert np.asarray(Image.open(thrice / "00000.png"))[0, 0].tolist() == [0, 0, 255]
    assert (once / "00000.txt").read_text() == "a plain.jpg"
    assert np.asarray(Image.open(made[0].masks / "00001.png")).min() == 255 and made[1].masks is None


def test_what_was_there_is_replaced(records, tmp_path):
    write_pictures(records, lambda name: tmp_path / name, tmp_path / "out", (0, 0, 0))
    write_pictures(records[:1], lambda name: tmp_path / name, tmp_path / "out", (0, 0, 0))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["00000.jpg", "00000.txt"]
