"""Florence-2 (Xiao et al. 2024), small and quick, in three lengths of caption; transformers' own class, no code from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name, model_digest, one_line
from charforgex.curation.captions.loading import check_quantise, check_source, load_model, load_processor
from charforgex.curation.captions.settings import CaptionSettings

TASKS = {"caption": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}
BEAMS = 3  # as its authors use it


class FlorenceCaptioner:
    reads = frozenset()

    def __init__(self, settings: CaptionSettings):
        self.settings, self.source = settings, check_source(settings, {"florence2"})
        check_quantise(settings)
        shapes = [model_digest(self.source), settings.task, settings.max_tokens, settings.dtype, settings.quantise]
        self.name = captioner_name("florence", Path(self.source).name, shapes)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        return load_model(self.source, Florence2ForConditionalGeneration, self.settings), load_processor(self.source, Florence2Processor)

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        import torch

        model, processor = self._loaded
        task = TASKS[self.settings.task]
        inputs = processor(images=[p.convert("RGB") for p in pictures], text=[task] * len(pictures), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False, num_beams=BEAMS)
        texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [one_line(re.sub(r"<[^<>]*>", " ", text)) for text in texts]  # places (<loc_12>) are no words


def build(settings: CaptionSettings) -> FlorenceCaptioner:
    return FlorenceCaptioner(settings)
