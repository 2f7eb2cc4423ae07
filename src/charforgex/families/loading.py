"""Base models loaded from wherever they are, with every weight accounted for."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from charforgex.errors import ModelError
from charforgex.families import layouts
from charforgex.families.parts import component_class, library, read_config
from charforgex.families.single_file import Checkpoint, load_tokenizers, spell
from charforgex.families.sources import Source, component_weights, read_json, resolve
from charforgex.types import Components

if TYPE_CHECKING:
    from charforgex.families.base import Family

TINY = "tiny"
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
UNACCOUNTED = {
    "missing_keys": "lacks the weights",
    "unexpected_keys": "has no place for the weights",
    "mismatched_keys": "has other shapes for the weights",
}


def load_components(
    family: Family, source: str, names: Sequence[str], dtype: torch.dtype, device: str = "cpu", tokenizer: str | None = None
) -> Components:
    """The named components and the scheduler. See `Family.load`."""
    if str(source) == TINY:
        parts = family.tiny()
        parts.drop(*(name for name in list(parts.modules) if name not in (*names, "scheduler")))
        for network in parts.networks().values():
            network.to(dtype)
        return finish(parts, device)
    found = resolve(source, family.name, [*names, "scheduler"])
    if found.is_single_file:
        parts = _from_file(family, found, names, dtype, tokenizer)
    else:
        if tokenizer is not None:
            raise ModelError(f"tokenizer={tokenizer} has no effect: {source} has its own tokenizers.")
        parts = _from_folder(family, found, names, dtype)
    _check_vocabulary(parts)
    family.process(parts)  # raises now if the scheduler is one that training cannot follow
    return finish(parts, device)


def finish(parts: Components, device: str = "cpu") -> Components:
    """What all parts of a frozen base share: eval mode, no gradients, one device."""
    for network in parts.networks().values():
        network.eval().requires_grad_(False).to(device)
    return parts


def safe_dtype(name: str, config: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The stock SDXL VAE overflows in float16 and says so by `force_upcast`: it stays in float32 then."""
    return torch.float32 if dtype == torch.float16 and name == "vae" and config.get("force_upcast") else dtype


def _from_file(family: Family, source: Source, names: Sequence[str], dtype: torch.dtype, tokenizer: str | None) -> Components:
    checkpoint = Checkpoint(family, source.path)
    configs = {name: read_config(family.configs, name) for name in family.original}
    scheduler = checkpoint.scheduler_config()
    modules: dict[str, Any] = {"scheduler": _scheduler(scheduler, source.path)}
    wanted = [name for name in names if name.startswith("tokenizer")]
    if wanted:
        modules |= load_tokenizers(wanted, source.path, tokenizer)
    elif tokenizer is not None:
        raise ModelError(f"tokenizer={tokenizer} has no effect: no text encoder is loaded.")
    for name in names:
        if name in family.original:
            modules[name] = checkpoint.load(name, safe_dtype(name, configs[name], dtype))
    return Components(
        source.address, family.denoiser_name, modules, _plain(read_json(family.configs / "model_index.json")) | family.facts(configs)
    )


def _from_folder(family: Family, source: Source, names: Sequence[str], dtype: torch.dtype) -> Components:
    index = _checked_index(family, source.path)
    configs = {name: read_config(source.path, name) for name in (family.denoiser_name, *family.components["vae"])}
    modules: dict[str, Any] = {"scheduler": _scheduler(read_config(source.path, "scheduler"), source.path)}
    for name in names:
        folder = source.path / name
        if not folder.is_dir():
            raise ModelError(f"{source.path} has no folder {name}, which {family.name} needs; the download or copy is incomplete.")
        modules[name] = _tokenizer(family, folder, name) if name.startswith("tokenizer") else _network(family, source, name, dtype)
    return Components(source.address, family.denoiser_name, modules, _plain(index) | family.facts(configs))


def _checked_index(family: Family, folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in family.pipelines:
        raise ModelError(f"{folder} holds a {pipeline}, not a base of family {family.name} ({' or '.join(family.pipelines)}).")
    return index


def _plain(index: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, (list, dict))}


def _scheduler(config: dict[str, Any], where: Path):
    import diffusers

    name = config.get("_class_name", "")
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        raise ModelError(f"The scheduler {name!r} of {where} is not one that diffusers has.")
    return cls.from_config(config)


def _tokenizer(family: Family, folder: Path, name: str):
    if not any((folder / file).is_file() for file in VOCABULARIES):  # transformers would make an empty one
        raise ModelError(f"{folder} holds no vocabulary ({' or '.join(VOCABULARIES)}); the download or copy is incomplete.")
    try:
        return component_class(family, name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error


def _network(family: Family, source: Source, name: str, dtype: torch.dtype):
    folder = source.path / name
    config = read_config(source.path, name)
    weights, files = component_weights(folder, source.variants)
    for file in files[weights.is_sharded :]:
        layouts.read_header(file)
    options = {"diffusers": {"low_cpu_mem_usage": True}, "transformers": {}}[library(family, name)]
    try:
        with quiet():
            network, account = component_class(family, name).from_pretrained(
                folder, variant=weights.variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
                dtype=safe_dtype(name, config, dtype), **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"{name} of {source.path} cannot be loaded: {error}") from error
    for kind, what in UNACCOUNTED.items():
        if account.get(kind):
            raise ModelError(f"{name} of {source.path} {what} {spell([str(key) for key in account[kind]])}.")
    return network


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and warnings: what they would say of weights we raise, and the rest helps nobody."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in (diffusers_logging, transformers_logging)
    ]
    for logging, _, _ in before:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity, shows_progress in before:
            logging.set_verbosity(verbosity)
            if shows_progress:
                logging.enable_progress_bar()


def denoiser_config(family: Family, source: str) -> dict[str, Any]:
    """The denoiser's config, by which a LoRA file is read, without loading any weights. Raises ModelError."""
    if str(source) == TINY:
        return dict(family.tiny().denoiser.config)
    found = resolve(source, family.name, [])
    return read_config(family.configs if found.is_single_file else found.path, family.denoiser_name)


def _check_vocabulary(parts: Components) -> None:
    for suffix in ("", "_2"):
        tokenizer, encoder = parts.modules.get(f"tokenizer{suffix}"), parts.modules.get(f"text_encoder{suffix}")
        if tokenizer is not None and encoder is not None and len(tokenizer) > encoder.config.vocab_size:
            raise ModelError(
                f"tokenizer{suffix} has {len(tokenizer)} tokens, text_encoder{suffix} of {parts.source} knows {encoder.config.vocab_size}: "
                "they do not belong together."
            )


def weights_hash(family: Family, source: str, group: str, tokenizer: str | None = None) -> str:
    """What identifies a group ("denoiser", "vae" or "text") for cache keys: a SHA-256 over its weights and configs.

    Nothing is loaded. Of a single file only the group's own bytes count, so two checkpoints that share a VAE share its cache.
    """
    names = family.components[group]
    if str(source) == TINY:
        return _tiny_hash(family, names)
    found = resolve(source, family.name, names)
    digest = hashlib.sha256(f"{family.name}/{group}".encode())
    if found.is_single_file:
        checkpoint = Checkpoint(family, found.path)
        header, stamp = checkpoint.header, _stamp(found.path)
        for key, span in checkpoint.group_spans(names).items():
            digest.update(f"{key} {header.dtypes[key]} {header.shapes[key]} {_span_hash(stamp, *span)}".encode())
        for name in names:
            if name in family.original:
                digest.update(json.dumps(read_config(family.configs, name), sort_keys=True).encode())
            elif name.startswith("tokenizer"):
                tokens = load_tokenizers([name], found.path, tokenizer)[name]
                digest.update(json.dumps([tokens.get_vocab(), tokens.pad_token], sort_keys=True).encode())
        index = read_json(family.configs / "model_index.json")
    else:
        for name in names:
            for file in _component_files(found, name):
                digest.update(f"{name}/{file.name} {_file_hash(_stamp(file))}".encode())
        index = _checked_index(family, found.path)
    digest.update(json.dumps(_plain(index), sort_keys=True).encode())
    return digest.hexdigest()


def _component_files(source: Source, name: str) -> list[Path]:
    folder = source.path / name
    if not folder.is_dir():
        raise ModelError(f"{source.path} has no folder {name}; the download or copy is incomplete.")
    plain = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt") and ".index." not in file.name]
    return plain if name.startswith("tokenizer") else [*plain, *component_weights(folder, source.variants)[1]]


Stamp = tuple[str, int, int]


def _stamp(file: Path) -> Stamp:
    """A file whose size and time are unchanged is not read again within a process."""
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns


@cache
def _file_hash(stamp: Stamp) -> str:
    with open(stamp[0], "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _span_hash(stamp: Stamp, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with open(stamp[0], "rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(1 << 24, end - start))
            digest.update(block)
            start += len(block)
    return digest.hexdigest()


def _tiny_hash(family: Family, names: Sequence[str]) -> str:
    parts, digest = family.tiny(), hashlib.sha256()
    for name in names:
        module = parts[name]
        if name.startswith("tokenizer"):
            digest.update(json.dumps([module.get_vocab(), module.pad_token], sort_keys=True).encode())
        else:
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
