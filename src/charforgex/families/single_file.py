"""A base model from one `.safetensors` checkpoint in its original layout, offline: configs are ours, every key is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from charforgex.errors import ModelError
from charforgex.families import layouts
from charforgex.families.parts import build, read_config
from charforgex.families.sgm import Original

if TYPE_CHECKING:
    from charforgex.families.base import Family

# What checkpoints also hold and no network needs: schedules, training state, EMA copies, buffers that newer classes compute.
IGNORED = (
    "model_ema.", "denoiser.", "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "posterior_", "sqrt_", "v_pred", "ztsnr",
    "global_step", "first_stage_model.loss.", "first_stage_model.model_ema.", "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
)  # fmt: skip
TOKENIZER_HOMES = {"stabilityai/stable-diffusion-xl-base-1.0": "tokenizer/", "openai/clip-vit-large-patch14": ""}
NAMED = 6  # how many keys an error spells out


def spell(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(sorted(keys)[:NAMED]) + more


def empty(family: Family, name: str) -> nn.Module:
    """The network of our own config, with no memory behind its weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():  # buffers stay real: the text encoders compute theirs
        return build(family, name, read_config(family.configs, name))


@cache
def originals(family: Family, name: str) -> dict[str, tuple[Original, tuple[int, ...]]]:
    """Our tensor's name -> where it stands in the file, and its shape in our module."""
    config, spelling = read_config(family.configs, name), family.original[name]
    return {key: (spelling(key, config), tuple(tensor.shape)) for key, tensor in empty(family, name).state_dict().items()}


class Checkpoint:
    """One file of one family, recognised and checked against the family's full list of keys before a weight is read."""

    def __init__(self, family: Family, path: Path):
        self.family, self.header = family, layouts.read_header(path)
        layouts.require(self.header, family.name)
        self.originals = {name: originals(family, name) for name in family.original}
        known = {original.key for table in self.originals.values() for original, _ in table.values()}
        left_over = [key for key in self.header.shapes if key not in known and not key.startswith(IGNORED)]
        if left_over:
            raise ModelError(f"{path} holds keys that {family.name} has no place for: {spell(left_over)}.")

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        """One network. Raises ModelError naming the keys that are missing or of another shape."""
        from safetensors import safe_open

        table, stored = self.originals[name], self.header.shapes
        absent = {original.key: key for key, (original, _) in table.items() if original.key not in stored}
        missing = [key for key, ours in absent.items() if not self.family.is_unused(name, ours)]
        if missing:
            raise ModelError(f"{self.header.path} lacks weights of {name}: {spell(missing)}.")
        wrong = [
            f"{original.key} {stored[original.key]} instead of {original.shape(shape)}"
            for original, shape in table.values()
            if original.key in stored and stored[original.key] != original.shape(shape)
        ]
        if wrong:
            raise ModelError(f"{self.header.path} is not a {self.family.name} of the usual size: {spell(wrong)}.")
        state = {}
        with safe_open(self.header.path, framework="pt") as file:
            for key, (original, shape) in table.items():
                if original.key in stored:
                    state[key] = original.read(file.get_tensor(original.key)).to(dtype).contiguous()
                else:
                    state[key] = torch.zeros(shape, dtype=dtype)
        network = empty(self.family, name)
        network.load_state_dict(state, strict=True, assign=True)
        return network

    def scheduler_config(self) -> dict[str, Any]:
        """The family's own, with what the file says of itself: v-prediction and zero terminal SNR are marked by empty tensors."""
        config = read_config(self.family.configs, "scheduler")
        told = self.header.metadata.get("modelspec.prediction_type", "").lower()
        if "v_pred" in self.header or told in ("v", "v_prediction"):
            config["prediction_type"] = "v_prediction"
        if "ztsnr" in self.header:
            if config["prediction_type"] != "v_prediction":
                raise ModelError(f"{self.header.path} is marked `ztsnr` but not `v_pred`: zero terminal SNR needs v-prediction.")
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def group_spans(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Key -> the bytes in the file, of all tensors of these components."""
        keys = {original.key for name in names if name in self.originals for original, _ in self.originals[name].values()}
        return {key: self.header.offsets[key] for key in sorted(keys) if key in self.header}


def load_tokenizers(names: Sequence[str], checkpoint: Path, folder: str | None) -> dict[str, Any]:
    """CLIP tokenizers, which a single file does not hold: from `folder`, from beside the checkpoint, or from the local hub cache."""
    places = [Path(folder).expanduser()] if folder else [checkpoint.parent / checkpoint.stem, checkpoint.parent]
    if folder and not places[0].is_dir():
        raise ModelError(f"tokenizer={folder} is not a folder.")
    for place in [*places, *([] if folder else _cached_homes())]:
        found = {name: _tokenizer(place, name) for name in names}
        if all(tokenizer is not None for tokenizer in found.values()):
            return found
    if folder:
        raise ModelError(f"tokenizer={folder} holds no CLIP tokenizer (tokenizer.json, or vocab.json with merges.txt).")
    raise ModelError(
        f"{checkpoint} comes without its tokenizers. Put a folder `tokenizer` (tokenizer.json, or vocab.json with merges.txt) beside it, "
        f"or give tokenizer=<folder>, or run once with a network: hf download openai/clip-vit-large-patch14 vocab.json merges.txt"
    )


def _cached_homes() -> list[Path]:
    """Snapshots in the local hub cache that hold a CLIP tokenizer. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    homes = []
    for repo, folder in TOKENIZER_HOMES.items():
        vocabulary = try_to_load_from_cache(repo, f"{folder}vocab.json")
        if isinstance(vocabulary, str):
            homes.append(Path(vocabulary).parent.parent if folder else Path(vocabulary).parent)
    return homes


def _tokenizer(place: Path, name: str):
    """`place/<name>`, else `place/tokenizer`, else `place` itself. Both of SDXL's share one vocabulary and differ in the padding."""
    from transformers import CLIPTokenizer

    for home in (place / name, place / "tokenizer", place):
        if (home / "tokenizer.json").is_file() or ((home / "vocab.json").is_file() and (home / "merges.txt").is_file()):
            # given at once: set afterwards, "!" would pad without being special, and a "!" in a caption get another id than SDXL's
            padding = {} if home == place / name else {"pad_token": "!" if name == "tokenizer_2" else "<|endoftext|>"}
            tokenizer = CLIPTokenizer.from_pretrained(home, local_files_only=True, **padding)
            tokenizer.model_max_length = min(tokenizer.model_max_length, 77)  # unset it is astronomically large
            return tokenizer
    return None
