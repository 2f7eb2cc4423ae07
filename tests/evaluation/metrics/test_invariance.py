"""The same pictures give the same numbers, in any order, by any number at a time, from files as from memory."""

from dataclasses import replace

import numpy as np
import pytest

from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.registry import load
from tests.evaluation.scenes import case, gallery, turned

SETTINGS = {
    "identity": {}, "verification": {}, "retrieval": {}, "confusion": {"faces": {"detector": "charworld"}}, "prompt_following": {},
    "attributes": {}, "leakage": {}, "style_damage": {}, "tone": {}, "sharpness": {}, "artefacts": {},
}  # fmt: skip
TOLERANCE = 1e-4  # of float32 in batches of other sizes; CLIP scores are a hundred times as large


def asked(number):
    """Half of the shots for one pack, half for the other; two of each prompt."""
    shots = [
        replace(shot, prompt=f"a portrait, smiling, {i // 2}", pack=("leakage", "unrelated")[i % 2])
        for i, shot in enumerate(gallery(number, 7).shots)
    ]
    return Gallery(f"{number}", shots)


def same(found, expected, order):
    scale = 100 if np.nanmax(expected.rows) > 2 else 1
    assert found.rows == pytest.approx(expected.rows[order], abs=TOLERANCE * scale, nan_ok=True)
    numbers = [[value.estimate, value.low, value.high, value.count, *value.parts.values()] for value in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=TOLERANCE * scale, nan_ok=True)
    assert found.notes == expected.notes


@pytest.mark.parametrize("name", SETTINGS)
def test_order_batches_and_files(name, monkeypatch, tmp_path):
    (metric,) = load({name: SETTINGS[name]}).values()
    told = case(base=asked(2))
    expected = metric(asked(1), told)
    other, order = turned(asked(1))
    same(metric(other, told), expected, order)
    monkeypatch.setattr(Gallery.batches, "__defaults__", (3,))
    same(metric(asked(1), told), expected, slice(None))
    files = []
    for i, shot in enumerate(asked(1).shots):
        shot.picture.save(tmp_path / f"{i}.png")
        files.append(replace(shot, picture=tmp_path / f"{i}.png", key=f"file {i}"))
    for _ in range(2):  # the second time from the cache
        same(metric(Gallery("1", files, tmp_path / "cache"), told), expected, slice(None))
