"""A base on disk in each form that it comes in, all of the tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from charforgex.families import registry
from charforgex.families.base import Family
from charforgex.families.motion_base import Motion
from charforgex.families.sdxl import Sdxl
from charforgex.families.single_file import tables
from charforgex.types import Components


def listing(family: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a published all-in-one checkpoint. In keys/, `{19}` stands for the numbers 0 to 18."""
    found = {}
    for key, shape in json.loads((Path(__file__).parent / "keys" / f"{family}.json").read_text()).items():
        repeated = re.search(r"\{(\d+)\}", key)
        for number in range(int(repeated[1]) if repeated else 1):
            found[key.replace(repeated[0], str(number)) if repeated else key] = tuple(shape)
    return found


def motion_listing(variant: str, half: type[Motion] = Motion) -> dict[str, tuple[int, ...]]:
    """Of AnimateDiff's published motion modules, from the very names that it is read by; test_motion_base holds those to diffusers'."""
    _, _, table = tables(half, "motion_adapter", variant)[0]
    keys = {original.key: shape for original, shape in table.values()}
    second = {k.replace("attention_blocks.0.pos", "attention_blocks.1.pos"): s for k, s in keys.items() if "pos_encoder" in k}
    return keys | second


def write_header(path: Path, shapes, metadata=None, dtype: str = "F16") -> Path:
    """A safetensors file of these shapes whose data is a hole: gigabytes that take no space."""
    table, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(torch.Size(shape).numel())
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def original_tensors(family: Family, component: str, state: dict[str, torch.Tensor], config, number: int = 0) -> dict[str, torch.Tensor]:
    """A component's weights as a single file stores them, the inverse of what loading does; `number` chooses the prefix."""
    spelling = family.original[component][0]
    names = spelling.names({key: tuple(tensor.shape) for key, tensor in state.items()}, config)
    tensors, joined = {}, {}
    for name, original in names.items():
        key, tensor = spelling.prefixes[number] + original.key, state[name]
        if original.rows is not None:
            joined.setdefault(key, {})[original.rows[0]] = tensor
        elif original.transposed:
            tensors[key] = tensor.T.contiguous()
        elif original.swapped:
            tensors[key] = torch.cat(tensor.chunk(2)[::-1])
        else:
            tensors[key] = tensor[..., None, None].contiguous() if original.convolved else tensor.clone()
    return tensors | {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in joined.items()}


class Bench:
    """A family whose single files are of its tiny model's size, with that model, as a folder too."""

    def __init__(self, name: str, home: Path):
        plain = registry.get(name)
        self.parts: Components = plain.tiny(seed=7)
        if name == "sd3":  # what its single files say of CLIP-L's projection
            self.parts["text_encoder"].text_projection.weight.data = torch.eye(32)
        self.folder = home / f"tiny-{name}"
        plain.pipeline(self.parts).save_pretrained(self.folder)
        self.family: Family = type(f"Small{name}", (type(plain),), {"configs": self.folder, "variants": ("",)})()

    def tensors(self, component: str, number: int = 0) -> dict[str, torch.Tensor]:
        network = self.parts[component]
        config = network.config if component in ("unet", "vae") else {}
        return original_tensors(self.family, component, network.state_dict(), config, number)

    def whole(self, *components: str) -> dict[str, torch.Tensor]:
        """The tensors of an all-in-one file of these components, of all if none is named."""
        return {k: t for component in components or self.family.original for k, t in self.tensors(component).items()}


@pytest.fixture(scope="session")
def benches(tmp_path_factory):
    """Makes the bench of a family by name, once. Its folder is shared: copy it before changing it."""
    made: dict[str, Bench] = {}
    return lambda name: made[name] if name in made else made.setdefault(name, Bench(name, tmp_path_factory.mktemp("bases")))


@pytest.fixture(scope="session")
def tiny_parts(benches) -> Components:
    return benches("sdxl").parts


@pytest.fixture(scope="session")
def tiny_folder(benches) -> Path:
    return benches("sdxl").folder


@pytest.fixture(scope="session")
def small_family(benches) -> Sdxl:
    return benches("sdxl").family


@pytest.fixture
def checkpoint(tmp_path, benches, tiny_folder):
    """Writes a single file of SDXL with `changes` (key -> tensor, None to leave it out), beside a tokenizer folder. Returns its path."""
    (tmp_path / "tokenizer").symlink_to(tiny_folder / "tokenizer")

    def write(changes=None, metadata=None, name="base.safetensors") -> Path:
        tensors = benches("sdxl").whole() | (changes or {})
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp_path / name, metadata)
        return tmp_path / name

    return write


def same_networks(one: Components, two: Components) -> None:
    assert one.networks().keys() == two.networks().keys()
    for name, network in one.networks().items():
        ours, theirs = network.state_dict(), two[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's cache in a folder of the test, and no network. Returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_snapshot(hub: Path, repo: str, source: Path, *names: str) -> Path:
    import shutil

    home = hub / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in names:
        target = snapshot / name
        shutil.copytree(source / name, target) if (source / name).is_dir() else shutil.copy(source / name, target)
    return snapshot
