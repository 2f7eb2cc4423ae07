"""BLIP-2 (Li et al. 2023): short plain captions. The prompt is what the caption goes on from, or a `Question: ... Answer:`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, model_digest, one_line
from charforgex.curation.captions.conversation import Questions
from charforgex.curation.captions.loading import check_quantise, check_source, load_model, load_processor
from charforgex.curation.captions.settings import CaptionSettings


class Blip2Captioner:
    def __init__(self, settings: CaptionSettings):
        self.settings, self.source = settings, check_source(settings, {"blip-2"})
        check_quantise(settings)
        self.questions = Questions({"any": (settings.prompt or "",)}, "curation.captions.prompt")
        self.reads = self.questions.reads
        shapes = [model_digest(self.source), settings.prompt, settings.max_tokens, settings.dtype, settings.quantise]
        self.name = captioner_name("blip2", Path(self.source).name, shapes)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        model = load_model(self.source, Blip2ForConditionalGeneration, self.settings)
        processor = load_processor(self.source, Blip2Processor)
        processor.num_query_tokens = model.config.num_query_tokens  # old files do not say it
        return model, processor

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        import torch

        model, processor = self._loaded
        prompts = [self.questions.ask(context, 0, []) for context in contexts]
        inputs = processor(images=[p.convert("RGB") for p in pictures], text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False, num_beams=1)
        if not model.language_model.config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [one_line(text) for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def build(settings: CaptionSettings) -> Blip2Captioner:
    return Blip2Captioner(settings)
