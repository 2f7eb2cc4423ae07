"""One step of learning motion by two paths: what sees a whole clip learns from clips, what sees single frames from single frames.

MotionDirector (Zhao et al. 2023) on AnimateDiff. Shapes as in `types.py`: latents of a batch are (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from charforgex.draws import python_rng, seed_of
from charforgex.families.base import Family
from charforgex.families.process import Process
from charforgex.lora.inject import TRAINED, acting
from charforgex.training.live import LiveText
from charforgex.training.losses import Objective, computing_in, diffusion_loss
from charforgex.training.module import DenoiserModule
from charforgex.training.motion import frame_indices, motion_losses, one_frame
from charforgex.types import Batch, Components

Parameters = Mapping[str, nn.Parameter]


class MotionLoraModule(DenoiserModule):
    """Trains `temporal`, which sees all frames of a clip at once, and `spatial`, which sees them one by one; either may be empty.

    One time a clip, noise of its own in each frame. Spatial pass: one random frame of the clip, the temporal adapter off, its plain
    error. Temporal pass: the whole clip, the spatial adapter on but not learning, `motion_losses`. In the share `masked` of the
    micro-batches there is no spatial pass, and the spatial adapter is off in the temporal one, so that motion does not come to need it.
    `dropout`: of the inputs of the spatial adapter, in its own pass.

    `temporal` and `spatial` are parameters by name; those of an adapter are "<module path>.<part>". Without an adapter in them,
    `temporal` are weights of the network itself, which act in the spatial pass as they are.
    """

    def __init__(
        self, family: Family, denoiser: nn.Module, process: Process, objective: Objective, temporal: Parameters, spatial: Parameters,
        masked: float = 0.2, dropout: float = 0.1, debias: float = 1.0, **settings,
    ):  # fmt: skip
        silent = LiveText(family, Components("", family.denoiser_name))  # captions are what the cache says
        super().__init__(family, denoiser, process, objective, {**temporal, **spatial}, silent, **settings)
        self.temporal, self.spatial = dict(temporal), dict(spatial)
        self.masked, self.debias = masked, debias
        adapted = adapters_of(denoiser, temporal), adapters_of(denoiser, spatial)
        self.temporal_acting, self.spatial_acting = (acting(*layers) for layers in adapted)
        self.dropouts = _drop(adapted[1], dropout) if dropout else []

    def losses(self, micro: Batch, key: tuple) -> Tensor:
        return sum(losses for _, losses in self.parts(micro, key))

    def parts(self, micro: Batch, key: tuple) -> Iterator[tuple[str, Tensor]]:
        """ "spatial" and "temporal". What is switched off for a pass is so until the next one is asked for: gradients come in between."""
        how = self.objective
        clean, noise, t_B = how.draw(self.process, micro, *key)
        noisy, target = self.process.add_noise(clean, noise, t_B), self.process.target(clean, noise, t_B)
        weight_B = self.process.weight(t_B, how.weighting, how.min_snr_gamma)
        frames = clean.shape[2]
        masked = bool(self.temporal and self.spatial) and python_rng(*key, "masked").random() < self.masked
        if self.spatial and not masked:
            frame_B = micro.drawn(lambda count: frame_indices(count, frames, *key))
            first = micro.place[:1] if micro.place and micro.place[0] else ()  # pieces of a batch drop what they drop apart
            with self.learning("spatial"), self.temporal_acting([]), self._dropping((*key, *first)):
                found = self._predict(one_frame(noisy, frame_B), t_B, micro)
                yield "spatial", diffusion_loss(found, one_frame(target, frame_B), weight_B, kind=how.kind, huber_delta=how.huber_delta)
        if self.temporal:
            anchor_B = micro.drawn(lambda count: frame_indices(count, frames, *key, "anchor"))
            with self.learning("temporal"), self.without_spatial() if masked else nullcontext():
                found = self._predict(noisy, t_B, micro)
                yield "temporal", motion_losses(found, target, weight_B, anchor_B, self.debias, how.kind, how.huber_delta)

    def without_spatial(self) -> AbstractContextManager:
        """Inside, the spatial adapter does nothing."""
        return self.spatial_acting([])

    @contextmanager
    def learning(self, path: str) -> Iterator[None]:
        """Inside, gradients go to the parameters of this path alone."""
        others = self.spatial if path == "temporal" else self.temporal
        for parameter in others.values():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others.values():
                parameter.requires_grad_(True)

    def _predict(self, noisy: Tensor, t_B: Tensor, micro: Batch) -> Tensor:
        with computing_in(next(self.denoiser.parameters()).dtype, noisy.device):
            return self.family.denoise(self.denoiser, noisy, t_B, micro.text, micro.crop)

    @contextmanager
    def _dropping(self, key: tuple) -> Iterator[None]:
        """Inside, dropout works, and what it drops is a function of `key`, also where a block is computed again for its gradients."""
        if not self.dropouts:
            yield
            return
        device = next(self.denoiser.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(seed_of(*key, "dropout"))
            for dropout in self.dropouts:
                dropout.train()
            try:
                yield
            finally:
                for dropout in self.dropouts:
                    dropout.eval()


def adapters_of(denoiser: nn.Module, parameters: Iterable[str]) -> list[nn.Module]:
    """The peft layers that hold an adapter's parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    paths = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return [layer for layer in map(denoiser.get_submodule, paths) if isinstance(layer, BaseTunerLayer)]


def _drop(layers: Iterable[nn.Module], share: float) -> list[nn.Dropout]:
    """Dropouts before these LoRAs, off until they are switched on."""
    dropouts = []
    for layer in layers:
        layer.lora_dropout[TRAINED] = nn.Dropout(share).eval()
        dropouts.append(layer.lora_dropout[TRAINED])
    return dropouts
