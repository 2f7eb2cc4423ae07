"""Text encoders that are trained beside the denoiser: captions go through them in every step, and only T5's part comes from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from charforgex.draws import seed_of
from charforgex.errors import ConfigError
from charforgex.families.base import Family
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

    def encode(self, captions: Sequence[str], cached: Text) -> Text:
        """Gradients reach the encoders' adapters. `cached` is the same captions as the base encodes them."""
        if not self.networks:
            return cached
        first = next(iter(self.networks.values()))
        with computing_in(first.dtype, first.device):
            return self.family.encode_live(self.parts, captions, cached)

    def batch(self, batch: Batch) -> Batch:
        """The batch with what is said of it encoded anew; what the base model says of its class stays."""
        if not self.networks:
            return batch
        prior = batch.prior and replace(batch.prior, text=self.encode(batch.prior.captions, batch.prior.text))
        return replace(batch, text=self.encode(batch.captions, batch.text), prior=prior)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters, by component and path."""
        named = {name: adapter_parameters(network) for name, network in self.networks.items()}
        return {f"{name}.{path}": parameter for name, found in named.items() for path, parameter in found.items()}


def adapt(live: LiveText, rank: int, alpha: float, seed: int) -> list[str]:
    """Adds a LoRA to the attention of every encoder's layers that have an effect. Returns the adapted modules as component and path."""
    if not live.networks:
        raise ConfigError(f"text_encoder.lr has no effect: {live.parts.source} has no CLIP text encoder; leave it null.")
    adapted = []
    for name, network in live.networks.items():
        layers = live.family.num_learning_layers(name, network.config.num_hidden_layers)
        targets = [f"encoder.layers.{layer}.self_attn.{module}" for layer in range(layers) for module in ATTENTION]
        adapted += [f"{name}.{path}" for path in inject(network, targets, rank, alpha, seed_of(seed, name))]
    return adapted
