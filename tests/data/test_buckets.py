"""Bucket arithmetic against worked numbers, and cuts that neither distort nor lie."""

import numpy as np
import pytest
from PIL import Image

from charforgex.data.buckets import find_bucket, make_buckets, make_cut
from charforgex.errors import ConfigError


def test_worked_buckets():
    # 64^2 = 4096: 48 -> 4096 / 48 = 85 -> 80; 32 -> 128 would be 4:1
    assert make_buckets(64, 16) == [(48, 80), (64, 64), (80, 48)]
    assert make_buckets(16, 16) == [(16, 16)]
    # SDXL's own list (Podell et al. 2023, appendix I) has these at 1024 and a multiple of 64
    assert {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (1344, 768)} <= set(make_buckets(1024, 64))


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 16), (512, 64), (1024, 32), (1024, 64), (768, 16)])
def test_every_bucket_keeps_the_rules(resolution, multiple):
    buckets = make_buckets(resolution, multiple)
    assert (resolution, resolution) in buckets and {(w, h) for h, w in buckets} == set(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert 0.5 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)


@pytest.mark.parametrize(("resolution", "words"), [(1000, "992 or 1008"), (8, "16 or 32"), (0, "16 or 32"), (-64, "16 or 32")])
def test_resolutions_off_the_grid_are_refused(resolution, words):
    with pytest.raises(ConfigError, match=f"resolution={resolution} .*16.*{words}"):
        make_buckets(resolution, 16)


def test_nearest_is_by_ratio_whatever_the_size():
    buckets = make_buckets(64, 16)
    for scale in (1, 7, 50):
        assert find_bucket(100 * scale, 100 * scale, buckets) == (64, 64)
        assert find_bucket(120 * scale, 100 * scale, buckets) == (64, 64)  # log 1.2 = .18; to 80/48: log 1.67 - .18 = .33
        assert find_bucket(100 * scale, 140 * scale, buckets) == (48, 80)  # log 1.4 = .34; .51 - .34 = .17
    # exactly half-way between 1:1 and 4:1: the larger, so that no orientation is favoured
    assert find_bucket(2, 1, [(10, 10), (24, 6)]) == (24, 6) and find_bucket(2, 1, [(13, 13), (24, 6)]) == (13, 13)


def test_a_worked_cut():
    # 1000 x 700 into 80 x 48 (height x width): scale max(.08, .0686) = .08 -> 80 x 56, (56 - 48) / 2 = 4 from the left
    cut = make_cut(1000, 700, (80, 48))
    assert cut.scale == 0.08 and cut.resized == (80, 56) and cut.top_left == (0, 4)
    assert cut.box() == (50, 0, 650, 1000)
    assert cut.lost == pytest.approx(1 - 48 / 56)
    assert cut.mirrored().top_left == (0, 56 - 4 - 48)


def test_the_mirrored_top_left_of_an_uneven_cut():
    cut = make_cut(80, 53, (80, 48))  # 53 - 48 = 5: 2 left, 3 right
    assert cut.top_left == (0, 2) and cut.mirrored().top_left == (0, 3)
    assert cut.mirrored().mirrored() == cut


def test_without_scaling_a_cut_is_the_very_pixels():
    array = np.random.default_rng(0).integers(0, 256, (80, 53, 3), dtype=np.uint8)
    cut = make_cut(80, 53, (80, 48))
    assert (np.asarray(cut.picture(Image.fromarray(array))) == array[:, 2:50]).all()
    assert (np.asarray(cut.mirrored().picture(Image.fromarray(array))) == array[:, 2:50][:, ::-1]).all()


@pytest.mark.parametrize("size", [(101, 67), (67, 101), (333, 170), (64, 65), (1000, 1000), (49, 81)])
def test_nothing_is_distorted(size):
    """A diagonal stays at 45 degrees: colour = x in red and y in green, so differences of a pixel's neighbours are the scale."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(float)
    step = 250 / max(size)
    image = Image.fromarray(np.stack([x * step, y * step, 0 * x], 2).round().astype(np.uint8))
    cut = make_cut(height, width, find_bucket(height, width, make_buckets(64, 16)))
    out = np.asarray(cut.picture(image)).astype(float)
    assert out.shape[:2] == cut.size
    inner = out[8:-8, 8:-8]
    across, down = inner[:, -1, 0].mean() - inner[:, 0, 0].mean(), inner[-1, :, 1].mean() - inner[0, :, 1].mean()
    per_pixel = step / cut.scale
    assert across / (inner.shape[1] - 1) == pytest.approx(per_pixel, rel=0.03)
    assert down / (inner.shape[0] - 1) == pytest.approx(per_pixel, rel=0.03)
    # and it begins where the numbers say: the value at output pixel i is (i + .5 + top_left) / scale - .5 in the original
    top, left = cut.top_left
    assert inner[:, 0, 0].mean() == pytest.approx(((8.5 + left) / cut.scale - 0.5) * step, abs=1)
    assert inner[0, :, 1].mean() == pytest.approx(((8.5 + top) / cut.scale - 0.5) * step, abs=1)


def test_a_mask_is_averaged_over_the_same_cut():
    mask = np.zeros((80, 53), np.uint8)
    mask[:, 10:30] = 255  # in the cut: columns 8..27 of 48; cells of 8: the first empty, two full, the fourth half
    grid = np.asarray(make_cut(80, 53, (80, 48)).mask(Image.fromarray(mask), 8))
    assert grid.shape == (10, 6)
    assert grid[0].tolist() == [0, 255, 255, 127.5, 0, 0]
    mirrored = np.asarray(make_cut(80, 53, (80, 48)).mirrored().mask(Image.fromarray(mask), 8))
    assert mirrored[0].tolist() == [0, 0, 127.5, 255, 255, 0]
