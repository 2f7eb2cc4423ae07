"""Drift of brightness, contrast and saturation."""

import numpy as np
import pytest
from PIL import Image

from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.tone import Tone
from tests.evaluation.scenes import case, gallery


def plain(*colours):
    return Gallery("plain", [Shot(Image.new("RGB", (16, 16), colour), f"{i}", seed=1) for i, colour in enumerate(colours)])


def test_numbers_by_hand():
    found = Tone()(plain((153, 153, 153), (51, 51, 51)), case(base=plain((102, 102, 102), (102, 102, 102))))
    assert found.rows == pytest.approx([0.2 / 3, 0.2 / 3]) and found.parts["brightness"] == pytest.approx(0)
    coloured = Tone()(plain((200, 100, 100)), case(base=plain((200, 200, 200))))
    assert coloured.parts["saturation"] == pytest.approx(0.5)
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[8:] = 255
    striped = Gallery("striped", [Shot(Image.fromarray(halves), "0", seed=1)])
    assert Tone()(striped, case(base=plain((127, 127, 127)))).parts["contrast"] == pytest.approx(0.5)


def test_the_base_has_not_drifted():
    assert Tone()(gallery(1), case(base=gallery(1))).estimate == 0
    with pytest.raises(DataError, match="base's pictures"):
        Tone()(gallery(1), case())
