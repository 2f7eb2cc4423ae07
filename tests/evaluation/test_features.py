"""Metrics of whole sets on real pictures, seen by the embedded CLIP: what must change them, and what must not."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.charworld.demo import held_out_character
from charforgex.errors import ConfigError
from charforgex.evaluation import gallery as galleries
from charforgex.evaluation.features import Features
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metric import Case
from charforgex.evaluation.metrics.fid import Fid
from charforgex.evaluation.metrics.kid import Kid
from charforgex.evaluation.metrics.manifold import ManifoldMetric
from charforgex.evaluation.metrics.pairwise import Pairwise
from charforgex.evaluation.metrics.vendi import Vendi

METRICS = [Fid(), Kid(), ManifoldMetric(), Vendi(), Pairwise()]


def pictures(number, count, key=""):
    rng = random.Random(f"features {number} {key}")
    return [drawing.render(held_out_character(number), world.draw_context(rng), 64) for _ in range(count)]


def gallery(arrays):
    return Gallery("drawn", [Shot(Image.fromarray(pixels), f"prompt {i // 2}", key=f"{i}") for i, pixels in enumerate(arrays)])


@pytest.fixture(scope="module")
def case():
    return Case(
        Gallery("references", [Shot(Image.fromarray(pixels), key=f"r{i}") for i, pixels in enumerate(pictures(1, 40, "references"))])
    )


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_order_and_batches_change_nothing(metric, case, monkeypatch):
    drawn = gallery(pictures(1, 50))
    plain = metric(drawn, case)
    shuffled = Gallery("drawn", random.Random(0).sample(drawn.shots, 50))
    monkeypatch.setattr(galleries.Gallery.batches, "__defaults__", (7,))
    again = metric(shuffled, case)
    for name in ("estimate", "low", "high"):
        assert getattr(again, name) == pytest.approx(getattr(plain, name), rel=1e-4, abs=1e-6)
    assert again.parts == pytest.approx(plain.parts)


def test_distances_rise_with_noise_and_with_another_character(case):
    clean = pictures(1, 60)
    noise = np.random.default_rng(0).normal(size=(60, 64, 64, 3))
    noisy = [gallery(np.clip(clean + level * noise, 0, 255).astype(np.uint8)) for level in (0, 8, 20, 40, 80)]
    fids, kids = ([metric(one, case).estimate for one in noisy] for metric in (Fid(), Kid()))
    assert fids == sorted(fids) and fids[-1] > 2 * fids[0]
    assert kids == sorted(kids) and abs(kids[0]) < 0.1 * kids[-1]
    others = gallery(pictures(2, 60))
    assert Fid()(others, case).low > Fid()(noisy[0], case).high
    assert Kid()(others, case).low > Kid()(noisy[0], case).high
    densities = [ManifoldMetric()(one, case).estimate for one in (noisy[0], noisy[-1], others)]
    assert densities[0] > 0.6 > 0.3 > max(densities[1:])


def test_less_varied_pictures_have_less_variety(case):
    one = pictures(1, 1) * 24
    two = pictures(1, 4) * 6
    many = pictures(1, 24)
    for metric in (Vendi(), Pairwise()):
        found = [metric(gallery(arrays), case).estimate for arrays in (one, two, many)]
        assert found == sorted(found) and found[2] > found[1] + 0.02
    assert Vendi()(gallery(one), case).estimate == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("source", ["", "w600k_r50.onnx"])
def test_features_that_do_not_see_whole_pictures_are_refused_before_any_is_drawn(source):
    with pytest.raises(ConfigError, match=f'features="{source}" does not see whole pictures'):
        Features(source)
    with pytest.raises(ConfigError):
        replace(Fid(), features=source)


def test_any_image_model_of_transformers_sees(case, tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=56, patch_size=14)).save_pretrained(
        tmp_path
    )
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    value = Fid(str(tmp_path))(gallery(pictures(1, 10)), case)
    assert value.estimate > 0 and "vectors of 32 numbers" in value.notes[0]
