"""The original spelling of the modules of two transformers: Flux's (Black Forest Labs) and SD3's (Stability AI).

The direction is from our diffusers path to the original one, where queries, keys, values, and Flux's single-block MLP, are
rows of one weight. Two modulations have (shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from charforgex.lora.names import Place

FLUX_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}

SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
OWN, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def flux(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The original place of each module, by its path and its weight's shape."""

    def original(path: str) -> tuple[str, int | None, bool]:
        found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path)
        if found is None:
            return FLUX_ENDS[path], None, path == "norm_out.linear"
        inner, table = found[3], FLUX_SINGLE if found[1] else FLUX_DOUBLE
        joined = {"img_attn.qkv": ["attn." + name for name in OWN], "txt_attn.qkv": ["attn." + name for name in TEXT]}
        if found[1]:
            joined = {"linear1": [*joined["img_attn.qkv"], "proj_mlp"]}
        name, part = _part(inner, joined, table)
        return f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{name}", part, False

    return _places(shapes, original)


def sd3(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The original place of each module, by its path and its weight's shape."""
    joined = {
        "x_block.attn.qkv": ["attn." + name for name in OWN],
        "x_block.attn2.qkv": ["attn2." + name for name in OWN],
        "context_block.attn.qkv": ["attn." + name for name in TEXT],
    }
    last = max(int(path.split(".")[1]) for path in shapes if path.startswith("transformer_blocks."))

    def original(path: str) -> tuple[str, int | None, bool]:
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
        if found is None:
            return SD3_ENDS[path], None, path == "norm_out.linear"
        name, part = _part(found[2], joined, SD3_BLOCK)
        # the last block's text only leads to keys and values: its modulation is diffusers' AdaLayerNormContinuous
        return f"joint_blocks.{found[1]}.{name}", part, path == f"transformer_blocks.{last}.norm1_context.linear"

    return _places(shapes, original)


def _part(inner: str, joined: Mapping[str, list[str]], table: Mapping[str, str]) -> tuple[str, int | None]:
    for name, parts in joined.items():
        if inner in parts:
            return name, parts.index(inner)
    return table[inner], None


def _places(shapes: Mapping[str, tuple[int, ...]], original: Callable[[str], tuple[str, int | None, bool]]) -> dict[str, Place]:
    found = {path: original(path) for path in shapes}
    places, ends = {}, {}
    for path, (name, part, swapped) in sorted(found.items(), key=lambda item: item[1][1] or 0):
        start = ends.get(name, 0)
        ends[name] = start + shapes[path][0]
        places[path] = Place(name, None if part is None else (start, ends[name]), swapped)
    return {path: places[path] for path in shapes}


XLABS = {
    "img_attn.qkv": "qkv_lora1",
    "txt_attn.qkv": "qkv_lora2",
    "img_attn.proj": "proj_lora1",
    "txt_attn.proj": "proj_lora2",
    "linear1": "qkv_lora",
    "linear2": "proj_lora",
}


def xlabs(places: Mapping[str, Place]) -> dict[str, Place]:
    """Flux's modules that XLabs' attention processors adapt, of `flux(...)`: not the MLPs, also not the one in a single block's linear1."""
    found = {}
    for path, place in places.items():
        block = re.fullmatch(r"((?:single|double)_blocks\.\d+)\.(.+)", place.path)
        if block and block[2] in XLABS and not path.endswith("proj_mlp"):
            found[path] = Place(f"{block[1]}.processor.{XLABS[block[2]]}", place.rows)
    return found
