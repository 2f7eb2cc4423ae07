"""New words for CLIP: rows of a token embedding beside the frozen vocabulary (textual inversion, Gal et al. 2022).

A word of prompts stands for them: `Rewording` puts the new tokens in its place before CLIP reads it, and T5 reads the word as it is.
Files are as diffusers' scripts and ComfyUI have them: safetensors with `clip_l` and `clip_g`, each (n, D).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charforgex.errors import LoraError
from charforgex.families.base import Family
from charforgex.runs import write_atomic
from charforgex.types import Components

KEYS = ("clip_l", "clip_g")  # of a family's first and second CLIP encoder
NO_EOS = 2  # what old configs say; transformers then takes the largest id for the end of the text, which a new token's is


class NewTokens(nn.Module):
    """The token embedding of a vocabulary and, from the id `first` on, of `rows` (n, D), kept in float32.

    A row longer than `limit` counts as shortened to it: embeddings that grow drown out the other words of a prompt.
    """

    def __init__(self, vocabulary: nn.Module, first: int, rows: Tensor, limit: float = float("inf")):
        super().__init__()
        self.vocabulary, self.first, self.limit = vocabulary, first, limit  # first, so that an encoder's dtype is the vocabulary's
        self.rows = nn.Parameter(rows.detach().float().clone(), requires_grad=False)

    def values(self) -> Tensor:
        """The rows as the encoder sees them."""
        if self.limit == float("inf"):
            return self.rows
        return self.rows * (self.limit / self.rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)

    def forward(self, ids: Tensor) -> Tensor:
        known = self.vocabulary(ids.clamp(max=self.first - 1))
        new = self.values().to(known.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first)[..., None], new, known)


class Rewording:
    """A tokenizer that reads each of `words` as its new tokens; all else is the tokenizer's own."""

    def __init__(self, tokenizer: Any, words: Mapping[str, tuple[str, ...]]):
        self.tokenizer, self.words = tokenizer, dict(words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer(self._reworded(text) if isinstance(text, str) else [self._reworded(one) for one in text], **options)

    def _reworded(self, text: str) -> str:
        for word, tokens in self.words.items():
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "".join(tokens), text)
        return text


def initial_rows(parts: Components, component: str, count: int, like: str) -> Tensor:
    """(count, D): the mean of the embeddings of a word."""
    ids = torch.tensor(_tokenizer(parts, component)(like).input_ids[1:-1])  # without the marks of beginning and end
    table = _embeddings(parts, component).token_embedding
    with torch.no_grad():
        return table(ids.to(next(table.parameters()).device)).float().mean(0, keepdim=True).repeat(count, 1)


def usual_length(parts: Components, component: str) -> float:
    """The mean norm of the embeddings of the encoder's own vocabulary."""
    return _embeddings(parts, component).token_embedding.weight.float().norm(dim=1).mean().item()


def add_tokens(parts: Components, component: str, word: str, rows: Tensor, limit: float = float("inf")) -> NewTokens:
    """Teaches an encoder in `parts` new tokens `<s0>`, `<s1>`, ... and its tokenizer to read `word` as them."""
    tokenizer, encoder = _tokenizer(parts, component), parts[component]
    words, own = (tokenizer.words, tokenizer.tokenizer) if isinstance(tokenizer, Rewording) else ({}, tokenizer)
    if word in words:
        raise LoraError(f'Two LoRAs have new tokens for the word "{word}"; use one of them.')
    start = sum(map(len, words.values()))
    names = tuple(f"<s{start + i}>" for i in range(len(rows)))
    own = copy.deepcopy(own)  # others may hold it
    if own.add_tokens(list(names)) != len(names):
        raise LoraError(f"The tokenizer of {parts.source} has tokens named {' '.join(names)} already.")
    embeddings = _embeddings(parts, component)
    rows = rows.to(next(encoder.parameters()).device)
    new = NewTokens(embeddings.token_embedding, own.convert_tokens_to_ids(names[0]), rows, limit)
    embeddings.token_embedding = new
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == NO_EOS:
            module.eos_token_id = own.eos_token_id
    parts.modules[_tokenizer_name(component)] = Rewording(own, {**words, word: names})
    return new


@contextmanager
def keeping_words(parts: Components) -> Iterator[None]:
    """Afterwards the encoders and their tokenizers know the words that they knew before, and are what they were, bit for bit."""
    tokenizers = {name: module for name, module in parts.modules.items() if name.startswith("tokenizer")}
    modules = [module for network in parts.networks().values() for module in network.modules()]
    tables = [(module, module.token_embedding) for module in modules if hasattr(module, "token_embedding")]
    ends = [(module, module.eos_token_id) for module in modules if hasattr(module, "eos_token_id")]
    try:
        yield
    finally:
        parts.modules |= tokenizers
        for module, table in tables:
            module.token_embedding = table
        for module, end in ends:
            module.eos_token_id = end


def save_tokens(path: Path, family: Family, values: Mapping[str, Tensor]) -> Path:
    """`values` by component, in float32."""
    from safetensors.torch import save

    keys = dict(zip(family.clip_encoders, KEYS, strict=False))
    tensors = {keys[name]: value.detach().float().cpu().contiguous() for name, value in values.items()}
    write_atomic(path, save(tensors))
    return path


def read_tokens(path: Path, family: Family) -> dict[str, Tensor]:
    """New tokens by component. Raises LoraError if the file is not there, or holds others than this family's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"{path} cannot be read, but its LoRA was trained with the new tokens in it; put it beside the LoRA. {error}"
        ) from error
    names = dict(zip(KEYS, family.clip_encoders, strict=False))
    strangers = sorted(set(tensors) - set(names))
    if strangers or not tensors or any(tensor.ndim != 2 for tensor in tensors.values()):
        raise LoraError(
            f"{path} holds no tokens of {family.name}: it has {', '.join(sorted(tensors)) or 'nothing'}, not {', '.join(names)}."
        )
    return {names[key]: tensor for key, tensor in tensors.items()}


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")


def _tokenizer(parts: Components, component: str) -> Any:
    return parts[_tokenizer_name(component)]


def _embeddings(parts: Components, component: str) -> nn.Module:
    return next(module for module in parts[component].modules() if hasattr(module, "token_embedding"))
