import random
from dataclasses import replace

import pytest
from PIL import Image

from charforgex.charworld.drawing import render
from charforgex.charworld.world import SCENE_WORDS, draw_context, draw_identity
from charforgex.curation.captions import interrogator
from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.interrogator import ONE_EACH, Chain, Words, labels
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.embedders import get_clip
from charforgex.errors import ModelError
from tests.curation.captions import tiny

SCENES = {scene: SCENE_WORDS[scene] for scene in ("beach", "space", "forest", "underwater")}
# What the embedded CLIP has words for; the true tables are for CLIPs that read any.
TABLES = {
    "medium": list(SCENES.values()),
    "movement": ["smiling", "sad"],
    "lighting": ["portrait", "close-up"],
    "composition": ["wearing a red t-shirt", "wearing a black suit"],
    "flavour": ["laughing", "sleeping", "a man", "a woman", "brown hair", "red hair", "round glasses", "a crown"],
}


@pytest.fixture(scope="module")
def pictures():
    rng = random.Random(3)
    drawn = (replace(draw_context(rng), scene=scene, frame="portrait", expression="smiling") for scene in SCENES)
    return [Image.fromarray(render(draw_identity(rng), context)) for context in drawn]


@pytest.fixture(scope="module")
def words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrogator, "labels", lambda: TABLES)
        yield Words(get_clip("charworld"))


def captioner(words, **options):
    one = get_captioner(CaptionSettings(backend="interrogator", source="charworld", **options))
    one.words = words
    return one


def contexts(pictures, *captions):
    return [Context(str(n), captions=captions) for n in range(len(pictures))]


def test_the_tables_are_lists_of_different_words_and_name_nobody():
    tables = labels()
    assert set(tables) == {*ONE_EACH, "flavour"}
    for phrases in tables.values():
        assert len(set(phrases)) == len(phrases) >= 30
        assert all(phrase == phrase.strip() and phrase and "," not in phrase and " by " not in phrase for phrase in phrases)


def test_the_style_of_a_picture_is_found_with_its_probability(words, pictures):
    found = words.styles(pictures, top=2)
    right = [styles["medium"][0][0] == phrase for styles, phrase in zip(found, SCENES.values(), strict=True)]
    assert sum(right) >= 3
    for styles in found:
        for likely in styles.values():
            assert 1 >= likely[0][1] >= likely[1][1] > 0 and sum(share for _, share in likely) <= 1 + 1e-5
    assert sum(share for _, share in words.styles(pictures[:1], top=4)[0]["medium"]) == pytest.approx(1, abs=1e-5)


def test_a_caption_is_lengthened_by_what_brings_it_nearest(words, pictures):
    seen = words.clip.see(pictures[:1])
    chain = Chain(words, seen, ["a man"])
    before = chain.scores[0]
    tried = {phrase: (words.clip.read([f"a man, {phrase}"]) @ seen[0]).item() for phrase in TABLES["medium"]}
    pool = list(TABLES["medium"])
    chain.extend([pool])
    best = max(tried, key=tried.get)
    assert tried[best] > before
    assert chain.texts == [f"a man, {best}"] and chain.scores[0] == pytest.approx(tried[best], abs=1e-5) and best not in pool


def test_nothing_is_added_that_does_not_help(words, pictures):
    chain = Chain(words, words.clip.see(pictures[:1]), ["a man"])
    chain.scores = [2.0]  # nearer than anything can be
    pools = [["at the beach"]]
    chain.extend(pools)
    assert chain.texts == ["a man"] and pools == [[]]


def test_captions_begin_with_what_was_there_and_a_batch_is_as_one_by_one(words, pictures):
    one = captioner(words, flavours=2)
    together = one.caption(pictures, contexts(pictures, "A person stands here.", "Another caption"))
    assert together == [one.caption([p], contexts([p], "A person stands here."))[0] for p in pictures]
    assert all(text.startswith("A person stands here, ") and text.count(", ") <= len(ONE_EACH) + 2 for text in together)
    assert sum(phrase in text for text, phrase in zip(together, SCENES.values(), strict=True)) >= 3


def test_without_a_beginning_and_without_flavours(words, pictures):
    [text] = captioner(words, begin=None, flavours=0).caption(pictures[:1], contexts(pictures[:1], "not read"))
    phrases = text.split(", ")
    assert 1 <= len(phrases) <= len(ONE_EACH) and phrases[0] in TABLES["medium"]
    assert captioner(words, begin=None).reads == frozenset() != captioner(words).reads


def test_a_caption_that_fills_what_clip_reads_stays(words, pictures):
    long = " ".join(["beach"] * 100)
    assert captioner(words).caption(pictures[:1], contexts(pictures[:1], long)) == [long]


def test_names_tell_apart_what_changes_captions(words):
    options = ({}, {"flavours": 3}, {"begin": None})
    assert len({captioner(words, **one).name for one in options}) == 3


def test_any_clip_by_path_and_nothing_else(tmp_path, pictures):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny.byte_tokenizer([])
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=32)
    config = CLIPConfig(text_config=size | ids, vision_config=size | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    tiny.save(tmp_path, CLIPModel(config), tokenizer)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path)
    settings = CaptionSettings(backend="interrogator", source=str(tmp_path), flavours=1)
    [text] = get_captioner(settings).caption(pictures[:1], contexts(pictures[:1], "A man."))
    added = text.split(", ")[1:]
    assert text.startswith("A man") and all(any(phrase in table for table in labels().values()) for phrase in added)

    with pytest.raises(ModelError, match="there is no such folder"):
        get_captioner(CaptionSettings(backend="interrogator", source=str(tmp_path / "none")))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"is a bert; curation.captions.backend=interrogator needs a clip"):
        get_captioner(settings)
