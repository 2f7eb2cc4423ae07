"""Base models loaded from wherever they are, with every weight accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from charforgex.errors import ModelError
from charforgex.families.folders import Folder
from charforgex.families.quantized import Packing, load_packed, pack_network
from charforgex.families.single_file import Checkpoint
from charforgex.families.sources import addresses, resolve
from charforgex.families.tokenizers import find_tokenizers, load_tokenizer
from charforgex.types import Components

if TYPE_CHECKING:
    from charforgex.families.base import Family

TINY = "tiny"


class Base:
    """The folders and files that a source names. The first of them that holds a component gives it.

    `names` are the components that are wanted: of a hub repository, no others are downloaded. Raises ModelError for a source that
    is none, is of another family, or adds nothing.
    """

    def __init__(self, family: Family, source: str, names: Sequence[str], tokenizer: str | None = None):
        self.family, self.source, self.tokenizer = family, str(source), tokenizer
        self.givers: dict[str, Folder | Checkpoint] = {}
        self.files: list[Path] = []
        for address in addresses(source):
            wanted = [*(name for name in names if name not in self.givers), "scheduler"]
            found = resolve(address, family.name, wanted, family.lone)
            place = family.opened(found)
            if not place.held - self.givers.keys():
                raise ModelError(f"{address} adds nothing: what it holds comes from those before it in source={source}.")
            if found.is_single_file:
                self.files.append(found.path)
            for name in place.held:
                self.givers.setdefault(name, place)
        self.givers = family.joined(self.givers, self.source)
        if family.denoiser_name not in self.givers:
            held = ", ".join(sorted(self.givers))
            raise ModelError(
                f"{source} holds {held} and no {family.denoiser_name} of {family.name}; put the file that has it in front, with +."
            )

    @property
    def main(self) -> Folder | Checkpoint:
        """Whose scheduler and model_index.json count."""
        return self.givers[self.family.denoiser_name]

    def is_absent(self, name: str) -> bool:
        """Whether this base does without a component, with its tokenizer if it is a text encoder."""
        return (
            name.replace("tokenizer", "text_encoder") in self.family.optional
            and name.replace("tokenizer", "text_encoder") not in self.givers
        )

    def check(self, names: Sequence[str]) -> None:
        """Raises ModelError unless each of the components is here, or one that the family can do without."""
        lacking = [name for name in names if name not in self.givers and not name.startswith("tokenizer") and not self.is_absent(name)]
        encoders = [name for name in self.family.components["text"] if name.startswith("text_encoder")]
        if set(encoders) & set(names) and not set(encoders) & self.givers.keys():
            lacking = sorted({*lacking, *encoders})
        if lacking:
            example = {"vae": "ae.safetensors"}.get(lacking[0], "clip_l.safetensors+t5xxl_fp16.safetensors")
            raise ModelError(
                f"{self.source} holds no {', '.join(lacking)}, which {self.family.name} needs; add what has them "
                f"with a plus: source={self.source}+{example}"
            )
        for name in names:
            if name in self.givers:
                self.givers[name].check(name)
        self.find_tokenizers([name for name in names if name.startswith("tokenizer")])

    def find_tokenizers(self, names: Sequence[str]) -> dict[str, Path]:
        """The folders of those that no folder of the source has itself."""
        names = [name for name in names if name not in self.givers and not self.is_absent(name)]
        if not self.files and self.tokenizer is not None:
            raise ModelError(f"tokenizer={self.tokenizer} has no effect: {self.source} has its own tokenizers.")
        return find_tokenizers(self.family, names, self.files, self.tokenizer) if names else {}

    def config(self, name: str) -> dict[str, Any]:
        """Of a component, also of one that nobody asked for and only our own configs know."""
        return self.givers.get(name, self.main).config(name)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The plain values of model_index.json."""
        return {key: value for key, value in self.main.index().items() if not key.startswith("_") and not isinstance(value, (list, dict))}

    def facts(self) -> dict[str, Any]:
        return self.index | self.family.facts(
            {name: self.config(name) for name in (self.family.denoiser_name, *self.family.components["vae"])}
        )

    def scheduler(self):
        import diffusers

        config = self.main.scheduler_config()
        name = config.get("_class_name", "")
        cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if cls is None:
            raise ModelError(f"The scheduler {name!r} of {self.main.path} is not one that diffusers has.")
        return cls.from_config(config)


def load_components(
    family: Family, source: str, names: Sequence[str], dtype: torch.dtype, device: str = "cpu", tokenizer: str | None = None,
    packing: Packing | None = None,
) -> Components:  # fmt: skip
    """The named components and the scheduler. Without names, everything is looked for and nothing else loaded. See `Family.load`."""
    if str(source) == TINY:
        parts = family.tiny()
        parts.drop(*(name for name in list(parts.modules) if name not in (*names, "scheduler")))
        for name, network in parts.networks().items():
            config = network.config
            network.to(safe_dtype(name, config if isinstance(config, Mapping) else config.to_dict(), dtype))
        if packing is not None and family.denoiser_name in parts:
            pack_network(family, parts.denoiser, packing.kind, device)
        return finish(parts, device)
    base = Base(family, source, names, tokenizer)
    base.check(names or [name for group in family.components.values() for name in group])
    modules: dict[str, Any] = {"scheduler": base.scheduler()}
    wanted = [name for name in names if name.startswith("tokenizer") and not base.is_absent(name)]
    if tokenizer is not None and names and not wanted:
        raise ModelError(f"tokenizer={tokenizer} has no effect: no text encoder is loaded.")
    homes = base.find_tokenizers(wanted)
    for name in wanted:
        modules[name] = load_tokenizer(family, name, homes[name]) if name in homes else base.givers[name].tokenizer(name)
    parts = Components(base.source, family.denoiser_name, modules, base.facts())
    family.process(parts)  # raises now if the scheduler is one that training cannot follow
    for name in names:
        if name.startswith("tokenizer") or base.is_absent(name):
            continue
        if packing is not None and name == family.denoiser_name:
            digest = weights_hash(family, source, "denoiser", tokenizer)
            modules[name] = load_packed(family, base, packing, dtype, device, digest)
        else:
            modules[name] = base.givers[name].load(name, safe_dtype(name, base.config(name), dtype))
    _check_vocabulary(parts)
    return finish(parts, device)


def finish(parts: Components, device: str = "cpu") -> Components:
    """What all parts of a frozen base share: eval mode, no gradients, one device."""
    for network in parts.networks().values():
        network.eval().requires_grad_(False).to(device)
    return parts


def safe_dtype(name: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """`dtype`, unless it is float16 and the part overflows in it.

    The stock VAEs do and say so by `force_upcast`: they stay in float32. T5-XXL was trained in bfloat16, whose range it uses.
    """
    if dtype == torch.float16 and name == "vae" and config.get("force_upcast"):
        return torch.float32
    return torch.bfloat16 if dtype == torch.float16 and config.get("model_type") == "t5" else dtype


def denoiser_config(family: Family, source: str) -> dict[str, Any]:
    """The denoiser's config, by which a LoRA file is read, without loading any weights. Raises ModelError."""
    if str(source) == TINY:
        return dict(family.tiny().denoiser.config)
    return Base(family, source, []).main.config(family.denoiser_name)


def _check_vocabulary(parts: Components) -> None:
    for name, encoder in parts.networks().items():
        tokenizer = parts.modules.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and tokenizer is not None and len(tokenizer) > encoder.config.vocab_size:
            raise ModelError(
                f"{name.replace('text_encoder', 'tokenizer')} has {len(tokenizer)} tokens, {name} of {parts.source} knows "
                f"{encoder.config.vocab_size}: they do not belong together."
            )


def weights_hash(family: Family, source: str, group: str, tokenizer: str | None = None) -> str:
    """What identifies a group ("denoiser", "vae" or "text") for cache keys: a SHA-256 over its weights and configs.

    Nothing is loaded. Of a single file only the group's own bytes count, so two checkpoints that share a VAE share its cache.
    """
    names = family.components[group]
    if str(source) == TINY:
        return _tiny_hash(family, names)
    base = Base(family, source, list(names), tokenizer)
    base.check(list(names))
    homes = base.find_tokenizers([name for name in names if name.startswith("tokenizer")])
    digest = hashlib.sha256(f"{family.name}/{group}".encode())
    for name in names:
        if base.is_absent(name):
            digest.update(f"{name} absent".encode())
        elif name in homes:
            digest.update(f"{name} {_vocabulary(load_tokenizer(family, name, homes[name]))}".encode())
        else:
            digest.update(f"{name} {base.givers[name].digest(name)}".encode())
    digest.update(json.dumps(base.index, sort_keys=True).encode())
    return digest.hexdigest()


def _vocabulary(tokenizer) -> str:
    return json.dumps([tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.model_max_length], sort_keys=True)


def _tiny_hash(family: Family, names: Sequence[str]) -> str:
    parts, digest = family.tiny(), hashlib.sha256()
    for name in names:
        module = parts[name]
        if name.startswith("tokenizer"):
            digest.update(_vocabulary(module).encode())
        else:
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
