"""Pictures from prompts and seeds, through the family's own diffusers pipeline and diffusers' own schedulers.

A picture is a function of its prompt, its seed and the settings. Batch size and order change it by rounding alone (about 1e-6 of a
latent on CPU), because every picture has generators of its own. Shapes as in `types.py`; N pictures, B of them in one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from charforgex.draws import torch_generator
from charforgex.errors import ConfigError, ModelError
from charforgex.generation.schedulers import DEFAULT, build_scheduler
from charforgex.types import Components, Text

if TYPE_CHECKING:
    from PIL.Image import Image

    from charforgex.families.base import Family
    from charforgex.generation.settings import SamplingSettings

OnStep = Callable[[int, int], None]  # denoising steps done, steps in all


def check_size(size: tuple[int, int], multiple: int, *, name: str = "size") -> None:
    """Height and width in pixels. Raises ConfigError naming the nearest sizes that work."""
    for side in size:
        if side < multiple or side % multiple:
            near = [str(s) for s in (side // multiple * multiple, -(-side // multiple) * multiple) if s > 0]
            near = near if side > 0 else [str(multiple)]
            raise ConfigError(
                f"{name}={'x'.join(map(str, size))}: {side} is not a multiple of {multiple}, which this base needs; "
                f"try {' or '.join(dict.fromkeys(near))}."
            )


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Noise of unit variance (N, *shape) in float32 on the CPU; each row depends on its seed alone."""
    return torch.stack([torch.randn(shape, generator=torch_generator("noise", seed)) for seed in seeds])


def encode_prompts(family: Family, parts: Components, prompts: Sequence[str], batch_size: int = 8) -> Text:
    """Each different prompt is encoded once."""
    unique = list(dict.fromkeys(prompts))
    text = Text.stack([family.encode_text(parts, unique[i : i + batch_size]) for i in range(0, len(unique), batch_size)])
    return text[[unique.index(prompt) for prompt in prompts]]


@torch.no_grad()
def sample_latents(
    family: Family, parts: Components, text: Text, seeds: Sequence[int], *, size: tuple[int, int], steps: int, guidance: float,
    negative_text: Text | None = None, true_guidance: float = 1.0, guidance_rescale: float = 0.0, batch_size: int = 8,
    scheduler: str = DEFAULT, on_step: OnStep | None = None,
) -> Tensor:  # fmt: skip
    """Scaled latents (N, C, h, w), float32 on the CPU, of N texts and N seeds.

    `size` is (height, width) in pixels. `negative_text` has one row or N, and is needed where `needs_negative` says so. The networks stay
    where they are and as they are, an adapter in the denoiser included; only while this runs they are in eval mode.
    Raises ConfigError for settings that cannot work and ModelError when a picture is not finite.
    """
    assert len(text) == len(seeds) > 0, f"{len(text)} texts for {len(seeds)} seeds"
    guided = needs_negative(family, parts, guidance, true_guidance, guidance_rescale)
    assert negative_text is not None or not guided, "this guidance needs a negative text"
    check_size(size, family.pixel_multiple(parts))
    denoiser = parts.denoiser
    stride = family.latent_stride(parts)
    height, width = size[0] // stride, size[1] // stride
    noise = initial_noise(seeds, (denoiser.config.in_channels // family.channels_per_latent, height, width))
    with _without_remarks():
        pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    starts = range(0, len(seeds), batch_size)
    total, done, out = steps * len(starts), 0, []

    def report(_pipeline, _step, _timestep, _tensors) -> dict:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)
        return {}

    with evaluating(parts.networks().values()):
        for start in starts:
            rows = slice(start, start + batch_size)
            batch = family.pack(noise[rows]).to(denoiser.device, denoiser.dtype)
            pipeline.scheduler = build_scheduler(parts["scheduler"], scheduler, steps)  # fresh: multistep solvers keep their history
            latents = pipeline(
                height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=guidance, latents=batch, output_type="latent",
                generator=[torch_generator("sampling", seed) for seed in seeds[rows]],  # ancestral samplers draw at every step
                callback_on_step_end=report, return_dict=False,
                **({"guidance_rescale": guidance_rescale} if guidance_rescale else {}),
                **({"true_cfg_scale": true_guidance} if family.has_true_guidance else {}),
                **_conditions(text[rows], batch),
                **(_conditions(_rows(negative_text, rows, len(batch)), batch, "negative_") if guided else {}),
            )[0]  # fmt: skip
            out.append(family.unpack(latents.float().cpu(), height, width))
    latents = torch.cat(out)
    for seed, picture in zip(seeds, latents, strict=True):
        if not picture.isfinite().all():
            raise ModelError(f"The picture of seed {seed} is not finite in {denoiser.dtype}; try dtype=float32, or a smaller LoRA scale.")
    return latents


def needs_negative(family: Family, parts: Components, guidance: float, true_guidance: float = 1.0, guidance_rescale: float = 0.0) -> bool:
    """Whether every step is also run on the negative text (classifier-free guidance). Raises ConfigError for guidance of no effect."""
    if guidance_rescale and family.process(parts).prediction == "velocity":
        raise ConfigError(
            f"guidance_rescale={guidance_rescale:g} has no meaning for {family.name}; it is for bases with betas. Set it to 0."
        )
    if not family.has_true_guidance:
        if true_guidance != 1:
            raise ConfigError(f"true_guidance={true_guidance:g} has no meaning for {family.name}; its guidance is the true one.")
        return guidance > 1  # diffusers' own rule
    if guidance > 1 and not family.is_distilled(parts):
        raise ConfigError(
            f"guidance={guidance:g} has no effect: {parts.source} has no input for it. Set guidance=1, or true_guidance={guidance:g}."
        )
    return true_guidance > 1


def check_sampling(family: Family, parts: Components, settings: SamplingSettings, guidance_rescale: float = 0.0):
    """The scheduler that filled settings ask for. Raises ConfigError where they cannot work or have no effect on this base, of which the
    scheduler and the facts are enough."""
    scheduler = build_scheduler(parts["scheduler"], settings.scheduler, settings.steps)
    guided = needs_negative(family, parts, settings.guidance, settings.true_guidance, guidance_rescale)
    scale = "true_guidance" if family.has_true_guidance else "guidance"
    for name, value in {"negative": settings.negative, "guidance_rescale": guidance_rescale}.items():
        if value and not guided:
            raise ConfigError(f"{name}={value} has no effect with {scale}={getattr(settings, scale):g}; {scale} must be above 1.")
    return scheduler


def _conditions(text: Text, like: Tensor, prefix: str = "") -> dict[str, Tensor]:
    tokens = {f"{prefix}prompt_embeds": text.tokens_BLD.to(like)}
    return tokens if text.pooled_BD is None else tokens | {f"{prefix}pooled_prompt_embeds": text.pooled_BD.to(like)}


def _rows(text: Text, rows: slice, count: int) -> Text:
    return text[[0] * count] if len(text) == 1 else text[rows]


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Importing a pipeline makes transformers advise image packages for parts that no picture here needs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def evaluating(networks) -> Iterator[None]:
    """Eval mode without dropout, and afterwards each module's own mode again."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def to_images(family: Family, parts: Components, latents_NChw: Tensor, batch_size: int = 8) -> list[Image]:
    """Decoded latents as RGB pictures."""
    from PIL import Image

    pixels = torch.cat([family.decode_latents(parts, batch).cpu() for batch in latents_NChw.split(batch_size)])
    bytes_NHWP = ((pixels / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in bytes_NHWP]


def sample(
    family: Family, parts: Components, prompts: Sequence[str] | None, seeds: Sequence[int], *, size: tuple[int, int], steps: int,
    guidance: float, negative: str = "", text: Text | None = None, negative_text: Text | None = None, true_guidance: float = 1.0,
    guidance_rescale: float = 0.0, batch_size: int = 8, scheduler: str = DEFAULT, on_step: OnStep | None = None,
) -> list[Image]:  # fmt: skip
    """One picture for each pair of prompt and seed. See `sample_latents` for the rest.

    `text` and `negative_text` stand in for `prompts` and `negative` where the text encoders are no longer loaded, as in training.
    """
    if text is None:
        text = encode_prompts(family, parts, prompts, batch_size)
    if negative_text is None and needs_negative(family, parts, guidance, true_guidance):
        negative_text = family.encode_text(parts, [negative])
    latents = sample_latents(
        family, parts, text, seeds, size=size, steps=steps, guidance=guidance, negative_text=negative_text,
        true_guidance=true_guidance, guidance_rescale=guidance_rescale, batch_size=batch_size, scheduler=scheduler, on_step=on_step,
    )  # fmt: skip
    return to_images(family, parts, latents, batch_size)
