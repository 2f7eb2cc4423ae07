"""The loss of one micro-batch, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from charforgex.binding import Range
from charforgex.draws import torch_generator
from charforgex.errors import ConfigError
from charforgex.families.base import Family
from charforgex.families.process import Ddpm, FlowMatching, Process, shifted
from charforgex.lora.inject import without_adapter
from charforgex.types import Batch, Text

LEVELS = 4  # ranges of noise whose losses are told apart


def diffusion_loss(
    prediction: Tensor, target: Tensor, weight_B: Tensor, mask_B1hw: Tensor | None = None, kind: str = "mse", huber_delta: float = 0.1
) -> Tensor:
    """Per-picture losses (B,) in float32: weight * mean error, the mean taken over the mask's area.

    With a mask m >= 0 the mean is sum(m * error) / sum(m), so a small mask weighs no less than a large one.
    kind "huber" is the pseudo-Huber loss 2 d (sqrt(e^2 + d^2) - d), which equals e^2 for errors small against d.
    """
    error = prediction.float() - target.float()
    if kind == "mse":
        error = error.square()
    elif kind == "huber":
        error = 2 * huber_delta * ((error.square() + huber_delta**2).sqrt() - huber_delta)
    else:
        raise ConfigError(f"loss.kind={kind} is unknown; choose mse or huber.")
    if mask_B1hw is None:
        mean = error.flatten(1).mean(1)
    else:
        mask = mask_B1hw.float().expand_as(error)
        mean = (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return weight_B.float() * mean


def by_level(examples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean losses of (time, loss) pairs by ranges of time that are there: "loss/t=0.25-0.50" is from a quarter to before a half."""
    found: dict[int, list[float]] = {}
    for time, loss in examples:
        found.setdefault(min(int(time * LEVELS), LEVELS - 1), []).append(loss)
    return {
        f"loss/t={level / LEVELS:.2f}-{(level + 1) / LEVELS:.2f}": sum(found[level]) / len(found[level]) for level in sorted(found)
    }  # fmt: skip


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to the frozen base's dtype, so that the float32 adapter's products cost no more than the base's."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Objective:
    """What is minimised: t ~ `timesteps`, noise, the family's prediction against the process's target.

    weighting: of the noise levels. Of DDPM "min_snr" (Hang et al. 2023) and "debiased" (Yu et al. 2023), of flow matching "sigma_sqrt" and
    "cosmap" (Esser et al. 2024); `Process.weight` has the formulas.
    timesteps: "uniform"; "logit_normal", sigmoid(logit_mean + logit_std N(0, 1)), and "mode", with weight `mode_scale` on the middle
    (both Esser et al. 2024, section 3.1). shift: of flow matching's times towards noise, a number, or "resolution" for Flux's, which
    grows with the picture; 1 is none.
    noise_offset: adds an offset of this size per channel to the noise (Guttenberg 2023); 0 is off.
    prior_weight: of the mean square by which the adapter changes predictions for the class, on the same noisy picture; 0 is off.
    """

    kind: Literal["mse", "huber"] = "mse"
    huber_delta: Annotated[float, Range(above=0)] = 0.1
    weighting: Literal["none", "min_snr", "debiased", "sigma_sqrt", "cosmap"] = "none"
    min_snr_gamma: Annotated[float, Range(above=0)] = 5.0
    noise_offset: Annotated[float, Range(at_least=0, at_most=1)] = 0.0
    timesteps: Literal["uniform", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Range(above=0)] = 1.0
    mode_scale: Annotated[float, Range(at_least=-1, at_most=1.75)] = 1.29
    shift: Annotated[float, Range(above=0)] | Literal["resolution"] = 1.0
    prior_weight: Annotated[float, Range(at_least=0)] = 0.0

    def check(self, process: Process) -> None:
        """Raises ConfigError for an option that this process has no use for."""
        process.weight(torch.ones(1), self.weighting, self.min_snr_gamma)
        if self.kind != "huber" and self.huber_delta != Objective.huber_delta:
            raise ConfigError(f"loss.huber_delta={self.huber_delta} has no effect with loss.kind={self.kind}; set loss.kind=huber.")
        if self.weighting != "min_snr" and self.min_snr_gamma != Objective.min_snr_gamma:
            raise ConfigError(
                f"loss.min_snr_gamma={self.min_snr_gamma} has no effect with loss.weighting={self.weighting}; set loss.weighting=min_snr."
            )
        for name, owner in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")):
            if self.timesteps != owner and getattr(self, name) != getattr(Objective, name):
                raise ConfigError(
                    f"loss.{name}={getattr(self, name)} has no effect with loss.timesteps={self.timesteps}; set loss.timesteps={owner}."
                )
        if self.shift != 1 and not isinstance(process, FlowMatching):
            raise ConfigError(f"loss.shift={self.shift} has no meaning for {process.describe()}; set it to 1.")
        if self.noise_offset and not isinstance(process, Ddpm):
            raise ConfigError(f"loss.noise_offset={self.noise_offset} has no meaning for {process.describe()}; set it to 0.")

    def times(self, count: int, process: Process, *key: object, tokens: int = 0) -> Tensor:
        """Times (count,) for the draw `key`, stratified over the batch so that its mean loss varies less.

        `tokens` is what a transformer makes of a picture: one of every 2 x 2 latents.
        """
        generator = torch_generator(*key, "t")
        u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        u = u[torch.randperm(count, generator=generator)]
        return process.snap(self.quantile(u, process, tokens))

    def quantile(self, u: Tensor, process: Process, tokens: int = 0) -> Tensor:
        """The time below which a share `u` of all draws falls."""
        if self.timesteps == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        elif self.timesteps == "mode":
            u = u - self.mode_scale * (torch.sin(math.pi / 2 * u) ** 2 - u)
        return shifted(u, process.resolution_shift(tokens) if self.shift == "resolution" else self.shift)

    def noise(self, shape: torch.Size, *key: object) -> Tensor:
        generator = torch_generator(*key, "noise")
        noise = torch.randn(shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
        return noise

    def times_of(self, process: Process, batch: Batch, *key: object) -> Tensor:
        """Times (B,) of a batch, on the CPU, for the draw `key`."""
        tokens = batch.mean_BChw.shape[-2] * batch.mean_BChw.shape[-1] // 4
        return batch.drawn(lambda count: self.times(count, process, *key, tokens=tokens))

    def draw(self, process: Process, batch: Batch, *key: object, t_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, their noise and times, each a function of `key`; of the times only where none are given."""
        device, shape = batch.mean_BChw.device, batch.mean_BChw.shape[1:]
        fresh = batch.drawn(lambda count: torch.randn((count, *shape), generator=torch_generator(*key, "posterior"))).to(device)
        clean = batch.mean_BChw + batch.std_BChw * fresh
        noise = batch.drawn(lambda count: self.noise(torch.Size((count, *shape)), *key)).to(device)
        if t_B is None:
            t_B = self.times_of(process, batch, *key)
        return clean, noise, t_B.to(device)

    def losses(self, family: Family, denoiser, process: Process, batch: Batch, *key: object, t_B: Tensor | None = None) -> Tensor:
        """Per-picture losses (B,). Everything random is a function of `key`."""
        clean, noise, t_B = self.draw(process, batch, *key, t_B=t_B)
        noisy, device = process.add_noise(clean, noise, t_B), clean.device

        def predict(text: Text) -> Tensor:
            with computing_in(next(denoiser.parameters()).dtype, device):
                return family.denoise(denoiser, noisy, t_B, text, batch.crop)

        if batch.prior is not None:
            with torch.no_grad(), without_adapter(denoiser):
                base = predict(batch.prior.base_text)
        weight = process.weight(t_B, self.weighting, self.min_snr_gamma)
        target = process.target(clean, noise, t_B)
        losses = diffusion_loss(predict(batch.text), target, weight, batch.mask_B1hw, self.kind, self.huber_delta)
        if batch.weight_B is not None:
            losses = losses * batch.weight_B
        if batch.prior is not None:
            losses = losses + self.prior_weight * diffusion_loss(predict(batch.prior.text), base, torch.ones_like(weight))
        return losses
