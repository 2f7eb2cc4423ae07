"""What happens to pictures of unrelated prompts."""

from dataclasses import replace

import pytest
from PIL import Image, ImageFilter

from charforgex.embedders import get_clip
from charforgex.errors import DataError
from charforgex.evaluation.appearance import ssim
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metrics.style_damage import StyleDamage
from tests.evaluation.scenes import case, edited, gallery, shots


def asked(number, count=4, size=64):
    return Gallery(
        f"{number}", [replace(s, prompt=f"prompt {i}", pack="unrelated") for i, s in enumerate(shots(number, range(count), size))]
    )


def test_it_is_the_distance_of_clips_vectors():
    clip, a, b = get_clip("charworld"), asked(1), asked(2)
    seen = [clip.see([shot.open() for shot in one.shots]) for one in (a, b)]
    found = StyleDamage()(a, case(base=b))
    assert found.rows == pytest.approx((1 - (seen[0] * seen[1]).sum(1)).tolist(), abs=1e-5)
    same = StyleDamage()(a, case(base=a))
    assert same.estimate == pytest.approx(0, abs=1e-6) and same.parts["structure"] == pytest.approx(0, abs=1e-9)


def test_it_rises_with_the_damage():
    base = asked(2, 6)
    found = [
        StyleDamage()(edited(base, lambda p, r=r: p.filter(ImageFilter.GaussianBlur(r))), case(base=base)) for r in (0.0, 1.0, 2.0, 4.0)
    ]
    assert sorted(value.estimate for value in found) == [value.estimate for value in found]
    assert sorted(value.parts["structure"] for value in found) == [value.parts["structure"] for value in found]


def test_structure_is_wangs():
    metrics = pytest.importorskip("skimage.metrics")
    import numpy as np

    a, b = (np.asarray(asked(number, 1, 96).shots[0].open().convert("L")) for number in (1, 2))
    theirs = metrics.structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_sizes_that_differ_are_told():
    with pytest.raises(DataError, match=r"\(64, 64\) pixels and \(96, 96\)"):
        StyleDamage()(asked(1), case(base=asked(2, size=96)))
    tiny = edited(asked(1), lambda picture: Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match="from 11 a side on"):
        StyleDamage()(tiny, case(base=tiny))


def test_other_packs_are_not_asked():
    with pytest.raises(DataError, match="pack unrelated"):
        StyleDamage()(gallery(1), case(base=gallery(2)))
