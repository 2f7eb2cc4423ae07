"""The original ("SGM") spelling of SDXL's UNet and of Stability AI's VAE, and OpenCLIP's of its text encoder, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping

from charforgex.families.originals import Original, Spelling, each

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_G_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_G_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with the module in front of its `.weight` or `.bias` renamed, None if the table lacks it."""
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None


def unet(name: str, config: Mapping) -> Original:
    """`config` gives the layers per block and which up blocks attend: blocks are numbered through in the original."""
    if renamed := _rename(name, UNET_ENDS):
        return Original(renamed)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, i, rest = found[1], int(found[2]), found[3]
        return Original(f"middle_block.{2 * i + (kind == 'attentions')}.{_inner(kind, rest)}")
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    assert found, f"{name} is no UNet2DConditionModel name that SDXL has"
    side, block, kind, i, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    per_block = config["layers_per_block"] + 1
    if kind == "downsamplers":
        return Original(f"input_blocks.{(block + 1) * per_block}.0.{rest.replace('conv.', 'op.')}")
    if kind == "upsamplers":
        attends = config["up_block_types"][block].startswith("CrossAttn")
        return Original(f"output_blocks.{(block + 1) * per_block - 1}.{1 + attends}.{rest}")
    number = block * per_block + i + (side == "down")
    return Original(f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{_inner(kind, rest)}")


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":  # the two spellings agree from here on
        return rest
    renamed = _rename(rest, RESNET)
    assert renamed, f"{rest} is not in a ResnetBlock2D of SDXL"
    return renamed


def vae(name: str, config: Mapping) -> Original:
    last = len(config["block_out_channels"]) - 1
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    if found := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)", name):
        inner = _rename(found[2], VAE_ATTENTION)
        assert inner, f"{name} is not in an AutoencoderKL of SDXL"
        return Original(f"{found[1]}.mid.attn_1.{inner}", convolved=inner.endswith("weight") and not inner.startswith("norm"))
    return Original(name)


def vae_spellings(*prefixes: str) -> list[Spelling]:
    """Of Stability AI's and Black Forest Labs' VAEs: the original one, also in a file of its own, and diffusers'."""
    return [Spelling(each(vae), (*prefixes, "")), Spelling(each(lambda key, config: Original(key)), ("",))]


def clip_g(name: str, config: Mapping) -> Original:
    name = name.removeprefix("text_model.")
    if name == "text_projection.weight":
        return Original("text_projection", transposed=True)
    if name in CLIP_G_ENDS:
        return Original(CLIP_G_ENDS[name])
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    assert found, f"{name} is not in a CLIPTextModelWithProjection"
    block = f"transformer.resblocks.{found[1]}."
    if stacked := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", found[2]):
        return Original(f"{block}attn.in_proj_{stacked[2]}", rows=(third := "qkv".index(stacked[1]), third + 1, 3))
    renamed = _rename(found[2], CLIP_G_LAYER)
    assert renamed, f"{name} is not in a CLIPTextModelWithProjection"
    return Original(block + renamed)
