"""Samplers by name: which diffusers scheduler, with what of the checkpoint kept. Imports neither torch nor diffusers by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from charforgex.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """One entry of `SAMPLERS`: a diffusers class, what of it is fixed, and the names that A1111 knows it by."""

    cls: str
    label: str
    schedule: str | None = None  # A1111's "Schedule type"
    settings: dict[str, Any] = field(default_factory=dict)


# Pixel-space clipping is off everywhere: a latent has no range to clip to. The multistep solvers are spaced as their authors and A1111
# space them; with SDXL's own "leading" spacing, diffusers would begin them far from noise (at index 801 of 999 for 200 steps).
MULTISTEP = {"solver_order": 2, "thresholding": False, "timestep_spacing": "linspace"}
SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM", settings={"clip_sample": False, "thresholding": False}),
    "euler": Sampler("EulerDiscreteScheduler", "Euler", settings={"use_karras_sigmas": False}),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M",
        settings=MULTISTEP | {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False},
    ),
    "dpmpp_2m_karras": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M", "Karras",
        settings=MULTISTEP | {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", settings=MULTISTEP | {"use_karras_sigmas": False}),
}  # fmt: skip
DEFAULT = "checkpoint"  # the checkpoint's own


def check_scheduler_name(name: str) -> None:
    """Raises ConfigError unless `name` is in the table; needs no model."""
    if name != DEFAULT and name not in SAMPLERS:
        near = get_close_matches(str(name), [DEFAULT, *SAMPLERS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join([DEFAULT, *SAMPLERS])}."
        raise ConfigError(f"scheduler={name} is unknown; {hint}")


def build_scheduler(own, name: str, steps: int):
    """A fresh scheduler with the checkpoint's betas, prediction type and zero terminal SNR.

    `own` is the checkpoint's. Raises ConfigError for a name, a pair of scheduler and checkpoint, or a number of steps that cannot work.
    """
    import diffusers

    check_scheduler_name(name)
    if name == DEFAULT:
        scheduler = type(own).from_config(own.config)
    else:
        if "prediction_type" not in own.config or "beta_schedule" not in own.config:
            raise ConfigError(
                f"scheduler={name} is for diffusion models with betas, and this checkpoint has a {type(own).__name__}; "
                f"use scheduler={DEFAULT}."
            )
        sampler = SAMPLERS[name]
        settings = dict(sampler.settings)
        if own.config.get("rescale_betas_zero_snr", False):
            if sampler.schedule == "Karras":
                raise ConfigError(
                    f"scheduler={name} cannot be used with this checkpoint: its schedule ends in pure noise (zero terminal SNR), and "
                    f"Karras steps would nearly all be spent there; use scheduler={name.removesuffix('_karras')} or {DEFAULT}."
                )
            settings["timestep_spacing"] = "trailing"  # any other spacing misses t = 1, where such a model begins (Lin et al. 2023)
        scheduler = getattr(diffusers, sampler.cls).from_config(own.config, **settings)
    _check_steps(scheduler, steps)
    return scheduler


def _check_steps(scheduler, steps: int) -> None:
    """Some numbers of trailing steps give diffusers 0.42 one step too many by rounding (61, 103, ...), at an index before the first."""

    def works(count: int) -> bool:
        scheduler.set_timesteps(count)
        return len(scheduler.timesteps) == count and bool((scheduler.timesteps >= 0).all())

    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"steps={steps} is out of range; this checkpoint takes 1 to {most}, and 20 to 40 are usual.")
    if not works(steps):
        near = [str(count) for count in (steps - 1, steps + 1) if 1 <= count <= most and works(count)]
        raise ConfigError(f"steps={steps} cannot be spaced evenly over the {most} of training; try {' or '.join(near) or 25}.")
