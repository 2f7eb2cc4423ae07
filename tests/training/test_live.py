"""Text encoders that learn: the same text at first, gradients in every layer, an effect, and files that give the trained text back."""

from dataclasses import replace

import pytest
import torch

from charforgex.errors import ConfigError, LoraError
from charforgex.families.loading import load_components
from charforgex.families.tokens import save_tokens, usual_length
from charforgex.generation.run import load
from charforgex.generation.settings import Settings
from charforgex.generation.stack import read_stack
from charforgex.lora import formats, writing
from charforgex.lora.inject import adapter_parameters, inject, load_adapter, read_adapters, without_adapter
from charforgex.training.live import LiveText, adapt, learn_tokens, word_and_start
from charforgex.training.losses import Objective
from charforgex.training.settings import TextEncoderSettings
from charforgex.types import Batch, Components, Crop, Prior
from tests.families.rows import PICTURES

CAPTIONS = ["a photo of a zkx woman", ""]


@pytest.fixture(params=PICTURES, ids=str)
def family(request):
    return request.param.family


def live_of(family):
    """Adapted encoders as a run loads them, the whole base, and what the base says."""
    names = [name for clip in family.clip_encoders for name in (clip, clip.replace("text_encoder", "tokenizer"))]
    live, base = LiveText(family, load_components(family, "tiny", names, torch.float32)), family.tiny()
    return live, base, family.encode_text(base, CAPTIONS), adapt(live, 2, 2.0, seed=1)


def move(parameters):
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))


def differ(one, other):
    return not torch.equal(one.tokens_BLD, other.tokens_BLD) or not torch.equal(one.pooled_BD, other.pooled_BD)


def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_none_of_t5(family):
    live, _, cached, _ = live_of(family)
    assert set(live.networks) == set(family.clip_encoders) and not any("T5" in type(part).__name__ for part in live.parts.modules.values())
    assert not differ(live.encode(CAPTIONS, cached), cached)
    move(live.parameters())
    changed = live.encode(CAPTIONS, cached)
    assert differ(changed, cached) and changed.tokens_BLD.shape == cached.tokens_BLD.shape
    if family.name == "flux":
        assert torch.equal(changed.tokens_BLD, cached.tokens_BLD)
    if family.name == "sd3":
        assert torch.equal(changed.tokens_BLD[:, 77:], cached.tokens_BLD[:, 77:])
    with without_adapter(*live.networks.values()):
        assert not differ(live.encode(CAPTIONS, cached), cached)


def test_gradients_reach_every_adapted_layer_and_nothing_else(family):
    live, _, cached, adapted = live_of(family)
    move(live.parameters())
    text = live.encode(CAPTIONS, cached)
    (text.tokens_BLD.square().sum() + text.pooled_BD.square().sum()).backward()
    parameters = live.parameters()
    assert len(parameters) == 2 * len(adapted) and all(parameter.grad.abs().max() > 0 for parameter in parameters.values())
    touched = {id(p) for network in live.networks.values() for p in network.parameters() if p.grad is not None}
    assert touched == {id(parameter) for parameter in parameters.values()}


def test_encoders_start_differently():
    live, _, _, _ = live_of(PICTURES[0].family)
    parameters = live.parameters()
    name = next(name for name in parameters if name.startswith("text_encoder.") and name.endswith(".down"))
    twin = next(n for n in parameters if n.startswith("text_encoder_2.") and n.endswith(name.partition("encoder.layers")[2]))
    assert not torch.equal(parameters[name], parameters[twin])


def batch_of(family, base, text):
    mean = torch.randn(2, base["vae"].config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(mean, torch.zeros_like(mean), text, Crop.whole(2, 64, 64), captions=tuple(CAPTIONS))


def test_they_alone_lower_the_loss_in_25_steps(family):
    live, base, cached, _ = live_of(family)
    batch, process = batch_of(family, base, cached), family.process(base)
    optimizer, losses = torch.optim.AdamW(live.parameters().values(), lr=3e-2), []
    for _ in range(25):
        loss = Objective().losses(family, base.denoiser, process, live.batch(batch), "same").sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3, losses


def test_the_class_is_held_to_what_the_base_says_of_it():
    family = PICTURES[0].family
    live, base, cached, _ = live_of(family)
    inject(base.denoiser, family.lora_targets("attention", base.denoiser.config), 2, 2.0)
    move(live.parameters())
    batch = replace(batch_of(family, base, cached), prior=Prior(cached, cached, tuple(CAPTIONS)))
    seen = live.batch(batch)
    assert differ(seen.prior.text, cached) and not differ(seen.prior.base_text, cached) and differ(seen.text, cached)
    process = family.process(base)
    plain, held = (Objective(prior_weight=1.0).losses(family, base.denoiser, process, b, "k") for b in (replace(seen, prior=None), seen))
    assert (held - plain)[0] > 1e-8  # the encoders alone have moved the class: the denoiser's adapter is fresh


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_files_give_the_trained_text_back(family, tmp_path, format):
    live, base, cached, adapted = live_of(family)
    move(live.parameters())
    inject(base.denoiser, family.lora_targets("attention", base.denoiser.config), 2, 2.0)
    move(adapter_parameters(base.denoiser))
    lora = read_adapters({family.denoiser_name: base.denoiser, **live.networks})
    path, config = tmp_path / "x.safetensors", base.denoiser.config
    writing.save_verified(lora, path, format, family, base.denoiser, torch.float32, encoders=live.networks)
    whole = family.tiny()
    assert load_adapter(whole, formats.read(path, family, config), "mine") == len(lora) > len(adapted)
    with torch.no_grad():
        assert not differ(family.encode_text(whole, CAPTIONS), live.encode(CAPTIONS, cached))


def test_without_them_nothing_is_loaded_and_the_cache_speaks():
    family = PICTURES[0].family
    live = LiveText(family, load_components(family, "tiny", [], torch.float32))
    assert list(live.parts.modules) == ["scheduler"] and live.parameters() == {}
    text = family.encode_text(family.tiny(), CAPTIONS)
    assert live.encode(CAPTIONS, text) is text
    with pytest.raises(ConfigError, match=r"text_encoder\.lr has no effect.*no CLIP"):
        adapt(LiveText(family, Components("a base", "unet")), 2, 2.0, 0)


def with_tokens(family, count=2):
    """Encoders whose new tokens for "zkx" have learnt something, without a LoRA."""
    names = [name for clip in family.clip_encoders for name in (clip, clip.replace("text_encoder", "tokenizer"))]
    live = LiveText(family, load_components(family, "tiny", names, torch.float32))
    learn_tokens(live, "zkx", count, "girl")
    return live


def test_new_tokens_are_all_that_learns_and_lower_the_loss(family):
    live, base = with_tokens(family), family.tiny()
    cached = family.encode_text(base, CAPTIONS)
    assert {name: p.shape for name, p in live.parameters().items()} == {f"{name}.tokens": (2, 32) for name in family.clip_encoders}
    batch, process = batch_of(family, base, cached), family.process(base)
    optimizer, losses = torch.optim.AdamW(live.parameters().values(), lr=3e-2), []
    for _ in range(25):
        loss = Objective().losses(family, base.denoiser, process, live.batch(batch), "same").sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4, losses
    learning = {id(p) for network in live.networks.values() for p in network.parameters() if p.requires_grad}
    assert learning == {id(new.rows) for new in live.tokens.values()}
    for name, new in live.tokens.items():
        assert new.values().norm(dim=1).max() <= usual_length(family.tiny(), name) * (1 + 1e-5)
    with live.base_speaking():
        assert live.encode(CAPTIONS, cached) is cached
    assert live.batch(batch).text is not cached


def test_generation_finds_the_tokens_beside_the_lora(family, tmp_path):
    live, base = with_tokens(family), family.tiny()
    move(live.parameters())
    inject(base.denoiser, family.lora_targets("attention", base.denoiser.config), 2, 2.0)
    move(adapter_parameters(base.denoiser))
    path = tmp_path / "x.safetensors"
    metadata = {"charforgex.family": family.name, "charforgex.trigger": "zkx woman", "charforgex.tokens": "x_tokens.safetensors"}
    lora = read_adapters({family.denoiser_name: base.denoiser, **live.adapters()})
    writing.save_verified(lora, path, "kohya", family, base.denoiser, metadata=metadata)
    with pytest.raises(LoraError, match=r"x_tokens\.safetensors cannot be read.*beside the LoRA"):
        read_stack(Settings(lora=str(path), base="tiny", prompt="a zkx woman"))
    save_tokens(tmp_path / "x_tokens.safetensors", family, {name: new.values() for name, new in live.tokens.items()})
    parts = load(read_stack(Settings(lora=str(path), base="tiny", prompt="a zkx woman")), "cpu", torch.float32)
    text = family.encode_text(parts, CAPTIONS)
    with torch.no_grad():
        assert not differ(text, live.encode(CAPTIONS, family.encode_text(base, CAPTIONS)))
    assert differ(text, family.encode_text(base, CAPTIONS))


def test_what_new_tokens_need():
    assert word_and_start("zatoki old woman", None) == ("zatoki", "old woman")
    assert word_and_start("ohwx", "man") == ("ohwx", "man")
    with pytest.raises(ConfigError, match=r"tokens needs data\.trigger"):
        word_and_start(None, "man")
    with pytest.raises(ConfigError, match=r"set text_encoder\.tokens_init"):
        word_and_start("ohwx", None)
    with pytest.raises(ConfigError, match=r"tokens_lr=0\.1 has no effect with text_encoder\.tokens=0"):
        TextEncoderSettings(tokens_lr=0.1)
    with pytest.raises(ConfigError, match=r"text_encoder\.tokens has no effect.*no CLIP"):
        learn_tokens(LiveText(PICTURES[0].family, Components("a base", "unet")), "zkx", 2, "man")
