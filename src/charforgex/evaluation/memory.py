"""Has the model learnt training pictures by heart?

Cosines of an embedder say what a picture is like, and two pictures of one character in one scene are alike. So a copy is told by structure:
thumbnails are laid onto each other, whatever mirroring, cropping, brightness or compression has done to the one, and what still differs is
measured (`curation.resemblance`). How small a difference makes a copy is told by the data: real pictures that are no copies of each other
have a smallest difference too, and nearly all of them have a larger one than the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from charforgex.curation.fingerprints import fingerprint, turned
from charforgex.curation.resemblance import FirstLook, Way, aligned_difference
from charforgex.errors import DataError
from charforgex.evaluation.distribution import BLOCK

MIRRORED = 1  # of fingerprints.ORIENTATIONS
SAME = 8.0  # grey levels up to which curation takes two pictures for one (`curation.duplicates.difference`)
BY_HASH, BY_COSINE, CLOSE = 16, 4, 2  # candidates by each measure, and how many of them are laid onto each other as well as can be
ASKED = 500  # training pictures that are compared with the others to learn the limit
FEWEST = 9  # different pictures that a limit may be learnt from


def nearest(features_ND: np.ndarray, training_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine to, and index of, each picture's nearest training picture, (N,) each, of unit vectors. A block of pictures at a time."""
    training = np.asarray(training_MD)
    cosines, indices = np.zeros(len(features_ND)), np.zeros(len(features_ND), np.int64)
    for start in range(0, len(features_ND), BLOCK):
        block = np.asarray(features_ND[start : start + BLOCK]) @ training.T
        indices[start : start + BLOCK] = block.argmax(1)
        cosines[start : start + BLOCK] = block.max(1)
    return cosines, indices


class Match(NamedTuple):
    """The training picture that a picture is most like: grey levels by which they differ (`aligned_difference`; above 4 SAME only roughly),
    its index, and whether it is mirrored."""

    difference: float
    index: int
    mirrored: bool


class Originals:
    """Training pictures, of which copies are looked for. Keeps 28 kB of each; `find` takes about 15 ms, hardly more for more of them."""

    def __init__(self, thumbnails: Sequence[np.ndarray], features_MD: np.ndarray):
        """`thumbnails` are `fingerprints.thumbnail`s, `features_MD` unit vectors, in one order. Raises DataError if there are none."""
        if not len(thumbnails):
            raise DataError("there are no training pictures")
        prints = [fingerprint(small).hashes for small in thumbnails]
        self.order = sorted(range(len(prints)), key=lambda i: prints[i].tolist())  # so that theirs changes nothing
        self.thumbnails = [thumbnails[i] for i in self.order]
        self.features = np.asarray(features_MD)[self.order]
        mirrored = [fingerprint(turned(small, MIRRORED)).hashes for small in self.thumbnails]
        self.hashes = np.array([*(prints[i] for i in self.order), *mirrored])  # (2 M, windows)

    def find(self, thumbnail: np.ndarray, feature_D: np.ndarray, but: int | None = None) -> Match:
        """The match of a picture. `but` is the training picture that it is itself. Raises DataError if that is the only one."""
        count, itself = len(self.thumbnails), None if but is None else self.order.index(but)
        if itself is not None and count == 1:
            raise DataError("one training picture has no other to be compared with")
        hashes = fingerprint(thumbnail).hashes
        # bits by which it differs from each window of theirs, and each of its windows from the whole of theirs
        bits = np.concatenate([np.bitwise_count(hashes[0] ^ self.hashes), np.bitwise_count(hashes[1:] ^ self.hashes[:, :1])], axis=1)
        ways, least = bits.argmin(axis=1), bits.min(axis=1).astype(np.int64)
        cosines = self.features @ feature_D
        if itself is not None:
            least[[itself, itself + count]], cosines[itself] = 1 << 16, -2.0
        places = np.argsort(least, kind="stable")[:BY_HASH].tolist()
        for place in np.argsort(-cosines, kind="stable")[:BY_COSINE].tolist():
            places.append(place if least[place] <= least[place + count] else place + count)
        pairs = [self._pair(place, int(ways[place])) for place in dict.fromkeys(places) if itself is None or place % count != itself]

        look = FirstLook(lambda place: thumbnail if place < 0 else self._entry(place), SAME)
        best = Match(np.inf, -1, False)
        for at in np.argsort(look.least(pairs, align=True), kind="stable")[:CLOSE].tolist():
            _, place, way = pairs[at]
            one, other = (self._entry(place), thumbnail) if way.swapped else (thumbnail, self._entry(place))
            best = min(best, Match(aligned_difference(one, other, 0, way.window, SAME), self.order[place % count], place >= count))
            if best.difference <= SAME:
                break
        return best

    def differences(self) -> np.ndarray:
        """How much each differs from the most similar of the others; of at most `ASKED` of them, spread over all."""
        count = len(self.thumbnails)
        places = np.unique(np.linspace(0, count - 1, min(count, ASKED)).astype(int)) if count > 1 else ()
        return np.array([self.find(self.thumbnails[i], self.features[i], but=self.order[i]).difference for i in places])

    def _pair(self, place: int, way: int) -> tuple[int, int, Way]:
        windows = self.hashes.shape[1]
        return -1, place, Way(0, 0, way if way < windows else way - windows + 1, way >= windows)

    def _entry(self, place: int) -> np.ndarray:
        count = len(self.thumbnails)
        return self.thumbnails[place] if place < count else turned(self.thumbnails[place - count], MIRRORED)


class Limit(NamedTuple):
    """Pictures that differ by less than `difference` grey levels from a training picture are copies of it; of pictures that are none, a
    share of at most `false_alarms` is taken for copies. `count` different pictures say so; `left_out` were copies of others."""

    difference: float
    false_alarms: float
    count: int
    left_out: int


def copy_limit(differences: np.ndarray, false_alarms: float) -> Limit:
    """From the smallest differences of real pictures to the training pictures that they are not.

    A conformal quantile (Vovk et al. 2005): a new picture like these n is below the r-th smallest of theirs with probability r / (n + 1),
    whatever the distribution, on average over what the n happen to be: one limit's own rate is off by about 1 / sqrt(r) of it.
    Where n is too small for the rate that is asked for, the limit is the smallest and its rate 1 / (n + 1).
    Differences up to SAME are of the same picture twice, which tells nothing of different ones. Raises DataError for fewer than FEWEST.
    """
    different = np.sort(differences[differences > SAME])
    if len(different) < FEWEST:
        raise DataError(
            f"{len(different)} training and reference pictures are too few to tell copies from look-alikes by; "
            f"at least {FEWEST} different ones are needed."
        )
    rank = max(1, int(false_alarms * (len(different) + 1)))
    return Limit(float(different[rank - 1]), rank / (len(different) + 1), len(different), len(differences) - len(different))
