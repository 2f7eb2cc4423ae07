"""Where a base model's files are: the embedded one, a diffusers folder, a hub id, a `.safetensors` or `.gguf` file, or several of them.

Nothing here loads weights. Only safetensors, GGUF and JSON are ever opened, because a pickled file can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import charforgex
from charforgex.errors import ModelError

EMBEDDED = "charworld"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CHECKPOINTS = (".safetensors", ".gguf")
LOCAL_VARIANTS = (None, "fp16", "bf16")
HUB_VARIANTS = ("fp16", None, "bf16")  # half the download; bases are published from training in half precision


@dataclass(frozen=True)
class Source:
    """`path` is a diffusers folder or a single file; `variants` is the order in which a folder's weights are preferred."""

    address: str
    path: Path
    variants: tuple[str | None, ...] = LOCAL_VARIANTS

    @property
    def is_single_file(self) -> bool:
        return self.path.is_file()

    @property
    def is_local(self) -> bool:
        """Not a hub's snapshot, which has what was asked for so far."""
        return self.variants is not HUB_VARIANTS


def addresses(source: str) -> list[str]:
    """The single addresses of `a.safetensors+b.safetensors`. Paths that hold a plus themselves go between ` + `."""
    source = str(source)
    if Path(source).expanduser().exists():
        return [source]
    return [address.strip() for address in source.split(" + " if " + " in source else "+")]


def resolve(address: str, family_name: str, components: Collection[str], lone: Collection[str] = ()) -> Source:
    """Find a base model's files, downloading those of `components` alone if it is a hub id. Raises ModelError.

    A folder or repository may hold one component alone, if its class is among `lone`.
    """
    address = str(address)
    if address == EMBEDDED:
        path = Path(charforgex.__file__).parent / "charworld" / "assets" / family_name
        if not path.is_dir():
            raise ModelError(f"source={address}: no base for {family_name} is embedded; say where one is, as family={family_name} does.")
        if not (path / "model_index.json").is_file():
            raise ModelError(f"source={address}: no base for {family_name} is embedded at {path}; reinstall charforgex.")
        return Source(address, path)
    path = Path(address).expanduser()
    if path.is_file():
        return Source(address, _checked_file(path))
    if path.is_dir():
        return Source(address, _checked_folder(path, lone))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", address) and path.suffix not in CHECKPOINTS:
        return Source(address, _hub_folder(address, components, bool(lone)), HUB_VARIANTS)
    raise ModelError(
        f"source={address} does not exist.{_nearest(path)} A diffusers folder, a .safetensors file, a hub id or {EMBEDDED} is wanted."
    )


def _checked_file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise ModelError(f"{path} is a pickled checkpoint, which can run code when it is opened; convert it to .safetensors first.")
    if path.suffix not in CHECKPOINTS:
        raise ModelError(f"{path} is not a .safetensors checkpoint.")
    return path


def _checked_folder(path: Path, lone: Collection[str]) -> Path:
    is_lone = bool(lone) and (path / "config.json").is_file() and read_json(path / "config.json").get("_class_name") in lone
    if not is_lone and not (path / "model_index.json").is_file():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        hint = f" Did you mean the checkpoint {path / files[0]}?" if files else _nearest(path / "model_index.json")
        raise ModelError(f"{path} is not a diffusers folder: it has no model_index.json.{hint}")
    return path


def _nearest(path: Path) -> str:
    """A hint at what does exist where `path` does not."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {parent}."
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    near = get_close_matches(path.name, names, n=3)
    return f" Near it: {', '.join(str(parent / name) for name in near)}." if near else ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.")
    return value


@dataclass(frozen=True)
class Weights:
    """The weight files of one component, as names inside its folder, with the variant that `from_pretrained` needs to find them."""

    variant: str | None
    entry: str  # the file, or the index of a sharded one

    @property
    def is_sharded(self) -> bool:
        return self.entry.endswith(".json")


def choose_weights(names: Collection[str], variants: Sequence[str | None], where: str) -> Weights:
    """Which of the files of a component's folder to load. Raises ModelError if there are none in safetensors."""
    for variant in variants:
        for stem in STEMS:
            dotted = f".{variant}" if variant else ""
            for entry in (f"{stem}{dotted}.safetensors", f"{stem}.safetensors.index{dotted}.json"):
                if entry in names:
                    return Weights(variant, entry)
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled:
        raise ModelError(
            f"{where} holds its weights only as {', '.join(pickled)}, which can run code when opened; only .safetensors are read. "
            "Save it again with pipeline.save_pretrained(folder, safe_serialization=True)."
        )
    raise ModelError(f"{where} holds no weights (.safetensors); the download or copy is incomplete.")


def component_weights(folder: Path, variants: Sequence[str | None]) -> tuple[Weights, list[Path]]:
    """The choice, and all of its files with the index first. Raises ModelError if a shard is missing."""
    weights = choose_weights([file.name for file in folder.iterdir()], variants, str(folder))
    files = [folder / weights.entry]
    if weights.is_sharded:
        shards = sorted(set(read_json(files[0]).get("weight_map", {}).values()))
        if not shards:
            raise ModelError(f"{files[0]} names no files.")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}; the download or copy is incomplete.")
        files += [folder / shard for shard in shards]
    return weights, files


def _hub_folder(repo: str, components: Collection[str], may_be_lone: bool) -> Path:
    """The local snapshot of a hub repository, holding the files of `components`. Works from the cache alone when offline."""
    from httpx2 import HTTPError  # huggingface_hub's own client, whose errors come through
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    local = _nearest(Path(repo)) if Path(repo).parent.is_dir() else ""
    try:
        names = [file.rfilename for file in HfApi().model_info(repo, timeout=20).siblings or ()]
        return Path(snapshot_download(repo, allow_patterns=_wanted(repo, names, components, may_be_lone)))
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repo}"
        raise ModelError(f"source={repo} is gated: accept its licence at {page}, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"source={repo} is neither a local path nor a hub repository that you may read.{local}") from error
    except (OSError, HTTPError) as unreachable:  # offline by choice or by accident: what was downloaded before will do
        return _cached_folder(repo, components, unreachable, local, may_be_lone)


def _cached_folder(repo: str, components: Collection[str], unreachable: Exception, local: str, may_be_lone: bool) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    way_out = f"Run `hf download {repo}` where there is a network, or give the path of a folder or a .safetensors file.{local}"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({type(unreachable).__name__})"
    index = try_to_load_from_cache(repo, "model_index.json")
    config = try_to_load_from_cache(repo, "config.json")
    if may_be_lone and not isinstance(index, str) and isinstance(config, str):
        return Path(config).parent
    if not isinstance(index, str):
        raise ModelError(f"source={repo} is no local path and not in the hub's local cache, and {reason}. {way_out}") from unreachable
    folder = Path(index).parent
    listed = read_json(Path(index))
    absent = [name for name in components if not (folder / name).is_dir() and any(listed.get(name, (True,)) or ())]
    if absent:
        raise ModelError(f"source={repo} is in the hub's local cache without {', '.join(absent)}, and {reason}. {way_out}") from unreachable
    return folder


def _wanted(repo: str, names: Sequence[str], components: Collection[str], may_be_lone: bool = False) -> list[str]:
    """The files of a repository that loading `components` needs: their JSON and text files and one set of weights."""
    if may_be_lone and "config.json" in names and "model_index.json" not in names:
        return ["config.json", choose_weights(names, HUB_VARIANTS, repo).entry]  # motion modules, which are small: never in shards
    if "model_index.json" not in names:
        raise ModelError(f"source={repo} has no model_index.json; download its .safetensors file and give the path of that.")
    wanted = ["model_index.json", *(name for name in names if re.fullmatch(r"[^/]+/config\.json", name))]
    for component in components:
        inside = [name.split("/", 1)[1] for name in names if name.startswith(f"{component}/")]
        wanted += [f"{component}/{name}" for name in inside if name.endswith((".json", ".txt", ".model")) and ".index." not in name]
        if not any(name.endswith((".safetensors", *PICKLES)) for name in inside):
            continue
        weights = choose_weights(inside, HUB_VARIANTS, f"{repo}/{component}")
        wanted.append(f"{component}/{weights.entry}")
        if weights.is_sharded:
            is_shard: Callable[[str], object] = re.compile(
                rf"({'|'.join(STEMS)}){re.escape('.' + weights.variant) if weights.variant else ''}-\d+-of-\d+\.safetensors"
            ).fullmatch
            wanted += [f"{component}/{name}" for name in inside if is_shard(name)]
    return wanted
