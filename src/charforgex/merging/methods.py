"""The ways to make one change of a weight out of several, each with its paper.

A change is a `Product` U V (lora/lowrank.py) or, where a method looks at single values, a dense matrix (out, k). Methods on products
return terms, whose sum is the result: nothing dense is formed and nothing is lost. A file without the layer, or with weight 0 in it, is
not among the arguments: its change is zero. What this means is said where it is not the same as adding zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora import lowrank
from charforgex.lora.lowrank import Product

Sign = Literal["total", "frequency"]
STEPS, SETTLED = 200, 1e-13  # of the mean on a sphere
CACHED = 1 << 15  # values of a matrix that are worked on at once: what is more, torch gives to several threads, which wait for each other
SAMPLED = 61  # one value in so many tells where a border lies


class Term(NamedTuple):
    """`weight` times a change."""

    change: Product
    weight: float


# ---- on products ----


def linear(changes: Sequence[Product], weights: Sequence[float]) -> list[Term]:
    """The weighted sum of the changes themselves, not of their factors: sum of w_i U_i V_i (task arithmetic, Ilharco et al. 2023)."""
    return [Term(change, weight) for change, weight in zip(changes, weights, strict=True)]


def subtract(changes: Sequence[Product], weights: Sequence[float], first: bool = True) -> list[Term]:
    """The first change less the others (negation of task vectors, Ilharco et al. 2023). `first`: whether the first file is among them."""
    signs = [1.0 if first and index == 0 else -1.0 for index in range(len(changes))]
    return [Term(change, sign * weight) for change, sign, weight in zip(changes, signs, weights, strict=True)]


def slerp(changes: Sequence[Product], weights: Sequence[float]) -> list[Term]:
    """The mean on the sphere of directions, at the weighted mean of the norms (Shoemake 1985; of more than two, Buss & Fillmore 2001).

    Of two it is sin((1 - t) a) / sin(a) x + sin(t a) / sin(a) y for directions x and y at the angle a: halfway it is as far from one as
    from the other, and not shorter than both as their sum is. A change of zero has no direction and takes part in the norm alone.
    """
    coefficients = slerp_coefficients(gram(changes), weights)
    return [Term(change, weight) for change, weight in zip(changes, coefficients, strict=True)]


def gram(changes: Sequence[Product]) -> Tensor:
    """All inner products (n, n) in float64, from r x r matrices."""
    table = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for i, one in enumerate(changes):
        for j, other in enumerate(changes[: i + 1]):
            table[i, j] = table[j, i] = lowrank.inner(one, other)
    return table


def slerp_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """What each change is multiplied by, from their inner products (n, n) and weights of at least 0, which may sum up to less than 1.

    Raises LoraError for directions without a mean, because they are opposite.
    """
    weight = torch.tensor(weights, dtype=torch.float64)
    norms = products.diagonal().clamp(min=0).sqrt()
    live = ((norms > 0) & (weight > 0)).nonzero().flatten()
    if len(live) <= 1:
        return [float(w) for w in weights]
    size = float((weight * norms).sum())
    cosines = (products[live][:, live] / norms[live, None] / norms[live]).clamp(-1, 1)
    mean = _mean_direction(cosines, weight[live] / weight[live].sum())
    found = torch.zeros_like(weight)
    found[live] = mean * size / norms[live]
    return found.tolist()


def _mean_direction(cosines: Tensor, shares: Tensor) -> Tensor:
    """Coefficients of the unit vector m with the least sum of shares * angle(m, x_i)^2, from the unit vectors' inner products.

    Steps to the mean of the tangents at m that lead to the x_i, until they cancel.
    """
    if float(shares @ cosines @ shares) < 1e-8:
        raise LoraError("They point in opposite directions, so there is no shortest way between them; use method=linear.")
    if len(shares) == 2:
        angle = math.acos(float(cosines[0, 1]))
        if angle > 1e-4:  # below it, sines are their angles
            shares = torch.sin(shares * angle) / math.sin(angle)
        return shares / torch.sqrt(shares @ cosines @ shares)
    mean = shares / torch.sqrt(shares @ cosines @ shares)
    for _ in range(STEPS):
        seen = (cosines @ mean).clamp(-1, 1)
        angles = torch.acos(seen)
        lengths = torch.where(angles > 1e-8, angles / torch.sin(angles).clamp(min=1e-12), 1.0)
        step = shares * lengths - (shares * lengths * seen).sum() * mean
        length = float(torch.sqrt((step @ cosines @ step).clamp(min=0)))
        if length > 0:
            mean = math.cos(length) * mean + math.sin(length) / length * step
            mean = mean / torch.sqrt(mean @ cosines @ mean)
        if length < SETTLED:
            break
    return mean


def orthogonal(
    changes: Sequence[Product | None], weights: Sequence[float], remove: Literal["inputs", "outputs", "either", "both"] = "inputs"
) -> list[Term]:
    """The sum, each change freed of what those before it occupy, so that they do not disturb each other.

    Without the inputs that another change reads (its row space), a change does nothing wherever the other acts (Po et al. 2024, Orthogonal
    Adaptation); without the outputs (its column space), it never writes what the other writes. "either" removes both, "both" only what has
    its input and its output there. The first stays as it is. The spaces are the files' own: a weight of 0 projects all the same, and gives
    what is left of the others alone. `changes` has None for a file without the layer.
    """
    terms: list[Term] = []
    before: list[Product] = []
    for change, weight in zip(changes, weights, strict=True):
        if change is None:
            continue
        freed = _freed(change, before, remove) if before else change
        before.append(change)
        if weight != 0:
            terms.append(Term(freed, weight))
    return terms


def _freed(change: Product, others: Sequence[Product], remove: str) -> Product:
    found = [lowrank.spectrum(Product(other.up.double(), other.down.double(), other.shape)) for other in others]
    ranks = [one.numerical_rank() for one in found]
    up, down = change.up.double(), change.down.double()
    if remove != "inputs":
        left = _basis([one.left[:, :rank].T for one, rank in zip(found, ranks, strict=True)]).T
        outputs = left @ (left.T @ up)  # the part in the others' space
    if remove != "outputs":
        right = _basis([one.right[:rank] for one, rank in zip(found, ranks, strict=True)])
        inputs = (down @ right.T) @ right
    if remove == "both":
        return lowrank.stacked([Product(up, down, change.shape), Product(-outputs, inputs, change.shape)])
    return Product(up - outputs if remove != "inputs" else up, down - inputs if remove != "outputs" else down, change.shape)


def _basis(spaces: Sequence[Tensor]) -> Tensor:
    """Orthonormal rows of the space that several sets of orthonormal rows span."""
    if len(spaces) == 1:
        return spaces[0]
    columns, core = torch.linalg.qr(torch.cat(list(spaces)).T)
    turned, values, _ = torch.linalg.svd(core)
    return (columns @ turned[:, : len(values)][:, values > lowrank.EXACT]).T


# ---- on dense matrices ----


def magnitude_prune(changes: Sequence[Tensor], weights: Sequence[float], density: float = 0.5) -> Tensor:
    """The weighted sum of each change's largest values (Han et al. 2015): `density` of them stay, the others become 0."""
    return _by_rows(changes, [_trimming(change, density) for change in changes], lambda kept: _summed(kept, weights))


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float = 0.5, sign: Sign = "total") -> Tensor:
    """Trim, elect sign, merge (Yadav et al. 2023): of each change `density` of the values stay, the largest; each place gets the sign that
    most of them have, by sum ("total") or by number ("frequency"); and there the mean of w_i x_i over those that have it.

    Weights of 1 therefore keep the strength. A value that only one file has is not halved by the files that have nothing there.
    """
    return _by_rows(changes, [_trimming(change, density) for change in changes], lambda kept: elected(kept, weights, sign))


def dare_linear(changes: Sequence[Tensor], weights: Sequence[float], keys: Sequence[tuple], density: float = 0.5) -> Tensor:
    """The weighted sum after dropping values by chance and dividing the rest by `density`, the share that stays (DARE, Yu et al. 2024).

    `keys` are those of the draws, one for each change.
    """
    return _by_rows(changes, [_dropping(lambda rows: density, key) for key in keys], lambda kept: _summed(kept, weights))


def dare_ties(
    changes: Sequence[Tensor], weights: Sequence[float], keys: Sequence[tuple], density: float = 0.5, sign: Sign = "total"
) -> Tensor:
    """DARE's drop (Yu et al. 2024) in place of TIES' trim, then its signs and mean (Yadav et al. 2023)."""
    return _by_rows(changes, [_dropping(lambda rows: density, key) for key in keys], lambda kept: elected(kept, weights, sign))


def della(
    changes: Sequence[Tensor], weights: Sequence[float], keys: Sequence[tuple], density: float = 0.5, epsilon: float = 0.2,
    sign: Sign = "total",
) -> Tensor:  # fmt: skip
    """DELLA (Deep et al. 2024): a value's chance to stay grows with its rank among the magnitudes of its row, from density - epsilon / 2
    to density + epsilon / 2, and what stays is divided by it; then signs and mean as in TIES."""

    def chance(rows: Tensor) -> Tensor:
        rising = torch.linspace(density - epsilon / 2, density + epsilon / 2, rows.shape[1], dtype=rows.dtype)
        order = rows.abs().argsort(dim=1, stable=True)  # the smallest first
        return torch.empty_like(rows).scatter_(1, order, rising.expand_as(rows))

    return _by_rows(changes, [_dropping(chance, key) for key in keys], lambda kept: elected(kept, weights, sign))


Thin = Callable[[Tensor], Tensor]  # what stays of some rows of a change; called for all of them, in order


def _by_rows(changes: Sequence[Tensor], thins: Sequence[Thin], merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What `merge` makes of what stays of each change, a few rows at a time: what is made on the way then stays in the processor's cache,
    and the result costs a fraction of what whole matrices would."""
    result = torch.empty_like(changes[0])
    rows = max(1, CACHED // changes[0].shape[1])
    for place, *parts in zip(result.split(rows), *(change.split(rows) for change in changes), strict=True):
        place.copy_(merge([thin(part) for thin, part in zip(thins, parts, strict=True)]))
    return result


def _summed(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(change * weight for change, weight in zip(changes, weights, strict=True))


def elected(changes: Sequence[Tensor], weights: Sequence[float], sign: Sign) -> Tensor:
    """The mean of w_i x_i over the values of the elected sign, 0 where there are none."""
    signs = [change.sign() for change in changes]
    votes = sum(signs if sign == "frequency" else changes)
    winner = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, own, weight in zip(changes, signs, weights, strict=True):
        agrees = (own == winner).to(change.dtype)
        total.addcmul_(change, agrees, value=weight)
        count += agrees
    return total / count.clamp_(min=1)


def _trimming(change: Tensor, density: float) -> Thin:
    """The share `density` of the values, the largest by magnitude; of equal ones at the border, all."""
    count = max(1, int(density * change.numel()))
    if count >= change.numel():
        return lambda rows: rows
    border = smallest_kept(change, count)
    return lambda rows: torch.where(rows.abs() >= border, rows, 0)


def smallest_kept(change: Tensor, count: int) -> Tensor:
    """The `count`-th largest magnitude. A sample says between which two values it lies; only those between them are put in order."""
    values = change.flatten()
    sample = values[::SAMPLED].abs().sort().values
    middle, margin = len(sample) * (1 - count / len(values)), 3 * math.sqrt(len(sample))
    low = float(sample[int(middle - margin)]) if middle > margin else 0.0
    high = float(sample[int(middle + margin)]) if middle + margin < len(sample) else math.inf
    below, between = 0, []
    for part in values.split(CACHED):
        sizes = part.abs()
        below += int((sizes < low).sum())
        between.append(sizes[(sizes >= low) & (sizes <= high)])
    place, found = len(values) - count + 1 - below, torch.cat(between)
    if not 0 < place <= len(found):  # the sample was not like the rest
        place, found = place + below, values.abs()
    return found.kthvalue(place).values


def _dropping(chance: Callable[[Tensor], float | Tensor], key: tuple) -> Thin:
    """Each value stays with its chance and is divided by it, so that the expectation is the same."""
    generator = torch_generator(*key)

    def thin(rows: Tensor) -> Tensor:
        drawn, stays = torch.rand(rows.shape, generator=generator), chance(rows)
        return torch.where(drawn < stays, rows / stays, 0)

    return thin


def content(change: Product) -> str:
    """A hash of a change's factors: draws that have it in their key are equal for equal changes, whichever file they come from."""
    digest = hashlib.sha256()
    for factor in (change.up, change.down):
        digest.update(factor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
