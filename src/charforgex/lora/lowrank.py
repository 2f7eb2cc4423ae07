"""Linear algebra of products up @ down that never forms them: sums, inner products, singular values, the best approximation of lower rank.

A change of a weight is a `Product`: U (out, r) and V (r, k), k = in * kh * kw, standing for U V. All is exact in the space of the products:
sums are stacked factors, inner products need r x r matrices only, and the singular value decomposition of U V follows from QR of both
factors and an SVD of the core R_u R_v^T (r x r). Costs grow with (out + k) r^2; a dense product would need out * k * min(out, k).

Numbers are float32 or float64 as they come; results agree with dense float64 to about 1e-6, relative to the largest singular value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.state import Layer, LohaLayer, LokrLayer, LoraLayer

EXACT = 1e-6  # singular values below this share of the largest are rounding
SETTLED = 1e-3  # by which share of the best error that of leading directions may be larger
SPARE, BLOCKS = 8, 8  # of `leading_spectrum`: directions besides those that are wanted, and how often that many are added
ROUNDED = 1e-2  # least energy of other directions, by rank and the largest's, beside which float32's rounding changes an error by < 1e-5
THREADS = "OPENBLAS_NUM_THREADS"
SQUARABLE = 1e-20, 1e30  # energies of changes whose values float32 can square
FLOAT32 = 1e-10  # share of the energy below which float32 products tell nothing


class Product(NamedTuple):
    """U (out, r) @ V (r, k), the strength included. `shape` is the weight's."""

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, factor: float) -> Product:
        return self._replace(up=self.up * factor)

    def dense(self) -> Tensor:
        return (self.up @ self.down).view(self.shape)

    def norm(self) -> float:
        """Frobenius: `inner` with itself, for half of its work."""
        up, down = self.up.double(), self.down.double()
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


class Spectrum(NamedTuple):
    """U diag(S) V of a product: orthonormal columns (out, r), values (r,) descending, orthonormal rows (r, k).

    `rest` is the energy, the sum of the squared singular values, of directions that were not computed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]
    rest: float = 0.0

    def truncated(self, rank: int) -> Product:
        """The best product of that rank (Eckart & Young 1936), its strength shared evenly by both factors. `rank` 0 is one of zeros."""
        rank = min(rank, len(self.values))
        if rank == 0:
            return Product(self.left.new_zeros(self.shape[0], 1), self.right.new_zeros(1, self.right.shape[1]), self.shape)
        root = self.values[:rank].clamp(min=0).sqrt()
        return Product(self.left[:, :rank] * root, root[:, None] * self.right[:rank], self.shape)

    def error(self, rank: int) -> float:
        """What `truncated(rank)` lacks, as a share of the whole in the Frobenius norm, 0 to 1."""
        energy = self.values.double().square()
        total = float(energy.sum()) + self.rest
        return math.sqrt((float(energy[rank:].sum()) + self.rest) / total) if total else 0.0

    def numerical_rank(self) -> int:
        return int((self.values > EXACT * self.values[0]).sum()) if len(self.values) else 0


def product(layer: Layer, dtype: torch.dtype = torch.float32) -> Product:
    """A layer of LoRA as its product. Raises LoraError for DoRA, whose change depends on the base's weight, and for LoHa and LoKr."""
    if layer.kind != "lora":
        raise LoraError(f"A layer of {layer.kind} is no product of two factors; convert the file to LoRA first.")
    up, down = layer.up.to(dtype).flatten(1), layer.down.to(dtype).flatten(1)
    return Product(up * layer.scale, down, layer.weight_shape)


def layer_of(found: Product, alpha: float | None = None) -> LoraLayer:
    """The product as a layer whose alpha is its rank, or another, in float32. The change is the same."""
    alpha = float(found.rank if alpha is None else alpha)
    up, down = (found.up * (found.rank / alpha)).float().contiguous(), found.down.float().contiguous()
    if len(found.shape) == 4:
        return LoraLayer(down.view(-1, *found.shape[1:]), up[:, :, None, None], alpha)
    return LoraLayer(down, up, alpha)


def stacked(products: Sequence[Product], weights: Sequence[float] | None = None) -> Product:
    """The weighted sum, exactly: ranks add up. Raises LoraError if they are not of one weight."""
    if len({found.shape for found in products}) != 1:
        raise LoraError(f"Changes of weights of different shapes, {' and '.join(sorted({str(p.shape) for p in products}))}, have no sum.")
    weights = [1.0] * len(products) if weights is None else weights
    up = torch.cat([found.up * weight for found, weight in zip(products, weights, strict=True)], dim=1)
    return Product(up, torch.cat([found.down for found in products]), products[0].shape)


def inner(one: Product, other: Product) -> float:
    """<U1 V1, U2 V2> = sum of (U1^T U2) * (V1 V2^T), in float64: the products' inner product as long vectors."""
    left = one.up.double().T @ other.up.double()
    return float((left * (one.down.double() @ other.down.double().T)).sum())


def cosine(one: Product, other: Product) -> float:
    """0 where one of them is zero."""
    norms = one.norm() * other.norm()
    return max(-1.0, min(1.0, inner(one, other) / norms)) if norms else 0.0


def spectrum(found: Product) -> Spectrum:
    """The singular value decomposition of the product. At most min(out, k, r) values."""
    left, core_left = torch.linalg.qr(found.up)
    right, core_right = torch.linalg.qr(found.down.T)
    u, values, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return Spectrum(left @ u, values, v @ right.T, found.shape)


def dense_spectrum(change: Tensor, rank: int | None = None) -> Spectrum:
    """The same of a dense change (out, in[, kh, kw]), by the eigenvectors of the smaller Gram matrix in float64: exact, and several times
    as fast as a full decomposition where the sides differ. `rank`: that many of the largest alone, ten times as fast again; what
    `truncated(rank)` lacks is then within 1e-5 of the least there is, and told as exactly."""
    matrix = change.flatten(1)
    if rank is not None and rank < min(matrix.shape) // 4:
        energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        found = _largest(matrix.float(), rank, energy) if SQUARABLE[0] < energy < SQUARABLE[1] else None
        if found is None or found.rest < ROUNDED * rank * float(found.values[0]) ** 2:
            found = _largest(matrix.double(), rank, energy)
        if found is not None:
            return _like(found, change)
    matrix = matrix.double()
    tall = matrix.shape[0] >= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    return _like(_spectrum_of(matrix, squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1), 0.0), change)


def _largest(matrix: Tensor, rank: int, energy: float) -> Spectrum | None:
    """The `rank` largest directions, and what of the energy the others have. None if LAPACK cannot tell them apart: a unit matrix's.

    Directions are found in the Gram matrix of the matrix's own precision, and the values are what the matrix does along them: in float32
    what is lost to rounding is below 1e-7 rank values[0]^2, measured on spectra from flat to steep.
    """
    linalg = _one_threaded_linalg()
    array, tall = matrix.contiguous().numpy(), matrix.shape[0] >= matrix.shape[1]
    (syrk,) = linalg.get_blas_funcs(("syrk",), (array,))
    gram = syrk(1.0, array.T, trans=int(not tall), lower=1)  # one half of it, for half of the work
    ends = [len(gram) - rank, len(gram) - 1]
    _, vectors = linalg.eigh(gram, subset_by_index=ends, driver="evr", lower=True, overwrite_a=True, check_finite=False)
    if vectors.shape[1] < rank:
        return None
    vectors = torch.from_numpy(vectors).double()
    images = (matrix if tall else matrix.T) @ vectors.to(matrix.dtype)
    squares, turned = torch.linalg.eigh(images.double().T @ images.double())
    values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors @ turned.flip(1)
    return _spectrum_of(matrix, values, vectors.to(matrix.dtype), max(0.0, energy - float(squares.sum())))


@cache
def _one_threaded_linalg() -> ModuleType:
    """scipy.linalg, with one thread unless OPENBLAS_NUM_THREADS says another number, which it reads when it is loaded.

    Eigenvectors come in thousands of short steps, at each of which threads wait for each other: two of them, on two cores that have other
    work too, took eight times as much time as one.
    """
    before = os.environ.get(THREADS)
    os.environ[THREADS] = before or "1"
    try:
        import scipy.linalg
    finally:
        if before is None:
            del os.environ[THREADS]
    return scipy.linalg


def _spectrum_of(matrix: Tensor, values: Tensor, vectors: Tensor, rest: float) -> Spectrum:
    """From the singular vectors (n, r) of the matrix's shorter side."""
    tall = matrix.shape[0] >= matrix.shape[1]
    kept = values > EXACT * values[0] if len(values) else values > 0
    values, vectors = values[kept], vectors[:, kept]
    other = ((matrix if tall else matrix.T) @ vectors) / values
    left, right = (other, vectors) if tall else (vectors, other)
    return Spectrum(left, values, right.T, tuple(matrix.shape), rest)


def _like(found: Spectrum, change: Tensor) -> Spectrum:
    left, values, right = (part.to(change.dtype) for part in (found.left, found.values, found.right))
    return Spectrum(left, values, right, tuple(change.shape), found.rest)


# ---- other kinds of layers ----


def loha_product(layer: LohaLayer, shape: tuple[int, ...]) -> Product:
    """A LoHa of rank r as a product of rank r^2, exactly: (A B) * (C D) is the sum over i and j of (A_i * C_j) (B_i * D_j)."""
    a, b, c, d = (tensor.float() for tensor in (layer.w1_a, layer.w1_b, layer.w2_a, layer.w2_b))
    up = (a[:, :, None] * c[:, None, :]).flatten(1)
    return Product(up * layer.scale, (b[:, None] * d[None]).flatten(0, 1), shape)


def lokr_spectrum(layer: LokrLayer, shape: tuple[int, ...]) -> Spectrum:
    """Of a Kronecker product the singular values are the products of its factors', and the vectors theirs: no dense change is made."""
    sides = []
    for side in ("w1", "w2"):
        whole, a, b = (getattr(layer, side + end) for end in ("", "_a", "_b"))
        sides.append(dense_spectrum(whole.float()) if whole is not None else spectrum(Product(a.float(), b.float(), (len(a), b.shape[1]))))
    one, two = sides
    values, order = torch.outer(one.values, two.values).flatten().sort(descending=True)
    kept = values > EXACT * values[0] if len(values) else values > 0
    i, j = order[kept] // max(len(two.values), 1), order[kept] % max(len(two.values), 1)
    left = torch.einsum("ar,br->abr", one.left[:, i], two.left[:, j]).flatten(0, 1)
    right = torch.einsum("ra,rb->rab", one.right[i], two.right[j]).flatten(1)
    sign = 1.0 if layer.scale >= 0 else -1.0
    return Spectrum(left * sign, values[kept] * abs(layer.scale), right, shape)


def leading_spectrum(change: Tensor, rank: int, generator: torch.Generator) -> Spectrum | None:
    """The `rank` largest directions of a dense change (out, in[, kh, kw]), many times as fast as all of them; None if they do not settle.

    Randomised block Krylov iteration (Musco & Musco 2015), which unlike power iterations also does well on flat spectra. It ends when the
    energy that is found grows so slowly, by the geometric series of its last gains, that the error of `truncated(rank)` is within
    `SETTLED` of the least there is, or 1e-5. `rank` must be far smaller than both sides.
    """
    shape, matrix = tuple(change.shape), change.flatten(1).float()
    tall = matrix.shape[0] >= matrix.shape[1]
    matrix = matrix if tall else matrix.T
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    start = torch.randn(matrix.shape[0], rank + SPARE, generator=generator)
    basis = torch.linalg.qr(matrix.T @ start)[0]
    images, gains, gram = matrix @ basis, [], torch.empty(0, 0, dtype=torch.float64)
    held, width = 0.0, start.shape[1]
    for _ in range(BLOCKS):
        across = images.T.double() @ images[:, -width:].double()
        gram = torch.cat([torch.cat([gram, across[:-width]], dim=1), across.T])
        gains.append(float(torch.linalg.eigvalsh(gram)[-rank:].sum()) - held)
        held += gains[-1]
        if gains[-1] <= FLOAT32 * total:  # nothing is left but rounding, of which no basis can be made
            break
        if len(gains) > 3:  # the first ones are the strong directions' and say nothing of a flat rest
            ratio = min(max(gains[-1] / gains[-2], 0.0), 0.95) if gains[-2] > 0 else 0.0
            coming = gains[-1] * ratio / (1 - ratio)
            if coming <= SETTLED * (total - held):  # half of what SETTLED allows: gains may fall more slowly
                break
        block = matrix.T @ images[:, -width:]
        for _ in range(2):  # once leaves too much of what is there already
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, matrix @ block], dim=1)
    else:
        return None
    squares, vectors = torch.linalg.eigh(gram)
    values, vectors = squares.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank].float()
    kept = values > EXACT * values[0]
    values, vectors = values[kept].float(), vectors[:, kept]
    right, left = basis @ vectors, images @ vectors / values
    left, right = (left, right) if tall else (right, left)
    return Spectrum(left, values, right.T, shape, max(0.0, total - held))


# ---- how much to keep: each says a rank for a spectrum ----

Keep = Callable[[Spectrum], int]


def keep_rank(rank: int) -> Keep:
    """That many directions, or as many as there are."""
    return lambda found: max(1, min(rank, found.numerical_rank()))


def keep_error(most: float) -> Keep:
    """As few directions as leave at most this relative error in the Frobenius norm; 0.1 keeps 99 % of the energy."""

    def choose(found: Spectrum) -> int:
        energy = found.values.double().square()
        left = energy.flip(0).cumsum(0).flip(0) + found.rest  # what directions from i on hold
        return max(1, int((left > most**2 * (energy.sum() + found.rest)).sum()))

    return choose


def keep_energy(share: float) -> Keep:
    """As few directions as hold this share of the energy, the sum of the squared singular values."""
    return keep_error(math.sqrt(max(0.0, 1 - share)))


def keep_ratio(ratio: float) -> Keep:
    """Directions whose singular value is at least the largest divided by `ratio`."""
    return lambda found: max(1, int((found.values >= found.values[0] / ratio).sum())) if len(found.values) else 1
