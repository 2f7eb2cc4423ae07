"""BLIP-2, Florence-2 and two families that chat, each run for real: random weights, real classes, no torchvision."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.cache import Job, caption_all
from charforgex.curation.captions.chat import answer
from charforgex.curation.captions.conversation import Answer
from charforgex.curation.captions.loading import load_processor
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError, ModelError
from tests.curation.captions import tiny

BACKENDS = {"blip2": tiny.blip2, "florence": tiny.florence, "glm4v": tiny.glm4v, "qwen3vl": tiny.qwen3vl}
OPTIONS = {"blip2": {"prompt": "Question: what is {{ framing or 'shown' }}? Answer:"}, "florence": {"task": "detailed"}}
CONTEXTS = [Context("a"), Context("b", framing="portrait"), Context("c", framing="full", class_word="woman")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def source(kind):
        if kind not in made:
            made[kind] = BACKENDS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return source


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0)
    shapes = ((64, 64), (48, 90), (70, 30))
    return [Image.fromarray(noise.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def settings(kind, source, **options):
    backend = kind if kind in ("blip2", "florence") else "chat"
    return CaptionSettings(backend=backend, source=source, **{"max_tokens": 12, **OPTIONS.get(kind, {}), **options})


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_batch_says_what_each_picture_alone_says_and_pictures_matter(kind, sources, pictures):
    captioner = get_captioner(settings(kind, sources(kind)))
    together = captioner.caption(pictures, CONTEXTS)
    assert together == [captioner.caption([picture], [context])[0] for picture, context in zip(pictures, CONTEXTS, strict=True)]
    same_context = captioner.caption(pictures, [CONTEXTS[0]] * 3)
    assert all(same_context) and len(set(same_context)) > 1
    assert not any("\n" in text or "<|" in text or "Question" in text for text in together)


@pytest.mark.parametrize("kind", BACKENDS)
def test_pixels_go_through_pillow(kind, sources):
    assert importlib.util.find_spec("torchvision") is None
    processor = load_processor(sources(kind))
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert processor.tokenizer.padding_side == "left"


def test_files_as_hubs_have_them_name_torchvisions_classes_and_videos(sources, pictures, tmp_path):
    for file in Path(sources("qwen3vl")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    files = {
        "preprocessor_config.json": images | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"},
        "chat_template.json": {"chat_template": (tmp_path / "chat_template.jinja").read_text()},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    said = [get_captioner(settings("qwen3vl", source)).caption(pictures, CONTEXTS) for source in (str(tmp_path), sources("qwen3vl"))]
    assert said[0] == said[1]


def test_what_is_cached_needs_no_model(sources, pictures, tmp_path):
    chat = settings("qwen3vl", sources("qwen3vl"), max_tokens=4)
    jobs = [Job(f"{n:064x}", lambda n=n: pictures[n], CONTEXTS[n]) for n in range(3)]
    first = get_captioner(chat)
    texts = list(caption_all(first, jobs, tmp_path, 2, pytest.fail))
    assert len(texts) == 3 and "_loaded" in vars(first)

    again = get_captioner(chat)
    assert list(caption_all(again, jobs, tmp_path, 2, pytest.fail)) == texts
    assert "_loaded" not in vars(again)
    assert len({get_captioner(other).name for other in (chat, replace(chat, max_tokens=5), replace(chat, turns={"any": ("x",)}))}) == 3


def test_the_prompt_is_the_chat_templates_and_later_turns_hold_earlier_answers(sources, pictures):
    turns = {"any": ("Who is it?", "{{ answers[0]|length }} letters. And {{ name }}?")}
    captioner = get_captioner(settings("glm4v", sources("glm4v"), turns=turns))
    said = [("user", "Who is it?"), ("assistant", "A man."), ("user", "Where?")]
    picture = "<|begin_of_image|><|image|><|end_of_image|>"
    assert captioner.prompt(said) == f"<|user|>{picture}Who is it?<|assistant|>A man.<|user|>Where?<|assistant|>"

    asked = []
    ask = captioner._answer
    captioner._answer = lambda shown, conversations: asked.append([list(one) for one in conversations]) or ask(shown, conversations)
    captioner.caption(pictures[:2], CONTEXTS[:2])
    first, second = asked
    assert first == [[("user", "Who is it?")]] * 2
    for name, before, after in zip("ab", first, second, strict=True):
        assert after[:1] == before and after[1][0] == "assistant" and after[1][1]
        assert after[2] == ("user", f"{len(after[1][1])} letters. And {name}?")
    assert captioner.caption(pictures[:2], CONTEXTS[:2]) == [
        captioner.caption([p], [c])[0] for p, c in zip(pictures, CONTEXTS[:2], strict=False)
    ]


def test_bfloat16_is_another_captioner(sources, pictures):
    captioner = get_captioner(settings("qwen3vl", sources("qwen3vl"), dtype="bfloat16"))
    assert captioner.caption(pictures, CONTEXTS) and captioner._loaded[0].dtype == torch.bfloat16
    assert captioner.name != get_captioner(settings("qwen3vl", sources("qwen3vl"))).name


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(sources, tmp_path):
    with pytest.raises(ModelError, match=r"is a blip-2; curation.captions.backend=florence needs a florence2"):
        get_captioner(settings("florence", sources("blip2")))
    with pytest.raises(ModelError, match="there is no such folder"):
        get_captioner(settings("blip2", str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        get_captioner(settings("blip2", str(tmp_path)))


def test_weights_that_are_not_there_are_not_drawn_at_random(sources, pictures, tmp_path):
    source = Path(sources("florence"))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    left_out = next(name for name in weights if "vision_tower" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != left_out}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the weights"):
        get_captioner(settings("florence", str(tmp_path))).caption(pictures[:1], CONTEXTS[:1])


def test_a_model_without_a_chat_template_is_told_so(sources, pictures, tmp_path):
    for file in Path(sources("glm4v")).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="has no chat template"):
        get_captioner(settings("glm4v", str(tmp_path))).caption(pictures[:1], CONTEXTS[:1])


def test_a_model_that_only_writes_is_refused(pictures, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="a gpt2 does not talk about pictures"):
        get_captioner(settings("chat", str(tmp_path))).caption(pictures[:1], CONTEXTS[:1])


def test_an_answer_ends_where_the_model_ends_it_and_a_prompt_may_open_the_thinking():
    tokenizer = tiny.byte_tokenizer(["<|box|>"])
    ids = tokenizer("<|box|>A man, 1 < 2.").input_ids
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert answer(tokenizer, torch.tensor([*ids, end, pad]), [end]) == Answer("A man, 1 < 2.", True)
    assert answer(tokenizer, torch.tensor(ids), end, "Who is it?<think>\n") == Answer("<think>A man, 1 < 2.", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there may be nothing to refuse")
@pytest.mark.parametrize("kind", ["blip2", "florence", "glm4v"])
def test_8_bit_without_a_gpu_is_refused_early(kind, sources):
    with pytest.raises(ConfigError, match=r"captions\.quantise=8bit needs"):
        get_captioner(settings(kind, sources(kind), quantise="8bit"))
