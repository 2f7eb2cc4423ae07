"""What singular values and singular vectors say of changes of weights: how many directions they have, and how far they share them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.lowrank import Spectrum, dense_spectrum, loha_product, lokr_spectrum, product, spectrum
from charforgex.lora.state import Layer


def spectrum_of(layer: Layer, shape: tuple[int, ...] | None = None, weight: Tensor | None = None) -> Spectrum:
    """The singular values of what a layer adds, without those that are rounding. None are left of a layer that changes nothing.

    `shape` is the weight's, which the factors of LoHa and LoKr do not tell of a convolution. Dense matrices are made only where nothing
    shorter is exact. DoRA rescales the base's `weight`, and its change is nothing without it: raises LoraError.
    """
    shape = layer.weight_shape if shape is None else shape
    if layer.kind == "lora":
        found = spectrum(product(layer))
    elif layer.kind == "loha" and layer.rank**2 < min(shape[0], math.prod(shape[1:])):
        found = spectrum(loha_product(layer, shape))
    elif layer.kind == "lokr":
        found = lokr_spectrum(layer, shape)
    elif layer.kind == "loha":
        found = dense_spectrum(layer.delta().view(shape))
    elif weight is None:
        raise LoraError("What a DoRA changes depends on the base's weights; say base=<diffusers folder, checkpoint or charworld>.")
    else:
        found = dense_spectrum(layer.change(weight))
    return trimmed(found)


def trimmed(found: Spectrum) -> Spectrum:
    rank = found.numerical_rank()
    return Spectrum(found.left[:, :rank], found.values[:rank], found.right[:rank], found.shape, found.rest)


def norm(values: Tensor) -> float:
    """Frobenius, of a matrix with these singular values."""
    return float(values.double().norm())


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values' shares in their sum (Roy & Vetterli 2007): r for r equal ones, and 0 where there are none."""
    if not len(values):
        return 0.0
    shares = values.double() / values.double().sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def stable_rank(values: Tensor) -> float:
    """The sum of the squares over the largest square: how many directions of the strongest one's strength hold the energy."""
    return float((values.double() / values[0].double()).square().sum()) if len(values) else 0.0


# ---- two changes of one weight ----


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """In degrees, ascending, between the spaces that the orthonormal columns of two matrices span (Björck & Golub 1973).

    Small angles come from sines, where cosines have no digits left.
    """
    one, other = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    one, other = one.double(), other.double()
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ (one.T @ other)).clamp(max=1).flip(0)
    return torch.rad2deg(torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()))


def overlap(one: Spectrum, other: Spectrum) -> dict[str, float]:
    """How much of the other's energy lies in the spaces of one: what it writes to (columns), what it reads (rows), and both at once.

    All from 0 to 1. `chance` is what both would be for random directions: the product of the spaces' shares of their wholes.
    """
    energy = float(other.values.double().square().sum())
    left = (one.left.double().T @ other.left.double()) * other.values.double()
    across = other.right.double() @ one.right.double().T
    right, both = other.values.double()[:, None] * across, left @ across
    rank, (out, k) = len(one.values), (one.left.shape[0], one.right.shape[1])
    shares = {name: float(found.square().sum()) / energy if energy else 0.0 for name, found in
              (("columns", left), ("rows", right), ("both", both))}  # fmt: skip
    return shares | {"chance": rank / out * rank / k}


def inner(one: Spectrum, other: Spectrum) -> float:
    """Of two changes as long vectors."""
    left = (one.left.double().T @ other.left.double()) * other.values.double()
    right = one.values.double()[:, None] * (one.right.double() @ other.right.double().T)
    return float((left * right).sum())
