"""The embedded captioner: a picture in, a sentence in charworld's words out. A plain `VisionEncoderDecoderModel` of transformers.

Its eye has the shape of the embedded CLIP's vision tower (65 states of 128), its tongue is two layers of GPT-2 that look at all of them,
over a vocabulary of whole words. `training/captioning.py` teaches it; it knows pictures alone, never what they were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

from charforgex.charworld import models

LENGTH = 64  # tokens at most; the longest caption has 48


def tokenizer():
    """The words of charworld's captions, one token each; punctuation and spaces come back as they were."""
    tokens = models.t5_tokenizer()
    tokens.model_max_length = LENGTH
    return tokens


def network(tokens, vision_config):
    """A fresh `VisionEncoderDecoderModel` over an eye of that config, 1.1 M weights in all."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    special = {"bos_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id}
    tongue = GPT2Config(
        vocab_size=len(tokens), n_positions=LENGTH, n_embd=vision_config.hidden_size, n_layer=2, n_head=4, add_cross_attention=True,
        is_decoder=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision_config, tongue, decoder_start_token_id=tokens.pad_token_id, pad_token_id=tokens.pad_token_id, **special
    )
    return VisionEncoderDecoderModel(config=config)


def describe(model, tokens, pixels_BPHW) -> list[str]:
    """A sentence for each picture of (B, 3, 64, 64) in [-1, 1], by greedy decoding."""
    import torch

    with torch.no_grad():
        ids = model.generate(pixel_values=pixels_BPHW, max_length=LENGTH, do_sample=False, num_beams=1)
    return tokens.batch_decode(ids, skip_special_tokens=True)


def agreement(captions: Sequence[str], shown: Sequence[dict[str, str]]) -> dict[str, float]:
    """Of each attribute, the share of the pictures that show it whose caption says it right; unsaid is wrong.

    `shown` is `world.visible_attributes` of each. Glasses, beards, marks and hats that a caption does not name are said to be absent.
    """
    from charforgex.charworld.world import ATTRIBUTES, read_caption

    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for caption, truth in zip(captions, shown, strict=True):
        said = read_caption(caption)
        for name, value in truth.items():
            right[name].append(said.get(name) == value)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}
