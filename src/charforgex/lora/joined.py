"""Several adapted modules as rows of one weight, and back, exactly: queries, keys, values (and an MLP) in the original networks.

For parts W_i with change up_i @ down_i, the joined weight [W_1; W_2; ...] changes by

    up = diag(up_1, up_2, ...), down = [down_1; down_2; ...]      rank m r for m parts of rank r, hence alpha m alpha_i
    up = [up_1; up_2; ...],     down = down_i                     where all parts share it, as in an adapter trained on the joined weight

Shape legend: r rank, in/out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.state import LoraLayer

Rows = Sequence[tuple[int, int]]  # of each part, in order and without a gap


def swap_halves(layer: LoraLayer) -> LoraLayer:
    """The same change of a weight whose two halves of rows are in the other order."""
    one, two = layer.up.chunk(2)
    return replace(layer, up=torch.cat([two, one]))


def alike(layers: Sequence[LoraLayer]) -> list[LoraLayer]:
    """The same changes with one rank and one alpha, which a joined layer needs: lesser ranks are filled up with zeros.

    Layers that agree already are returned as they are. Otherwise values of `up` are scaled, which float16 may round.
    """
    if len({(layer.rank, layer.alpha) for layer in layers}) == 1:
        return list(layers)
    rank = max(layer.rank for layer in layers)
    scale = min((abs(layer.scale) for layer in layers if layer.scale), default=1.0)
    return [
        LoraLayer(
            torch.cat([layer.down, layer.down.new_zeros(rank - layer.rank, *layer.down.shape[1:])]),
            torch.cat([layer.up * (layer.scale / scale), layer.up.new_zeros(layer.up.shape[0], rank - layer.rank)], dim=1),
            scale * rank,
        )
        for layer in layers
    ]


def join(layers: Sequence[LoraLayer | None], rows: Rows) -> LoraLayer:
    """The layer of the joined weight. Parts are None where nothing is adapted; the others are `alike`."""
    present = [(layer, span) for layer, span in zip(layers, rows, strict=True) if layer is not None]
    first = present[0][0]
    shared = all(torch.equal(layer.down, first.down) for layer, _ in present)
    copies = 1 if shared else len(present)
    up = first.up.new_zeros(rows[-1][1], copies * first.rank)
    for i, (layer, (start, end)) in enumerate(present):
        column = 0 if shared else i * first.rank
        up[start:end, column : column + first.rank] = layer.up
    down = first.down if shared else torch.cat([layer.down for layer, _ in present])
    return LoraLayer(down, up, copies * first.alpha)


def split(joined: LoraLayer, rows: Rows) -> list[LoraLayer | None]:
    """The inverse of `join`: always the same change, and the very layers if they were joined block by block.

    Parts that are not changed are None. Raises LoraError if the rows are not those of the joined weight.
    """
    if joined.up.ndim != 2 or joined.up.shape[0] != rows[-1][1]:
        raise LoraError(f"up {tuple(joined.up.shape)} does not have the {rows[-1][1]} rows of the {len(rows)} modules that are one here.")
    changes = torch.stack([joined.up[start:end].any(dim=0) for start, end in rows])  # part, column
    blocks = _blocks(changes)
    if blocks is None:  # one `down` for all
        blocks = {i: (0, joined.rank) for i in range(len(rows)) if changes[i].any()}
    share = joined.alpha / joined.rank
    parts: list[LoraLayer | None] = [None] * len(rows)
    for i, (left, right) in blocks.items():
        start, end = rows[i]
        # copies: tensors that share memory cannot be saved
        parts[i] = LoraLayer(joined.down[left:right].clone(), joined.up[start:end, left:right].clone(), _alpha(share, joined, right - left))
    return parts


def _alpha(share: float, joined: LoraLayer, rank: int) -> float:
    """alpha of a part, so that its strength is the joined one's; exactly what `join` multiplied."""
    return joined.alpha / (joined.rank // rank) if joined.rank % rank == 0 else share * rank


def _blocks(changes: Tensor) -> dict[int, tuple[int, int]] | None:
    """Part -> its columns, if each column belongs to one part and all parts have equally many, else None.

    `changes` (parts, r) says where a part's rows are not all zero. The most parts that fit are taken: one may be all zero.
    """
    parts, rank = changes.shape
    for count in range(parts, 0, -1):
        width, rest = divmod(rank, count)
        for chosen in combinations(range(parts), count) if not rest else ():
            allowed = torch.zeros_like(changes)
            for block, part in enumerate(chosen):
                allowed[part, block * width : (block + 1) * width] = True
            if not (changes & ~allowed).any():
                return {part: (block * width, (block + 1) * width) for block, part in enumerate(chosen)}
    return None
