"""Every promise of the seam, for every family in `rows.py`, on its tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from charforgex.errors import ConfigError, LoraError
from charforgex.families import layouts, registry
from charforgex.families.motion_base import Motion, SdxlMotion
from charforgex.lora import formats, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapter, set_scales, without_adapter
from charforgex.training.losses import Objective, diffusion_loss
from charforgex.types import Batch, Crop, Text
from tests.families.conftest import listing, motion_listing
from tests.families.rows import ROWS, Row

MOTION = {layouts.MOTION: ("v3", Motion), layouts.MOTION_SDXL: ("", SdxlMotion)}
CAPTIONS = ["a photo of a man with red hair", "a dog at the beach"]


@pytest.fixture(params=ROWS, ids=str)
def row(request) -> Row:
    return request.param


@pytest.fixture
def parts(row):
    return row.family.tiny(seed=2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(row: Row, parts) -> Batch:
    mean, std = row.family.encode_pixels(parts, draw(2, *row.pixels).clamp(-1, 1))
    return Batch(mean, std, row.family.encode_text(parts, CAPTIONS), Crop.whole(2, *row.size))


def predict(row: Row, parts, batch: Batch) -> torch.Tensor:
    t = row.family.process(parts).snap(torch.tensor([0.3, 0.8]))
    return row.family.denoise(parts.denoiser, draw(*batch.mean_BChw.shape, seed=4), t, batch.text, batch.crop)


def move(parts, by: float = 0.3) -> None:
    """An adapter that does something: fresh ones have `up` = 0."""
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(parts.denoiser).values()):
            parameter.add_(draw(*parameter.shape, seed=i), alpha=by)


def test_every_registered_family_is_in_the_table():
    assert {row.family.name for row in ROWS} == set(registry.FAMILIES)
    for row in ROWS:
        assert type(registry.get(row.family.name)) is type(row.family)


def test_text_has_the_promised_shapes(row, parts):
    text = row.family.encode_text(parts, [*CAPTIONS, ""])
    assert text.tokens_BLD.shape == (3, *row.tokens_LD)
    assert (None if text.pooled_BD is None else text.pooled_BD.shape) == (None if row.pooled_D is None else (3, row.pooled_D))
    assert not torch.equal(text.tokens_BLD[0], text.tokens_BLD[1]), "two captions, two encodings"
    assert not text.tokens_BLD.requires_grad


def test_pixels_come_back_in_size_and_range(row, parts):
    pixels = draw(2, *row.pixels).clamp(-1, 1)
    mean, std = row.family.encode_pixels(parts, pixels)
    assert mean.shape == std.shape == (2, *row.latents)
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all()
    assert row.latent_Chw[1:] == tuple(side // row.family.latent_stride(parts) for side in row.size)
    assert all(side % row.family.pixel_multiple(parts) == 0 for side in row.size)
    back = row.family.decode_latents(parts, 50 * mean)
    assert back.shape == pixels.shape
    assert back.dtype == torch.float32
    assert back.abs().max() == 1, "clamped"


def test_noise_vanishes_towards_zero(row, parts):
    process = row.family.process(parts)
    clean, noise = draw(2, *row.latents), draw(2, *row.latents, seed=1)
    shares = [(process.add_noise(clean, noise, torch.full((2,), t)) - clean).square().mean().sqrt().item() for t in (0, 0.01, 0.1, 0.5)]
    assert shares == sorted(shares)
    assert shares[0] < 0.05 < 0.5 < shares[-1]


def test_to_clean_inverts_add_noise(row, parts):
    process = row.family.process(parts)
    clean, noise = draw(5, *row.latents), draw(5, *row.latents, seed=1)
    t = process.snap(torch.tensor([0.0, 0.05, 0.5, 0.9, 1.0]))
    assert t.dtype == torch.float32
    back = process.to_clean(process.add_noise(clean, noise, t), process.target(clean, noise, t), t)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-4)


def test_denoise_keeps_the_shape_and_only_the_adapter_gets_gradients(row, parts):
    batch = batch_of(row, parts)
    before = {name: tensor.clone() for name, tensor in parts.denoiser.state_dict().items()}
    inject(parts.denoiser, row.family.lora_targets("attention", parts.denoiser.config), rank=2, alpha=2)
    move(parts)
    prediction = predict(row, parts, batch)
    assert prediction.shape == batch.mean_BChw.shape
    prediction.square().mean().backward()
    adapter = adapter_parameters(parts.denoiser)
    assert {id(p) for p in parts.denoiser.parameters() if p.grad is not None} == {id(p) for p in adapter.values()}
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.values())
    after = parts.denoiser.state_dict()
    for name, tensor in before.items():
        found = name if name in after else ".".join((*name.split(".")[:-1], "base_layer", name.split(".")[-1]))
        assert torch.equal(after[found], tensor), name


def test_twenty_five_steps_lower_the_loss(row, parts):
    """On one picture and one set of noises, so that the comparison is exact."""
    batch, process, objective = batch_of(row, parts), row.family.process(parts), Objective()
    parts.drop("vae")
    inject(parts.denoiser, row.family.lora_targets("all", parts.denoiser.config), rank=4, alpha=4)
    optimizer = torch.optim.AdamW(adapter_parameters(parts.denoiser).values(), lr=2e-2)
    losses = []
    for _ in range(25):
        loss = objective.losses(row.family, parts.denoiser, process, batch, "same", "draw").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@torch.no_grad()
def test_scale_zero_changes_nothing_and_scale_one_does(row, parts):
    batch = batch_of(row, parts)
    base = predict(row, parts, batch)
    inject(parts.denoiser, row.family.lora_targets("attention", parts.denoiser.config), rank=2, alpha=1)
    assert torch.equal(predict(row, parts, batch), base), "a fresh adapter is no change"
    move(parts)
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    fresh = row.family.tiny(seed=2)
    assert load_adapter(fresh, lora, "mine", scale=0.0) == len(lora)
    assert torch.equal(predict(row, fresh, batch), base)
    set_scales(fresh, {"mine": 1.0})
    full = predict(row, fresh, batch)
    assert (full - base).abs().max() > 1e-3
    torch.testing.assert_close(full, predict(row, parts, batch), rtol=0, atol=1e-6)
    with without_adapter(fresh.denoiser):
        assert torch.equal(predict(row, fresh, batch), base)


@pytest.mark.parametrize(("row", "format"), [(row, format) for row in ROWS for format in row.formats], ids=str)
def test_save_load_save_is_identical(row, parts, format, tmp_path):
    inject(parts.denoiser, row.family.lora_targets("all", parts.denoiser.config), rank=3, alpha=1.5)
    move(parts)
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    first = writing.save_verified(lora, tmp_path / "first.safetensors", format, row.family, parts.denoiser)
    read = formats.read(first, row.family, parts.denoiser.config)
    second = writing.write(read, tmp_path / "second.safetensors", format, row.family, parts.denoiser.config)
    assert second.read_bytes() == first.read_bytes()
    with safe_open(first, framework="pt") as file:
        assert formats.identify(file.keys()) == format
    assert read.alphas() == [1.5]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_identify_names_this_family_and_nothing_else(row, parts, tmp_path):
    """From the listing of its published single-file checkpoints; its LoRAs are LoRAs, its denoiser alone is no base."""
    keys = motion_listing(*MOTION[row.single_file]) if row.single_file else listing(row.family.name)

    def identify(shapes):
        return layouts.identify(layouts.Header(tmp_path, {key: tuple(shape) for key, shape in shapes.items()}, {}, {}, {}))

    assert identify(keys) == (row.single_file or row.family.name)
    with pytest.raises(LoraError, match="a LoRA's" if row.single_file else "whole checkpoint"):
        formats.identify(keys)
    assert identify({key: tensor.shape for key, tensor in parts.denoiser.state_dict().items()}) not in registry.FAMILIES
    inject(parts.denoiser, row.family.lora_targets("attention", parts.denoiser.config), rank=2, alpha=2)
    move(parts)
    lora = read_adapter(parts.denoiser, row.family.denoiser_name)
    for format in row.formats:
        tensors = writing.to_tensors(lora, format, row.family, parts.denoiser.config, torch.float32)
        assert identify({key: tensor.shape for key, tensor in tensors.items()}) == "a LoRA"


def test_presets_are_named_when_one_is_unknown(row, parts):
    with pytest.raises(ConfigError, match=r"lora\.targets=everything is unknown.*attention"):
        row.family.lora_targets("everything", parts.denoiser.config)


# ---- the value of the loss ----


SCALED = ("scaled_linear", 0.012)


def exact_power(index, schedule: tuple[str, float], like: np.ndarray) -> np.ndarray:
    """The signal's power at each index, from the definition of the betas, for what has the shape `like`."""
    rise, last = schedule
    root = np.linspace(np.sqrt(0.00085), np.sqrt(last), 1000) ** 2
    betas = {"scaled_linear": root, "linear": np.linspace(0.00085, last, 1000)}[rise]
    return np.cumprod(1 - betas)[index].reshape(-1, *[1] * (like.ndim - 1))


def exact_losses(prediction, clean, noise, index, mask, kind: str, gamma: float, schedule=SCALED) -> np.ndarray:
    """The per-picture losses of a DDPM written from the definitions, in float64."""
    power = exact_power(index, schedule, clean)
    target = noise if kind == "epsilon" else np.sqrt(power) * noise - np.sqrt(1 - power) * clean
    error = mask * (prediction - target) ** 2
    rest = tuple(range(1, error.ndim))
    mean = error.sum(rest) / (np.broadcast_to(mask, error.shape).sum(rest))
    snr = (power / (1 - power)).ravel()
    return np.minimum(snr, gamma) / (snr if kind == "epsilon" else snr + 1) * mean


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_value_of_the_loss(kind):
    """A worked example: 3 pictures, min-SNR 5, a mask, any prediction, against float64 numpy."""
    from charforgex.families.process import Ddpm

    rng = np.random.default_rng(0)
    clean, noise, prediction = rng.standard_normal((3, 3, 4, 2, 3))
    mask, index = rng.uniform(0.1, 3, (3, 1, 2, 3)), np.array([3, 200, 940])
    expected = exact_losses(prediction, clean, noise, index, mask, kind, 5.0)
    process, t = Ddpm(kind), torch.tensor(index) / 999
    tensors = [torch.tensor(values, dtype=torch.float32) for values in (prediction, clean, noise, mask)]
    losses = diffusion_loss(tensors[0], process.target(*tensors[1:3], t), process.weight(t, "min_snr", 5.0), tensors[3])
    np.testing.assert_allclose(losses, expected, rtol=2e-4)  # the schedule itself is float32, as diffusers has it


def test_the_value_of_the_loss_by_hand():
    """One picture of two latents. SNR at index 200 is 3.0609, so v's weight is 3.0609 / 4.0609 = 0.75375.

    Errors 1 and 3 under mask 3 and 1: (3 * 1 + 1 * 9) / 4 = 3, times the weight 2.26124.
    """
    from charforgex.families.process import Ddpm

    weight = Ddpm("v_prediction").weight(torch.tensor([200 / 999]), "min_snr", 5.0)
    prediction, mask = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2), torch.tensor([3.0, 1.0]).view(1, 1, 1, 2)
    loss = diffusion_loss(prediction, torch.zeros(1, 1, 1, 2), weight, mask)
    assert loss.item() == pytest.approx(2.26124, abs=2e-3)
    assert diffusion_loss(prediction, prediction, weight, mask).item() == 0


def test_masked_loss_does_not_depend_on_the_masks_area():
    target = torch.zeros(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :1, :1], mask[1, :, :7, :7] = 1, 1
    constant = diffusion_loss(torch.full_like(target, 0.5), target, torch.ones(2), mask)
    torch.testing.assert_close(constant, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(diffusion_loss(torch.full_like(target, 0.5), target, torch.ones(2), 7 * mask), constant)


def test_the_objective_is_the_worked_example_on_a_whole_family(row, parts):
    """The training loss of a real network: recomputed in float64 from the draws, the network's own prediction given."""
    batch, process = batch_of(row, parts), row.family.process(parts)
    is_flow = process.prediction == "velocity"
    objective = Objective() if is_flow else Objective(weighting="min_snr")
    t, seen = process.snap(torch.tensor([0.2, 0.9])), []

    class Watched(type(row.family)):
        def denoise(self, denoiser, noisy, t_B, text, crop):
            seen.extend((noisy, t_B, super().denoise(denoiser, noisy, t_B, text, crop)))
            return seen[-1]

    with torch.no_grad():
        losses = objective.losses(Watched(), parts.denoiser, process, batch, "key", t_B=t)
    noisy, told, prediction = (tensor.double().numpy() for tensor in seen)
    np.testing.assert_array_equal(told, t)
    # what the network saw fixes the clean latent, once the noise is known
    noise = objective.noise(batch.mean_BChw.shape, "key").double().numpy()
    if is_flow:
        sigma = t.double().numpy()[:, None, None, None]
        clean = (noisy - sigma * noise) / (1 - sigma)
        expected = ((prediction - (noise - clean)) ** 2).mean((1, 2, 3))
    else:
        index = np.array([200, 899])
        np.testing.assert_allclose(told * 999, index, rtol=1e-6)
        power = exact_power(index, row.betas, noisy)
        clean = (noisy - np.sqrt(1 - power) * noise) / np.sqrt(power)
        expected = exact_losses(prediction, clean, noise, index, np.ones([1] * noisy.ndim), process.prediction, 5.0, row.betas)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    apart = np.abs(clean - batch.mean_BChw.double().numpy()) / batch.std_BChw.double().numpy()
    assert 0.5 < apart.mean() < 1.1, "a fresh sample of the posterior, not its mean"


def test_text_rows_can_be_stacked_and_picked(row, parts):
    text = row.family.encode_text(parts, CAPTIONS)
    again = Text.stack([text[:1], text[1:]])
    assert torch.equal(again.tokens_BLD, text.tokens_BLD)
    assert (again.pooled_BD is None) == (text.pooled_BD is None)
