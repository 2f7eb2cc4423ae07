"""Quality measures: each rises and falls with what it is named for, on drawings and on textured scenes, and with nothing else."""

import io
import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from charforgex.binding import bind
from charforgex.charworld import drawing, world
from charforgex.curation import quality
from charforgex.curation.quality import ClipIqa, QualitySettings, judge, measure
from charforgex.embedders import get_clip
from charforgex.errors import ConfigError

COUNT = 12


def drawn(seed, size=384):
    rng = random.Random(f"quality {seed}")
    return drawing.render(world.draw_identity(rng), world.draw_context(rng), size)


def textured(seed, size=384):
    """Something like a photograph: a spectrum that falls with frequency, shapes with edges, a little grain."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) + 1 / size
    clouds = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size, 3)), axes=(0, 1)) / f[..., None] ** 1.2, axes=(0, 1)).real
    picture = 120 + 35 * clouds / clouds.std()
    for _ in range(12):
        x, y, r = rng.integers(0, size, 3) // (1, 1, 8) + (0, 0, 6)
        cv2.circle(picture, (int(x), int(y)), int(r), rng.uniform(20, 235, 3).tolist(), -1, cv2.LINE_AA)
    return np.clip(picture + rng.normal(size=picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures():
    return [drawn(seed) for seed in range(COUNT)] + [textured(seed) for seed in range(COUNT)]


def jpeg(picture, q):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=q)
    return file.getvalue()


def decoded(data):
    return np.array(Image.open(io.BytesIO(data)))


def grainy(picture, sigma, seed=0):
    return np.clip(picture + np.random.default_rng(seed).normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)


def enlarged(picture, times):
    side = len(picture)
    return cv2.resize(
        cv2.resize(picture, (side // times, side // times), interpolation=cv2.INTER_AREA), (side, side), interpolation=cv2.INTER_CUBIC
    )


def lettered(picture):
    image = Image.fromarray(picture)
    font = ImageFont.load_default(size=0.06 * len(picture))
    ImageDraw.Draw(image).text(
        (10, 0.8 * len(picture)), "Copyright picture agency", (255, 255, 255), font, stroke_width=1, stroke_fill=(0, 0, 0)
    )
    return np.array(image)


def barred(picture):
    picture = picture.copy()
    picture[: len(picture) // 9] = picture[-len(picture) // 9 :] = 0
    return picture


def shaken(picture, length, angle):
    """Moved by so many pixels; `angle` in degrees."""
    turn = cv2.getRotationMatrix2D((length / 2, length / 2), angle, 1)
    line = np.zeros((length + 1, length + 1), np.float32)
    line[length // 2] = 1
    kernel = cv2.warpAffine(line, turn, line.shape)
    return cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


SPOILT = {
    "blurred": lambda p: cv2.GaussianBlur(p, (0, 0), 3),
    "blurred, shaken sideways": lambda p: shaken(p, 20, 0),
    "blurred, shaken up": lambda p: shaken(p, 20, 90),
    "blurred, shaken aslant": lambda p: shaken(p, 24, 40),
    "blurred, enlarged": lambda p: enlarged(p, 4),
    "noisy": lambda p: grainy(p, 25),
    "compressed": lambda p: decoded(jpeg(p, 5)),
    "marked": barred,
    "exposure": lambda p: (p * 0.12).astype(np.uint8),
}


@pytest.mark.parametrize("way", SPOILT)  # seen in the pixels alone; a JPEG's tables tell compression more surely
def test_spoilt_pictures_are_told_by_their_kind(pictures, way):
    kind, _, how = way.partition(", ")
    off = {"enlarged": {"min_sharpness": None}, "": {"min_detail_side": None}}.get(how, {"min_detail_side": None, "min_sharpness": None})
    settings = QualitySettings(**off)
    found = [judge(measure(spoilt), 384, 384, settings) for spoilt in map(SPOILT[way], pictures)]
    right = sum(verdict is not None and verdict.kind == kind for verdict in found)
    assert right >= 0.85 * len(pictures), [verdict and verdict.reason for verdict in found]


def test_good_pictures_pass(pictures):
    found = [judge(measure(picture), 384, 384, QualitySettings()) for picture in pictures]
    assert sum(verdict is not None for verdict in found) <= 1, [verdict.reason for verdict in found if verdict]


def test_letters_are_seen_and_their_absence_too(pictures):
    drawings = pictures[:COUNT]
    assert sum(measure(lettered(p))["text"] > 0.01 for p in drawings) >= 0.8 * COUNT
    assert not any(measure(p)["text"] > 0.01 for p in drawings)


def test_a_sharp_person_before_a_soft_background_is_sharp():
    picture = textured(0)
    soft = cv2.GaussianBlur(picture, (0, 0), 8)
    soft[100:280, 100:280] = picture[100:280, 100:280]
    assert judge(measure(soft), 384, 384, QualitySettings(min_detail_side=None)) is None


def test_grain_does_not_hide_blur():
    spoilt = grainy(cv2.GaussianBlur(textured(1), (0, 0), 3.5), 10)
    assert measure(spoilt)["sharpness"] < QualitySettings().min_sharpness


def test_sharpness_follows_the_blur_more_than_contrast_and_not_size():
    step = np.zeros((128, 128), np.uint8)
    step[:, 64:] = 200
    for sigma, expected in ((1, 0.90), (2, 0.60), (3, 0.44), (4, 0.34)):
        assert quality.sharpness(cv2.GaussianBlur(step, (0, 0), sigma)) == pytest.approx(expected, abs=0.01)
        assert quality.sharpness(cv2.GaussianBlur(step // 2 + 50, (0, 0), sigma)) == pytest.approx(expected, rel=0.35)
        assert quality.sharpness(cv2.GaussianBlur(np.tile(step, (3, 1)), (0, 0), sigma)) == pytest.approx(expected, abs=0.01)


def test_noise_is_measured_in_grey_levels():
    flat = np.full((256, 256), 128, np.uint8)
    for sigma in (3, 8, 20):
        assert quality.noise([grainy(flat, sigma)]) == pytest.approx(sigma, rel=0.1)
    assert quality.noise([flat]) == 0


def test_the_grid_is_found_wherever_a_crop_put_it():
    blocky = decoded(jpeg(textured(2), 8))
    assert measure(np.ascontiguousarray(blocky[3:, 5:]))["blocks"] > QualitySettings().max_blocks
    assert measure(textured(2))["blocks"] < 0.3


@pytest.mark.parametrize("q", [10, 30, 50, 75, 92])
def test_jpeg_quality_is_read_from_the_tables(q):
    picture = textured(3, 64)
    assert measure(picture, jpeg(picture, q))["jpeg_quality"] == pytest.approx(q, abs=1.5)


def test_no_jpeg_quality_without_a_jpeg():
    picture, file = textured(3, 64), io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    assert "jpeg_quality" not in measure(picture, file.getvalue())
    assert "jpeg_quality" not in measure(picture, b"\xff\xd8 not a jpeg")
    assert "jpeg_quality" not in measure(picture)


def test_detail_tells_how_often_a_picture_was_enlarged():
    picture = textured(4, 512)
    assert quality.detail([cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)]) > 0.9
    assert measure(enlarged(picture, 3))["detail"] == pytest.approx(1 / 3, abs=0.13)


def test_a_plain_background_is_no_frame():
    picture = np.full((300, 300, 3), 255, np.uint8)
    cv2.circle(picture, (150, 150), 80, (180, 40, 40), -1)
    assert measure(picture)["border"] == 0
    framed = np.full((300, 300, 3), 255, np.uint8)
    framed[30:270, 30:270] = textured(5, 240)
    assert measure(framed)["border"] == pytest.approx(1 - 0.8**2, abs=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (7, 9), (2000, 3), (16, 16)])
def test_any_shape_is_measured(shape):
    scores = measure(np.full((*shape, 3), 90, np.uint8))
    assert all(np.isfinite(value) for value in scores.values())
    assert judge(scores, shape[1], shape[0], QualitySettings()).kind == "too_small"


def test_reasons_have_value_and_limit_and_none_switches_off():
    scores = {"sharpness": 0.31}
    verdict = judge(scores, 512, 600, QualitySettings())
    assert verdict == ("blurred", "sharpness 0.31; at least 0.42 is wanted")
    assert judge(scores, 512, 600, QualitySettings(min_sharpness=None)) is None
    assert judge(scores, 200, 600, QualitySettings()).reason == "its shorter side has 200 pixels; at least 256 is wanted"


def test_a_limit_on_opinions_needs_somebody_to_ask():
    with pytest.raises(ConfigError, match=r"min_assessed=0\.5 needs curation.quality.assessor"):
        bind(QualitySettings, {"min_assessed": 0.5}, "curation.quality")


def test_clip_iqa_is_a_softmax_over_opposite_prompts():
    texts = torch.eye(8)
    clip = SimpleNamespace(name="tiny", scale=2.0, read=lambda prompts: texts[: len(prompts)], see=lambda pictures: texts[[0, 3]])
    good, blurry = ClipIqa(clip)([None, None])
    assert good["assessed_quality"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert blurry["assessed_sharpness"] == pytest.approx(1 / (1 + np.exp(2)))
    assert blurry["assessed_quality"] == pytest.approx(0.5)
    assert judge(blurry, 512, 512, QualitySettings(assessor="tiny", min_assessed=0.3)).kind == "blurred"


def test_clip_iqa_on_a_real_clip():
    assess = ClipIqa(get_clip("charworld"))
    scores = assess([Image.fromarray(drawn(0, 64)), Image.fromarray(drawn(1, 64))])
    assert len(scores) == 2 and scores[0].keys() == quality.PROMPTS.keys()
    assert all(0 <= value <= 1 for score in scores for value in score.values())
    assert assess([]) == []
