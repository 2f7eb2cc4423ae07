import math

import pytest
import torch
from safetensors.torch import load_file

from charforgex.errors import LoraError
from charforgex.lora import writing
from charforgex.lora.inject import (
    acting,
    adapter_parameters,
    inject,
    load_adapter,
    read_adapter,
    same_output,
    set_scales,
    unload_adapter,
    without_adapter,
)
from charforgex.lora.start import first_layer
from charforgex.lora.state import Lora, LoraLayer


def random_lora(parts, component, paths, rank=2, alpha=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        weight = parts[component].get_submodule(path).weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.3
        layers[f"{component}.{path}"] = LoraLayer(down, up, alpha)
    return Lora(layers)


def test_injected_adapter_changes_nothing_and_trains_alone(parts, predict):
    before = predict(parts)
    paths = inject(parts.denoiser, ["to_q", "to_out.0"], rank=4, alpha=2.0)
    expected = [n for n, _ in parts.denoiser.named_modules() if n.endswith(("to_q", "to_out.0"))]
    assert paths == expected and len(paths) > 10
    assert torch.equal(predict(parts), before)
    trainable = [p for p in parts.denoiser.parameters() if p.requires_grad]
    named = adapter_parameters(parts.denoiser)
    assert {id(p) for p in trainable} == {id(p) for p in named.values()} and len(named) == 2 * len(paths)
    assert list(named)[:2] == [f"{paths[0]}.down", f"{paths[0]}.up"]
    assert all(p.dtype == torch.float32 for p in named.values())


def test_first_weights_follow_from_seed_and_path_alone(family):
    def down(targets, seed, global_seed):
        parts = family.tiny()
        torch.manual_seed(global_seed)
        inject(parts.denoiser, targets, rank=8, alpha=8, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(global_seed)))  # global state not used
        return {name: p.detach() for name, p in adapter_parameters(parts.denoiser).items() if name.endswith("to_q.down")}

    one, other, third = down(["to_q"], 1, 10), down(["to_k", "to_q"], 1, 11), down(["to_q"], 2, 10)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], third[name]) for name in one)
    for weights in one.values():
        bound = 1 / math.sqrt(weights.shape[1])
        assert 0.8 * bound < weights.abs().max() <= bound
    assert len({tuple(weights.flatten()[:4].tolist()) for weights in one.values()}) == len(one)


def test_adapters_stay_float32_in_a_bfloat16_model(parts):
    parts.denoiser.to(torch.bfloat16)
    inject(parts.denoiser, ["to_q"], rank=2, alpha=2)
    assert {p.dtype for p in adapter_parameters(parts.denoiser).values()} == {torch.float32}


def test_a_target_that_matches_nothing_is_named(parts):
    with pytest.raises(LoraError, match=r"add_q_proj matches no .*to_q"):
        inject(parts.denoiser, ["to_q", "add_q_proj"], rank=2, alpha=2)
    assert not [p for p in adapter_parameters(parts.denoiser)]
    inject(parts.denoiser, ["to_q"], rank=2, alpha=2)
    with pytest.raises(LoraError, match="already"):
        inject(parts.denoiser, ["to_k"], rank=2, alpha=2)


def test_without_adapter_is_the_base_and_leaves_no_trace(family, parts, trained, predict):
    base = predict(family.tiny())
    trained(parts)
    adapted = predict(parts)
    flags = [p.requires_grad for p in parts.denoiser.parameters()]
    assert not torch.allclose(adapted, base, atol=1e-2)
    with without_adapter(parts.denoiser):
        assert torch.equal(predict(parts), base)
        with without_adapter(parts.denoiser):
            pass
        assert torch.equal(predict(parts), base)
    assert torch.equal(predict(parts), adapted)
    assert [p.requires_grad for p in parts.denoiser.parameters()] == flags and any(flags) and not all(flags)


def test_loaded_adapter_equals_dense_weights(family, parts, predict):
    """Every layer adds alpha / rank * up @ down at its scale, with ranks and alphas that differ from layer to layer."""
    adapted = [n for n, m in parts.denoiser.named_modules() if n.endswith(("to_k", "proj_in", "conv1", "conv2", "time_emb_proj"))]
    layers = {}
    for i, path in enumerate(adapted):
        layers |= random_lora(parts, "unet", [path], rank=1 + i % 3, alpha=(0.5, 2.0)[i % 2], seed=i).layers
    lora = Lora(layers)
    assert load_adapter(parts, lora, "hero", scale=0.7) == len(adapted)
    dense = family.tiny()
    for path, layer in lora.of("unet").items():
        dense.denoiser.get_submodule(path).weight.data += 0.7 * layer.delta()
    torch.testing.assert_close(predict(parts), predict(dense), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(predict(family.tiny()), predict(dense), atol=0.05)
    assert read_adapter(parts.denoiser, "unet", "hero").sha256() == lora.sha256()


def test_several_adapters_with_their_own_scales(family, parts, predict):
    paths = [n for n, _ in parts.denoiser.named_modules() if n.endswith("to_v")]
    one, two = random_lora(parts, "unet", paths, seed=1), random_lora(parts, "unet", paths[2:], rank=3, alpha=3.0, seed=2)
    base = predict(parts)
    load_adapter(parts, one, "hero.v1", 0.5)  # names that a ModuleDict would refuse
    load_adapter(parts, two, "type", 2.0)
    dense = family.tiny()
    for lora, scale in ((one, 0.5), (two, 2.0)):
        for path, layer in lora.of("unet").items():
            dense.denoiser.get_submodule(path).weight.data += scale * layer.delta()
    torch.testing.assert_close(predict(parts), predict(dense), atol=2e-4, rtol=1e-4)
    set_scales(parts, {"hero.v1": 0.0, "type": 0.0})
    assert torch.equal(predict(parts), base)
    set_scales(parts, {"type": 1.0})
    alone = family.tiny()
    load_adapter(alone, two, "only")
    assert torch.equal(predict(parts), predict(alone))
    assert not any(p.requires_grad for p in parts.denoiser.parameters())
    with pytest.raises(LoraError, match=r"No adapter named villain.*hero\.v1, type"):
        set_scales(parts, {"villain": 1.0})
    with pytest.raises(LoraError, match="loaded already"):
        load_adapter(parts, one, "type")


def test_adapters_act_alone_where_that_is_asked_for(family, parts, predict):
    base, alone = predict(parts), {}
    paths = [name for name, _ in parts.denoiser.named_modules() if name.endswith("to_q")]
    for seed, name in enumerate(("one", "two")):
        lora, other = random_lora(parts if not alone else family.tiny(), parts.denoiser_name, paths, seed=seed), family.tiny()
        load_adapter(other, lora, name)
        load_adapter(parts, lora, name)
        alone[name] = predict(other)
    both, only = predict(parts), acting(parts.denoiser)
    with only([]):
        assert torch.equal(predict(parts), base)
    with only(["two"]):
        with only(["one"]):
            assert torch.equal(predict(parts), alone["one"])
        assert torch.equal(predict(parts), alone["two"])
    assert torch.equal(predict(parts), both)
    assert not torch.allclose(both, alone["two"])


def test_text_encoders_of_both_shapes(family, parts):
    """CLIPTextModel is flat in transformers 5, CLIPTextModelWithProjection is not; files say text_model. for both."""
    base = family.encode_text(parts, ["a red cat"])
    module = "encoder.layers.0.self_attn.q_proj"
    assert "encoder.layers.0.self_attn.q_proj" in dict(parts["text_encoder"].named_modules())
    layers = {}
    for component, path in (("text_encoder", module), ("text_encoder_2", "text_model." + module)):
        layer = random_lora(parts, component, [path], seed=4).layers[f"{component}.{path}"]
        layers[f"{component}.text_model.{module}"] = layer
        dense = parts[component].get_submodule(path).weight.detach() + layer.delta()
        layers[component] = dense
    first, second = layers.pop("text_encoder"), layers.pop("text_encoder_2")
    lora = Lora(layers)
    assert load_adapter(parts, lora, "hero") == 2
    text = family.encode_text(parts, ["a red cat"])
    dense = family.tiny()
    dense["text_encoder"].get_submodule(module).weight.data = first
    dense["text_encoder_2"].get_submodule("text_model." + module).weight.data = second
    expected = family.encode_text(dense, ["a red cat"])
    torch.testing.assert_close(text.tokens_BLD, expected.tokens_BLD, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(text.tokens_BLD[..., :32], base.tokens_BLD[..., :32], atol=1e-3)
    assert not torch.allclose(text.tokens_BLD[..., 32:], base.tokens_BLD[..., 32:], atol=1e-3)
    for component in ("text_encoder", "text_encoder_2"):
        assert list(read_adapter(parts[component], component, "hero").layers) == [f"{component}.text_model.{module}"]
    with without_adapter(*parts.networks().values()):
        assert torch.equal(family.encode_text(parts, ["a red cat"]).tokens_BLD, base.tokens_BLD)


def test_layers_that_fit_nothing_are_named_and_nothing_is_changed(parts, predict):
    good = random_lora(parts, "unet", ["mid_block.attentions.0.proj_in"]).layers
    stray = LoraLayer(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    before = [n for n, _ in parts.denoiser.named_modules()]
    with pytest.raises(LoraError, match=r"1 of 2 layers .* fit no module .*: unet\.mid_block\.attentions\.7\.proj_in"):
        load_adapter(parts, Lora(good | {"unet.mid_block.attentions.7.proj_in": stray}), "hero")
    with pytest.raises(LoraError, match=r"another size .*mid_block\.attentions\.0\.proj_out \(7, 5\) for a weight of \(8, 8\)"):
        load_adapter(
            parts, Lora(good | {"unet.mid_block.attentions.0.proj_out": LoraLayer(torch.ones(1, 5), torch.ones(7, 1), 1.0)}), "hero"
        )
    with pytest.raises(LoraError, match="text_encoder_3, which tiny has not loaded"):
        load_adapter(parts, Lora(good | {"text_encoder_3.x": stray}), "hero")
    with pytest.raises(LoraError, match="not finite"):
        load_adapter(parts, Lora({name: layer.map(lambda x: x * float("nan")) for name, layer in good.items()}), "hero")
    assert [n for n, _ in parts.denoiser.named_modules()] == before


def test_same_output_sees_one_wrong_value_and_touches_nothing(parts, trained, predict):
    paths = trained(parts)
    lora = read_adapter(parts.denoiser, "unet")
    set_scales(parts, {"default": 0.5})  # a preview left it at half strength
    before = {name: value.clone() for name, value in parts.denoiser.state_dict().items()}
    ids = {name: id(p) for name, p in parts.denoiser.named_parameters()}
    flags = {name: p.requires_grad for name, p in parts.denoiser.named_parameters()}
    output = predict(parts)
    assert same_output(parts.denoiser, "unet", lora, lora) == []
    wrong = {**lora.layers}
    wrong[f"unet.{paths[3]}"] = LoraLayer(wrong[f"unet.{paths[3]}"].down, wrong[f"unet.{paths[3]}"].up, alpha=2.001)
    assert same_output(parts.denoiser, "unet", lora, Lora(wrong)) == [paths[3]]
    assert all(torch.equal(value, before[name]) for name, value in parts.denoiser.state_dict().items())
    assert {name: id(p) for name, p in parts.denoiser.named_parameters()} == ids
    assert {name: p.requires_grad for name, p in parts.denoiser.named_parameters()} == flags
    assert torch.equal(predict(parts), output)


def test_saving_during_training_goes_on_as_if_nothing_happened(family, tmp_path, predict):
    """Two steps of AdamW with a verified save between them equal two steps without."""

    def train(save):
        parts = family.tiny()
        inject(parts.denoiser, ["to_q", "to_v"], rank=2, alpha=1.0)
        parameters = adapter_parameters(parts.denoiser)
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            x = torch.randn(1, 4, 8, 8, generator=generator)
            conditions = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
            out = parts.denoiser(x, 10, torch.ones(1, 77, 64), added_cond_kwargs=conditions).sample
            (out - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if save:
                writing.save_verified(read_adapter(parts.denoiser, "unet"), tmp_path / "x.safetensors", "kohya", family, parts.denoiser)
        return parameters

    plain, saved = train(False), train(True)
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert len(load_file(tmp_path / "x.safetensors")) == 3 * len(plain) // 2


def of_kind(parts, kind, path, seed):
    layer = first_layer(kind, parts.denoiser.get_submodule(path).weight, path, 2, 2.0, seed)
    draw = torch.Generator().manual_seed(seed)
    return {f"unet.{path}": layer.map(lambda x: x + torch.randn(x.shape, generator=draw) * 0.3)}


def test_an_unloaded_adapter_leaves_the_others_alone_and_the_last_one_leaves_the_base(family, parts, predict):
    """Of kinds that wrap each other on one module, in any order of going."""
    path = next(path for path, _ in parts.denoiser.named_modules() if path.endswith("attn1.to_q"))
    before, modules = predict(parts), [type(module) for module in parts.denoiser.modules()]
    loras = {kind: Lora(of_kind(parts, kind, path, seed)) for seed, kind in enumerate(("lora", "dora", "loha"))}
    for gone in loras:
        for name, lora in loras.items():
            load_adapter(parts, lora, name, scale=0.7)
        unload_adapter(parts, gone)
        rest = family.tiny()
        for name in (name for name in loras if name != gone):
            load_adapter(rest, loras[name], name, scale=0.7)
        assert torch.equal(predict(parts), predict(rest)), gone
        load_adapter(parts, loras["lora"], "again", scale=0.0)
        unload_adapter(parts, "again")
        assert torch.equal(predict(parts), predict(rest))
        for name in (name for name in loras if name != gone):
            unload_adapter(parts, name)
        assert torch.equal(predict(parts), before)
        assert [type(module) for module in parts.denoiser.modules()] == modules and not hasattr(parts.denoiser, "peft_config")
    with pytest.raises(LoraError, match="No adapter named dora is loaded; loaded are none"):
        unload_adapter(parts, "dora")


def test_a_name_that_was_dora_may_come_back_as_lora(family, parts, predict):
    path = next(path for path, _ in parts.denoiser.named_modules() if path.endswith("attn1.to_q"))
    load_adapter(parts, Lora(of_kind(parts, "lora", path, 1)), "stays")
    load_adapter(parts, Lora(of_kind(parts, "dora", path, 2)), "name")
    unload_adapter(parts, "name")
    load_adapter(parts, Lora(of_kind(parts, "lora", path, 3)), "name")
    fresh = family.tiny()
    for seed, name in ((1, "stays"), (3, "name")):
        load_adapter(fresh, Lora(of_kind(fresh, "lora", path, seed)), name)
    assert torch.equal(predict(parts), predict(fresh))
