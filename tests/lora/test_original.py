"""A LoRA file in original names changes the original network as ours changes diffusers': at tiny size, by weights put together by hand."""

import json

import pytest
import torch
from diffusers.loaders import single_file_utils

from charforgex.errors import LoraError
from charforgex.families.flux import Flux
from charforgex.families.parts import adaptable
from charforgex.families.sd3 import Sd3
from charforgex.families.sdxl import Sdxl
from charforgex.lora import formats, writing
from charforgex.lora.inject import load_adapter
from charforgex.lora.names import Names
from charforgex.lora.state import Lora, LoraLayer
from charforgex.types import Crop
from tests.lora import published

FAMILIES = {"flux": Flux(), "sd3": Sd3()}
SDXL_REAL = json.loads((Sdxl().configs / "unet" / "config.json").read_text())
TABLES = {"flux": published.flux(1, 1), "sd3": published.sd3(2, 1)}  # of the tiny networks


def every_layer(family, parts, paths=None, rank=2, alpha=1.5):
    """A layer on each module that can be adapted, each of other values."""
    generator = torch.Generator().manual_seed(4)
    layers = {}
    for path in paths or family.lora_names(parts.denoiser.config):
        shape = parts.denoiser.get_submodule(path).weight.shape
        down, up = (
            torch.randn(rank, *shape[1:], generator=generator),
            torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator),
        )
        layers[f"transformer.{path}"] = LoraLayer(down, up * 0.1, alpha)
    return Lora(layers)


@torch.no_grad()
def predict(family, parts):
    generator = torch.Generator().manual_seed(7)
    text = family.encode_text(parts, ["a red cat", "a dog"])
    return family.denoise(
        parts.denoiser, torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.8]), text, Crop.whole(2, 64, 64)
    )


def swapped(weight):
    one, two = weight.chunk(2)
    return torch.cat([two, one])


@torch.no_grad()
def change_original(parts, table, tensors, named, ends):
    """What a tool does that knows only the original network: each weight of it += alpha / rank * up @ down."""
    last = parts.denoiser.config.num_layers - 1
    left = set(tensors)
    for theirs, ours in table.items():
        if named(theirs) + ends.down not in tensors:
            continue
        modules = [parts.denoiser.get_submodule(path) for path in ours]
        weight = torch.cat([module.weight for module in modules])
        weight = swapped(weight) if published.is_swapped(theirs, last) else weight
        down, up = (tensors[named(theirs) + end] for end in (ends.down, ends.up))
        alpha = tensors[named(theirs) + ends.alpha] if ends.alpha else down.shape[0]
        assert up.shape[0] == weight.shape[0]
        weight = weight + (alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))).view(weight.shape)
        weight = swapped(weight) if published.is_swapped(theirs, last) else weight
        for module, part in zip(modules, weight.split([module.weight.shape[0] for module in modules]), strict=True):
            module.weight.copy_(part)
        left -= {named(theirs) + end for end in (ends.down, ends.up, ends.alpha) if end}
    assert not left


@pytest.mark.parametrize(
    ("name", "format"), [("flux", "kohya"), ("flux", "comfyui"), ("flux", "xlabs"), ("sd3", "kohya"), ("sd3", "comfyui")]
)
def test_the_original_network_is_changed_alike(name, format, tmp_path):
    family = FAMILIES[name]
    table = published.flux_xlabs(1, 1) if format == "xlabs" else TABLES[name]
    named = {
        "kohya": lambda theirs: "lora_unet_" + theirs.replace(".", "_"),
        "comfyui": lambda theirs: "diffusion_model." + theirs,
        "xlabs": lambda theirs: theirs,
    }[format]
    ours, original = family.tiny(), family.tiny()
    paths = [path for paths in table.values() for path in paths]
    lora = every_layer(family, ours, paths)
    path = writing.write(lora, tmp_path / "x.safetensors", format, family, ours.denoiser.config, torch.float32)
    tensors = writing.to_tensors(lora, format, family, ours.denoiser.config, torch.float32)
    assert load_adapter(ours, formats.read(path, family, ours.denoiser.config), "x") == len(lora)
    change_original(original, table, tensors, named, formats.WRITTEN[format])
    prediction = predict(family, ours)
    torch.testing.assert_close(predict(family, original), prediction, rtol=0, atol=1e-5)
    assert not torch.allclose(predict(family, family.tiny()), prediction, atol=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_has_its_published_place(name):
    parts = FAMILIES[name].tiny()
    places = FAMILIES[name].lora_names(parts.denoiser.config)
    assert {path: place.path for path, place in places.items()} == {o: theirs for theirs, ours in TABLES[name].items() for o in ours}
    for theirs, ours in TABLES[name].items():
        start = 0
        for path in ours:
            rows = parts.denoiser.get_submodule(path).weight.shape[0]
            assert places[path].rows == ((start, start + rows) if len(ours) > 1 else None)
            assert places[path].swapped == published.is_swapped(theirs, parts.denoiser.config.num_layers - 1)
            start += rows


# ---- against diffusers' converters of whole checkpoints, at real size ----


def narrow(family, config, rank=2):
    """Layers with the real numbers of rows and 2 columns: converters look at rows alone, and the values stay few."""
    generator = torch.Generator().manual_seed(6)
    shapes = {path: shape for path, shape in adaptable(family, config).items() if len(shape) == 2}
    return Lora({
        f"transformer.{path}": LoraLayer(torch.randn(rank, 2, generator=generator), torch.randn(shape[0], rank, generator=generator), 3.0)
        for path, shape in shapes.items()
    })  # fmt: skip


SMALL = {
    "flux": published.FLUX_REAL | {"num_layers": 1, "num_single_layers": 1},
    "sd3": published.SD3_REAL | {"num_layers": 2, "dual_attention_layers": (0,)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_converts_the_original_change_to_ours(name):
    """Its converters split and swap a checkpoint's rows, and are linear: of the change that our file makes they make our change."""
    config, table = SMALL[name], TABLES[name]
    converter = getattr(single_file_utils, f"convert_{name}_transformer_checkpoint_to_diffusers")
    family = FAMILIES[name]
    lora = narrow(family, config)
    tensors = writing.to_tensors(lora, "comfyui", family, config, torch.float32)
    checkpoint, other = {}, ["pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias"]
    for theirs in table:
        module = f"diffusion_model.{theirs}"
        if module + ".alpha" not in tensors:
            continue
        down, up, alpha = (tensors[module + end] for end in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        checkpoint |= {f"{theirs}.weight": alpha / down.shape[0] * up @ down, f"{theirs}.bias": torch.zeros(up.shape[0])}
        if theirs.endswith("qkv"):
            side = theirs.removesuffix("qkv")
            other += [f"{side}norm.{n}_norm.scale" for n in ("query", "key")] + [f"{side}ln_{n}.weight" for n in "qk"]
        if theirs.endswith("linear1"):
            other += [theirs.replace("linear1", f"norm.{n}_norm.scale") for n in ("query", "key")]
    checkpoint |= dict.fromkeys(other, torch.zeros(1))
    converted = converter(checkpoint)
    for path, layer in lora.of("transformer").items():
        torch.testing.assert_close(converted[f"{path}.weight"], layer.delta())


# ---- files of other tools ----


@pytest.mark.parametrize("who", published.LISTINGS)
def test_other_tools_files_are_read_whole(who):
    """Every key of a real-size file, by the names that the tool is known to write."""
    format, name, config, listing, count = published.LISTINGS[who]
    family = (FAMILIES | {"sdxl": Sdxl()})[name]
    tensors = {key: torch.ones(shape) for key, shape in listing.items()}
    assert formats.identify(tensors) == format
    assert formats.family_of(listing) == name
    lora = formats.from_tensors(tensors, {}, family, config or SDXL_REAL)
    assert len(lora) == count
    assert set(lora.alphas()) == {1.0}
    known = Names(family, config or SDXL_REAL).modules
    assert all(path in known[component] for component, _, path in (layer.partition(".") for layer in lora.layers))


@pytest.mark.parametrize("who", published.OTHERS)
def test_files_of_other_base_models_are_no_familys(who):
    assert formats.family_of(published.OTHERS[who]) is None


def test_a_file_of_another_family_is_named():
    listing = published.LISTINGS["sd-scripts, SD3.5 medium"][3]
    tensors = {key: torch.ones(shape) for key, shape in listing.items()}
    with pytest.raises(LoraError, match=r"of \d+ keys belong to no module of this flux model.*looks like a LoRA of sd3"):
        formats.from_tensors(tensors, {}, FAMILIES["flux"], published.FLUX_REAL)
