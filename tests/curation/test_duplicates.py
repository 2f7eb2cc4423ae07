"""Duplicates: copies are found however they were changed, and what only looks alike stays apart."""

import io
import itertools
import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from charforgex.charworld import drawing, world
from charforgex.curation import duplicates
from charforgex.curation.duplicates import (
    DuplicateSettings,
    Fingerprint,
    best,
    clusters,
    fingerprint,
    pairs,
    thumbnail,
    turned,
    turned_hashes,
)
from charforgex.curation.items import Finding, Verdict
from charforgex.data import mess
from charforgex.errors import ConfigError


def drawn(identity, context, size=256):
    return drawing.render(world.draw_identity(random.Random(identity)), world.draw_context(random.Random(context)), size)


def recompressed(picture, q):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=q)
    return np.array(Image.open(io.BytesIO(file.getvalue())))


CHANGES = {
    "recompressed": lambda p: recompressed(p, 25),
    "halved": lambda p: cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "brightened": lambda p: np.clip(p * 1.2 + 8, 0, 255).astype(np.uint8),
    "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
    "turned": lambda p: np.ascontiguousarray(np.rot90(p)),
    "upside_down": lambda p: recompressed(np.ascontiguousarray(p[::-1, ::-1]), 50),
    "cropped": lambda p: np.ascontiguousarray(p[4:-14, 17:-6]),
}


def found(pictures, settings=None, **known):
    """Clusters of pictures, with findings and thumbnails as a shard gives them."""
    findings = [
        Finding(f"{n}", f"content {n}", p.shape[1], p.shape[0], fingerprint=fingerprint(p).hex, **known) for n, p in enumerate(pictures)
    ]
    small = [thumbnail(p) for p in pictures]
    return clusters(findings, settings or DuplicateSettings(), small.__getitem__)


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
    monkeypatch.setattr(duplicates, "CANDIDATES", 50)
    assert np.array_equal(pairs(hashes, 8), at_once) and len(at_once) > 300


@pytest.mark.parametrize("radius", range(17))
def test_bands_leave_no_way_to_differ_unseen(radius):
    for count in (10, 10_000, 10_000_000):
        bands = duplicates._bands(count, count, radius)
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
    signs = [bool(spectrum[u, v] > 0) for u, v in duplicates.FREQUENCIES]
    assert int(fingerprint(picture).hashes[0]) == sum(1 << bit for bit, sign in enumerate(signs) if sign)


# ---- clusters ----


@pytest.fixture(scope="module")
def cast():
    return [drawn(seed, f"context {seed}") for seed in range(24)]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(cast, change):
    groups = found([*cast, *map(CHANGES[change], cast)])
    together = {tuple(sorted(group.members)) for group in groups}
    right = sum((n, n + len(cast)) in together for n in range(len(cast)))
    assert right >= 0.9 * len(cast)
    assert all(len({member % len(cast) for member in members}) == 1 for members in together), "different pictures were joined"


def test_pictures_of_one_character_stay_apart():
    pictures = [drawn("one character", f"context {n}") for n in range(60)]
    assert found(pictures) == []


def ways_of(small):
    """Each pair of thumbnails that would be compared, and the ways in which they could fit."""
    findings = [Finding(str(n), str(n), 256, 256, fingerprint=fingerprint(one).hex) for n, one in enumerate(small)]
    columns = duplicates._Columns(findings)
    near = duplicates._candidates(columns, columns.order, DuplicateSettings())
    return {one: {other: ways for other, ways in near.of(one).items() if one < other} for one in range(len(small))}


@pytest.mark.parametrize("kind", ["recompressed", "resized", "turned", "mirrored", "trimmed", "brightened", "trimmed and changed"])
def test_a_first_look_turns_no_copy_away(kind):
    """Whatever the whole comparison calls the same, in any of the ways that hashes propose, passes a first look with half the limit."""
    copies = 0
    for number, index in itertools.product(range(8), range(2)):
        maker = mess.Maker(number, 192)
        _, data = mess.KINDS[kind.split()[0]][1](maker, mess.rng_of(maker, kind, index), index)
        copy = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        if kind == "trimmed and changed":
            smaller = cv2.resize(copy, (120, 125), interpolation=cv2.INTER_AREA)
            copy = recompressed(np.clip(smaller * (0.7, 1.25)[index] + 5, 0, 255).astype(np.uint8), 40)
        small = [thumbnail(maker.original(index)), thumbnail(copy)]
        asked = ways_of(small)
        seen = duplicates._FirstLook(small.__getitem__, 4.0)(asked)
        for way in asked[0].get(1, ()):
            pair = small[::-1] if way.swapped else small
            if (value := duplicates.aligned_difference(*pair, way.orientation, way.window)) <= 8:
                assert way in seen[0][1], f"{value:.1f} grey levels, but turned away at first"
                assert duplicates.aligned_difference(*pair, way.orientation, way.window, 4.0) == value
                copies += 1
    assert copies >= 11


def test_a_first_look_is_enough_for_most_look_alikes():
    maker = mess.Maker(0, 192)
    small = [thumbnail(maker.original(index)) for index in range(120)]
    asked = ways_of(small)
    seen = duplicates._FirstLook(small.__getitem__, 8.0)(asked)
    left, all_of_them = (sum(len(ways) for several in found.values() for ways in several.values()) for found in (seen, asked))
    assert all_of_them > 500 and left < 0.3 * all_of_them


def test_a_higher_limit_lets_more_through():
    maker = mess.Maker(1, 192)
    small = [thumbnail(maker.original(index)) for index in range(40)]
    asked = ways_of(small)
    left = [sum(len(found) for found in duplicates._FirstLook(small.__getitem__, limit)(asked).values()) for limit in (0.1, 8.0, 255.0)]
    assert left[0] < left[1] < left[2] == sum(map(len, asked.values()))


def test_another_expression_is_another_picture():
    apart = 0
    for seed in range(30):
        identity, context = world.draw_identity(random.Random(seed)), world.draw_context(random.Random(f"c{seed}"))
        other = replace(context, expression="laughing" if context.expression != "laughing" else "sad")
        apart += found([drawing.render(identity, context, 256), drawing.render(identity, other, 256)]) == []
    assert apart >= 29


def test_turned_and_cropped_copies_only_when_asked_for(cast):
    pictures = [cast[0], CHANGES["turned"](cast[0])]
    assert len(found(pictures)) == 1 and found(pictures, DuplicateSettings(turned=False)) == []
    pictures = [cast[1], np.ascontiguousarray(cast[1][:-20, 20:])]
    assert len(found(pictures)) == 1 and found(pictures, DuplicateSettings(cropped=False, radius=4)) == []


def test_equal_files_and_what_is_nearly_equal_to_them_are_one_cluster(cast):
    pictures = [cast[0], cast[0], recompressed(cast[0], 40), recompressed(cast[0], 40), cast[1]]
    findings = [
        Finding(name, content, 256, 256, fingerprint=fingerprint(p).hex, scores={"blocks": blocks})
        for name, content, p, blocks in zip("abcde", "xxyyz", pictures, (0, 0, 2, 2, 0), strict=True)
    ]
    small = [thumbnail(p) for p in pictures]
    [group] = clusters(findings, DuplicateSettings(), small.__getitem__)
    assert group.kept == 0 and sorted(group.others) == [1, 2, 3]
    assert group.others[1] == "the same file as a"
    assert group.others[2].startswith("nearly the same as a: ") and "(limit 10)" in group.others[2] and "(limit 8)" in group.others[2]
    assert group.others[3].startswith("the same file as c, nearly the same as a: ")
    assert [sorted(g.members) for g in clusters(findings, DuplicateSettings(radius=None), small.__getitem__)] == [[0, 1], [2, 3]]
    assert sorted(clusters(findings, DuplicateSettings(exact=False), small.__getitem__)[0].members) == [0, 1, 2, 3]


def test_what_is_decided_takes_no_part(cast):
    findings = [Finding(name, "same", 256, 256, fingerprint=fingerprint(cast[0]).hex) for name in "ab"]
    findings.append(Finding("c", "same", verdict=Verdict("corrupt", "it is damaged")))
    [group] = clusters(findings, DuplicateSettings(), [thumbnail(cast[0])].__getitem__)
    assert group.members == [0, 1]


def test_nothing_gives_nothing():
    assert clusters([], DuplicateSettings(), [].__getitem__) == []
    assert clusters([], DuplicateSettings(similarity=0.9), [].__getitem__) == []


def test_a_chain_of_small_changes_is_no_cluster(cast):
    """Frames that drift: each is near the next, the first and the last are not."""
    start, end = cast[2].astype(float), cast[3].astype(float)
    frames = [(start * (1 - t) + end * t).astype(np.uint8) for t in np.linspace(0, 1, 15)]
    groups = found(frames)
    assert groups and all(max(group.members) - min(group.members) < 14 for group in groups)
    small = [thumbnail(frame) for frame in frames]
    for group in groups:
        assert all(duplicates.aligned_difference(small[group.kept], small[other]) <= 8 for other in group.others)


def test_embeddings_join_what_hashes_do_not(cast):
    findings = [Finding(str(n), str(n), 256, 256, fingerprint=fingerprint(p).hex) for n, p in enumerate(cast[:3])]
    vectors = np.array([[1, 0], [0.96, 0.28], [0, 1]], np.float32)
    [group] = clusters(findings, DuplicateSettings(similarity=0.95), [thumbnail(p) for p in cast[:3]].__getitem__, vectors)
    assert group.members == [0, 1] and "embeddings agree by 0.960 (limit 0.95)" in group.others[1]
    with pytest.raises(ConfigError, match=r"similarity=0\.95 compares pictures' embeddings: set curation\.clip"):
        clusters(findings, DuplicateSettings(similarity=0.95), [].__getitem__)


def test_the_best_has_most_detail_then_a_caption_then_is_sharpest():
    small, large = Finding("small", width=512, height=512), Finding("large", width=1024, height=1024)
    blown_up = Finding("blown up", width=2048, height=2048, scores={"detail": 0.25, "sharpness": 0.2})
    assert best([0, 1, 2], [small, large, blown_up]) == 1
    assert best([0, 1], [large, replace(large, captions=("a woman",))]) == 1
    assert best([0, 1], [replace(large, scores={"sharpness": 0.7, "bright": 0.3}), replace(large, scores={"sharpness": 0.69})]) == 1
    assert best([0, 1], [replace(large, scores={"contrast": 150}), replace(large, scores={"contrast": 180})]) == 1
    ringing = {"sharpness": 0.98, "jpeg_quality": 55}
    assert best([0, 1], [replace(large, scores=ringing), replace(large, scores={"sharpness": 0.86})]) == 1
    assert best([0, 1], [replace(large, scores={"sharpness": 0.5}), replace(large, scores={"sharpness": 0.7})]) == 1
    assert best([0, 1], [large, large]) == 0
