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


# For bases with betas. Pixel-space clipping is off everywhere: a latent has no range to clip to. The multistep solvers are spaced as their
# authors and A1111 space them; with SDXL's own "leading" spacing, diffusers would begin them far from noise (at index 801 of 999 for 200).
SOLVER = {"solver_order": 2, "thresholding": False}
MULTISTEP = SOLVER | {"timestep_spacing": "linspace"}
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

# For rectified flow. Not here: diffusers' Heun knows no shift by resolution, and its stochastic Euler draws noise that no seed decides.
FLOW = SOLVER | {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
FLOW_SAMPLERS = {
    "euler": Sampler("FlowMatchEulerDiscreteScheduler", "Euler"),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", settings=FLOW | {"algorithm_type": "dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC", settings=FLOW),
}
DEFAULT = "checkpoint"  # the checkpoint's own


def check_scheduler_name(name: str) -> None:
    """Raises ConfigError unless `name` is in the table; needs no model."""
    if name != DEFAULT and name not in SAMPLERS:
        near = get_close_matches(str(name), [DEFAULT, *SAMPLERS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join([DEFAULT, *SAMPLERS])}."
        raise ConfigError(f"scheduler={name} is unknown; {hint}")


def build_scheduler(own, name: str, steps: int):
    """A fresh scheduler with all that the checkpoint's says of the model: betas, prediction type and zero terminal SNR, or its shift.

    `own` is the checkpoint's. Raises ConfigError for a name, a pair of scheduler and checkpoint, or a number of steps that cannot work.
    """
    check_scheduler_name(name)
    if name != DEFAULT:
        scheduler = _for_flow(own, name) if _is_flow(own) else _for_betas(own, name)
    else:
        scheduler = type(own).from_config(own.config)
        if own.config.get("stochastic_sampling"):
            raise ConfigError("this checkpoint's own scheduler draws noise that no seed decides; use scheduler=euler.")
    _check_steps(scheduler, steps)
    return scheduler


def _is_flow(own) -> bool:
    return bool(own.config.get("use_flow_sigmas")) or "beta_schedule" not in own.config


def _for_betas(own, name: str):
    import diffusers

    sampler = SAMPLERS[name]
    settings = dict(sampler.settings)
    if own.config.get("rescale_betas_zero_snr", False):
        if sampler.schedule == "Karras":
            raise ConfigError(
                f"scheduler={name} cannot be used with this checkpoint: its schedule ends in pure noise (zero terminal SNR), and "
                f"Karras steps would nearly all be spent there; use scheduler={name.removesuffix('_karras')} or {DEFAULT}."
            )
        settings["timestep_spacing"] = "trailing"  # any other spacing misses t = 1, where such a model begins (Lin et al. 2023)
    return getattr(diffusers, sampler.cls).from_config(own.config, **settings)


def _for_flow(own, name: str):
    import math

    import diffusers

    from charforgex.families.process import FlowMatching

    if name not in FLOW_SAMPLERS:
        raise ConfigError(
            f"scheduler={name} is for diffusion models with betas, and this checkpoint is a flow matching model "
            f"({type(own).__name__}); use one of {', '.join([DEFAULT, *FLOW_SAMPLERS])}."
        )
    if own.config.get("shift_terminal") or own.config.get("time_shift_type", "exponential") != "exponential":
        raise ConfigError(f"scheduler={name} does not know how this checkpoint spaces its steps; use scheduler={DEFAULT}.")
    process, sampler = FlowMatching.from_config(own.config), FLOW_SAMPLERS[name]
    line = {"base_shift": process.base_mu, "max_shift": process.max_mu}
    line |= {"base_image_seq_len": process.base_tokens, "max_image_seq_len": process.max_tokens}
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=process.shift or 1.0, use_dynamic_shifting=process.shift is None, **line)
    # Flux's pipeline gives every scheduler a shift by resolution, which these two take only if it is theirs: a constant one is a flat line.
    if process.shift is not None:
        line |= dict.fromkeys(("base_shift", "max_shift"), math.log(process.shift))
    scheduler = getattr(diffusers, sampler.cls)(**sampler.settings)
    scheduler.register_to_config(**line)  # where the pipelines look for it
    return scheduler


def _check_steps(scheduler, steps: int) -> None:
    """Some numbers of trailing steps give diffusers 0.42 one step too many by rounding (61, 103, ...), at an index before the first;
    and where solvers round the first two times of many steps to one, it begins at the second."""
    given = {"mu": scheduler.config.get("base_shift")} if scheduler.config.get("use_dynamic_shifting") else {}

    def works(count: int) -> bool:
        scheduler.set_timesteps(count, **given)
        times = scheduler.timesteps
        return len(times) == count and bool((times >= 0).all()) and (count == 1 or bool(times[0] != times[1]))

    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"steps={steps} is out of range; this checkpoint takes 1 to {most}, and 20 to 40 are usual.")
    if not works(steps):
        near = [str(count) for count in (steps - 1, steps + 1) if 1 <= count <= most and works(count)]
        raise ConfigError(f"steps={steps} cannot be spaced evenly over the {most} of training; try {' or '.join(near) or 25}.")
