"""Prior preservation: its value by hand, its gradient, and that it holds the class still."""

from dataclasses import replace

import pytest
import torch

from charforgex.lora.inject import adapter_parameters, inject, without_adapter
from charforgex.training.losses import Objective
from charforgex.types import Batch, Crop, Prior
from tests.families.rows import PICTURES


def setup(family, move=0.0):
    """The tiny base with an adapter, and a batch whose class is another caption."""
    parts = family.tiny(seed=2)
    mean = torch.randn(2, parts["vae"].config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    said, of_class = (family.encode_text(parts, [text] * 2) for text in ("a zkx woman", "a woman"))
    inject(parts.denoiser, family.lora_targets("attention", parts.denoiser.config), 2, 2.0)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapter_parameters(parts.denoiser).items()):
            parameter.add_(move * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * name.endswith(".up"))
    return parts, Batch(mean, torch.zeros_like(mean), said, Crop.whole(2, 64, 64), prior=Prior(of_class, of_class))


def gradient(parts, losses):
    parameters = list(adapter_parameters(parts.denoiser).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_the_loss_is_that_without_and_the_weighted_mean_square_of_what_changed_for_the_class(row):
    family = row.family
    parts, batch = setup(family, move=0.3)
    process, t = family.process(parts), torch.tensor([0.3, 0.8])
    plain = Objective().losses(family, parts.denoiser, process, replace(batch, prior=None), "key", t_B=t)
    both = Objective(prior_weight=0.5).losses(family, parts.denoiser, process, batch, "key", t_B=t)

    noisy = process.add_noise(batch.mean_BChw, Objective().noise(batch.mean_BChw.shape, "key"), t)
    changed = family.denoise(parts.denoiser, noisy, t, batch.prior.text, batch.crop)
    with without_adapter(parts.denoiser), torch.no_grad():
        base = family.denoise(parts.denoiser, noisy, t, batch.prior.text, batch.crop)
    drift = (changed - base).square().flatten(1).mean(1)
    assert drift.min() > 1e-6
    torch.testing.assert_close(both, plain + 0.5 * drift, rtol=1e-5, atol=1e-7)
    expected = gradient(parts, plain + 0.5 * drift)
    torch.testing.assert_close(gradient(parts, both), expected, rtol=1e-4, atol=1e-7)


def test_weights_of_whole_pictures_multiply_their_losses():
    family = PICTURES[0].family
    parts, batch = setup(family)
    batch = replace(batch, prior=None)
    plain, weighed = (
        Objective().losses(family, parts.denoiser, family.process(parts), b, "key")
        for b in (batch, replace(batch, weight_B=torch.tensor([0.25, 3.0])))
    )
    torch.testing.assert_close(weighed, plain * torch.tensor([0.25, 3.0]))


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_the_class_drifts_less_in_25_steps(row):
    def drift(weight):
        family = row.family
        parts, batch = setup(family)
        process, parameters = family.process(parts), list(adapter_parameters(parts.denoiser).values())
        optimizer, objective = torch.optim.AdamW(parameters, lr=1e-2), Objective(prior_weight=weight)
        for step in range(25):
            optimizer.zero_grad()
            objective.losses(family, parts.denoiser, process, batch, step).sum().backward()
            optimizer.step()
        with torch.no_grad():
            measured = Objective(prior_weight=1).losses(family, parts.denoiser, process, batch, "held out")
            return (measured - Objective(prior_weight=0).losses(family, parts.denoiser, process, batch, "held out")).mean().item()

    without, held = drift(0.0), drift(1.0)
    assert 0 < held < 0.5 * without, (held, without)
