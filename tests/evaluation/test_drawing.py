"""Pictures of contestants: the same noise for all, each as if its LoRA were alone, none drawn twice, none lost but of one batch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from charforgex.errors import ModelError
from charforgex.evaluation import drawing
from charforgex.evaluation.contestants import Contestant
from charforgex.evaluation.drawing import Studio
from charforgex.evaluation.packs import Pack, templates
from charforgex.families.sdxl import Sdxl
from charforgex.families.tokens import save_tokens
from charforgex.generation import sampling
from charforgex.generation.metadata import read_recipe
from charforgex.generation.run import load, shared
from charforgex.generation.sampling import check_sampling
from charforgex.generation.settings import Settings
from charforgex.generation.stack import read_stack
from charforgex.lora.inject import set_scales
from charforgex.lora.metadata import build
from charforgex.lora.state import Lora, LoraLayer
from charforgex.lora.writing import write

FAMILY = Sdxl()
TEMPLATES = templates({"own": Pack(("a portrait of {trigger}", "{trigger} at the {beach|lake}"))}, None, None)
QUICK = {"steps": 2, "base": "tiny", "width": 32, "height": 32}


class Silent:
    def say(self, text):
        pass

    def step(self, pictures, text=""):
        pass


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs of the denoiser, of it and an encoder, and one with a new word."""
    folder, parts = tmp_path_factory.mktemp("loras"), FAMILY.tiny()
    places = {
        "plain": [("unet", "to_q")], "speaking": [("unet", "to_v"), ("text_encoder", "q_proj")], "wordy": [("unet", "to_q")],
    }  # fmt: skip
    for seed, (name, ends) in enumerate(places.items()):
        draw, layers = torch.Generator().manual_seed(seed), {}
        for component, end in ends:
            for path, module in parts[component].named_modules():
                if path.endswith(end):
                    start = "text_model." if component == "text_encoder" else ""
                    down, up = (torch.randn(size, generator=draw) for size in ((2, module.in_features), (module.out_features, 2)))
                    layers[f"{component}.{start}{path}"] = LoraLayer(down, up, alpha=2.0)
        metadata = build(Lora(layers), FAMILY, title=name, base="tiny", trigger="zqx woman")
        if name == "wordy":
            rows = {encoder: torch.randn(2, 32, generator=draw) for encoder in FAMILY.clip_encoders}
            metadata["charforgex.tokens"] = save_tokens(folder / "words.safetensors", FAMILY, rows).name
        write(Lora(layers), folder / f"{name}.safetensors", "kohya", FAMILY, parts.denoiser.config, torch.float32, metadata)
    return folder


def studio(cache, *files, batch_size=1, **settings):
    asked = Settings(lora=[str(file) for file in files] or None, prompt="x", batch_size=batch_size, **QUICK | settings)
    stack = read_stack(asked)
    asked = asked.filled(stack.recipe)
    common = shared(stack, asked, (32, 32), check_sampling(FAMILY, stack.bare, asked), torch.float32)
    return Studio(stack, asked, (32, 32), common, "cpu", torch.float32, None, cache)


def wanted(place, *contestants, seeds=(5, 9)):
    return [(one, place.asks(one, TEMPLATES, seeds, "zqx woman", None)) for one in contestants]


def pixels(path):
    return np.asarray(Image.open(path))


def drawn(place, asks):
    return [pixels(place.file(ask)) for ask in asks]


def contestants(folder):
    base, alone = Contestant("base", "base"), {}
    for name in ("plain", "speaking", "wordy"):
        alone[name] = Contestant(name, "lora", (folder / f"{name}.safetensors",), 0.5)
    both = Contestant("both", "lora", (alone["plain"].loras[0], alone["speaking"].loras[0]), 0.5)
    return [alone["wordy"], base, alone["speaking"], both, alone["plain"]]


def test_each_is_drawn_as_if_it_were_alone(loras, tmp_path):
    """Bit for bit what a freshly loaded base with those LoRAs alone makes, whoever had this one before."""
    everyone = contestants(loras)
    place = studio(tmp_path, *dict.fromkeys(path for one in everyone for path in one.loras))
    asked = wanted(place, *everyone, seeds=(5,))
    place.draw(asked, Silent())
    assert place.drawn == 5 * 2
    for one, asks in asked:
        alone = [str(path) for path in one.loras]
        stack = read_stack(Settings(lora=alone or None, base="tiny"))
        parts = load(stack, "cpu", torch.float32)
        set_scales(parts, {adapter.name: 0.5 for adapter in stack.adapters})
        numbers = {name: place.shared[name] for name in ("steps", "guidance")}
        expected = [sampling.sample(FAMILY, parts, [ask.prompt], [ask.seed], size=(32, 32), **numbers)[0] for ask in asks]
        for own, picture in zip(drawn(place, asks), expected, strict=True):
            assert np.array_equal(own, np.asarray(picture)), one.name
    first = [drawn(place, asks)[0] for _, asks in asked]
    assert len({picture.tobytes() for picture in first}) == 5
    recipe = read_recipe(place.file(asked[3][1][1]))
    assert recipe.seed == drawing.noise_seed(TEMPLATES[1].text, 5) != drawing.noise_seed(TEMPLATES[0].text, 5)
    assert ([use.name for use in recipe.loras], recipe.loras[0].scale) == (["plain", "speaking"], 0.5)


def test_everybody_gets_the_same_noise(loras, tmp_path, monkeypatch):
    """Seen where it is drawn: for each contestant the same seeds in the same order, and at strength 0 the base's own pictures."""
    seen = []
    noise = sampling.initial_noise
    monkeypatch.setattr(sampling, "initial_noise", lambda seeds, shape: seen.append(noise(seeds, shape)) or seen[-1])
    plain = contestants(loras)[-1]
    place = studio(tmp_path, plain.loras[0], batch_size=4)
    asked = wanted(place, Contestant("base", "base"), plain, replace(plain, name="more", scale=1.0))
    assert len({ask.seed for ask in asked[0][1]}) == 4  # no two prompts share any: what noise makes of a person is not counted twice
    place.draw(asked, Silent())
    assert len(seen) == 3 and all(torch.equal(own, seen[0]) for own in seen) and len(seen[0]) == 4
    off = place.asks(replace(plain, scale=0.0), TEMPLATES, (5, 9), "zqx woman", None)
    assert [ask.key for ask in off] == [ask.key for ask in asked[0][1]] and place.missing(off) == []


def test_what_was_drawn_is_not_drawn_again(loras, tmp_path):
    plain, base = contestants(loras)[-1], Contestant("base", "base")
    first = studio(tmp_path, plain.loras[0])
    assert first.expected(10) is None
    asked = wanted(first, base, plain)
    assert len(first.missing(asked[0][1])) == 4
    first.draw(asked, Silent())
    assert first.expected(10) == pytest.approx(10 * first.seconds / 8)

    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(plain.loras[0].read_bytes())
    again = studio(tmp_path, copy, plain.loras[0])
    asked = wanted(again, base, Contestant("other name", "lora", (copy,), 0.5), plain, seeds=(5, 9, 11))
    missing = [len(again.missing(asks)) for _, asks in asked]
    again.draw(asked, Silent())
    assert missing == [2, 2, 2] and again.drawn == 4  # the renamed copy and the file itself are one

    keys = {ask.key for _, asks in asked for ask in asks}
    told = dict(again.shared)
    for name, value in {"steps": 3, "guidance": 2.0, "scheduler": "ddim", "negative": "blurry", "width": 64, "dtype": "float16"}.items():
        again.shared = told | {name: value}
        assert not keys & {ask.key for ask in again.asks(plain, TEMPLATES, (5, 9), "zqx woman", None)}, name
    again.shared = told | {"base": "another name of the same weights"}
    assert {ask.key for ask in again.asks(plain, TEMPLATES, (5, 9), "zqx woman", None)} <= keys


def test_new_words_count(loras, tmp_path):
    words, wordy = studio(tmp_path, loras / "wordy.safetensors"), contestants(loras)[0]

    def key():
        return words.asks(wordy, TEMPLATES, (5,), "zqx woman", None)[0].key

    before = key()
    words.adapters[wordy.loras[0]].tokens["text_encoder"] += 1
    assert key() != before


def test_an_interruption_loses_one_batch_and_nothing_of_the_base(loras, tmp_path, monkeypatch):
    plain, real, calls = contestants(loras)[-1], sampling.sample_latents, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    place = studio(tmp_path, plain.loras[0])
    asked = wanted(place, plain)
    monkeypatch.setattr(sampling, "sample_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.draw(asked, Silent())
    assert len(place.missing(asked[0][1])) == 2 and not list((tmp_path / "pictures").rglob(".tmp-*"))
    after = studio(tmp_path, plain.loras[0])
    after.draw(wanted(after, plain), Silent())
    assert after.drawn == 2


def test_too_little_memory_halves_the_batch(tmp_path, monkeypatch):
    """Until one picture is too many. `fits` is how many do."""
    real, sizes, fits = sampling.sample_latents, [], 2

    def limited(family, parts, text, seeds, **settings):
        sizes.append(len(seeds))
        if len(seeds) > fits:
            raise torch.OutOfMemoryError("out of memory")
        return real(family, parts, text, seeds, **settings)

    monkeypatch.setattr(sampling, "sample_latents", limited)
    place = studio(tmp_path, batch_size=8)
    steps = []
    bar = Silent()
    bar.step = lambda pictures, text="": steps.append(pictures)
    place.draw(wanted(place, Contestant("base", "base"), seeds=(1, 2, 3)), bar)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1] and place.drawn == 6 and place.batch_size == 1
    assert sum(steps) == pytest.approx(6)
    fits = 0
    place = studio(tmp_path / "other", batch_size=2)
    with pytest.raises(ModelError, match="not enough for one picture; try dtype=bfloat16"):
        place.draw(wanted(place, Contestant("base", "base")), Silent())


def test_pictures_get_readable_names_without_taking_more_room(tmp_path, monkeypatch):
    source = tmp_path / "cache.png"
    source.write_bytes(b"picture")
    target = drawing.place(source, tmp_path / "out" / "one.png")
    assert target.read_bytes() == b"picture" and target.samefile(source)

    def refuse(*_):
        raise OSError("no links on this disk")

    monkeypatch.setattr(drawing.os, "link", refuse)
    assert not drawing.place(source, target).samefile(source) and target.read_bytes() == b"picture"


def test_a_damaged_record_of_speeds_is_no_reason_to_stop(tmp_path):
    place = studio(tmp_path)
    Path(tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / drawing.SPEED).write_text("[not json")
    assert place.expected(3) is None
    place.draw(wanted(place, Contestant("base", "base"), seeds=(1,)), Silent())
    assert len(json.loads((tmp_path / "pictures" / drawing.SPEED).read_text())) == 1
