"""An adapter's first weights: drawn from (seed, path), and such that nothing changes yet.

All kinds are scaled so that alpha and the learning rate mean to them what they mean to a LoRA: per step of Adam, an entry of the weight
moves by about as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora.state import Layer, LohaLayer, LokrLayer, LoraLayer

OVERSAMPLING, ITERATIONS = 8, 4  # of the range finder (Halko et al. 2011); the trained difference is exact whatever they are


def first_layer(kind: str, weight: Tensor, path: str, rank: int, alpha: float, seed: int, factor: int | None = None) -> Layer:
    """lora, dora: down ~ U(-1/sqrt(k), 1/sqrt(k)), which is kaiming_uniform(a=sqrt 5), up = 0; dora's magnitude is the weight's own.

    loha: w1_a @ w1_b of variance 1, w2_b as down, w2_a = 0. lokr: `factor` is w1's size, None for halves as near as can be; w2 is whole
    where a product of that rank would not be smaller, with the scale in w1, because nothing scales it then.
    """
    out, shape = weight.shape[0], weight.shape[1:]
    inner = shape.numel()

    def uniform(*size: int) -> Tensor:
        return (torch.rand(*size, generator=torch_generator("lora", seed, path)) * 2 - 1) / math.sqrt(inner)

    def normal(part: str, *size: int) -> Tensor:
        return torch.randn(*size, generator=torch_generator("lora", seed, path, part))

    if kind in ("lora", "dora"):
        magnitude = norms(weight) if kind == "dora" else None
        return LoraLayer(uniform(rank, *shape), torch.zeros(out, rank, *[1] * len(shape[1:])), alpha, magnitude)
    if kind == "loha":
        spread = rank**-0.25
        w1_a, w1_b = normal("w1_a", out, rank) * spread, normal("w1_b", rank, inner) * spread
        return LohaLayer(w1_a, w1_b, torch.zeros(out, rank), uniform(rank, inner), alpha)

    from peft.tuners.lokr.layer import factorization

    (o1, o2), (i1, i2) = (factorization(size, factor or -1) for size in (out, shape[0]))
    w1 = normal("w1", o1, i1)
    if rank >= max(o2, i2) / 2:
        return LokrLayer(alpha=1.0, w1=w1 * math.sqrt(rank / (3 * inner)) * alpha / rank, w2=torch.zeros(o2, i2, *shape[1:]))
    return LokrLayer(alpha=alpha, w1=w1, w2_a=torch.zeros(o2, rank), w2_b=uniform(rank, i2 * shape[1:].numel()))


def norms(weight: Tensor) -> Tensor:
    """Of each row, float32 (out,)."""
    return torch.linalg.norm(weight.detach().float().flatten(1), dim=1)


def principal(weight: Tensor, path: str, rank: int, alpha: float, seed: int) -> LoraLayer:
    """The weight's own `rank` largest directions as factors, their singular values shared between both (PiSSA, Meng et al. 2024)."""
    matrix = weight.detach().float().flatten(1)
    if rank > min(matrix.shape):
        raise LoraError(
            f"lora.init=pissa: {path} has {min(matrix.shape)} directions, fewer than rank {rank}; lower lora.rank or lora.ranks."
        )
    probe = torch.randn(matrix.shape[1], min(rank + OVERSAMPLING, *matrix.shape), generator=torch_generator("pissa", seed, path))
    basis = torch.linalg.qr(matrix @ probe.to(matrix.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    half = (values[:rank] * rank / alpha).sqrt()
    up, down = (basis @ left)[:, :rank] * half, half[:, None] * right[:rank]
    return LoraLayer(down.view(rank, *weight.shape[1:]).cpu(), up.view(-1, rank, *[1] * (weight.ndim - 2)).cpu(), alpha)


def together(one: LoraLayer, other: LoraLayer) -> LoraLayer:
    """The sum of two layers of equal scale, exact, of both ranks together, in factors as small as it is itself.

    What was trained and minus what it began with nearly cancel: side by side, half precision would round away what was learnt. So
    their sum is decomposed anew, by QR of the factors.
    """
    up = torch.cat([one.up.flatten(1), other.up.flatten(1)], 1).double()
    down = torch.cat([one.down.flatten(1), other.down.flatten(1)]).double()
    (left, upper), (right, lower) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    up, down, rank = (left @ inner_left) * values.sqrt(), values.sqrt()[:, None] * (inner_right @ right.T), len(values)
    shapes = (rank, *one.down.shape[1:]), (-1, rank, *one.up.shape[2:])
    return LoraLayer(down.float().view(shapes[0]), up.float().view(shapes[1]), one.scale * rank)
