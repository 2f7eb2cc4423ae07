"""Between what a metric's numbers are to be read: the metric itself, on sets of which it is known what they are.

Its `floor` is what the worst picture gets and its `ceiling` what a perfect one does: real pictures, other people, other prompts, noise.
A metric of single pictures leaves each out of the references that it is compared with, so "real" means held out. One that compares whole
sets with the references would find them equal, and has "training" for its ceiling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from charforgex.draws import seed_of
from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery
from charforgex.evaluation.metric import Case, Metric, Value

if TYPE_CHECKING:
    from PIL.Image import Image

NOISES = 16  # pictures of noise for each prompt pack


def calibrate(metrics: Mapping[str, Metric], case: Case) -> dict[str, dict[str, Value | str | None]]:
    """For each metric "floor" and "ceiling": its value on that set, why there is none, or None for a metric without that end."""
    sets = Sets(case)
    return {name: {end: _measured(metric, getattr(metric, end), sets) for end in ("floor", "ceiling")} for name, metric in metrics.items()}


def _measured(metric: Metric, which: str | None, sets: Sets) -> Value | str | None:
    if which is None:
        return None
    try:
        return metric(sets[which], sets.case)
    except DataError as error:
        return str(error)


class Sets:
    """Galleries by name, each made once: "real", "others", "shuffled", "noise", "everywhere", ... Raises DataError where one cannot."""

    def __init__(self, case: Case):
        self.case, self._made = case, {}
        self._makers: dict[str, Callable[[], Gallery]] = {
            "real": lambda: case.references,
            "others": self._others,
            "shuffled": self._shuffled,
            "noise": self._noise,
            "everywhere": self._everywhere,
            "training": lambda: self._given(case.training, "training pictures"),
            "base": lambda: self._given(case.base, "pictures of the base"),
        }  # fmt: skip

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def __getitem__(self, name: str) -> Gallery:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    @staticmethod
    def _given(gallery: Gallery | None, what: str) -> Gallery:
        if not gallery:
            raise DataError(f"there are no {what}")
        return gallery

    def _others(self) -> Gallery:
        """As if somebody had drawn them for the character: nobody else was asked for."""
        others = self._given(self.case.others, "pictures of other people")
        if not any(shot.people for shot in others.shots):
            return others
        return Gallery(others.name, [replace(shot, people=()) for shot in others.shots], others.cache)

    def _shuffled(self) -> Gallery:
        """Real pictures with each other's captions; without captions, the base's with each other's prompts."""
        source = self.case.references
        if not any(source.prompts):
            source = self.case.base or source
        told = [shot for shot in source.shots if shot.prompt]
        if not told:
            raise DataError("neither the references have captions nor the base's pictures prompts")
        shots = [replace(told[i], prompt=prompt) for i, prompt in enumerate(deranged([shot.prompt for shot in told]))]
        return Gallery("shuffled", shots, source.cache)

    def _noise(self) -> Gallery:
        """Noise in place of the base's pictures, or of the references: prompts, seeds and sizes are theirs."""
        source, count, shots = self.case.base or self.case.references, Counter(), []
        for shot in source.shots:
            count[shot.pack] += 1
            if count[shot.pack] <= NOISES:
                width, height = shot.open().size
                key = f"noise {width} x {height} {shot.prompt} {shot.seed} {count[shot.pack]}"
                shots.append(replace(shot, picture=noise(width, height, key), key=key, people=()))
        return Gallery("noise", shots, source.cache)

    def _everywhere(self) -> Gallery:
        """The references, over and over, in place of the base's pictures: as if nothing else could be drawn any more."""
        base, references = self["base"], self.case.references.shots
        if not references:
            raise DataError("there are no references")
        shown = [references[i % len(references)] for i in range(len(base))]
        shots = [replace(shot, picture=one.picture, key=one.key) for shot, one in zip(base.shots, shown, strict=True)]
        return Gallery("everywhere", shots, base.cache)


def deranged(prompts: Sequence[str]) -> list[str]:
    """The prompts in another order, the same for the same prompts, in which none is where it was nor where an equal one was.

    Raises DataError if more than half of them are equal.
    """
    count = max(Counter(prompts).values())
    if 2 * count > len(prompts):
        raise DataError(f"{count} of {len(prompts)} captions are the same; others cannot take their place")
    order = sorted(range(len(prompts)), key=lambda i: (seed_of("shuffled", prompts[i]), prompts[i]))
    found = [""] * len(prompts)
    for place, i in enumerate(order):
        found[i] = prompts[order[(place + count) % len(order)]]
    return found


def noise(width: int, height: int, key: str) -> Image:
    """Each pixel's colour by chance; a function of the arguments."""
    from PIL import Image

    rng = np.random.default_rng(seed_of("noise picture", key))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
