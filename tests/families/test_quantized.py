"""Bases held in 8 and 4 bits: the numbers they stand for, what that does to the loss, adapters on them, and the file that keeps them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from charforgex.errors import ConfigError, ModelError
from charforgex.families import registry
from charforgex.families.packed import PackedLinear
from charforgex.families.quantized import Packing, QuantizedLinear, check_packing, pack, pack_network, packed_by
from charforgex.lora.inject import adapter_parameters, inject, read_adapter, same_output
from charforgex.lora.quantized import NF4, Codes, dequantize
from charforgex.training.losses import Objective
from charforgex.types import Batch, Crop
from tests.families.rows import PICTURES, ROWS, Row

KINDS = ("int8", "fp8", "nf4")
APART = {"int8": 0.005, "fp8": 0.02, "nf4": 0.06}  # of a picture's loss, that with the whole base; 0.003, 0.011 and 0.046 were seen
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}  # for a value, besides a scale of 4 bytes a row in 8 bits


def packed(weight: torch.Tensor, kind: str) -> QuantizedLinear:
    return QuantizedLinear(*pack(weight, kind), kind, weight.shape[1], weight.shape[0], False, torch.float32)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_values_that_the_codes_have_come_back_exactly():
    rows = torch.tensor([[127.0, -3.0, 0.0, 64.0], [0.0, 0.0, 0.0, 0.0], [-0.127, 0.001, 0.05, 0.1]])
    torch.testing.assert_close(packed(rows, "int8").weight, rows, rtol=1e-6, atol=0)
    floats = torch.tensor([[448.0, -1.125, 0.0, 0.015625], [-28.0, 3.5, 26.0, 0.0]])
    assert torch.equal(packed(floats, "fp8").weight, floats)
    codes = torch.cat([NF4, -NF4[[0, 15]], torch.zeros(46)]).view(4, 16) * 3  # one block, whose largest is 3
    assert torch.equal(packed(codes, "nf4").weight, codes)


def test_how_far_other_values_move():
    """At most half a step of a row's, or a block's, largest; a row of outliers spoils no other row."""
    weight = draw(6, 70)
    weight[2] *= 1000
    largest = weight.abs().amax(dim=1, keepdim=True)
    int8, fp8 = packed(weight, "int8").weight, packed(weight, "fp8").weight
    assert ((int8 - weight).abs() <= largest / 254 * 1.0001).all()
    assert ((fp8 - weight).abs() <= torch.maximum(weight.abs() / 16, largest / 448 * 2**-9) * 1.0001).all()  # a mantissa of 3 bits
    padded = nn.functional.pad(weight.flatten(), (0, 28))  # 420 values are 7 blocks of 64
    codes, scale = pack(weight, "nf4")
    assert codes.shape == (7, 32) and scale.shape == (7,)
    expected = dequantize(Codes(codes.flatten(), scale), "nf4", (1, 448)).flatten()
    assert torch.equal(packed(weight, "nf4").weight.flatten(), expected[:420])
    widest = (NF4[1:] - NF4[:-1]).max() / 2
    assert ((expected - padded).view(7, 64).abs() <= widest * scale[:, None] * 1.0001).all()


def test_what_is_not_finite_cannot_be_packed():
    family = registry.get("flux")
    network = family.tiny().denoiser
    with torch.no_grad():
        network.transformer_blocks[0].attn.to_q.weight[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=r"transformer_blocks\.0\.attn\.to_q cannot be packed as int8: it holds values that are not finite"
    ):
        pack_network(family, network, "int8", "cpu")


def example(row: Row, family, config, tokens: int = 5) -> Batch:
    """Latents and a text of the base's sizes."""
    from charforgex.types import Text

    frames = (3,) * bool(row.frames)
    mean = draw(2, config.in_channels // family.channels_per_latent, *frames, 8, 8)
    width = config.get("joint_attention_dim") or config["cross_attention_dim"]
    pooled = None if row.pooled_D is None else draw(2, _pooled(config), seed=2)
    return Batch(mean, torch.zeros_like(mean), Text(draw(2, tokens, width, seed=1), pooled), Crop.whole(2, 64, 64))


def _pooled(config) -> int:
    if "pooled_projection_dim" in config:
        return config["pooled_projection_dim"]
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_the_loss_is_nearly_that_of_the_whole_base(row):
    """On the embedded bases, which have learnt something; their bytes are what the kind says."""
    family = row.family
    whole = family.load("charworld", ["denoiser"])
    batch, process = example(row, family, whole.denoiser.config), family.process(whole)

    def losses(denoiser) -> torch.Tensor:
        with torch.no_grad():
            return Objective().losses(family, denoiser, process, batch, "key", t_B=process.snap(torch.tensor([0.3, 0.7])))

    expected, far = losses(whole.denoiser), {}
    layers = {path: module.weight for path, module in whole.denoiser.named_modules() if type(module) is nn.Linear}
    for kind in KINDS:
        denoiser = family.load("charworld", ["denoiser"], packing=Packing(kind)).denoiser
        assert packed_by(denoiser) == kind
        far[kind] = ((losses(denoiser) - expected).abs() / expected).max().item()
        held = {path: module for path, module in denoiser.named_modules() if isinstance(module, PackedLinear)}
        numbers, rows = sum(layers[path].numel() for path in held), sum(len(layers[path]) for path in held)
        found = sum(buffer.numel() * buffer.element_size() for module in held.values() for buffer in module.buffers())
        assert numbers > 0.9 * sum(weight.numel() for path, weight in layers.items() if "time_emb" not in path)
        assert found == numbers * BYTES[kind] + (4 * rows if kind != "nf4" else 0)
    assert 0 < far["int8"] < far["nf4"]
    assert all(far[kind] <= APART[kind] for kind in KINDS), far


OTHERS = [("dora", "zero", "int8"), ("lora", "pissa", "nf4"), ("lokr", "zero", "fp8")]
CASES = [(row, "lora", "zero", kind) for row, kind in zip(ROWS, 2 * KINDS, strict=False)] + [(ROWS[1], *other) for other in OTHERS]


@pytest.mark.parametrize(("row", "adapter", "init", "kind"), CASES, ids=str)
def test_adapters_learn_on_packed_weights_as_on_what_they_stand_for(row, adapter, init, kind):
    """Gradients of all of an adapter and of the noisy latents, against plain layers of the unpacked weights."""
    family, gradients = row.family, []
    for is_packed in (True, False):
        parts = family.tiny()
        pack_network(family, parts.denoiser, kind, "cpu")
        for path, layer in list(parts.denoiser.named_modules()) if not is_packed else ():
            if isinstance(layer, PackedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight, plain.bias = nn.Parameter(layer.weight), layer.bias
                parts.denoiser.set_submodule(path, plain.requires_grad_(False))
        inject(parts.denoiser, family.lora_targets("attention", parts.denoiser.config), 2, 2.0, kind=adapter, init=init)
        parameters = adapter_parameters(parts.denoiser)
        for number, parameter in enumerate(parameters.values()):
            parameter.data += draw(*parameter.shape, seed=number) / 4
        batch = example(row, family, parts.denoiser.config)
        losses = Objective().losses(family, parts.denoiser, family.process(parts), batch, "key")
        losses.mean().backward()
        gradients.append({name: parameter.grad for name, parameter in parameters.items()} | {"losses": losses.detach()})
        if is_packed:  # what is saved is what was trained, also where the layer beneath is packed
            lora = read_adapter(parts.denoiser, family.denoiser_name)
            assert same_output(parts.denoiser, family.denoiser_name, lora, lora) == []
    assert all(gradient.abs().max() > 0 for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_unpacks_to_its_own_dtype_once():
    """The plain layer's result under autocast, from float32 activations, and nothing float32 of the weight's size on the way."""
    weight, x = draw(96, 64), draw(3, 64, seed=1)
    layer = QuantizedLinear(*pack(weight, "int8"), "int8", 64, 96, False, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.requires_grad_())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, nn.functional.linear(x.bfloat16(), layer.weight))
    found.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).float().expand(3, -1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_is_kept_and_found_again(kind, tmp_path):
    family, packing = registry.get("sd3"), Packing(kind, tmp_path)
    first = family.load("charworld", ["denoiser"], packing=packing).denoiser
    (file,) = (tmp_path / "quantized").iterdir()
    second = family.load("charworld", ["denoiser"], packing=packing).denoiser
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert two[key].dtype == tensor.dtype and torch.equal(two[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert not any(parameter.requires_grad for parameter in second.parameters())

    path = next(key for key in one if key.endswith(".scale"))
    save_file(load_file(file) | {path: one[path] * 2}, file)  # it is this file that is read, not the base
    assert torch.equal(family.load("charworld", ["denoiser"], packing=packing).denoiser.state_dict()[path], one[path] * 2)
    family.load("charworld", ["denoiser"], torch.bfloat16, packing=packing)  # another dtype is another file
    assert len(list((tmp_path / "quantized").iterdir())) == 2
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"{file.name} is not what was kept there .* delete it"):
        family.load("charworld", ["denoiser"], packing=packing)


def test_refused_where_it_cannot_be():
    check_packing("nf4", "mps")
    with pytest.raises(ConfigError, match=r"trainer\.quantize=fp8: mps has no numbers"):
        check_packing("fp8", "mps")
