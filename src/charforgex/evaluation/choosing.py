"""Which checkpoint, strength or contestant is the best: one rule, for training, sweeps and reports."""

from __future__ import annotations

from collections.abc import Sequence

FAITHFUL = 0.9  # share of the base's prompt-following that the best keeps
VARIED = 0.5  # share of the base's diversity that the best keeps
LEAST = 1e-6


def gain(identity: float, base: float, ceiling: float) -> float:
    """Share of the way from the base model's likeness to that of real pictures: 0 is no better than the base, 1 as good as real."""
    return (identity - base) / max(ceiling - base, LEAST)


def worth(gained: float, prompt_following: float, diversity: float, base_following: float, base_diversity: float) -> float:
    """What the best has most of: identity gained, less what prompt-following falls below 90 % of the base's, and scaled down where
    pictures are less varied than half of the base's. Below the base stays below, whatever else."""
    if gained <= 0:
        return gained
    faithful = min(1.0, prompt_following / max(FAITHFUL * base_following, LEAST))
    return gained * faithful * min(1.0, diversity / max(VARIED * base_diversity, LEAST))


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other one beats: at least as much of everything, and more of something. In order."""

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points)

    return [index for index, point in enumerate(points) if not beaten(point)]
