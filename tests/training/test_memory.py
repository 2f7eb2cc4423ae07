"""What is in memory while a LoRA is trained: no text encoder, of the VAE the decoder alone, for the previews, and no copies of inputs."""

import gc
import weakref

import pytest
import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from charforgex.config import compose
from charforgex.lora.inject import leaving_casts_to_autocast
from charforgex.training import job
from charforgex.training.module import StepModule
from charforgex.training.run import run
from tests.families.rows import PICTURES
from tests.training.test_blocks import Learner, kept_bytes

TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)


@pytest.fixture
def seen(monkeypatch):
    """The groups of the base that are loaded, and at each step what of them is alive."""
    groups, encoders, alive = [], [], []
    others = weakref.WeakSet(item for item in gc.get_objects() if isinstance(item, (CLIPModel, *TEXT_ENCODERS)))  # of other tests
    loader, training_step = job.loader, StepModule.training_step

    def watched_loader(*arguments):
        load_parts = loader(*arguments)

        def load(wanted):
            parts = load_parts(wanted)
            groups.extend(wanted)
            networks = parts.networks()
            encoders.extend(weakref.ref(network) for name, network in networks.items() if name.startswith("text_encoder"))
            encoders.extend([weakref.ref(networks["vae"].encoder)] if "vae" in networks else [])
            return parts

        return load

    def watched_step(module, *arguments):
        gc.collect()
        networks = [item for item in gc.get_objects() if isinstance(item, (CLIPModel, *TEXT_ENCODERS)) and item not in others]
        judges = {part for network in networks if isinstance(network, CLIPModel) for part in network.modules()}  # of prompt-following
        found = [network for network in networks if network not in judges]
        alive.append([type(item).__name__ for item in [*found, *filter(None, (encoder() for encoder in encoders))]])
        return training_step(module, *arguments)

    monkeypatch.setattr(job, "loader", watched_loader)
    monkeypatch.setattr(StepModule, "training_step", watched_step)
    return groups, encoders, alive


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_no_encoder_is_in_memory_while_it_trains_and_a_second_run_loads_none(row, seen, tmp_path):
    groups, encoders, alive = seen
    settings = [
        f"family={row.family.name}", "debug=tiny", f"cache_dir={tmp_path / 'cache'}", "trainer.steps=2", "sampling.steps=1",
        "evaluation.times=1", "evaluation.every=2", "evaluation.prompts=['a portrait of a {trigger}']", "logger.tensorboard=false",
    ]  # fmt: skip
    run(compose("train", [*settings, f"run_dir={tmp_path / 'first'}"]))
    assert groups == ["denoiser", "vae", "text", "vae"]  # to encode both, and the decoder
    assert len(encoders) > 2
    assert alive == [[], []]

    groups.clear()
    run(compose("train", [*settings, f"run_dir={tmp_path / 'second'}", "lora.rank=3"]))
    assert groups == ["denoiser", "vae"]
    assert alive == [[], [], [], []]


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_an_adapter_of_a_bfloat16_base_keeps_no_copy_of_its_inputs(row):
    learner = Learner(row.family, dtype=torch.bfloat16)
    losses, gradients = learner.step()
    held = kept_bytes(learner)
    with leaving_casts_to_autocast(learner.denoiser)():
        assert kept_bytes(learner) < held
        again = learner.step()
    assert torch.equal(again[0], losses) and torch.equal(again[1], gradients)
    assert kept_bytes(learner) == held  # afterwards it is as before: previews run without autocast
