"""Checkpoints are known by their keys and shapes, and every module of a published base is found in its single file."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from charforgex.errors import ModelError
from charforgex.families import bases, registry
from charforgex.toolbox.checkpoints import find
from charforgex.toolbox.extracting import beside
from tests.families.conftest import listing, write_header
from tests.toolbox.bases_on_disk import folder_of, single_of

UNCHANGED = {"differing": [], "change": 0.0, "only_in_base": [], "only_in_tuned": []}


@pytest.mark.parametrize(("family", "base"), [("sdxl", "sdxl_base"), ("flux", "flux_dev"), ("sd3", "sd3_medium")])
def test_published_files_are_known(family, base, tmp_path):
    """Key -> shape of the real ones, with no data. SD3's CLIP-L has no projection there."""
    weights = find(str(write_header(tmp_path / "base.safetensors", listing(family))))
    expected = {name: shape for name, shape in bases.get(base).shapes.items() if (family, name) != ("sd3", "text_encoder.text_projection")}
    assert weights.base.name == base
    assert {name: weights.shape(name) for name in weights.modules} == expected
    for name, (part, place) in weights.modules.items():
        start, end = part.span(place)
        assert end - start == 2 * torch.Size(expected[name]).numel(), name
    spans = sorted({part.span(place) for part, place in weights.modules.values()})
    assert len(spans) == len(expected)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))  # no two share a byte
    taken = {place.key for _, place in weights.modules.values()} | {place.key for _, place in weights.rest.values()}
    assert {key for key in listing(family) if key.endswith((".weight", ".bias"))} <= taken


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_every_layout_gives_the_weights_that_networks_have(family, tmp_path):
    folder = folder_of(family, tmp_path / "base", torch.float16)
    parts = registry.get(family).load(str(folder), only=("denoiser", "text"))
    file = find(str(single_of(family, folder, tmp_path / "base.safetensors")))
    for weights in (find(str(folder)), file):
        assert weights.base.name == f"charworld_{family}"
        for name, (part, place) in weights.modules.items():
            component, _, path = name.partition(".")
            network = parts[component]
            try:
                module = network.get_submodule(path)
            except AttributeError:  # transformers 5 has dropped a level of one of its classes
                module = network.get_submodule(path.removeprefix("text_model."))
            assert torch.equal(part.read(place).float(), module.weight), name


def test_files_of_one_part(tmp_path):
    """A denoiser in its own spelling, in diffusers', and an encoder alone, whose family the caller knows."""
    folder = folder_of("flux", tmp_path / "base")
    names = {name for name in bases.get("charworld_flux").shapes if name.startswith("transformer.")}
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "diffusers.safetensors")
    single = single_of("flux", folder, tmp_path / "single.safetensors", "transformer")
    bare = tmp_path / "bare.safetensors"
    save_file({key.removeprefix("model.diffusion_model."): tensor for key, tensor in load_file(single).items()}, bare)
    found = [find(str(path)) for path in (single, bare, tmp_path / "diffusers.safetensors")]
    for weights in found:
        assert weights.modules.keys() == names
        part, place = weights.modules["transformer.norm_out.linear"]  # whose halves are in the other order in two of them
        assert torch.equal(part.read(place), state["norm_out.linear.weight"])
    assert found[0].rest.keys() == found[1].rest.keys()
    assert found[2].rest.keys() == {f"transformer.{key}" for key in state if f"transformer.{key.removesuffix('.weight')}" not in names}
    assert beside(found[1], found[2]) == beside(found[2], found[0]) == UNCHANGED
    encoder = tmp_path / "t5.safetensors"
    save_file(load_file(folder / "text_encoder_2" / "model.safetensors"), encoder)
    weights = find(str(encoder), like=bases.get("charworld_flux"))
    assert weights.components == ["text_encoder_2"]
    with pytest.raises(ModelError, match=r"holds no base of sdxl, flux, sd3.* that is listed"):
        save_file({"vae": torch.zeros(2)}, tmp_path / "strange.safetensors")
        find(str(tmp_path / "strange.safetensors"))
    with pytest.raises(ModelError, match="embedded for several families"):
        find("charworld")
    unknown = next(base for base in map(bases.get, bases.names()) if base.family not in registry.FAMILIES)
    with pytest.raises(ModelError, match=f"Of {unknown.family} only LoRA files are understood"):
        find(str(encoder), like=unknown)
