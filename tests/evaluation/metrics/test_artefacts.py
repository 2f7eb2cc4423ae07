"""Blocks, grain, lost tones and pictures of nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from charforgex.curation import quality
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metrics.artefacts import Artefacts
from tests.evaluation.scenes import case, edited, gallery


def squeezed(level):
    def change(picture):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=level)
        return Image.open(data).convert("RGB")

    return change


def test_they_rise_as_jpegs_get_worse():
    pictures = gallery(1, 6, size=192)
    found = [Artefacts()(pictures, case()), *(Artefacts()(edited(pictures, squeezed(level)), case()) for level in (60, 30, 15, 5))]
    estimates = [value.estimate for value in found]
    assert sorted(estimates) == estimates and estimates[-1] > 3 * estimates[0], estimates
    assert [value.parts["blocks"] for value in found] == sorted(value.parts["blocks"] for value in found)


def test_each_flaw_is_measured_against_curations_limit():
    grain = np.random.default_rng(0).normal(128, 5, (64, 64)).clip(0, 255).astype(np.uint8)
    noisy = Image.fromarray(grain).convert("RGB")
    limits = quality.QualitySettings()
    found = Artefacts()(Gallery("noisy", [Shot(noisy)]), case())
    assert found.estimate == pytest.approx(quality.measure(np.asarray(noisy))["noise"] / limits.max_noise)
    assert found.parts["noise"] == pytest.approx(5, abs=1)
    night = np.zeros((64, 64, 3), np.uint8)
    night[:16] = 120  # a quarter
    found = Artefacts()(Gallery("night", [Shot(Image.fromarray(night))]), case())
    assert found.parts["dark"] == 0.75 and found.parts["uniform"] == 1
    assert found.estimate == pytest.approx(0.75 / limits.max_dark)


def test_a_black_picture_is_the_worst():
    black = Gallery(
        "black", [Shot(Image.new("RGB", (64, 64)), "black"), Shot(Image.new("RGB", (64, 64), (9, 99, 199)), "blue"), *gallery(1, 2).shots]
    )
    found = Artefacts()(black, case())
    assert found.rows[:2].tolist() == [1, 1] and (found.rows[2:] < 0.6).all()
    assert found.parts["blank"] == 0.5 and found.notes == ("2 of 4 pictures are of one colour",)


def test_no_pictures():
    with pytest.raises(DataError, match="there are no pictures"):
        Artefacts()(Gallery("none", []), case())
