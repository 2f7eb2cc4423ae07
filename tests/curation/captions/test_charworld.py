"""The embedded captioner: what it says of characters whom no training picture showed, from pixels of any size."""

import io
import json
import random

import pytest
import torch
from PIL import Image

from charforgex.charworld import captioner, drawing, world
from charforgex.charworld.assets import ROOT, load_captioner
from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.charworld import square
from charforgex.curation.captions.settings import CaptionSettings

COUNT = 64


@pytest.fixture(scope="module")
def embedded():
    return get_captioner(CaptionSettings(backend="charworld"))


@pytest.fixture(scope="module")
def scenes():
    found = []
    for seed in range(COUNT):
        rng = random.Random(f"captioned {seed}")
        found.append((world.draw_identity(rng, held_out=True), world.draw_context(rng)))
    return found


@pytest.fixture(scope="module")
def pictures(scenes):
    return [Image.fromarray(drawing.render(*scene, 96)) for scene in scenes]


def accuracy(captions, scenes):
    shares = captioner.agreement(captions, [world.visible_attributes(*scene) for scene in scenes])
    return sum(shares.values()) / len(shares), shares


def caption(embedded, pictures):
    return embedded.caption(pictures, [Context(str(i)) for i in range(len(pictures))])


def test_it_is_small_and_of_a_class_that_transformers_loads():
    model, tokens = load_captioner()
    assert type(model).__name__ == "VisionEncoderDecoderModel" and sum(p.numel() for p in model.parameters()) < 1.5e6
    assert (ROOT / "captioner/model.safetensors").stat().st_size < 3e6
    provenance = json.loads((ROOT / "captioner/provenance.json").read_text())
    assert provenance["licence"] == "Apache-2.0" and "attributes" in provenance["measures"] and (ROOT / "captioner/LICENSE").is_file()
    sentence = "a portrait of a woman with pale skin and round red glasses, smiling, at sunset"
    assert tokens.decode(tokens(sentence).input_ids, skip_special_tokens=True) == sentence


def test_it_says_of_unseen_characters_what_the_picture_shows(embedded, pictures, scenes):
    mean, shares = accuracy(caption(embedded, pictures), scenes)
    assert mean > 0.85, shares
    certain = ("kind", "hair_colour", "skin", "garment", "garment_colour", "scene", "scene_colour", "frame")
    assert min(shares[name] for name in certain) > 0.85, shares


def test_it_reads_pictures_that_were_cropped_scaled_and_recompressed(embedded, pictures, scenes):
    rng = random.Random("spoilt")

    def spoilt(picture):
        side = picture.width
        left, top = rng.randint(0, side // 16), rng.randint(0, side // 16)
        cut = picture.crop((left, top, left + side * 15 // 16, top + side * 15 // 16)).resize((150, 150), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        cut.save(file, "JPEG", quality=60)
        return Image.open(file)

    whole, _ = accuracy(caption(embedded, pictures), scenes)
    mean, shares = accuracy(caption(embedded, [spoilt(picture) for picture in pictures]), scenes)
    assert mean > whole - 0.06, shares


def test_a_caption_is_the_same_alone_and_in_any_company(embedded, pictures):
    together = caption(embedded, pictures[:5])
    assert [caption(embedded, [picture])[0] for picture in pictures[:5]] == together
    assert caption(embedded, pictures[4::-1]) == together[::-1]
    assert len(set(together)) == 5 and embedded.reads == frozenset()


def test_captions_are_of_pixels(embedded, pictures, scenes):
    identity, context = scenes[0]
    for colour in ("red", "blue", "white"):
        drawn = world.Context(**{**context.__dict__, "garment": "hoodie", "garment_colour": colour})
        assert f"{colour} hoodie" in caption(embedded, [Image.fromarray(drawing.render(identity, drawn))])[0]


def test_tall_and_wide_pictures_and_other_modes(embedded, pictures):
    assert square(Image.new("RGB", (30, 80))).size == square(Image.new("RGB", (80, 30))).size == (30, 30)
    plain = pictures[0]
    background = plain.getpixel((0, 0))
    wide = Image.new("RGB", (plain.width * 2, plain.height), background)
    wide.paste(plain, (plain.width // 2, 0))
    assert caption(embedded, [wide, plain.convert("RGBA")]) == caption(embedded, [plain, plain])


def test_captions_are_read_back():
    for seed in range(300):
        rng = random.Random(seed)
        identity, context = world.draw_identity(rng, seed % 2 == 0), world.draw_context(rng)
        sentence, named = world.caption(identity, context, rng, keep=0.8)
        read = world.read_caption(sentence)
        assert named.items() <= read.items(), sentence
        assert all(value == "none" for name, value in read.items() if name not in named), sentence


def test_agreement_counts_what_is_unsaid_as_wrong():
    shown = [{"kind": "woman", "glasses": "none"}, {"kind": "man", "glasses": "round"}]
    shares = captioner.agreement(["a portrait of a woman with pale skin", "a portrait of a person"], shown)
    assert shares == {"kind": 0.5, "glasses": 0.5}


def test_a_fresh_network_has_the_shape_of_the_embedded_one():
    tokens = captioner.tokenizer()
    model, kept = load_captioner()
    fresh = captioner.network(tokens, model.config.encoder)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert len(tokens) == len(kept)
    texts = captioner.describe(fresh.eval(), tokens, torch.zeros(2, 3, 64, 64))
    assert len(texts) == 2 and texts[0] == texts[1]
