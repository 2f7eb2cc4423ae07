"""What a LoRA file is, told from its keys and shapes alone: its format, and the family of base models that it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from charforgex.errors import LoraError
from charforgex.lora.state import some

DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".down.weight")
LYCORIS = (".hada_w1_b", ".lokr_w1", ".lokr_w1_a", ".lokr_w2", ".lokr_w2_a")
FLAT = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")
TEXT_IN = r"_attn2_(processor_)?to_[kv]_"
SDXL_TEXT, OTHER_UNETS_TEXT = 2048, (768, 1024)  # width of what the UNet's second attentions read: SDXL; Stable Diffusion 1 and 2
SDXL_MOTION = {1: 640, 2: 320}  # by block on the way up: width of what its motion modules read; Stable Diffusion 1's is twice that
FLUX_BLOCKS = {"double": 19, "single": 38}  # HunyuanVideo has names of Flux and 20 and 40 blocks
FLUX_WIDTH, SD3_WIDTHS = 3072, (1536, 2432)  # of Flux; of SD3 and SD3.5 medium, and of SD3.5 large


def identify(keys: Iterable[str]) -> str:
    """The format of a file with these keys. Raises LoraError if it is none that can be read.

    ai-toolkit's is "diffusers": only the header tells them apart.
    """
    keys = list(keys)
    adapted = [key for key in keys if key.endswith((*DOWN, *LYCORIS))]
    if any(re.search(r"(double|single)_blocks\.\d+\.processor\.", key) for key in adapted):
        return "xlabs"
    if any(".temporal_transformer." in key and "_lora." in key for key in adapted):
        return "animatediff"
    if any(key.startswith(FLAT) for key in adapted):
        return "kohya"
    if any(key.startswith(("diffusion_model.", "text_encoders.")) for key in adapted):
        return "comfyui"
    if adapted:
        return "diffusers"
    guess = unreadable(keys)
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        guess = " They look like a whole checkpoint, not an adapter."
    raise LoraError(f"None of the {len(keys)} keys is a LoRA's in a format that can be read: {some(keys)}.{guess}")


def half_of(name: str) -> str:
    """Whether a layer of AnimateDiff, by our name, is "temporal", of a motion module, or "spatial", of the picture's base."""
    return "temporal" if ".motion_modules." in name else "spatial"


UNREADABLE = {  # how keys end, or begin, of what is no adapter that can be read -> what it is
    r"\.norm\.(query|key)_norm\.scale$": (
        "a control LoRA of Black Forest Labs (FLUX.1 Canny or Depth): with biases, norms and a wider img_in, it is for a base that reads "
        "pictures besides text, which none here is"
    ),
    r"\.lora_B\.bias$": "biases beside the factors (peft's lora_bias), which no adapter here has",
    r"\.diff(_b)?$": "full changes of weights (LyCORIS' full, or norms and biases): only products of factors are adapters here",
    r"\.oft_blocks$|\.oft_diag$|\.oft_R\b": "OFT or BOFT, which turns weights instead of adding to them",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.w_norm$|\.b_norm$": "changes of norms, which are no adapter's",
    r"\.(set|reshape)_weight$": "weights that replace the base's",
    r"^bundle_emb": "embeddings of words, bundled by OneTrainer; save the LoRA without them",
    r"^(controlnet|lora_controlnet)\b": "a control-LoRA of Stability AI",
}  # fmt: skip


def unreadable(keys: Iterable[str]) -> str:
    """A sentence on what keys are that have no place, if that is known."""
    keys = list(keys)
    return next((f" They are {what}." for pattern, what in UNREADABLE.items() if any(re.search(pattern, key) for key in keys)), "")


def family_of(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The family whose LoRA has these keys and shapes: sdxl, flux, sd3, sd15, animatediff, animatediff_sdxl; None if not certain."""
    names = {re.sub(r"[._]", "_", key): shape for key, shape in shapes.items()}  # kohya's names and dotted ones alike
    if any("joint_blocks_" in name for name in names):
        return "sd3"
    if any(re.search(r"(^|_)(double|single)_blocks_\d", name) for name in names) or any("single_transformer_blocks_" in n for n in names):
        return "flux" if _is_flux(names) else None
    if any(re.search(r"(^|_)transformer_blocks_\d+_(attn2?|ff|ff_context|norm1|norm1_context)_", name) for name in names) and not _is_unet(
        names
    ):
        widths = _widths(names, r"_attn2?_(to_q|add_q_proj)_")
        if widths and widths <= set(SD3_WIDTHS):
            return "sd3"
        return "flux" if widths == {FLUX_WIDTH} and _is_flux(names) else None
    if _is_unet(names):
        if any("_motion_modules_" in name for name in names):
            return _family_of_motion(names)
        return "sdxl" if _is_sdxl(names) else "sd15" if _widths(names, TEXT_IN) == {OTHER_UNETS_TEXT[0]} else None
    return None


def _is_down(name: str) -> bool:
    return name.endswith(tuple(end.replace(".", "_") for end in DOWN))


def _widths(names: Mapping[str, Sequence[int]], pattern: str) -> set[int]:
    """What the modules of such names read: the columns of their first factors."""
    return {shape[1] for name, shape in names.items() if len(shape) > 1 and _is_down(name) and re.search(pattern, name)}


def _is_flux(names: Mapping[str, Sequence[int]]) -> bool:
    for kind, count in FLUX_BLOCKS.items():
        pattern = r"(?<!single_)transformer_blocks_(\d+)_" if kind == "double" else r"single_transformer_blocks_(\d+)_"
        found = [re.search(rf"{kind}_blocks_(\d+)_|{pattern}", name) for name in names]
        if any(match and int(match[1] or match[2]) >= count for match in found):
            return False
    return not any("stream_modulation" in name for name in names)  # FLUX.2's


def _is_unet(names: Mapping[str, Sequence[int]]) -> bool:
    return any(re.search(r"(^|_)((input|output|middle)_blocks?|(down|up|mid)_blocks?)_", name) for name in names)


def _is_sdxl(names: Mapping[str, Sequence[int]]) -> bool:
    """Stable Diffusion 1 and 2 have UNets of the same names, but one transformer block everywhere, narrower text, and one encoder."""
    widths = _widths(names, TEXT_IN)
    if widths & {*OTHER_UNETS_TEXT}:
        return False
    second_encoder = any(name.startswith(("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_")) for name in names)
    return second_encoder or SDXL_TEXT in widths or any(re.search(r"_transformer_blocks_[1-9]", name) for name in names)


def _family_of_motion(names: Mapping[str, Sequence[int]]) -> str | None:
    """Motion modules of both UNets have the same names, and as far as the first block on the way up the same widths."""
    widths = {block: _widths(names, rf"up_blocks_{block}_motion_modules_.*_(to_[qkv]|proj_in)_") for block in SDXL_MOTION}
    if _is_sdxl(names) or any(found == {SDXL_MOTION[block]} for block, found in widths.items()):
        return "animatediff_sdxl"
    alike = re.compile(r"(down_blocks_[0-2]|up_blocks_0)_motion_modules_")
    return None if all(alike.search(name) for name in names if "_motion_modules_" in name) else "animatediff"
