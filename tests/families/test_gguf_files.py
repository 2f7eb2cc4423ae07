"""GGUF: packed weights come apart where ours do, unpack to the same numbers, and a LoRA learns on them as on those numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from charforgex.errors import ModelError
from charforgex.families import registry
from charforgex.families.loading import weights_hash
from charforgex.families.packed import PackedLinear
from charforgex.lora.inject import adapter_parameters, inject
from charforgex.types import Crop, Text

gguf = pytest.importorskip("gguf")
from gguf.quants import quantize  # noqa: E402

Q8, BF16, F16 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "BF16", "F16"))


def write(path: Path, tensors: dict[str, torch.Tensor], kind=Q8) -> Path:
    """As city96's converter does: weights whose rows are whole blocks of 32 are packed, small tensors are not."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in tensors.items():
        values = tensor.numpy().astype(np.float32)
        packs = values.ndim == 2 and values.shape[1] % 32 == 0 and kind != F16
        if packs or (kind == BF16):
            writer.add_tensor(key, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values.astype(np.float16 if kind == F16 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpacked(transformer) -> dict[str, torch.Tensor]:
    layers = {name: module.weight for name, module in transformer.named_modules() if isinstance(module, PackedLinear)}
    plain = {key: tensor for key, tensor in transformer.state_dict().items() if not key.endswith(".packed")}
    return plain | {f"{name}.weight": weight for name, weight in layers.items()}


@pytest.fixture(params=["flux", "sd3"])
def bench(request, benches):
    return benches(request.param)


def example(bench):
    drawn = torch.Generator().manual_seed(0)
    text = Text(
        torch.randn(2, 9, bench.parts.denoiser.config.joint_attention_dim, generator=drawn),
        torch.randn(2, bench.parts.denoiser.config.pooled_projection_dim, generator=drawn),
    )
    return torch.randn(2, 4, 8, 8, generator=drawn), torch.tensor([0.3, 0.8]), text, Crop.whole(2, 64, 64)


def test_packed_weights_stand_for_the_same_numbers(bench, tmp_path):
    """8 bits: every weight within half a step of its block's largest; what stays unpacked is exact, and so are halves that are swapped."""
    parts = bench.family.load(str(write(tmp_path / "base-Q8_0.gguf", bench.whole("transformer"))), only=("denoiser",))
    exact, found = bench.parts.denoiser.state_dict(), unpacked(parts.denoiser)
    assert found.keys() == exact.keys()
    packed = [name for name, module in parts.denoiser.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) > 10
    for key, tensor in exact.items():
        apart = (found[key] - tensor).abs().max()
        if key.removesuffix(".weight") in packed and key.endswith(".weight"):
            assert 0 < apart <= tensor.abs().max() / 200, key
        else:
            assert apart == 0, key
    with torch.no_grad():
        one, two = (bench.family.denoise(some.denoiser, *example(bench)) for some in (parts, bench.parts))
    torch.testing.assert_close(one, two, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", [BF16, F16], ids=["BF16", "F16"])
def test_plain_numbers_in_gguf(bench, kind, tmp_path):
    transformer = bench.family.load(str(write(tmp_path / "base.gguf", bench.whole("transformer"), kind)), only=("denoiser",)).denoiser
    dtype = {BF16: torch.bfloat16, F16: torch.float16}[kind]
    for key, tensor in bench.parts.denoiser.state_dict().items():
        assert torch.equal(transformer.state_dict()[key], tensor.to(dtype).float()), key


@pytest.mark.parametrize(("kind", "init"), [("lora", "zero"), ("dora", "zero"), ("lora", "pissa")], ids=["lora", "dora", "pissa"])
def test_adapters_learn_on_packed_weights_as_on_what_they_stand_for(bench, kind, init, tmp_path):
    """The gradients of all of an adapter, against those on plain layers of the unpacked weights; also of kinds that read the weight."""
    parts = bench.family.load(str(write(tmp_path / "base.gguf", bench.whole("transformer"))), only=("denoiser",))
    plain = registry.get(bench.family.name).tiny().denoiser
    plain.load_state_dict(unpacked(parts.denoiser), strict=True)
    gradients = []
    for denoiser in (parts.denoiser, plain.eval().requires_grad_(False)):
        inject(denoiser, bench.family.lora_targets("attention", denoiser.config), rank=2, alpha=2, kind=kind, init=init)
        for i, parameter in enumerate(adapter_parameters(denoiser).values()):
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 4
        bench.family.denoise(denoiser, *example(bench)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(denoiser).items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_unpacked_weights_are_not_kept_for_backwards(benches, tmp_path):
    bench = benches("flux")
    parts = bench.family.load(str(write(tmp_path / "base.gguf", bench.whole("transformer"))), only=("denoiser",))
    inject(parts.denoiser, bench.family.lora_targets("attention", parts.denoiser.config), rank=2, alpha=2)
    shapes = {tuple(module.weight.shape) for module in parts.denoiser.modules() if isinstance(module, PackedLinear)}
    weights = {shape for shape in shapes if max(shape) > 100}  # activations are smaller
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        bench.family.denoise(parts.denoiser, *example(bench))
    assert len(kept) > 10
    assert len(weights) > 3
    assert not weights & set(kept)


def test_with_encoders_and_vae_from_elsewhere(benches, tmp_path):
    bench = benches("flux")
    source = f"{write(tmp_path / 'flux.gguf', bench.whole('transformer'))}+{bench.folder}"
    parts = bench.family.load(source, dtype=torch.bfloat16)
    assert set(parts.networks()) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    out = bench.family.pipeline(parts)(
        "a red cat", height=32, width=32, num_inference_steps=1, output_type="np", max_sequence_length=24
    ).images
    assert np.isfinite(out).all()
    hashes = {group: weights_hash(bench.family, source, group) for group in ("denoiser", "vae")}
    other = f"{write(tmp_path / 'other.gguf', {k: t + 0.1 for k, t in bench.whole('transformer').items()})}+{bench.folder}"
    assert weights_hash(bench.family, other, "denoiser") != hashes["denoiser"]
    assert weights_hash(bench.family, other, "vae") == hashes["vae"]


def test_what_is_wrong_with_a_gguf(benches, tmp_path):
    bench = benches("flux")
    tensors = bench.whole("transformer")
    whole = write(tmp_path / "base.gguf", tensors)
    last = list(tensors)[-1]
    with pytest.raises(ModelError, match=rf"lacks weights of transformer: {last}"):
        bench.family.load(
            str(write(tmp_path / "less.gguf", {key: tensor for key, tensor in tensors.items() if key != last})), only=("denoiser",)
        )
    with pytest.raises(ModelError, match=r"no place for: more"):
        bench.family.load(str(write(tmp_path / "more.gguf", tensors | {"more": torch.ones(2)})), only=("denoiser",))
    with pytest.raises(ModelError, match=r"T5 in llama\.cpp's spelling: take t5xxl_fp16"):
        bench.family.load(str(write(tmp_path / "t5.gguf", {"enc.blk.0.attn_q.weight": torch.ones(32, 32)})), only=("denoiser",))
    for name, content in (("cut", whole.read_bytes()[:3000]), ("text", b"version https://git-lfs"), ("none", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}\.gguf is not a whole \.gguf file"):
            bench.family.load(str(tmp_path / f"{name}.gguf"), only=("denoiser",))
