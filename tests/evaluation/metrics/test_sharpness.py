"""Sharp edges."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from charforgex.curation import quality
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.sharpness import Sharpness
from tests.evaluation.scenes import case, edited, gallery


def test_it_falls_with_blur():
    pictures = gallery(1, 4, size=128)
    blurred = [edited(pictures, lambda p, r=r: p.filter(ImageFilter.GaussianBlur(r))) for r in (0, 1, 2, 3, 4)]
    found = [Sharpness()(one, case()).rows for one in blurred]
    assert (np.diff(found, axis=0) < 0).all(), found


def test_it_is_curations():
    step = np.zeros((96, 96, 3), np.uint8)
    step[:, 48:] = 200
    picture = Image.fromarray(step).filter(ImageFilter.GaussianBlur(3))
    found = Sharpness()(Gallery("step", [Shot(picture)]), case())
    assert found.estimate == pytest.approx(quality.measure(np.asarray(picture))["sharpness"])
    assert found.estimate == pytest.approx(0.44, abs=0.03)


def test_where_there_are_no_edges_nothing_is_said():
    blank = Shot(Image.new("RGB", (64, 64), (90, 90, 90)), "blank")
    found = Sharpness()(Gallery("some", [blank, *gallery(1, 2).shots]), case())
    assert np.isnan(found.rows).tolist() == [True, False, False] and found.notes == ("1 of 3 pictures have no edges to tell by",)
    for none, words in ((Gallery("blank", [blank]), "none of the 1 pictures has edges"), (Gallery("none", []), "no pictures")):
        with pytest.raises(DataError, match=words):
            Sharpness()(none, case())
