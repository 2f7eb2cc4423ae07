"""What curation costs: python benchmarks/curation.py [--quick]

One thread, CPU seconds, both sides in turn on the same files, several rounds, medians. The last line is one JSON object: ratios are ours
divided by theirs, smaller is better.

scan_vs_decode        read, sha256, grey decode at an eighth, fingerprint, exposure   against  reading and that decode alone
scan_vs_imagehash     the same                                                         against  imagehash.phash(Image.open(file))
scan_vs_imagededup    the same                                                         against  imagededup's PHash
neardup_10k_vs_numpy  all pairs of 10,000 hashes within 8 bits                         against  all with all by numpy's bit count

The scan is what hashes and basic statistics cost. A shard of curation decodes at full size and measures everything: "stages" has pictures
a second for each of its stages. "growth" has the near-duplicate search from a thousand hashes to a million (--quick: to 100,000), and
"look_alikes" all of the search for duplicates among 1,000 different pictures of one drawn character (--quick: 200).
imagehash comes with pip install imagehash; imagededup needs torchvision. What is not installed is skipped by name.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import hashlib
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from charforgex.curation import duplicates, fingerprints, quality, resemblance
from charforgex.curation.items import Finding
from charforgex.curation.pictures import decode_picture
from charforgex.data.mess import Maker
from charforgex.runs import versions

GOALS = {"scan_vs_decode": 1.3, "scan_vs_imagehash": 0.4, "scan_vs_imagededup": 0.25, "neardup_10k_vs_numpy": 0.5}
RADIUS = 8


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Grainy JPEGs of 1536 x 1024, quality 92, about 400 kB: clouds with shapes."""
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = cv2.resize(rng.uniform(30, 220, (12, 18, 3)), (1536, 1024), interpolation=cv2.INTER_CUBIC)
        for _ in range(40):
            x, y, radius = rng.integers(0, 1536), rng.integers(0, 1024), rng.integers(8, 120)
            cv2.circle(picture, (int(x), int(y)), int(radius), rng.uniform(0, 255, 3).tolist(), -1, cv2.LINE_AA)
        picture += cv2.GaussianBlur(rng.normal(0, 9, picture.shape), (0, 0), 0.7)
        path = folder / f"{number:03}.jpg"
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=92)
        paths.append(path)
    return paths


def alternating(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side, once a round, so that a busy machine is busy for all; a first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.process_time()
            side()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


# ---- sides ----


def small_grey(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)


def decode(paths: list[Path]) -> None:
    for path in paths:
        small_grey(path.read_bytes())


def scan(paths: list[Path]) -> None:
    for path in paths:
        data = path.read_bytes()
        grey = small_grey(data)
        _ = hashlib.sha256(data).hexdigest(), fingerprints.fingerprint(grey).hex, quality.exposure(grey)


def with_imagehash(paths: list[Path]) -> None:
    import imagehash

    for path in paths:
        imagehash.phash(Image.open(path))


def with_imagededup(hasher, paths: list[Path]) -> None:
    for path in paths:
        hasher.encode_image(image_file=path)


def all_with_all(hashes: np.ndarray, block: int = 512) -> np.ndarray:
    """Pairs by comparing all with all, in blocks that fit a core's cache."""
    found = []
    for top in range(0, len(hashes), block):
        for left in range(top, len(hashes), 8 * block):
            near = np.bitwise_count(hashes[top : top + block, None] ^ hashes[None, left : left + 8 * block]) <= RADIUS
            rows, columns = np.nonzero(near)
            found.append(np.stack([rows + top, columns + left], axis=1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def planted(count: int) -> np.ndarray:
    """Random hashes; one in twenty is a copy of another with up to 8 bits changed."""
    rng = np.random.default_rng(count)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    bits = rng.random((count // 20, 64)).argsort(axis=1)[:, :RADIUS]
    wanted = np.arange(RADIUS) < rng.integers(0, RADIUS + 1, (count // 20, 1))
    flips = np.where(wanted, np.uint64(1) << bits.astype(np.uint64), np.uint64(0)).sum(axis=1, dtype=np.uint64)
    hashes[count - len(flips) :] = hashes[: len(flips)] ^ flips
    return hashes


def growth(counts: list[int]) -> dict[str, dict[str, float]]:
    """CPU seconds and peak memory of `pairs` by the number of hashes."""
    table = {}
    for count in counts:
        hashes = planted(count)
        tracemalloc.start()  # numpy tells it of its arrays, which are few: it slows nothing down
        started = time.process_time()
        found = len(fingerprints.pairs(hashes, RADIUS))
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert found >= count // 20, "the planted pairs must be among those found"
        table[str(count)] = {"cpu_seconds": seconds, "pairs": found, "peak_mib": peak}
        print(f"near-duplicates of {count:>9,} hashes {seconds:9.3f} CPU s {peak:7.0f} MiB   {found:,} pairs", flush=True)
    return table


def look_alikes(count: int) -> dict[str, float]:
    """CPU seconds of `clusters` for pictures of one character, and how many of them it takes for another's copy."""
    maker = Maker(0, 192)
    small = [fingerprints.thumbnail(maker.original(index)) for index in range(count)]
    findings = [Finding(str(n), str(n), 192, 192, fingerprint=fingerprints.fingerprint(one).hex) for n, one in enumerate(small)]
    started = time.process_time()
    found = duplicates.clusters(findings, duplicates.DuplicateSettings(), small.__getitem__)
    seconds, joined = time.process_time() - started, sum(len(group.others) for group in found)
    print(f"duplicates among {count:,} pictures of one character {seconds:9.3f} CPU s   {joined} joined", flush=True)
    return {"pictures": count, "cpu_seconds": seconds, "joined": joined}


def stages(paths: list[Path]) -> dict[str, Callable[[], object]]:
    data = [path.read_bytes() for path in paths]
    pictures = [np.asarray(decode_picture(one)) for one in data]
    small = [fingerprints.thumbnail(picture) for picture in pictures]
    return {
        "read": lambda: [path.read_bytes() for path in paths],
        "sha256": lambda: [hashlib.sha256(one).hexdigest() for one in data],
        "decode": lambda: [decode_picture(one) for one in data],
        "measure": lambda: [quality.measure(picture, one) for picture, one in zip(pictures, data, strict=True)],
        "thumbnail": lambda: [fingerprints.thumbnail(picture) for picture in pictures],
        "fingerprint": lambda: [fingerprints.fingerprint(one) for one in small],
        "compare": lambda: [resemblance.aligned_difference(small[0], one) for one in small],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and rounds, growth to 100,000")
    options = parser.parse_args()
    count, rounds = (4, 3) if options.quick else (30, 7)
    cv2.setNumThreads(1)

    skipped = {}
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_pictures(Path(temporary), count)
        hashes = planted(10_000)
        sides = {"scan": partial(scan, paths), "scan_decode": partial(decode, paths)}
        try:
            import imagehash  # noqa: F401
        except ImportError:
            skipped["scan_vs_imagehash"] = "imagehash is not installed"
        else:
            sides["scan_imagehash"] = partial(with_imagehash, paths)
        try:
            from imagededup.methods import PHash
        except ImportError as error:
            skipped["scan_vs_imagededup"] = f"imagededup cannot be imported: {error}"
        else:
            sides["scan_imagededup"] = partial(with_imagededup, PHash(verbose=False), paths)
        seconds = alternating(sides, rounds)
        assert np.array_equal(fingerprints.pairs(hashes, RADIUS), np.unique(all_with_all(hashes), axis=0)), "not the same pairs"
        seconds |= alternating(
            {"neardup_10k": partial(fingerprints.pairs, hashes, RADIUS), "neardup_10k_numpy": partial(all_with_all, hashes)}, rounds
        )
        by_stage = {name: statistics.median(values) / count for name, values in alternating(stages(paths), rounds).items()}

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        f"scan_vs_{other}": middle["scan"] / middle[f"scan_{other}"]
        for other in ("decode", "imagehash", "imagededup")
        if f"scan_{other}" in middle
    }
    ratios["neardup_10k_vs_numpy"] = middle["neardup_10k"] / middle["neardup_10k_numpy"]
    for name, value in ratios.items():
        print(f"{name:<22} {value:6.2f}   goal {GOALS[name]:.2f}")
    for name, why in skipped.items():
        print(f"{name:<22} skipped: {why}")
    for name, value in by_stage.items():
        print(f"{name:<12} {1000 * value:8.2f} CPU ms a picture {1 / value:10.0f} pictures a second")
    table = growth([1_000, 10_000, 100_000] + ([] if options.quick else [1_000_000]))
    alike = look_alikes(200 if options.quick else 1_000)

    def ms(name: str) -> float:
        return 1000 * middle[name] / count

    values = {
        "ms_per_picture": {name: ms(name) for name in sides},
        "spread_ms": {name: [1000 * min(seconds[name]) / count, 1000 * max(seconds[name]) / count] for name in sides},
        "neardup_10k_cpu_seconds": middle["neardup_10k"],
        "stages_ms": {name: 1000 * value for name, value in by_stage.items()},
        "pictures_per_second": {name: 1 / value for name, value in by_stage.items()},
        "growth": table,
        "look_alikes": alike,
        "rounds": rounds,
    }
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    known = versions() | {name: installed(name) for name in ("opencv-python-headless", "pillow", "imagehash", "imagededup")}
    print(
        json.dumps({"benchmark": "curation", "ratios": ratios, "values": values, "machine": machine, "versions": known, "skipped": skipped})
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
