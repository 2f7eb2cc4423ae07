"""Fingerprints are those of the picture however it is turned, and the pairs that are found are all there are."""

import random

import cv2
import numpy as np
import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.curation import fingerprints
from charforgex.curation.fingerprints import Fingerprint, fingerprint, pairs, thumbnail, turned, turned_hashes


def drawn(identity, context, size=256):
    return drawing.render(world.draw_identity(random.Random(identity)), world.draw_context(random.Random(context)), size)


# ---- pairs ----


def planted(count, rng, share=0.3):
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for n in range(int(count * share)):
        flips = rng.choice(64, rng.integers(0, 14), replace=False)
        hashes[-1 - n] = hashes[n] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    return hashes


def compared(one, other, radius):
    return np.bitwise_count(one[:, None] ^ other[None]) <= radius


@pytest.mark.parametrize("radius", [0, 1, 3, 5, 8, 10, 16])
def test_pairs_are_all_pairs(radius):
    rng = np.random.default_rng(radius)
    for count in (0, 1, 2, 60, 700):
        hashes = planted(count, rng)
        assert np.array_equal(pairs(hashes, radius), np.argwhere(np.triu(compared(hashes, hashes, radius), 1)))
        others = np.concatenate([hashes[:50], planted(200, rng)])
        assert np.array_equal(pairs(hashes, radius, others), np.argwhere(compared(hashes, others, radius)))


@pytest.mark.parametrize("radius", [0, 2, 4])
def test_pairs_of_hashes_that_crowd_together_and_repeat(radius):
    hashes = np.random.default_rng(0).integers(0, 2**9, 600, dtype=np.uint64)
    assert np.array_equal(pairs(hashes, radius), np.argwhere(np.triu(compared(hashes, hashes, radius), 1)))


def test_few_comparisons_at_a_time_change_nothing(monkeypatch):
    hashes = planted(3000, np.random.default_rng(1))
    at_once = pairs(hashes, 8)
    monkeypatch.setattr(fingerprints, "CANDIDATES", 50)
    assert np.array_equal(pairs(hashes, 8), at_once) and len(at_once) > 300


@pytest.mark.parametrize("radius", range(17))
def test_bands_leave_no_way_to_differ_unseen(radius):
    for count in (10, 10_000, 10_000_000):
        bands = fingerprints._bands(count, count, radius)
        searched = sum(width for _, width, _ in bands)
        assert sum(reach + 1 for _, _, reach in bands) >= radius + 1  # so many bits must differ to be in no band's reach
        assert searched <= 64 and all(width <= 22 for _, width, _ in bands)


# ---- fingerprints ----


def test_fingerprints_are_written_and_read():
    one = fingerprint(drawn(0, 0))
    assert len(one.hex) == 16 * 16 and np.array_equal(Fingerprint.from_hex(one.hex).hashes, one.hashes)
    assert one.hashes.dtype == np.uint64


def test_a_picture_its_thumbnail_and_pil_have_one_fingerprint():
    picture = drawn(1, 1)
    assert fingerprint(picture).hex == fingerprint(thumbnail(picture)).hex == fingerprint(Image.fromarray(picture)).hex


@pytest.mark.parametrize("orientation", range(8))
def test_turned_hashes_are_the_hashes_of_turned_pictures(orientation):
    for seed in range(6):
        picture = drawn(seed, seed)
        expected = fingerprint(turned(picture, orientation)).hashes[0]
        got = turned_hashes(fingerprint(picture).hashes[:1], orientation)[0]
        assert np.bitwise_count(expected ^ got) <= 1  # a sign of a frequency that is nearly zero


def test_the_whole_hash_is_the_signs_of_opencvs_cosine_transform():
    picture = drawn(2, 2)
    grey = cv2.cvtColor(thumbnail(picture), cv2.COLOR_RGB2GRAY).astype(np.float32)
    spectrum = cv2.dct(grey - grey.mean())
    signs = [bool(spectrum[u, v] > 0) for u, v in fingerprints.FREQUENCIES]
    assert int(fingerprint(picture).hashes[0]) == sum(1 << bit for bit, sign in enumerate(signs) if sign)
