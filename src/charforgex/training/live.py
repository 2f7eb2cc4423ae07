"""CLIP encoders that learn beside the denoiser: captions go through them in every step, and only T5's part comes from the cache.

A LoRA, or new tokens for the trigger's word (pivotal tuning), or both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from charforgex.draws import seed_of
from charforgex.errors import ConfigError
from charforgex.families.base import Family
from charforgex.families.tokens import NewTokens, add_tokens, initial_rows, usual_length
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.training.losses import computing_in
from charforgex.types import Batch, Components, Text

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class LiveText:
    """What captions are for the denoiser. With no encoders in `parts`, what the cache says.

    `parts` hold the CLIP encoders and their tokenizers. `networks` are the encoders by component.
    """

    def __init__(self, family: Family, parts: Components):
        self.family, self.parts = family, parts
        self.networks: dict[str, nn.Module] = {name: parts[name] for name in family.clip_encoders if name in parts}
        self.tokens: dict[str, NewTokens] = {}  # by component
        self.silent = not self.networks

    def encode(self, captions: Sequence[str], cached: Text) -> Text:
        """Gradients reach what learns in the encoders. `cached` is the same captions as the base encodes them."""
        if self.silent:
            return cached
        first = next(iter(self.networks.values()))
        with computing_in(first.dtype, first.device):
            return self.family.encode_live(self.parts, captions, cached)

    def batch(self, batch: Batch) -> Batch:
        """The batch with what is said of it encoded anew; what the base model says of its class stays."""
        if self.silent:
            return batch
        prior = batch.prior and replace(batch.prior, text=self.encode(batch.prior.captions, batch.prior.text))
        return replace(batch, text=self.encode(batch.captions, batch.text), prior=prior)

    @contextmanager
    def base_speaking(self) -> Iterator[None]:
        """Inside, captions are what the base model makes of them."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def adapters(self) -> dict[str, nn.Module]:
        """The encoders that hold a LoRA."""
        return {name: network for name, network in self.networks.items() if adapter_parameters(network)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns: "<component>.<path>" of the adapters, "<component>.tokens" of new tokens."""
        named = {name: adapter_parameters(network) for name, network in self.networks.items()}
        found = {f"{name}.{path}": parameter for name, found in named.items() for path, parameter in found.items()}
        return found | {f"{name}.tokens": new.rows for name, new in self.tokens.items()}


def word_and_start(trigger: str | None, init: str | None) -> tuple[str, str]:
    """The word that new tokens stand for, the trigger's first, and the one that they start from: `init`, or the trigger's others."""
    if not trigger:
        raise ConfigError("text_encoder.tokens needs data.trigger: the tokens take the place of its first word.")
    word, _, others = trigger.partition(" ")
    start = init or others.strip()
    if not start:
        raise ConfigError(
            f'text_encoder.tokens needs a word to start from besides "{trigger}"; set text_encoder.tokens_init, such as woman.'
        )
    return word, start


def learn_tokens(live: LiveText, word: str, count: int, start: str) -> None:
    """Gives every encoder `count` new tokens that stand for `word`, begin as `start` and grow no longer than other tokens usually are."""
    _need_encoders(live, "text_encoder.tokens", "0")
    for name in live.networks:
        rows = initial_rows(live.parts, name, count, start)
        live.tokens[name] = add_tokens(live.parts, name, word, rows, usual_length(live.parts, name))
        live.tokens[name].rows.requires_grad_(True)


def _need_encoders(live: LiveText, setting: str, off: str) -> None:
    if not live.networks:
        raise ConfigError(f"{setting} has no effect: {live.parts.source} has no CLIP text encoder; set it to {off}.")


def adapt(live: LiveText, rank: int, alpha: float, seed: int, **how) -> list[str]:
    """Adds an adapter to the attention of every encoder's layers that have an effect, made as `inject` says with `how`.

    Returns the adapted modules as component and path.
    """
    _need_encoders(live, "text_encoder.lr", "null")
    adapted = []
    for name, network in live.networks.items():
        layers = live.family.num_learning_layers(name, network.config.num_hidden_layers)
        targets = [f"encoder.layers.{layer}.self_attn.{module}" for layer in range(layers) for module in ATTENTION]
        adapted += [f"{name}.{path}" for path in inject(network, targets, rank, alpha, seed_of(seed, name), **how)]
    return adapted
