"""Models of transformers for captions: checked early, loaded late, whole or not at all, and never with torchvision."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError, ModelError


def check_source(settings: CaptionSettings, model_types: Collection[str] = ()) -> str:
    """The source of the one backend, after what can be said without loading it. A hub's name is taken as it is. Raises ModelError."""
    backend, source = settings.backends[0], settings.source_of(settings.backends[0])
    folder = Path(source).expanduser()
    if not folder.exists():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise ModelError(f"curation.captions.source={source}: there is no such folder, and a hub's name is of the form owner/model.")
        return source
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"curation.captions.source={source} is no model of transformers: its config.json cannot be read ({error})."
        ) from error
    if model_types and kind not in model_types:
        raise ModelError(
            f"curation.captions.source={source} is a {kind}; curation.captions.backend={backend} needs a "
            f"{' or '.join(sorted(model_types))}."
        )
    return str(folder)


def check_quantise(settings: CaptionSettings) -> None:
    """8-bit weights need bitsandbytes and an NVIDIA GPU. Raises ConfigError."""
    if settings.quantise is None:
        return
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError('captions.quantise=8bit needs bitsandbytes, which is not installed: pip install "charforgex[cuda]".')
    if not torch.cuda.is_available():
        raise ConfigError("curation.captions.quantise=8bit needs an NVIDIA GPU, and there is none; leave it null.")
    if settings.dtype == "float32":
        raise ConfigError(
            "curation.captions.dtype=float32 is not how 8-bit weights compute; leave it auto, or curation.captions.quantise null."
        )


def load_model(source: str, auto_class: Any, settings: CaptionSettings) -> Any:
    """The model on the best device, in eval mode. Raises ModelError, also if the file lacks weights, which would be drawn at random."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": torch.bfloat16 if device == "cuda" else torch.float32}.get(settings.dtype) or getattr(torch, settings.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if settings.quantise:
        from transformers import BitsAndBytesConfig

        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": 0}}
    try:
        model, info = auto_class.from_pretrained(source, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"curation.captions.source={source} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"curation.captions.source={source} lacks {len(missing)} of the weights that {type(model).__name__} has, such as {missing[0]}."
            " It is of another kind or layout; take the one converted for transformers."
        )
    return (model if settings.quantise else model.to(device)).eval()


def load_processor(source: str, processor_class: type | None = None) -> Any:
    """Tokenizer, image processor and chat template of a model, with Pillow for the pixels and padding on the left.

    Processors that also take videos cannot be made without torchvision, even to see pictures (transformers 5.23); these are made without
    their videos.
    """
    from transformers import AutoImageProcessor

    try:
        processor_class = processor_class or _processor_class(source)
        processor = _without_videos(processor_class).from_pretrained(source, trust_remote_code=False)
        # Where torchvision is installed its processors would be taken, whose pixels differ: captions must not depend on that.
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise ModelError(f"The processor of curation.captions.source={source} cannot be loaded: {error}") from error
    processor.tokenizer.padding_side = "left"  # answers are written on behind the question
    return processor


def _processor_class(source: str) -> type:
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"a {config.model_type} does not talk about pictures")
    return PROCESSOR_MAPPING[type(config)]


def _without_videos(processor_class: type) -> type:
    attributes = [name for name in processor_class.get_attributes() if "video" not in name]
    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda cls: attributes)})
