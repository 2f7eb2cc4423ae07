"""The listing is what the networks themselves say, and it finds the base of a LoRA file by keys and shapes alone."""

import subprocess
import sys

import pytest

from charforgex.errors import LoraError
from charforgex.families import bases
from charforgex.families.parts import adaptable, measure_adaptable


@pytest.mark.parametrize("name", bases.WRITTEN)
def test_the_listing_is_what_the_networks_say(name):
    assert bases._listing()[name] == bases.measured(name)
    base = bases.get(name)
    known = {f"{component}.{path}" for component, modules in base.names.modules.items() for path in modules}
    assert {path for path in base.shapes if path.startswith(base.spelling.denoiser_name)} <= known
    assert adaptable(base.spelling, base.config) == measure_adaptable(base.spelling, base.spelling.denoiser_name, base.config)


def file_of(base, format, pick, rank=2):
    """Key -> shape of a file in `format` with the modules of the base that `pick` chooses."""
    ends = ("lora_A", "lora_B") if format == "diffusers" else ("lora_down", "lora_up")
    shapes = {}
    for module, parts in base.names.table(format).items():
        found = [base.shapes.get(name) for name, _ in parts]
        if None not in found and pick(parts[0][0]):
            shape, many = found[0], len(found[0]) == 4
            shapes[f"{module}.{ends[0]}.weight"] = (rank, *shape[1:])
            shapes[f"{module}.{ends[1]}.weight"] = (sum(s[0] for s in found), rank, *([1, 1] if many else []))
    return shapes


BY_FILES = {
    name: ["diffusers", "kohya", "comfyui"]
    for name in ("sdxl_base", "flux_dev", "sd35_medium", "sd35_large", "sd15", "charworld_sdxl", "charworld_flux", "charworld_sd3")
} | {name: ["diffusers", "animatediff"] for name in ("animatediff_v3", "animatediff_sdxl")}


@pytest.mark.parametrize("name, format", [(name, format) for name, formats in BY_FILES.items() for format in formats])
def test_a_base_is_found_by_its_files(name, format):
    base = bases.get(name)
    attention = file_of(base, format, lambda path: ".attn" in path)
    header = {"charforgex.family": base.family} if name.startswith("charworld") else {}
    assert bases.base_of(attention, header).name == name
    whole = file_of(base, format, lambda path: True)
    assert bases.base_of(whole, header).name == name


def test_what_fits_no_base_is_told():
    base = bases.get("sdxl_base")
    shapes = file_of(base, "kohya", lambda path: ".attn1" in path)
    key = next(key for key in shapes if key.endswith("lora_down.weight"))
    with pytest.raises(LoraError, match=r"looks like a LoRA of sdxl\. 1 layers do not fit sdxl_base, such as lora_unet"):
        bases.base_of(shapes | {key: (2, 77)}, {})
    with pytest.raises(LoraError, match=r"1 of .* keys belong to no module of this sdxl model: lora_unet_stray"):
        bases.base_of(shapes | {"lora_unet_stray.lora_down.weight": (2, 77)}, {})
    text = file_of(base, "kohya", lambda path: "layers.0.mlp" in path)
    with pytest.raises(LoraError, match=r"looks like a LoRA of wan\. No base of it is listed; .* one of sdxl_base, .* say base=<name>"):
        bases.base_of(text, {"charforgex.family": "wan"})
    sides = {"w1_a": (1280, 2), "w1_b": (2, 1280), "w2_a": (1280, 2), "w2_b": (2, 1280)}
    loha = {f"lora_unet_mid_block_attentions_0_proj_in.hada_{side}": shape for side, shape in sides.items()}
    assert bases.base_of(loha, {}).name == "sdxl_base"
    with pytest.raises(
        LoraError, match=r"1 layers do not fit flux_dev, .*proj_out: factors of a weight \(64, 77\) for one of \(64, 3072\)"
    ):
        bases.base_of({"transformer.proj_out.lokr_w1": (8, 7), "transformer.proj_out.lokr_w2": (8, 11)}, {}, "flux_dev")
    with pytest.raises(LoraError, match="nowhere is no base that is listed; there are sdxl_base"):
        bases.get("nowhere")


def test_no_library_is_needed():
    code = (
        "import sys; from charforgex.families import bases; bases.get('sdxl_base').names.readable();"
        "assert not {'diffusers', 'transformers', 'peft', 'lightning'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
