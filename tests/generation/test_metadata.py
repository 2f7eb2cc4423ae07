"""metadata.py: PNG text as other tools parse it, and the recipe that comes back."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from charforgex.generation.metadata import LoraUse, Recipe, parameters, read_recipe, save_png

RECIPE = Recipe(
    prompt="zqx, smiling (happy), at the beach", template="{trigger}, smiling (happy), at the beach", negative="blurry, dark", seed=7,
    width=832, height=1216, steps=25, guidance=5.0, guidance_rescale=0.0, scheduler="dpmpp_2m_karras",
    scheduler_class="DPMSolverMultistepScheduler", schedule_type="Karras", family="sdxl", base="base.safetensors",
    base_sha256="0123456789abcdef" * 4, base_is_file=True, dtype="bfloat16",
    loras=(LoraUse("zqx", "a" * 64, "b" * 12, 0.8), LoraUse("style, old", "c" * 64, "d" * 12, 1.0)),
    versions={"charforgex": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
)  # fmt: skip


def parsed(text):
    """The format as readers take it: last line of Name: value, values with commas as JSON strings; a line "Negative prompt:" before."""
    *above, last = text.split("\n")
    values = {}
    for name, value in re.findall(r'([A-Za-z][A-Za-z0-9 ]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last):
        values[name] = json.loads(value) if value.startswith('"') else value
    split = next((i for i, line in enumerate(above) if line.startswith("Negative prompt: ")), len(above))
    return "\n".join(above[:split]), "\n".join(above[split:]).removeprefix("Negative prompt: "), values


def test_parameters_as_other_tools_read_them():
    prompt, negative, values = parsed(parameters(RECIPE))
    assert prompt == r"zqx, smiling \(happy\), at the beach <lora:zqx:0.8> <lora:style, old:1>"
    assert negative == "blurry, dark"
    assert values == {
        "Steps": "25", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "5", "Seed": "7", "Size": "832x1216",
        "Model hash": "0123456789", "Model": "base", "Lora hashes": f"zqx: {'b' * 12}, style, old: {'d' * 12}",
        "Version": "charforgex 0.1.0",
    }  # fmt: skip


def test_without_negative_loras_or_a_single_file():
    text = parameters(
        replace(RECIPE, negative="", loras=(), base="charworld", base_is_file=False, schedule_type=None, guidance_rescale=0.7)
    )
    prompt, negative, values = parsed(text)
    assert (prompt, negative) == (r"zqx, smiling \(happy\), at the beach", "")
    assert not {"Lora hashes", "Model hash", "Schedule type"} & values.keys()
    assert values["Model"] == "charworld" and values["CFG Rescale phi"] == "0.7"


def test_the_two_guidances_of_flux_have_the_names_of_forge():
    _, _, values = parsed(parameters(replace(RECIPE, guidance=3.5, true_guidance=2.0, scheduler_class="FlowMatchEulerDiscreteScheduler")))
    assert (values["CFG scale"], values["Distilled CFG Scale"], values["Sampler"]) == ("2", "3.5", "Euler")
    assert "Distilled CFG Scale" not in parsed(parameters(RECIPE))[2]


def test_pictures_of_earlier_versions_are_read(tmp_path):
    """They knew no true guidance."""
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", RECIPE)
    with Image.open(path) as image:
        values = json.loads(image.text["charforgex"])
    del values["true_guidance"]
    info = PngInfo()
    info.add_text("charforgex", json.dumps(values))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    assert read_recipe(path) == RECIPE


def test_png_carries_both_and_the_recipe_comes_back(tmp_path):
    recipe = replace(RECIPE, prompt="ein Mädchen in Köln, 東京")
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    path = save_png(picture, tmp_path / "a.png", recipe)
    with Image.open(path) as image:
        assert image.text["parameters"] == parameters(recipe)
        assert image.tobytes() == picture.tobytes()
    assert read_recipe(path) == recipe


def test_same_recipe_same_bytes_wherever(tmp_path):
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    one, two = (save_png(picture, tmp_path / folder / "a.png", RECIPE).read_bytes() for folder in ("x", "y"))
    assert one == two and str(tmp_path).encode() not in one and b"tIME" not in one


def test_foreign_pictures_have_no_recipe(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert read_recipe(tmp_path / "a.png") is None and read_recipe(tmp_path / "a.jpg") is None
