"""How varied the pictures of one set are. Legend: N pictures, D numbers in each vector, G groups of pictures (prompts)."""

from __future__ import annotations

import numpy as np

from charforgex.curation import analysis
from charforgex.evaluation.distribution import by_group, checked, in_blocks, mean_over_pairs


def vendi(features_ND: np.ndarray) -> float:
    """How many different pictures a set amounts to, 1 to N (Friedman & Dieng 2023): the same number that curation tells of a dataset, from
    the smaller of the N x N and D x D matrices. Raises DataError for a single picture or vectors that are not finite."""
    return analysis.vendi(checked(features_ND, "pictures", 2))


def diversity(features_ND: np.ndarray) -> float:
    """Mean cosine distance between different pictures, in [0, 2]: 0 means that all are the same. One picture alone has 0."""
    return float(diversities(features_ND, np.zeros(len(features_ND), np.int64))[0]) if len(features_ND) > 1 else 0.0


def diversities(features_ND: np.ndarray, groups_N: np.ndarray, weights_KG: np.ndarray | None = None) -> np.ndarray:
    """(K,): `diversity` when groups are drawn as often as each row says; without weights (1,), of all as they are. Takes no N x N matrix:
    the sum over pairs of cosines is what the sum of all vectors has in length, less each vector's own."""
    counts = np.bincount(groups_N)
    sums, own = np.zeros((len(counts), features_ND.shape[1])), np.zeros(len(counts))
    for block, features in in_blocks(features_ND):
        sums += by_group(features, groups_N[block], len(counts))
        own += np.bincount(groups_N[block], np.square(features).sum(axis=1), len(counts))
    weights = np.ones((1, len(counts))) if weights_KG is None else weights_KG
    return 1 - mean_over_pairs(sums @ sums.T - np.diag(own), counts, weights)
