"""Noise processes: the mathematics of training, with no network in it.

x is a scaled latent, n is noise of unit variance, t in [0, 1] with 1 = pure noise. All factors are float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from charforgex.errors import ConfigError, ModelError

STEPS = 1000  # of every denoising diffusion base: its networks know the indices 0 to 999
DEBIASED_SNR = 1000  # above it, debiased estimation's weights fall no further


def _like(factor_B: Tensor, x: Tensor) -> Tensor:
    return factor_B.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


class Process(ABC):
    """How pictures become noise, and what the network predicts of it."""

    weightings: tuple[str, ...] = ("none",)
    prediction: str  # "epsilon", "v_prediction" or "velocity"

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor: ...

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor: ...

    @abstractmethod
    def to_clean(self, noisy: Tensor, prediction: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that a prediction implies. Inverse of `add_noise` where the prediction is the target."""

    @abstractmethod
    def snap(self, t_B: Tensor) -> Tensor:
        """The nearest times that the process knows, in float32."""

    def weight(self, t_B: Tensor, weighting: str, gamma: float) -> Tensor:
        """Loss weights (B,). Raises ConfigError for a weighting that means nothing for this process."""
        if weighting not in self.weightings:
            raise ConfigError(
                f"loss.weighting={weighting} has no meaning for {self.describe()}; choose one of {', '.join(self.weightings)}."
            )
        return torch.ones_like(t_B)

    def resolution_shift(self, tokens: int) -> float:
        """How far times shift towards noise for a picture of so many tokens. Raises ConfigError where times do not shift."""
        raise ConfigError(f"loss.shift=resolution has no meaning for {self.describe()}; set it to 1.")

    @abstractmethod
    def describe(self) -> str:
        """One line for the effective-objective report."""


@dataclass(frozen=True)
class Ddpm(Process):
    """Denoising diffusion (Ho et al. 2020) over 1000 discrete steps; t is the index divided by 999.

    prediction "epsilon" or "v_prediction" (Salimans & Ho 2022); `zero_snr` rescales the betas so that t = 1 holds no
    signal (Lin et al. 2023). Equal to diffusers' DDPMScheduler, tested.
    """

    prediction: str = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    zero_snr: bool = False

    weightings = ("none", "min_snr", "debiased")

    def __post_init__(self):
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(f"prediction_type={self.prediction} is not supported; epsilon and v_prediction are.")
        if self.zero_snr and self.prediction == "epsilon":
            raise ConfigError("A zero-terminal-SNR schedule needs v_prediction: at t = 1 the noise says nothing about the picture.")
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ConfigError(f"beta_schedule={self.beta_schedule} is not supported; scaled_linear and linear are.")

    @classmethod
    def from_config(cls, config) -> Ddpm:
        """From a diffusers scheduler's config, whichever sampler it is of. Raises ModelError where that is no such process."""
        name = config.get("_class_name", "The scheduler")
        absent = [key for key in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps") if key not in config]
        if absent:
            raise ModelError(f"{name} has no {', '.join(absent)}: it is not for a denoising diffusion model (DDPM).")
        if config.get("trained_betas") is not None:
            raise ModelError(f"{name} has trained_betas, which are not supported.")
        if config["num_train_timesteps"] != STEPS:
            raise ModelError(f"{name} has num_train_timesteps={config['num_train_timesteps']}; only {STEPS} are supported.")
        return cls(
            prediction=config["prediction_type"],
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Signal power at each index, float32 (STEPS,)."""
        if self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, STEPS, dtype=torch.float32) ** 2
        else:
            betas = torch.linspace(self.beta_start, self.beta_end, STEPS, dtype=torch.float32)
        if self.zero_snr:  # Lin et al. 2023, algorithm 1
            root = (1 - betas).cumprod(0).sqrt()
            first, last = root[0].clone(), root[-1].clone()
            root = (root - last) * (first / (first - last))
            power = root**2
            betas = 1 - torch.cat([power[:1], power[1:] / power[:-1]])
        return (1 - betas).cumprod(0)

    def index(self, t_B: Tensor) -> Tensor:
        return (t_B.float() * (STEPS - 1)).round().long()

    def snap(self, t_B: Tensor) -> Tensor:
        return self.index(t_B).float() / (STEPS - 1)

    def _signal_noise(self, t_B: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        power = self.alphas_cumprod.to(t_B.device)[self.index(t_B)]
        return _like(power.sqrt(), x), _like((1 - power).sqrt(), x)

    def add_noise(self, clean, noise, t_B):
        signal, sigma = self._signal_noise(t_B, clean)
        return signal * clean + sigma * noise

    def target(self, clean, noise, t_B):
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._signal_noise(t_B, clean)
        return signal * noise - sigma * clean

    def to_clean(self, noisy, prediction, t_B):
        signal, sigma = self._signal_noise(t_B, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / signal
        return signal * noisy - sigma * prediction

    def snr(self, t_B: Tensor) -> Tensor:
        power = self.alphas_cumprod.to(t_B.device)[self.index(t_B)]
        return power / (1 - power)

    def weight(self, t_B, weighting, gamma):
        """min-SNR (Hang et al. 2023), min(SNR, gamma) / SNR; debiased estimation (Yu et al. 2023), 1 / sqrt(min(SNR, 1000)).

        Both are of the error of epsilon. That of v is sqrt(1 + 1 / SNR) times as large, so its weights have SNR / (SNR + 1) besides: the
        same loss, whichever of the two a network predicts.
        """
        ones = super().weight(t_B, weighting, gamma)
        if weighting == "none":
            return ones
        snr = self.snr(t_B)
        signal = snr.clamp(max=gamma) if weighting == "min_snr" else (snr * (snr / DEBIASED_SNR).clamp(min=1)).sqrt()
        return signal / (snr if self.prediction == "epsilon" else snr + 1)  # no 0 / 0 where v's schedule ends in pure noise

    def describe(self) -> str:
        zero = ", zero terminal SNR" if self.zero_snr else ""
        return f"DDPM {self.prediction}, {self.beta_schedule} betas{zero}"


def shifted(t: Tensor, shift: float) -> Tensor:
    """a t / (1 + (a - 1) t): more of the noisy times for a > 1 (Esser et al. 2024, eq. 23). 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class FlowMatching(Process):
    """Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t = (1 - t) x + t n, and the network predicts the velocity n - x.

    `shift` is a constant one, or None for the one that depends on the picture's tokens (Flux): exp(mu), mu a straight line through
    (`base_tokens`, `base_mu`) and (`max_tokens`, `max_mu`). Both are of sampling; training draws its times as `Objective` says.
    """

    shift: float | None = 1.0
    base_tokens: int = 256
    max_tokens: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    prediction = "velocity"
    weightings = ("none", "sigma_sqrt", "cosmap")

    @classmethod
    def from_config(cls, config) -> FlowMatching:
        """From a diffusers scheduler's config. Raises ModelError where that is no such process."""
        name = config.get("_class_name", "The scheduler")
        if not config.get("use_flow_sigmas") and ("beta_start" in config or "shift" not in config):
            raise ModelError(f"{name} is not for a flow matching model.")
        if config.get("num_train_timesteps", STEPS) != STEPS:
            raise ModelError(f"{name} has num_train_timesteps={config['num_train_timesteps']}; only {STEPS} are supported.")
        if config.get("invert_sigmas"):
            raise ModelError(f"{name} has invert_sigmas, which is not supported.")
        return cls(
            shift=None if config.get("use_dynamic_shifting") else float(config.get("shift") or config.get("flow_shift") or 1.0),
            base_tokens=config.get("base_image_seq_len") or cls.base_tokens,
            max_tokens=config.get("max_image_seq_len") or cls.max_tokens,
            base_mu=config.get("base_shift") or cls.base_mu,
            max_mu=config.get("max_shift") or cls.max_mu,
        )

    def snap(self, t_B: Tensor) -> Tensor:
        return t_B.float()

    def add_noise(self, clean, noise, t_B):
        t = _like(t_B.float(), clean)
        return (1 - t) * clean + t * noise

    def target(self, clean, noise, t_B):
        return noise - clean

    def to_clean(self, noisy, prediction, t_B):
        return noisy - _like(t_B.float(), noisy) * prediction

    def weight(self, t_B, weighting, gamma):
        """Of the velocity's error: sigma_sqrt is t^-2, t at least 1 / 1000; cosmap is 2 / (pi (1 - 2 t + 2 t^2)) (Esser et al. 2024, 3.1).

        Scripts that compare clean estimates have a factor t^2 in their loss; their sigma_sqrt is therefore "none" here.
        """
        ones = super().weight(t_B, weighting, gamma)
        if weighting == "sigma_sqrt":
            return t_B.float().clamp(min=1 / STEPS) ** -2
        if weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t_B.float() + 2 * t_B.float() ** 2))
        return ones

    def resolution_shift(self, tokens: int) -> float:
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_mu + slope * (tokens - self.base_tokens))

    def describe(self) -> str:
        return "rectified flow, velocity"
