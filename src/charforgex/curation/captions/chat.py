"""Models that talk about pictures, by their own chat templates: Qwen3-VL, GLM-4V and others that transformers has (image-text-to-text)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, model_digest
from charforgex.curation.captions.conversation import Answer, Questions, Said, converse, shrink, without_special
from charforgex.curation.captions.loading import check_quantise, check_source, load_model, load_processor
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ModelError


class ChatCaptioner:
    def __init__(self, settings: CaptionSettings):
        self.settings, self.source = settings, check_source(settings)
        check_quantise(settings)
        self.questions = Questions(settings.turns, "curation.captions.turns")
        self.reads = self.questions.reads | {"turns"}
        shapes = [model_digest(self.source), settings.turns, settings.max_tokens, settings.dtype, settings.quantise]
        self.name = captioner_name("chat", Path(self.source).name, shapes)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText

        processor = load_processor(self.source)
        if not processor.chat_template and not processor.tokenizer.chat_template:
            raise ModelError(f"curation.captions.source={self.source} has no chat template; take its instruct or chat version.")
        return load_model(self.source, AutoModelForImageTextToText, self.settings), processor

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        small = [shrink(picture) for picture in pictures]
        return converse(self.questions, contexts, lambda indices, said: self._answer([small[index] for index in indices], said))

    def prompt(self, said: Sequence[Said]) -> str:
        """The conversation as the model reads it, up to where it answers."""
        _, processor = self._loaded
        template = processor.chat_template or processor.tokenizer.chat_template
        return processor.apply_chat_template(messages(said), chat_template=template, add_generation_prompt=True, tokenize=False)

    def _answer(self, pictures: Sequence[Image.Image], conversations: Sequence[Sequence[Said]]) -> list[Answer]:
        import torch

        model, processor = self._loaded
        prompts = [self.prompt(said) for said in conversations]
        # The template has written what begins a text (bos); the tokenizer must not write it twice.
        inputs = processor(text=prompts, images=[[p] for p in pictures], padding=True, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False, num_beams=1)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [
            answer(processor.tokenizer, row, model.generation_config.eos_token_id, prompt) for row, prompt in zip(new, prompts, strict=True)
        ]


def messages(said: Sequence[Said]) -> list[dict[str, Any]]:
    """As chat templates want them; the picture stands before the first words."""
    out = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    out[0]["content"].insert(0, {"type": "image"})
    return out


def answer(tokenizer: Any, ids: Any, end: int | list[int] | None, prompt: str = "") -> Answer:
    """Token ids behind the prompt as text. A prompt may open the thinking itself."""
    ends = set(end if isinstance(end, list) else [end])
    ids = ids.tolist()
    ended = any(token in ends for token in ids)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return Answer(opened + without_special(text, tokenizer.all_special_tokens), ended)


def build(settings: CaptionSettings) -> ChatCaptioner:
    return ChatCaptioner(settings)
