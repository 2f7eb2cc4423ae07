"""Text encoding shared by the families: CLIP and T5 encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIP_TOKENS = 77  # of every published CLIP


def token_ids(tokenizer, captions: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids (B, L), padded and truncated to `length` or the tokenizer's own, as diffusers' pipelines do."""
    return tokenizer(
        list(captions), padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def seen(tokenizer, caption: str, limit: int | None = None) -> tuple[str, int]:
    """The caption as the encoder sees it after truncation, and the number of tokens that were cut off."""
    whole = tokenizer(caption, verbose=False).input_ids  # its own warning would say less than the caller does
    limit = limit or tokenizer.model_max_length
    kept = whole if len(whole) <= limit else [*whole[: limit - 1], whole[-1]]
    return tokenizer.decode(kept, skip_special_tokens=True).strip(), len(whole) - len(kept)


def clip_states(encoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states (B, L, D), and the encoder's first output: the projection where it has one."""
    out = encoder(ids.to(encoder.device), output_hidden_states=True)
    return out.hidden_states[-2], out[0]


@torch.no_grad()
def t5_states(encoder, ids: Tensor) -> Tensor:
    """Last hidden states (B, L, D). Padding is attended to: the reference pipelines pass no mask, and bases are trained so."""
    return encoder(ids.to(encoder.device))[0]
