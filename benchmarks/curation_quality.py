"""How well the limits of quality and duplicates tell good from spoilt: python benchmarks/curation_quality.py [--quick]

Clean pictures are charworld's at three sizes, the photographs that scikit-image carries (if it is installed), and synthetic scenes. Each is
spoilt in known ways. For each way: the score's median before and after, and at the default limit the share of spoilt pictures found
(recall) and of found ones that are spoilt (precision, with as many clean pictures as spoilt ones). Then, for copies changed in known
ways among look-alikes of the same characters: the share found, and the share of joined pictures that belong together. One JSON line last.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from charforgex.charworld import drawing, world
from charforgex.curation import duplicates, fingerprints, quality
from charforgex.curation.items import Finding

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "hubble_deep_field", "retina", "brick", "grass", "clock")
Change = Callable[[np.ndarray], np.ndarray]


# ---- pictures ----


def character(seed: object, size: int, context: object = None) -> np.ndarray:
    rng = random.Random(f"quality {seed}")
    identity = world.draw_identity(rng)
    return drawing.render(identity, world.draw_context(random.Random(f"context {seed} {context}")), size)


def scene(seed: int, size: int = 640) -> np.ndarray:
    """Like a photograph: a spectrum that falls with frequency, shapes with edges, a little grain."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) + 1 / size
    clouds = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size, 3)), axes=(0, 1)) / f[..., None] ** 1.2, axes=(0, 1)).real
    picture = 120 + 35 * clouds / clouds.std()
    for _ in range(25):
        x, y, radius = rng.integers(0, size), rng.integers(0, size), rng.integers(6, 60)
        cv2.circle(picture, (int(x), int(y)), int(radius), rng.uniform(20, 235, 3).tolist(), -1, cv2.LINE_AA)
    return np.clip(picture + rng.normal(size=picture.shape), 0, 255).astype(np.uint8)


def photographs() -> list[np.ndarray]:
    try:
        from skimage import data
    except ImportError:
        return []
    found = []
    for name in PHOTOGRAPHS:
        try:
            picture = np.asarray(getattr(data, name)())
        except (OSError, ImportError, ConnectionError):  # some are fetched on first use, and this runs offline
            continue
        picture = picture[0] if isinstance(picture, tuple) else picture
        found.append(np.ascontiguousarray(np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture[..., :3]))
    return found


# ---- ways to spoil ----


def compressed(picture: np.ndarray, level: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=level)
    return np.array(Image.open(io.BytesIO(file.getvalue())))


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), sigma * max(1, max(picture.shape) / quality.WORK))


def moved(picture: np.ndarray, share: float) -> np.ndarray:
    """Shaken along the diagonal by a share of the longer side."""
    length = max(2, round(share * max(picture.shape) / 2**0.5))
    return cv2.filter2D(picture, -1, np.eye(length, dtype=np.float32) / length, borderType=cv2.BORDER_REPLICATE)


def grainy(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(picture + np.random.default_rng(0).normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)


def enlarged(picture: np.ndarray, times: float) -> np.ndarray:
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (round(width / times), round(height / times)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def lettered(picture: np.ndarray, share: float, opacity: float = 1.0) -> np.ndarray:
    image = Image.fromarray(picture)
    over = image.copy()
    font = ImageFont.load_default(size=share * min(image.size))
    ImageDraw.Draw(over).text((0.05 * image.width, 0.8 * image.height), "Copyright picture agency", (255, 255, 255), font, stroke_width=1,
                              stroke_fill=(0, 0, 0))  # fmt: skip
    return np.array(Image.blend(image, over, opacity))


def barred(picture: np.ndarray) -> np.ndarray:
    picture, bar = picture.copy(), len(picture) // 10
    picture[:bar] = picture[-bar:] = 0
    return picture


SPOILT: dict[str, tuple[str, Change]] = {
    "blur, 2 px": ("sharpness", lambda p: blurred(p, 2)),
    "blur, 3 px": ("sharpness", lambda p: blurred(p, 3)),
    "blur, 3 px, and grain": ("sharpness", lambda p: grainy(blurred(p, 3), 10)),
    "movement, 2 %": ("steadiness", lambda p: moved(p, 0.02)),
    "movement, 5 %": ("steadiness", lambda p: moved(p, 0.05)),
    "dark, by 8": ("high", lambda p: p // 8),
    "bright, 3 times": ("low", lambda p: np.clip(p * 2.5 + 120, 0, 255).astype(np.uint8)),
    "contrast, a tenth": ("contrast", lambda p: (p // 10 + 110).astype(np.uint8)),
    "grain, 10": ("noise", lambda p: grainy(p, 10)),
    "grain, 25": ("noise", lambda p: grainy(p, 25)),
    "JPEG 8, saved again": ("blocks", lambda p: compressed(p, 8)),
    "JPEG 20, saved again": ("blocks", lambda p: compressed(p, 20)),
    "JPEG 75, saved again": ("blocks", lambda p: compressed(p, 75)),
    "enlarged, 3 times": ("detail", lambda p: enlarged(p, 3)),
    "enlarged, 4 times": ("detail", lambda p: enlarged(p, 4)),
    "bars": ("border", barred),
    "letters, 6 %": ("text", lambda p: lettered(p, 0.06)),
    "letters, 3 %": ("text", lambda p: lettered(p, 0.03)),
    "letters, 7 %, faint": ("text", lambda p: lettered(p, 0.07, 0.4)),
}  # fmt: skip


def limit_of(score: str) -> tuple[Callable[[float, int], bool], str]:
    """Whether a value of a picture with that shorter side is over the default limit, and the limit in words."""
    settings = quality.QualitySettings()
    if score == "detail":
        return lambda value, side: value * side < settings.min_detail_side, f"< {settings.min_detail_side} px"
    least = getattr(settings, f"min_{score}", None)
    if least is not None:
        return lambda value, side: value < least, f"< {least:g}"
    most = getattr(settings, f"max_{score}")
    return lambda value, side: value > most, f"> {most:g}"


def measure_quality(pictures: list[np.ndarray]) -> dict[str, dict[str, float]]:
    clean = [quality.measure(picture) for picture in pictures]
    sides = [min(picture.shape[:2]) for picture in pictures]
    table = {}
    print(f"{'spoilt by':<24}{'score':<12}{'limit':<10}{'clean':>8}{'spoilt':>8}{'recall':>8}{'precision':>11}")
    for name, (score, change) in SPOILT.items():
        wrong, words = limit_of(score)
        values = [quality.measure(np.ascontiguousarray(change(picture)))[score] for picture in pictures]
        right = sum(map(wrong, values, sides))
        false = sum(wrong(one[score], side) for one, side in zip(clean, sides, strict=True))
        row = {
            "clean": float(np.median([one[score] for one in clean])), "spoilt": float(np.median(values)),
            "recall": right / len(values), "precision": right / max(1, right + false),
        }  # fmt: skip
        table[name] = row
        print(
            f"{name:<24}{score:<12}{words:<10}{row['clean']:8.2f}{row['spoilt']:8.2f}{row['recall']:8.2f}{row['precision']:11.2f}",
            flush=True,
        )
    good = [quality.judge(one, side, side, quality.QualitySettings()) for one, side in zip(clean, sides, strict=True)]
    kept = sum(verdict is None for verdict in good) / len(good)
    why = Counter(verdict.kind for verdict in good if verdict)
    print(f"clean pictures kept by all default limits: {kept:.3f}; others: {dict(why)}")
    return table | {"clean": {"kept": kept}}


# ---- duplicates ----


def cut(share: float) -> Change:
    def change(picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        top, left = int(share * height * 0.3), int(share * width * 0.7)
        return np.ascontiguousarray(picture[top : height - int(share * height) + top, left : width - int(share * width) + left])

    return change


COPIES: dict[str, Change] = {
    "JPEG 50": lambda p: compressed(p, 50),
    "JPEG 10": lambda p: compressed(p, 10),
    "half the size": lambda p: cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "brighter, some clipped": lambda p: np.clip(p * 1.3 + 20, 0, 255).astype(np.uint8),
    "gamma 0.7": lambda p: (255 * (p / 255) ** 0.7).astype(np.uint8),
    "grain, 15": lambda p: grainy(p, 15),
    "blur, 2 px": lambda p: cv2.GaussianBlur(p, (0, 0), 2),
    "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
    "turned by 90": lambda p: np.ascontiguousarray(np.rot90(p)),
    "turned by 180, JPEG 40": lambda p: compressed(np.ascontiguousarray(np.rot90(p, 2)), 40),
    "cropped by 5 %": cut(0.05),
    "cropped by 10 %": cut(0.1),
    "cropped by 10 %, JPEG 30": lambda p: compressed(cut(0.1)(p), 30),
    "cropped by 15 %": cut(0.15),
}


def measure_duplicates(base: list[np.ndarray], every: int) -> dict[str, float]:
    findings, small, source = [], [], []

    def add(picture: np.ndarray, number: int, kind: str) -> None:
        findings.append(Finding(f"{kind}/{number}", f"{len(findings)}", picture.shape[1], picture.shape[0],
                                fingerprint=fingerprints.fingerprint(picture).hex, scores=quality.measure(picture)))  # fmt: skip
        small.append(fingerprints.thumbnail(picture))
        source.append((number, kind))

    for number, picture in enumerate(base):
        add(picture, number, "original")
    for kind, change in COPIES.items():
        for number in range(0, len(base), every):
            add(change(base[number]), number, kind)
    started = time.process_time()
    found = duplicates.clusters(findings, duplicates.DuplicateSettings(), small.__getitem__)
    seconds = time.process_time() - started
    cluster = {member: group.kept for group in found for member in group.members}
    total, hit = Counter(kind for _, kind in source), Counter()
    for index, (number, kind) in enumerate(source):
        hit[kind] += index in cluster and cluster[index] == cluster.get(number)
    joined = [(source[group.kept][0], source[other][0]) for group in found for other in group.others]
    precision = sum(one == other for one, other in joined) / max(1, len(joined))
    recall = {kind: hit[kind] / total[kind] for kind in COPIES}
    for kind, share in recall.items():
        print(f"{kind:<26}{share:6.2f}")
    print(f"{len(findings)} pictures, {len(joined)} joined, precision {precision:.3f}, {seconds:.1f} CPU s")
    return {**recall, "precision": precision, "pictures": len(findings), "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the pictures")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    few = 8 if options.quick else 1
    photos = photographs()[:: 4 if options.quick else 1]
    drawn = [character(seed, size) for size in (320, 512, 1024) for seed in range(40 // few)]
    pictures = drawn + photos + [scene(seed) for seed in range(24 // few)]
    table = measure_quality(pictures)
    base = photos + [character(seed, 256) for seed in range(160 // few)]
    base += [character(f"one {who}", 256, number) for who in range(max(1, 8 // few)) for number in range(25)]
    copies = measure_duplicates(base, 8)
    values = {"quality": table, "duplicates": copies, "pictures": len(pictures), "photographs": len(photos)}
    print(json.dumps({"benchmark": Path(sys.argv[0]).stem, "ratios": {}, "values": values}))


if __name__ == "__main__":
    main()
