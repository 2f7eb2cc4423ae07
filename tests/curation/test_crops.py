"""Crops: the head whole, the shape a bucket's, nobody else, and never larger than it was."""

import random

import numpy as np
import pytest
from PIL import Image

from charforgex.curation.crops import CropSettings, Cut, cut, free_of, head_box, plan, salient_box
from charforgex.curation.items import Face
from charforgex.errors import ConfigError

SETTINGS = CropSettings(min_side=64)


def holds(box, inner, slack=1.0):
    return all(a <= b + slack for a, b in zip(box[:2], inner[:2], strict=True)) and all(
        a >= b - slack for a, b in zip(box[2:], inner[2:], strict=True)
    )


def some_face(rng, width, height):
    side = rng.uniform(0.05, 0.5) * min(width, height)
    x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return Face((x, y, x + 0.9 * side, y + side), 0.9)


def test_a_thousand_pictures_keep_their_heads_and_shapes():
    rng, counts = random.Random(0), []
    for _ in range(1000):
        width, height = rng.randint(300, 2000), rng.randint(300, 2000)
        face = some_face(rng, width, height)
        cuts = plan(width, height, face, SETTINGS)
        head = head_box(face, SETTINGS.head_margin, (0, 0, width, height))
        counts.append(len(cuts))
        for one in cuts:
            left, top, right, bottom = one.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert one.size == (right - left, bottom - top) and min(one.size) >= SETTINGS.min_side
            shape = min(abs((right - left) - ratio * (bottom - top)) for ratio in SETTINGS.ratios)
            assert shape < 2, "a ratio of the set, to a pixel"
            assert holds(one.box, face.box)
            if any(min(width, height * r) >= head[2] - head[0] and min(height, width / r) >= head[3] - head[1] for r in SETTINGS.ratios):
                assert holds(one.box, head), "the whole head wherever some ratio holds it"
    assert min(counts) >= 1 and sum(counts) > 1800


def test_framings_show_more_and_more():
    face = Face((450, 300, 550, 420), 0.9)
    portrait, upper, full = plan(1000, 2000, face, SETTINGS)
    assert [c.framing for c in (portrait, upper, full)] == ["portrait", "upper", "full"]
    heights = [c.box[3] - c.box[1] for c in (portrait, upper, full)]
    assert 300 < heights[0] < 480 < heights[1] < 900 < heights[2]
    assert holds(upper.box, portrait.box, slack=5)


def test_others_stay_outside():
    face, right, above = Face((300, 400, 400, 520), 0.9), Face((600, 380, 700, 500), 0.9), Face((310, 40, 360, 100), 0.9)
    cuts = plan(1200, 900, face, SETTINGS, others=(right, above))
    assert cuts and all(c.box[2] <= 600 and c.box[1] >= 100 for c in cuts)
    behind = Face((320, 420, 380, 480), 0.9)
    assert plan(1200, 900, face, SETTINGS, others=(behind,)) == []
    hair = Face((310, 340, 360, 390), 0.9)  # a face in front of the character's hat, not of its face
    limits = (0.0, 0.0, 1200.0, 900.0)
    assert free_of((hair,), face, head_box(face, 1.0, limits), limits) == (0, 390, 1200, 900)


def test_two_crops_of_a_portrait_are_not_made():
    assert len(plan(600, 600, Face((180, 220, 420, 460), 0.9), SETTINGS)) == 1


def test_small_crops_are_left_out_or_enlarged_if_asked():
    face = Face((450, 300, 480, 336), 0.9)
    assert [c.framing for c in plan(1000, 1000, face, CropSettings(min_side=256))] == ["full"]
    cuts = plan(1000, 1000, face, CropSettings(min_side=256, upscale=True))
    portrait = cuts[0]
    left, top, right, bottom = portrait.box
    assert min(portrait.size) == 256 > min(right - left, bottom - top)
    assert portrait.size[0] / portrait.size[1] == pytest.approx((right - left) / (bottom - top), rel=0.02)
    assert cut(Image.new("RGB", (1000, 1000)), portrait).size == portrait.size
    assert plan(200, 200, None, CropSettings(min_side=256)) == []


def test_a_cut_has_the_pixels_of_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    part = cut(Image.fromarray(pixels), Cut("full", (10, 20, 70, 80), (60, 60)))
    assert np.array_equal(np.asarray(part), pixels[20:80, 10:70])


def test_without_a_face_what_stands_out_is_shown():
    rng = np.random.default_rng(1)
    pixels = (120 + rng.normal(0, 2, (300, 600, 3))).clip(0, 255).astype(np.uint8)
    pixels[100:180, 420:500] = rng.integers(0, 256, (80, 80, 3))
    box = salient_box(pixels)
    assert holds((380, 60, 540, 220), box) and holds(box, (430, 110, 490, 170))
    (only,) = plan(1200, 300, None, SETTINGS, (1000, 60, 1180, 220))
    (middle,) = plan(1200, 300, None, SETTINGS)
    assert only.framing == "full" and only.box == (675, 0, 1200, 300), "as much as the shapes allow, the subject in it"
    assert middle.box == (338, 0, 862, 300) or middle.box == (337, 0, 862, 300)
    (left,) = plan(1200, 300, None, SETTINGS, (300, 60, 500, 220))
    assert left.box in ((138, 0, 662, 300), (137, 0, 662, 300))


def test_no_framing_or_ratio_is_refused():
    with pytest.raises(ConfigError, match="framings"):
        CropSettings(framings=())
    with pytest.raises(ConfigError, match="ratios"):
        CropSettings(ratios=())
