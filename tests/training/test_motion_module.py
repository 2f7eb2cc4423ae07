"""Both paths of a step of motion, on AnimateDiff's tiny model: what is on, what learns, and the values."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from charforgex.families.animatediff import AnimateDiff
from charforgex.lora.inject import adapter_parameters, load_adapter, read_adapter
from charforgex.lora.state import Lora
from charforgex.training.blocks import checkpoint_blocks
from charforgex.training.losses import Objective, computing_in
from charforgex.training.motion import frame_indices
from charforgex.training.motion_module import MotionLoraModule
from charforgex.training.motion_run import learn
from charforgex.training.settings import LoraSettings, MotionSettings
from charforgex.types import Batch, Crop

FAMILY = AnimateDiff()
KEY = (0, 5, 0, 0, 0)  # its steps are not masked


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(parts, frames: int = 4) -> Batch:
    mean = draw(2, 4, frames, 4, 4, seed=3)
    return Batch(mean, 0.1 * torch.ones_like(mean), FAMILY.encode_text(parts, ["a man", "a dog"]), Crop.whole(2, 32, 32))


def make(parts, moved=0.05, train="lora", spatial=True, checkpointing=False, **settings) -> MotionLoraModule:
    """Adapters that do something. Rates 0.02 and 0.01 of two AdamWs."""
    if checkpointing:
        checkpoint_blocks(parts.denoiser, FAMILY.blocks(parts.denoiser), True)
    presets = ["temporal"] * (train == "lora") + ["spatial"] * spatial
    wanted = [path for preset in presets for path in FAMILY.lora_targets(preset, parts.denoiser.config)]
    chosen = SimpleNamespace(lora=LoraSettings(rank=2, alpha=2.0), motion=MotionSettings(train=train, spatial=spatial))
    learning = learn(FAMILY, parts.denoiser, chosen, wanted, 0)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapter_parameters(parts.denoiser).items()):
            parameter.add_(moved * draw(*parameter.shape, seed=number) * name.endswith(".up"))

    def optimizers(trainable):
        groups = {"temporal": (learning.temporal, 0.02), "spatial": (learning.spatial, 0.01)}
        return {name: torch.optim.AdamW(own.values(), lr=rate) for name, (own, rate) in groups.items() if own}

    return MotionLoraModule(
        FAMILY, parts.denoiser, FAMILY.process(parts), Objective(), learning.temporal, learning.spatial,
        make_optimizer=optimizers, learning_rate=lambda step: 1.0, **settings,
    )  # fmt: skip


def alone(parts, lora: Lora, half: str | None):
    """The base with one half of an adapter, or with neither, loaded afresh."""
    fresh = FAMILY.tiny()
    layers = {name: layer for name, layer in lora.layers.items() if half and (FAMILY.temporal in name) == (half == "temporal")}
    if layers:
        load_adapter(fresh, Lora(layers), half)
    return fresh.denoiser


@torch.no_grad()
def test_both_losses_in_float64_and_what_is_on_in_each_pass():
    """Everything recomputed from the definitions: the draws, the frame, the anchor; predictions by networks that hold one half alone."""
    parts = FAMILY.tiny()
    module, batch = make(parts, dropout=0.0, masked=0.5), batch_of(parts)
    lora, process, objective = read_adapter(parts.denoiser, "unet"), module.process, module.objective
    seen = {}
    for step in range(6):
        key = (0, step, 0, 0, 0)
        found = dict(module.parts(batch, key))
        seen.setdefault(len(found), key)
        clean, noise, t_B = objective.draw(process, batch, *key)
        noisy = process.add_noise(clean, noise, t_B)
        if len(found) == 2 and seen[2] == key:
            frame = frame_indices(2, 4, *key)
            one = torch.stack([noisy[i, :, f : f + 1] for i, f in enumerate(frame)])
            prediction = FAMILY.denoise(alone(parts, lora, "spatial"), one, t_B, batch.text, batch.crop)[:, :, 0]
            wanted = torch.stack([noise[i, :, f] for i, f in enumerate(frame)])
            np.testing.assert_allclose(found["spatial"], np.square(prediction.double() - wanted.double()).mean((1, 2, 3)), rtol=1e-4)
        if len(found) == 1 and seen[1] == key:
            anchor = frame_indices(2, 4, *key, "anchor")
            prediction = FAMILY.denoise(alone(parts, lora, "temporal"), noisy, t_B, batch.text, batch.crop)
            error = (prediction - noise).double().numpy()
            moved = np.stack([np.sqrt(2) * error[i] - error[i, :, [a]].transpose(1, 0, 2, 3) for i, a in enumerate(anchor)])
            expected = np.square(error).mean((1, 2, 3, 4)) + np.square(moved).mean((1, 2, 3, 4))
            np.testing.assert_allclose(found["temporal"], expected, rtol=1e-4)
    assert set(seen) == {1, 2}, "some steps are masked and some are not"
    both = FAMILY.denoise(parts.denoiser, noisy, t_B, batch.text, batch.crop)
    with module.without_spatial():
        half = FAMILY.denoise(parts.denoiser, noisy, t_B, batch.text, batch.crop)
    torch.testing.assert_close(half, FAMILY.denoise(alone(parts, lora, "temporal"), noisy, t_B, batch.text, batch.crop), rtol=0, atol=1e-5)
    assert (both - half).abs().max() > 1e-3


def test_the_share_of_masked_steps():
    parts = FAMILY.tiny()
    module, batch = make(parts, masked=0.3, dropout=0.0), batch_of(parts, frames=2)
    module._predict = lambda noisy, t_B, micro: torch.zeros_like(noisy)
    module.temporal, module.spatial = (dict(list(own.items())[:1]) for own in (module.temporal, module.spatial))
    masked = sum(len(list(module.parts(batch, (0, step, 0, 0, 0)))) == 1 for step in range(300))
    assert masked == pytest.approx(90, abs=30)


def gradients(module, batch, key=KEY) -> dict[str, dict[str, torch.Tensor]]:
    """By path, of the parameters that have any after it; each path's own."""
    found = {}
    for name, losses in module.parts(batch, key):
        losses.sum().backward()
        found[name] = {path: p.grad.clone() for path, p in module.trainable.items() if p.grad is not None}
        for parameter in module.trainable.values():
            parameter.grad = None
    return found


def test_each_path_has_gradients_of_its_own_and_checkpointing_changes_none():
    plain, again = ({} for _ in range(2))
    for checkpointing, found in ((False, plain), (True, again)):
        parts = FAMILY.tiny()
        module = make(parts, checkpointing=checkpointing, dropout=0.2, masked=0.0)
        found |= gradients(module, batch_of(parts))
        assert set(found["spatial"]) == set(module.spatial) and set(found["temporal"]) == set(module.temporal)
        assert all(parameter.requires_grad for parameter in module.trainable.values())
    for path, own in plain.items():
        for name, gradient in own.items():
            torch.testing.assert_close(again[path][name], gradient, rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in plain["temporal"].values()) > 1e-3


def test_dropout_is_a_function_of_the_key_and_of_the_spatial_pass_alone():
    parts = FAMILY.tiny()
    module, batch = make(parts, moved=0.3, dropout=0.5, masked=0.0), batch_of(parts)
    state = torch.get_rng_state()
    with torch.no_grad():
        one, two = (dict(module.parts(batch, KEY)) for _ in range(2))
        for dropout in module.dropouts:
            dropout.p = 0.0
        without = dict(module.parts(batch, KEY))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["spatial"], two["spatial"]) and torch.equal(one["temporal"], without["temporal"])
    assert not torch.equal(one["spatial"], without["spatial"])
    assert not any(dropout.training for dropout in module.dropouts)


def learn_for(module, batch, steps: int) -> dict[str, list[float]]:
    """Plain steps on one batch and one set of draws, without Lightning."""
    found: dict[str, list[float]] = {"temporal": [], "spatial": []}
    for _ in range(steps):
        for name, losses in module.parts(batch, KEY):
            losses.mean().backward()
            found[name].append(losses.mean().item())
        for solver in module.solvers.values():
            solver.step()
            solver.zero_grad()
    return found


@pytest.mark.parametrize(
    ("train", "rate", "falls"), [("lora", 0.05, {"temporal": 0.98, "spatial": 0.9}), ("module", 0.01, {"temporal": 0.95})]
)
def test_ten_steps_lower_the_loss_of_each_path(train, rate, falls):
    parts = FAMILY.tiny()
    module, batch = make(parts, moved=0.0, train=train, spatial="spatial" in falls, dropout=0.0, masked=0.0), batch_of(parts)
    for solver in module.solvers.values():
        solver.param_groups[0]["lr"] = rate
    found = learn_for(module, batch, 10)
    for name, share in falls.items():
        assert found[name][-1] < share * found[name][0], (name, found[name])


def test_an_optimizer_of_a_path_that_had_no_pass_does_not_step(monkeypatch):
    """Rates, clipped norms and the log are each path's own; where the look has no pass, neither has its weight decay."""
    parts = FAMILY.tiny()
    module, batch = make(parts, masked=0.9999, dropout=0.0, grad_clip=0.01), batch_of(parts)
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(module, "optimizers", lambda: list(module.solvers.values()))
    monkeypatch.setattr(type(module), "global_rank", 0)
    before = {name: p.detach().clone() for name, p in module.trainable.items()}
    module.training_step([batch], 0)
    levels = {name for name in module.numbers if name.startswith("loss/t=")}
    whole = {"loss", "loss/temporal", "grad_norm/temporal", "grad_norm/spatial", "lr/temporal", "lr/spatial"}
    assert set(module.numbers) - levels == whole and len(levels) == len(batch)
    assert module.numbers["lr/temporal"] == 0.02 and module.numbers["lr/spatial"] == 0.01
    assert module.numbers["grad_norm/spatial"] == 0 < module.numbers["grad_norm/temporal"]
    assert all(torch.equal(p, before[name]) for name, p in module.spatial.items())
    assert not any(torch.equal(p, before[name]) for name, p in module.temporal.items())
    module.masked = 0.0
    module.training_step([batch], 0)
    assert module.numbers["loss"] == pytest.approx(module.numbers["loss/temporal"] + module.numbers["loss/spatial"])
    assert not all(torch.equal(p, before[name]) for name, p in module.spatial.items())

    other = make(FAMILY.tiny(), dropout=0.0)
    other.restore(module.checkpoint())
    assert all(torch.equal(p, module.trainable[name]) for name, p in other.trainable.items())
    firsts = {"temporal": next(iter(other.temporal.values())), "spatial": next(iter(other.spatial.values()))}
    counts = {name: float(other.solvers[name].state[parameter]["step"]) for name, parameter in firsts.items()}
    assert counts == {"temporal": 2, "spatial": 1}, "each optimizer has its own state"


def test_motion_modules_of_a_bfloat16_base_learn_in_float32_and_are_loaded_back(tmp_path):
    """Behind a whole base, whose own they replace, they give what was trained."""
    parts = FAMILY.tiny()
    FAMILY.pipeline(parts).save_pretrained(tmp_path / "base")
    parts.denoiser.to(torch.bfloat16)
    module, batch = make(parts, train="module", spatial=False, masked=0.0, dropout=0.0), batch_of(parts)
    assert {p.dtype for p in module.trainable.values()} == {torch.float32} and not module.spatial
    values = learn_for(module, batch, 4)["temporal"]
    assert values[-1] < values[0]
    folder = FAMILY.save_motion(parts.denoiser, tmp_path / "modules")
    loaded = FAMILY.load(f"{folder}+{tmp_path / 'base'}", ["denoiser"])
    state = loaded.denoiser.state_dict()
    for name, parameter in module.trainable.items():
        torch.testing.assert_close(state[name], parameter.detach().half().float(), rtol=0, atol=0)
    x, t = draw(2, 4, 4, 4, 4), torch.tensor([0.3, 0.6])
    with torch.no_grad(), computing_in(torch.bfloat16, torch.device("cpu")):
        ours = FAMILY.denoise(parts.denoiser, x, t, batch.text, batch.crop)
    with torch.no_grad():
        torch.testing.assert_close(ours.float(), FAMILY.denoise(loaded.denoiser, x, t, batch.text, batch.crop), rtol=0, atol=0.1)


def test_an_adapter_of_one_path_alone():
    parts = FAMILY.tiny()
    module, batch = make(parts, spatial=False, masked=0.0), batch_of(parts)
    assert list(gradients(module, batch)) == ["temporal"] and list(module.solvers) == ["temporal"]
