"""How single files store what our modules hold: the spelling of a whole component, from its names to the file's.

The direction is always from the diffusers name to the original one: then the set of keys that a file must hold is
known exactly, at any size of network, and both what is missing and what is left over can be named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from charforgex.families import mmdit
from charforgex.lora.names import Place

Shapes = Mapping[str, tuple[int, ...]]  # of a module's tensors, by their names in its state dict


@dataclass(frozen=True)
class Original:
    """Where a tensor stands in a single file, and how it is stored there."""

    key: str
    rows: tuple[int, int, int] | None = None  # ours of a joined weight: from part i to before part j, of n equal parts
    transposed: bool = False
    convolved: bool = False  # a linear layer stored as a 1x1 convolution
    swapped: bool = False  # its two halves are in the other order: shift and scale of a modulation

    def behind(self, prefix: str) -> Original:
        return replace(self, key=prefix + self.key)

    def shape(self, ours: Iterable[int]) -> tuple[int, ...]:
        """The stored shape of a tensor that has shape `ours` in our module."""
        rows, *rest = ours
        if self.rows is not None:
            start, end, of = self.rows
            return (rows * of // (end - start), *rest)
        if self.transposed:
            return (*rest, rows)
        return (rows, *rest, 1, 1) if self.convolved else (rows, *rest)

    def span(self, stored_rows: int) -> slice:
        """Our rows among the stored ones."""
        start, end, of = self.rows or (0, 1, 1)
        return slice(stored_rows * start // of, stored_rows * end // of)

    def read(self, stored: Tensor) -> Tensor:
        """Our tensor, from the rows of `span`."""
        if self.swapped:
            return torch.cat(stored.chunk(2)[::-1])
        if self.transposed:
            return stored.T
        return stored[..., 0, 0] if self.convolved else stored

    def written(self, ours: Tensor) -> Tensor:
        """The inverse of `read`: the rows of `span` as they are stored."""
        if self.swapped:
            return torch.cat(ours.chunk(2)[::-1])
        if self.transposed:
            return ours.T
        return ours[..., None, None] if self.convolved else ours


@dataclass(frozen=True)
class Spelling:
    """What a component's tensors are called in single files."""

    names: Callable[[Shapes, Mapping], Mapping[str, Original]]  # of our names and the component's config
    prefixes: tuple[str, ...]  # before all of its keys, by the file's maker; "" in files that hold nothing else
    besides: tuple[str, ...] = ()  # keys that files also have, and that this component has no use for


def each(name: Callable[[str, Mapping], Original]) -> Callable[[Shapes, Mapping], dict[str, Original]]:
    """A spelling in which no name depends on the others."""
    return lambda shapes, config: {key: name(key, config) for key in shapes}


def clip(key: str, config: Mapping) -> Original:
    """As transformers spelled CLIP before its version 5 dropped a level, for one of its two classes."""
    return Original(key if key.startswith("text_projection.") else f"text_model.{key.removeprefix('text_model.')}")


def t5(key: str, config: Mapping) -> Original:
    return Original("shared.weight" if key == "encoder.embed_tokens.weight" else key)  # one and the same


def each_but_projection(shapes: Shapes, config: Mapping) -> dict[str, Original]:
    """CLIP whose projection counts for nothing, whether a file has one or not."""
    return {key: clip(key, config) for key in shapes if not key.startswith("text_projection.")}


CLIP_BESIDES = ("text_projection.weight",)
T5_BESIDES = ("encoder.embed_tokens.weight",)  # `shared.weight` once more

FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SD3_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}


def flux(shapes: Shapes, config: Mapping) -> dict[str, Original]:
    """Black Forest Labs' spelling."""
    found = _joined(shapes, mmdit.flux)
    for key in shapes.keys() - found.keys():
        blocks, number, module = key.removesuffix(".weight").split(".", 2)
        if blocks == "single_transformer_blocks":
            found[key] = Original(f"single_blocks.{number}.{FLUX_NORMS[module].removeprefix('img_attn.')}.scale")
        else:
            found[key] = Original(f"double_blocks.{number}.{FLUX_NORMS[module]}.scale")
    return found


def sd3(shapes: Shapes, config: Mapping) -> dict[str, Original]:
    """Stability AI's spelling."""
    found = _joined(shapes, mmdit.sd3)
    for key in shapes.keys() - found.keys():
        if key == "pos_embed.pos_embed":
            found[key] = Original("pos_embed")
        else:
            _, number, module = key.removesuffix(".weight").split(".", 2)
            found[key] = Original(f"joint_blocks.{number}.{SD3_NORMS[module]}.weight")
    return found


def _joined(shapes: Shapes, places: Callable[[Shapes], Mapping[str, Place]]) -> dict[str, Original]:
    """Of the linear and convolutional modules' tensors: those whose weight has a bias or more than one dimension, norms do not."""
    modules = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1}
    found = places(modules)
    heights: dict[str, int] = {}
    for place in found.values():
        if place.rows is not None:
            heights[place.path] = max(heights.get(place.path, 0), place.rows[1])
    return {
        f"{module}.{leaf}": Original(
            f"{place.path}.{leaf}", None if place.rows is None else (*place.rows, heights[place.path]), swapped=place.swapped
        )
        for module, place in found.items()
        for leaf in ("weight", "bias")
        if f"{module}.{leaf}" in shapes
    }
