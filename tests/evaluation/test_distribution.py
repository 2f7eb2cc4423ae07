"""FID, KID and the manifold measures: by hand, against scipy and torchmetrics, and where they must not care."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from charforgex.errors import DataError
from charforgex.evaluation import distribution
from charforgex.evaluation.distribution import fid, frechet, kernel_sums, kid, manifold, mean_over_pairs, moments


def sets(n, m, width, shift=0.3, key=0):
    """Two correlated sets of different means and covariances, float64."""
    rng = np.random.default_rng([n, m, width, key])
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) / math.sqrt(width) + shift, rng.normal(size=(m, width)) * 1.3


def by_matrices(one, other):
    """FID as the paper writes it: covariances, and scipy's root of their product."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (one, other))
    return np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)


class Given(torch.nn.Module):
    """Hands the vectors through that torchmetrics believes to be pictures."""

    num_features = 16

    def forward(self, vectors):
        return vectors.flatten(1)


def test_fid_of_two_gaussians_by_hand():
    line = np.array([[-1.0], [1.0]])  # mean 0, variance 2
    assert fid(line, 3 * line + 5) == pytest.approx(25 + (3 - 1) ** 2 * 2)  # (m1 - m2)^2 + (s1 - s2)^2
    corners = np.array([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])  # variances 4/3 and 16/3, no covariance
    assert fid(corners, corners[:, ::-1]) == pytest.approx(2 * (4 / math.sqrt(3) - 2 / math.sqrt(3)) ** 2)
    assert fid(corners, corners) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 24), (40, 3000, 24), (60, 60, 24)])
def test_fid_is_what_matrices_in_float64_give(n, m, width):
    one, other = sets(n, m, width)
    assert fid(one, other) == pytest.approx(by_matrices(one, other), rel=1e-10)
    assert fid(other, one) == pytest.approx(fid(one, other), rel=1e-12)


def test_fid_of_few_pictures_and_by_the_streamed_factor_are_one_number(monkeypatch):
    """With fewer pictures than numbers the rows themselves are the factor; with more, one of D x D is built block by block."""
    one, other = sets(30, 45, 64)
    assert moments(one).factor.shape == (29, 64)
    padded = [np.concatenate([x, x.mean(0) + np.zeros((100, 64))]) for x in (one, other)]  # changes neither mean nor sum of squares
    monkeypatch.setattr(distribution, "BLOCK", 16)
    streamed = [replace(moments(p), count=len(x)) for p, x in zip(padded, (one, other), strict=True)]
    assert streamed[0].factor.shape == (64, 64)
    assert frechet(*streamed) == pytest.approx(fid(one, other), rel=1e-10)


def test_the_fast_way_to_fid_is_taken_only_where_it_is_right(monkeypatch):
    """Variances over twelve decades: the smallest of the eigenvalues, which the fast way takes roots of, are rounding."""
    one, other = (x * np.logspace(0, -7, 40) for x in sets(200, 300, 40))
    other = one + 0.01 * other[:200]
    right = fid(one, other)
    monkeypatch.setattr(distribution, "DIGITS", math.inf)
    assert 1e-11 < abs(fid(one, other) / right - 1) < 1e-3, "what would be wrong"
    monkeypatch.setattr(distribution, "DIGITS", 0.0)
    assert fid(one, other) == right, "singular values were what was taken"
    few = [x[:50] for x in sets(200, 300, 64)]
    slow = fid(*few)
    monkeypatch.undo()
    assert fid(*few) == pytest.approx(slow, rel=1e-12)


def test_fid_of_directions_without_variance_is_exact():
    """Roots of covariances have errors near 1e-8 for each direction without variance; this has none."""
    one, other = sets(200, 300, 8)
    wide = [
        np.concatenate([x, np.zeros((len(x), 100))], 1) @ np.linalg.qr(np.random.default_rng(1).normal(size=(108, 108)))[0]
        for x in (one, other)
    ]
    assert fid(*wide) == pytest.approx(fid(one, other), rel=1e-11)


def test_fid_and_kid_are_torchmetrics_with_the_same_vectors():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    one, other = sets(120, 90, 16)
    theirs = FrechetInceptionDistance(Given(), input_img_size=(1, 1, 16)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(Given(), subsets=1, subset_size=90, gamma=0.5)
    for metric, pictures in ((theirs, one), (kernel, one[:90])):
        metric.update(torch.from_numpy(pictures).reshape(-1, 1, 1, 16), real=False)
        metric.update(torch.from_numpy(other).reshape(-1, 1, 1, 16), real=True)
    assert fid(one, other) == pytest.approx(theirs.compute().item(), rel=1e-8)
    assert kid(one[:90], other, gamma=0.5) == pytest.approx(kernel.compute()[0].item(), rel=1e-6)


def test_fid_rises_with_noise():
    clean = sets(400, 2, 12)[0]
    noise = np.random.default_rng(0).normal(size=clean.shape)
    found = [fid(clean + strength * noise, clean) for strength in (0.0, 0.1, 0.3, 1.0, 3.0)]
    assert found == sorted(found) and found[0] < 1e-9 < found[1]


def test_kid_of_three_points_by_hand():
    """Kernel (x.y + 1)^3 with D = 1: pictures 0, 1, 2 and references 1, -1."""
    within = (1 + 1 + 27) / 3  # k(0,1), k(0,2), k(1,2)
    references = 0.0  # k(1,-1) = 0
    across = (1 + 1 + 8 + 0 + 27 - 1) / 6
    assert kid(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [-1.0]])) == pytest.approx(within + references - 2 * across)


def test_kid_is_unbiased_where_fid_is_not():
    rng = np.random.default_rng(3)
    kids, fids = [], []
    for _ in range(200):
        one, other = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
        kids.append(kid(one, other))
        fids.append(fid(one, other))
    assert abs(np.mean(kids)) < 3 * np.std(kids) / math.sqrt(200) and min(kids) < 0
    assert np.mean(fids) > 1


def test_order_and_blocks_change_nothing(monkeypatch):
    one, other = sets(150, 130, 12)
    groups = np.repeat(np.arange(30), 5)
    order = np.random.default_rng(0).permutation(150)

    def everything(pictures, groups):
        found = manifold(pictures, other, 4)
        sums = kernel_sums(pictures, other, groups)
        return [fid(pictures, other), *sums.kid(), *sums.within_GG.ravel(), found.density_N.mean(), found.recalled_M.mean()]

    plain = everything(one, groups)
    assert everything(one[order], groups[order]) == pytest.approx(plain, rel=1e-9)
    monkeypatch.setattr(distribution, "BLOCK", 7)
    assert everything(one, groups) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("measure", [fid, kid, lambda a, b: manifold(a, b, 5)], ids=["fid", "kid", "manifold"])
def test_memory_does_not_grow_with_pictures(measure, monkeypatch, tmp_path):
    """Of vectors on disk, a block at a time: three times as many take no more than what is kept of each, a few numbers."""
    monkeypatch.setattr(distribution, "BLOCK", 256)

    def peak(count):
        np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32))
        vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
        tracemalloc.start()
        measure(vectors, vectors[:256])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(300)
    assert peak(3000) - peak(1000) < 2000 * 64


def test_sums_by_group_are_sums_over_pairs():
    one, other = sets(20, 15, 5)
    groups = np.arange(20) % 4
    sums = kernel_sums(one, other, groups)
    kernel = (one @ one.T / 5 + 1) ** 3
    np.fill_diagonal(kernel, 0)
    assert sums.within_GG[1, 2] == pytest.approx(kernel[np.ix_(groups == 1, groups == 2)].sum())
    assert sums.within_GG[3, 3] == pytest.approx(kernel[np.ix_(groups == 3, groups == 3)].sum())
    assert sums.kid()[0] == pytest.approx(kid(one, other))
    subset = groups != 0
    assert sums.kid(np.array([[0, 1, 1, 1]]))[0] == pytest.approx(kid(one[subset], other))


def test_a_picture_makes_no_pair_with_its_copy():
    """Two groups of one picture each: drawn twice, one alone has no pairs, while 2 + 1 of them are still one pair."""
    sums, counts = np.array([[0.0, 3.0], [3.0, 0.0]]), np.array([1, 1])
    assert mean_over_pairs(sums, counts, np.array([[1, 1], [2, 1]])).tolist() == [3.0, 3.0]
    assert np.isnan(mean_over_pairs(sums, counts, np.array([[2, 0]]))[0])


def test_neighbourhoods_on_a_line_by_hand():
    """k = 1. References 0, 1, 10: balls of 1, 1 and 9. Pictures 0.5, 1.5, 30: balls of 1, 1 and 28.5."""
    found = manifold(np.array([[0.5], [1.5], [30.0]]), np.array([[0.0], [1.0], [10.0]]), 1)
    assert found.inside_N.tolist() == [True, True, False]
    assert found.density_N.tolist() == [2.0, 2.0, 0.0]  # 0.5 is near 0 and 1; 1.5 is near 1, and 10 reaches to it
    assert found.recalled_M.tolist() == [True, True, True]  # 10 lies 20 from 30, whose ball reaches over it
    assert found.covered_M.tolist() == [True, True, True]
    far = manifold(np.array([[0.5], [0.6], [0.7]]), np.array([[0.0], [1.0], [10.0], [11.0]]), 1)
    assert far.covered_M.tolist() == [True, True, False, False] and far.recalled_M.tolist() == [False] * 4
    edge = manifold(np.array([[2.0], [-5.0]]), np.array([[0.0], [1.0], [10.0], [11.0]]), 1)
    assert edge.inside_N.tolist() == [True, False], "the edge belongs to the ball"


def test_copies_of_the_references_are_all_inside_and_cover_all():
    references = sets(2, 60, 10)[1]
    found = manifold(references[::-1], references, 3)
    assert found.inside_N.all() and found.recalled_M.all() and found.covered_M.all()
    assert found.density_N.sum() == 60 * 4 / 3  # each ball holds its k, and its own middle
    assert manifold(np.ones((9, 10)) / 3, np.ones((9, 10)) / 3, 2).density_N.tolist() == [4.5] * 9


@pytest.mark.parametrize("measure", [fid, kid, lambda a, b: manifold(a, b, 5)])
def test_what_says_nothing_is_refused(measure):
    good, bad = sets(10, 10, 3)[0], sets(10, 10, 3)[0]
    bad[7, 1] = np.nan
    for pictures, references, why in [
        (good[:1], good, "pictures are too few for this number: 1,"), (good, good[:0], "references are too few for this number: 0,"),
        (bad, good, "number 8 of the pictures is not finite"), (good, bad, "number 8 of the references"),
        (good, good[:, :2], "3 numbers cannot be compared with references of 2"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=why):
            measure(pictures, references)


def test_neighbours_need_more_pictures_than_k():
    one, other = sets(5, 20, 3)
    with pytest.raises(DataError, match="pictures are too few for this number: 5, and it needs at least 6"):
        manifold(one, other, 5)
