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
from charforgex.curation import duplicates, resemblance
from charforgex.curation.duplicates import DuplicateSettings, best, clusters
from charforgex.curation.fingerprints import fingerprint, thumbnail
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
        seen = resemblance.FirstLook(small.__getitem__, 4.0)(asked)
        for way in asked[0].get(1, ()):
            pair = small[::-1] if way.swapped else small
            if (value := resemblance.aligned_difference(*pair, way.orientation, way.window)) <= 8:
                assert way in seen[0][1], f"{value:.1f} grey levels, but turned away at first"
                assert resemblance.aligned_difference(*pair, way.orientation, way.window, 4.0) == value
                copies += 1
    assert copies >= 11


def test_a_first_look_is_enough_for_most_look_alikes():
    maker = mess.Maker(0, 192)
    small = [thumbnail(maker.original(index)) for index in range(120)]
    asked = ways_of(small)
    seen = resemblance.FirstLook(small.__getitem__, 8.0)(asked)
    left, all_of_them = (sum(len(ways) for several in found.values() for ways in several.values()) for found in (seen, asked))
    assert all_of_them > 500 and left < 0.3 * all_of_them


def test_a_higher_limit_lets_more_through():
    maker = mess.Maker(1, 192)
    small = [thumbnail(maker.original(index)) for index in range(40)]
    asked = ways_of(small)
    left = [sum(len(found) for found in resemblance.FirstLook(small.__getitem__, limit)(asked).values()) for limit in (0.1, 8.0, 255.0)]
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
        assert all(resemblance.aligned_difference(small[group.kept], small[other]) <= 8 for other in group.others)


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
