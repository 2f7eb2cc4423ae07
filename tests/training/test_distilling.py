"""A student comes nearer to its teachers than the best truncation of their weights, and every run of it is the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from charforgex.config import compose
from charforgex.draws import torch_generator
from charforgex.errors import ConfigError, LoraError
from charforgex.families import registry
from charforgex.families.loading import denoiser_config
from charforgex.families.parts import adaptable
from charforgex.lora import lowrank, writing
from charforgex.lora.formats import read
from charforgex.lora.state import LohaLayer, Lora, LoraLayer
from charforgex.lora.targets import chosen
from charforgex.overrides import as_overrides
from charforgex.training.distilling import Settings, Teachers, distill
from charforgex.training.student import Student

RANK, DECAY = 8, 0.7


def lora_file(path, family_name="flux", source="tiny", seed=0, size=0.5, trigger="zkx woman", ends=("to_q", "to_v"), **more):
    """A LoRA of rank 8 whose directions weaken geometrically, as trained ones do, on some layers of a base's attention."""
    family = registry.get(family_name)
    config = denoiser_config(family, source)
    shapes = adaptable(family, config)
    layers = {}
    for name in chosen("test", ends, [name for name, shape in shapes.items() if len(shape) == 2]):
        (out, inner), generator = shapes[name], torch_generator("distilling", seed, name)
        strength = torch.tensor([DECAY**i for i in range(RANK)])
        up = size * torch.randn(out, RANK, generator=generator) * strength / out**0.5
        layers[f"{family.denoiser_name}.{name}"] = LoraLayer(torch.randn(RANK, inner, generator=generator) / inner**0.5, up, float(RANK))
    metadata = {"charforgex.family": family_name, "charforgex.base": source} | ({"charforgex.trigger": trigger} if trigger else {})
    return writing.write(Lora(layers | more), path, "kohya", family, config, torch.float32, metadata)


def run(lora, out, **settings):
    files = [str(path) for path in (lora if isinstance(lora, list) else [lora])]
    shape = {"rank": 2, "steps": 2, "count": 4, "batch_size": 2, "accelerator": "cpu", "cache_dir": str(out.parent / "cache")}
    return distill(compose("lora_distill", as_overrides({"lora": files, "out": str(out)} | shape | settings)))


@pytest.mark.parametrize(("family", "source", "steps", "count"), [("sdxl", "charworld", 16, 8), ("flux", "tiny", 20, 4)])
def test_the_student_is_nearer_than_plain_truncation(tmp_path, family, source, steps, count):
    """Measured 0.81 and 0.82 of the truncation's error; more steps come nearer."""
    lora = lora_file(tmp_path / "a.safetensors", family, source)
    told = run(lora, tmp_path / "b.safetensors", steps=steps, count=count, batch_size=4)
    assert 0.05 < told["error"]["truncated"] < 1
    assert told["error"]["distilled"] < 0.92 * told["error"]["truncated"]
    assert told["errors"][0] == (0, told["error"]["truncated"])
    assert told["ranks"] == [2] and told["bytes"] < 0.5 * told["bytes_before"]
    assert [step for step, _ in told["loss"]] == list(range(1, steps + 1))
    assert json.loads((tmp_path / "b.json").read_text())["error"] == told["error"]
    assert not (tmp_path / "b.distilling").exists()


def test_equal_seeds_give_equal_bytes_also_when_stopped_or_recomputed(tmp_path, monkeypatch):
    lora = lora_file(tmp_path / "a.safetensors")
    run(lora, tmp_path / "one" / "b.safetensors", steps=3)
    (tmp_path / "two").mkdir()
    again = {"steps": 3, "gradient_checkpointing": True}
    losses, calls = Student.losses, []

    def stopped(self, micro, key):
        calls.append(key)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return losses(self, micro, key)

    monkeypatch.setattr(Student, "losses", stopped)
    with pytest.raises(RuntimeError, match="power cut"):
        run(lora, tmp_path / "two" / "b.safetensors", **again)
    assert (tmp_path / "two" / "b.distilling" / "latents.safetensors").exists()
    with pytest.raises(ConfigError, match="interrupted distillation of other settings"):
        run(lora, tmp_path / "two" / "b.safetensors", steps=4)
    run(lora, tmp_path / "two" / "b.safetensors", **again)
    assert len(calls) == 4  # the third step alone was done again
    assert (tmp_path / "one" / "b.safetensors").read_bytes() == (tmp_path / "two" / "b.safetensors").read_bytes()


def test_the_start_is_the_best_truncation_of_the_weighted_sum(tmp_path):
    """The file is it at a rate that moves nothing, also where a teacher is no product. A trigger that they disagree on is left out."""
    family = registry.get("sdxl")
    config = denoiser_config(family, "tiny")
    name = next(name for name, shape in adaptable(family, config).items() if name.endswith("attn2.to_k"))
    out, inner = adaptable(family, config)[name]
    draw = lambda *shape: torch.randn(*shape, generator=torch_generator("loha", *shape)) / 3  # noqa: E731
    loha = LohaLayer(draw(out, 2), draw(2, inner), draw(out, 3)[:, :2], draw(3, inner)[:2], 2.0)
    one = lora_file(tmp_path / "one.safetensors", "sdxl", ends=("attn2.to_q",), **{f"unet.{name}": loha})
    two = lora_file(tmp_path / "two.safetensors", "sdxl", seed=1, trigger="blq man", ends=("attn2.to_q",))
    run([one, two], tmp_path / "c.safetensors", weights=[1, -0.5], lr=1e-30, steps=1)
    made, parents = read(tmp_path / "c.safetensors", family, config), [read(path, family, config) for path in (one, two)]
    assert set(made.layers) == set(parents[0].layers) | set(parents[1].layers)
    for layer in made.layers:
        found = [(parent.layers[layer], weight) for parent, weight in zip(parents, (1, -0.5), strict=True) if layer in parent.layers]
        left, values, right = torch.linalg.svd(sum(weight * one.delta() for one, weight in found).double(), full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        assert torch.allclose(made.layers[layer].delta().double(), best, atol=1e-5 * values[0].item())
    assert "charforgex.trigger" not in made.metadata
    lineage = json.loads(made.metadata["charforgex.lineage"])
    assert lineage["method"] == "distill" and lineage["settings"]["weights"] == {"one": 1.0, "two": -0.5}


def test_what_a_lora_does_to_encoders_is_learnt_by_the_denoiser(tmp_path):
    """A LoRA of an encoder alone gives a student nothing to begin with; beside one of the denoiser its effect is part of the error."""
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    draw = lambda *shape: torch.randn(*shape, generator=torch_generator("encoder", *shape))  # noqa: E731
    layer = LoraLayer(draw(2, 32), draw(32, 2), 2.0)
    both = lora_file(tmp_path / "both.safetensors", **{encoder: layer})
    without = lora_file(tmp_path / "without.safetensors")
    errors = [run(path, tmp_path / f"{path.stem}-2.safetensors", steps=1)["error"]["truncated"] for path in (both, without)]
    assert errors[0] > errors[1]
    assert not any("te1" in key for key in load_file(tmp_path / "both-2.safetensors"))
    only = writing.write(
        Lora({encoder: layer}), tmp_path / "only.safetensors", "kohya", registry.get("flux"), denoiser_config(registry.get("flux"), "tiny"),
        metadata={"charforgex.family": "flux", "charforgex.base": "tiny", "charforgex.trigger": "zkx woman"},
    )  # fmt: skip
    with pytest.raises(LoraError, match="change nothing in the transformer"):
        run(only, tmp_path / "none.safetensors")


def test_pictures_are_looked_at_in_place_of_drawn_ones(tmp_path):
    from charforgex.charworld.demo import write_character

    write_character(tmp_path / "pictures", 0, 8, size=64)
    lora = lora_file(tmp_path / "a.safetensors", "sdxl", "charworld", trigger="zatoki woman", ends=("attn2.to_q", "attn2.to_v"))
    told = run(lora, tmp_path / "b.safetensors", pictures=str(tmp_path / "pictures"), count=None, together=False)
    assert told["held_out"]["latents"] == 1 and told["error"]["truncated"] < 1
    with pytest.raises(LoraError, match="On no held-out prompt"):  # strangers are the base's to answer
        run(lora, tmp_path / "c.safetensors", pictures=str(tmp_path / "pictures"), count=None, together=False, triggers=["nobody"])


# ---- without a base ----


def test_who_answers_what():
    together = Teachers({"anna": "ohwx woman", "ben": "sks man"}, {}, together=True)
    assert together.answering("a dog") == together.answering("") == [("anna", "ben")]
    each = Teachers({"anna": "ohwx woman", "ben": "sks man"}, {}, together=False)
    assert each.answering("photo of an ohwx woman, laughing") == [("anna",)]
    assert each.answering("sks man and ohwx woman") == [("anna", "ben")]
    assert each.answering("a sks mandolin") == [()]
    assert each.answering("") == [("anna",), ("ben",)]


def test_prompts_take_turns_and_some_more_are_held_out():
    teachers = Teachers({"anna": "ohwx woman", "ben": "sks man", "style": None}, {}, together=True)
    prompts = teachers.prompts(["a {trigger} in {red|blue}", "a house"], seed=0, count=6)
    assert len(prompts) == 6 + 2
    assert [prompt.split(" in ")[0] for prompt in prompts[:3]] == ["a ohwx woman", "a sks man", "a house"]
    assert prompts == teachers.prompts(["a {trigger} in {red|blue}", "a house"], seed=0, count=6)
    with pytest.raises(ConfigError, match="No LoRA here carries a trigger"):
        Teachers({"style": None}, {}, together=True).prompts(["a {trigger}"], 0, 4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": [1.0, 2.0]}, r"weights=\[1.0, 2.0\] has 2 entries for 1 LoRAs"),
        ({"weights": [0.0]}, "a LoRA of weight 0 teaches nothing"),
        ({"triggers": ["a", "b"]}, "triggers=.* has 2 entries"),
        ({"prompts": []}, "prompts=.. is an empty list"),
        ({"pictures": "nowhere"}, "pictures=nowhere is not there"),
        ({"pictures": "nowhere", "count": 3}, "count has no effect with pictures=nowhere"),
        ({"rank": 0}, "rank=0"),
        ({"lr": 1}, "lr=1"),
        ({"out": "c.pt"}, "out=c.pt must end in .safetensors"),
    ],
)
def test_wrong_settings_stop_before_any_file_is_read(wrong, said):
    with pytest.raises(ConfigError, match=said):
        distill(compose("lora_distill", as_overrides({"lora": "missing.safetensors", "out": "c.safetensors"} | wrong)))


def test_what_cannot_be_learnt_is_refused_before_a_base_is_loaded(tmp_path):
    one, two = lora_file(tmp_path / "one.safetensors"), lora_file(tmp_path / "two.safetensors", seed=1)
    silent = lora_file(tmp_path / "silent.safetensors", trigger=None)
    for loras, settings, said in (
        ([one, two], {"rank": 16}, "rank=16: at rank 16 their sum is exact"),
        ([one], {"rank": 8}, "it is as small already"),
        ([one, two], {"together": False}, "needs triggers that differ"),
        ([one, silent], {"together": False}, "silent.safetensors carries no trigger"),
        ([silent], {}, "No LoRA here carries a trigger"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(loras, tmp_path / "out.safetensors", **settings)
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_tells_the_truncations_error_and_writes_nothing(tmp_path):
    lora = lora_file(tmp_path / "a.safetensors")
    told = run(lora, tmp_path / "b.safetensors", dry_run=True)
    family = registry.get("flux")
    layers = read(lora, family, denoiser_config(family, "tiny")).layers.values()
    assert told["truncated"] == pytest.approx(sum(lowrank.spectrum(lowrank.product(one)).error(2) for one in layers) / len(layers))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_setting_has_its_line():
    shown = compose("lora_distill", ["lora=a.safetensors"])
    told = {name for name in Settings.__dataclass_fields__ if name != "family"}
    assert set(shown) - {"family"} == told
