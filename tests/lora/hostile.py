"""Mutations of safetensors files, each a function of its number: what damage, chance and malice make of them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from random import Random

import torch

from charforgex.families import bases
from charforgex.lora.quantized import mark, quantize
from charforgex.lora.state import LohaLayer, LokrLayer, LoraLayer
from charforgex.lora.writing import write_layers

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "", "X", "f32", None, 5]
NUMBERS = [0, 1, 2, 3, 7, -1, 255, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, 0.5, 1e400, "1", None, [], [1], True]
NAMES = [
    "../../etc/passwd",
    "a\x00b",
    "\x1b[31mred\x1b[0m",
    "\n\r",
    "é\u202eb",
    "",
    ".",
    "x" * 10_000,
    "a/b\\c",
    "__metadata__",
    "unet.",
    ".alpha",
]
ENDS = [
    ".alpha", ".dora_scale", ".lora_mid.weight", ".hada_w1_a", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_t2", ".diff", ".diff_b",
    ".scale", ".lora_magnitude_vector", ".oft_blocks", ".lora_A.weight", ".lora_up.weight", ".down.weight",
]  # fmt: skip
DEEP = "[" * 5000 + "]" * 5000
SLOW = "(a|a?)+" * 5 + "(([a-z_.0-9]+)+)*x"  # takes for ever where regular expressions go back to try again
VALUES = [
    "", "null", "[]", "{}", "1", "NaN", "9" * 5000, DEEP, '{"a":' * 2000 + "1" + "}" * 2000, "\x00", "\x1b[2J", "x" * 100_000,
    json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": {SLOW: 1}}), json.dumps({"unet.lora_alpha": 10**400}),
    json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {f".*{i}.*": i for i in range(500)}}), json.dumps({"unet.lora_alpha": "nan"}),
    json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}), json.dumps({"unet.lora_alpha": [1], "unet.use_rslora": True}),
    json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": [1], "unet.use_dora": True}), json.dumps({"transformer.lora_alpha": -1e308}),
    json.dumps({"kind": "nf4", "dtype": "float16", "shapes": {"a": [1e300, 1]}}), json.dumps({"kind": "int8", "dtype": "float16"}),
]  # fmt: skip
SETTINGS = ["lora_adapter_metadata", "charforgex.quantized", "charforgex.lineage", "charforgex.family", "ss_tag_frequency", "format", "x"]
BITS = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7C007C00, 0x7E007E00, 0x7F807F80]  # infinities and no numbers, of 32 and of 16 bits


def seeds(folder: Path) -> list[tuple[dict, bytes]]:
    """Header and data of small valid files: each embedded base, each kind, joined weights, alphas in the header, codes with scales."""
    found = []
    for name, format, kind in (
        ("charworld_sdxl", "kohya", "lora"), ("charworld_sdxl", "diffusers", "dora"), ("charworld_sdxl", "kohya", "loha"),
        ("charworld_flux", "kohya", "lora"), ("charworld_flux", "diffusers", "lora"), ("charworld_sd3", "comfyui", "lora"),
        ("charworld_sd3", "kohya", "lokr"), ("charworld_flux", "xlabs", "lora"),
    ):  # fmt: skip
        base = bases.get(name)
        layers = {n: layer(kind, base.shapes[n]) for n in list(n for n in base.shapes if ".attn" in n)[:9]}
        write_layers(layers.get, layers, folder / "seed.safetensors", format, base.names, torch.float16, {"charforgex.family": base.family})
        found.append(unpacked((folder / "seed.safetensors").read_bytes()))
    header, data, told = {}, b"", {}
    for key, factor in {"down": torch.randn(2, 128), "up": torch.randn(128, 2)}.items():
        full = f"transformer.transformer_blocks.0.attn.to_q.lora_{'A' if key == 'down' else 'B'}.weight"
        stored, told[full] = quantize(factor, "nf4"), tuple(factor.shape)
        for end, tensor, dtype in (("", stored.codes, "U8"), (".scale", stored.scale, "F32")):
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            header[full + end] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    return [*found, ({"__metadata__": mark("nf4", "float16", told)} | header, data)]


def layer(kind: str, shape: tuple[int, ...]):
    out, wide = shape[0], math.prod(shape[1:])
    generator = torch.Generator().manual_seed(out + wide)

    def draw(*sizes: int):
        return torch.randn(*sizes, generator=generator)

    if kind == "loha":
        return LohaLayer(draw(out, 2), draw(2, wide), draw(out, 2), draw(2, wide), 1.0)
    if kind == "lokr":
        return LokrLayer(1.0, w1=draw(2, 2), w2_a=draw(out // 2, 2), w2_b=draw(2, wide // 2))
    return LoraLayer(draw(2, wide), draw(out, 2), 1.5, draw(out).abs() if kind == "dora" else None)


def unpacked(raw: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(header: dict, data: bytes, number: int) -> bytes:
    """The file after one to three of the mutations below, and now and then one of its bytes besides."""
    random = Random(number)
    header = json.loads(json.dumps(header))
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        data = random.choice([_entry, _entry, _key, _setting, _numbers, _another])(header, data, random)
    raw = bytearray(packed(_written(header, random), data))
    for _ in range(random.choice([0, 0, 0, 1, 4])):
        span = len(raw) if random.random() < 0.3 else min(len(raw), 8 + 4000)
        raw[random.randrange(span)] ^= 1 << random.randrange(8)
    kind = random.random()
    if kind < 0.06:
        raw = raw[: len(raw) * random.randint(0, 10) // 10]
    elif kind < 0.1:
        raw[:8] = struct.pack("<Q", random.choice([0, 1, len(raw), 2**31, 2**40, 2**63, random.randrange(2 * len(raw) + 1)]))
    elif kind < 0.12:
        raw += bytes(random.randrange(1, 100))
    return bytes(raw)


def _written(header: dict, random: Random) -> bytes:
    text = json.dumps(header).encode()
    kind = random.random()
    if kind < 0.02:  # a key twice
        return text[:-1] + b"," + text[1:]
    if kind < 0.03:
        return random.choice([DEEP.encode(), b"{" * 3000, b'{"a":' * 9000, b"[]", b"null", b"\xff\xfe", b"", b"{}"])
    return text


def _chosen(header: dict, random: Random) -> str:
    return random.choice([key for key in header if key != "__metadata__"] or ["none"])


def _entry(header: dict, data: bytes, random: Random) -> bytes:
    """Dtype, shape or place of a tensor."""
    entry = header.get(_chosen(header, random))
    if not isinstance(entry, dict):
        return data
    field = random.choice(list(entry) or ["dtype"])
    if field == "dtype":
        entry[field] = random.choice(DTYPES)
    elif random.random() < 0.1:
        entry[field] = random.choice(NUMBERS)
    elif isinstance(entry[field], list):
        values = entry[field]
        change = random.randrange(4)
        if change == 0:
            values.reverse()
        elif change == 1 and values:
            values[random.randrange(len(values))] = random.choice(NUMBERS)
        elif change == 2:
            values.insert(random.randrange(len(values) + 1), random.choice(NUMBERS))
        elif values and isinstance(values[-1], int):
            values[-1] += random.choice([-4, -1, 1, 4, 64])
    return data


def _key(header: dict, data: bytes, random: Random) -> bytes:
    """A name: another one, another's, gone, or with another end."""
    key = _chosen(header, random)
    entry = header.pop(key, {})
    other = random.choice([random.choice(NAMES), key + random.choice(NAMES), key.rsplit(".", 2)[0] + random.choice(ENDS), None])
    if other is not None:
        header[other] = entry
    return data


def _setting(header: dict, data: bytes, random: Random) -> bytes:
    told = header.get("__metadata__")
    if not isinstance(told, dict) or random.random() < 0.05:
        header["__metadata__"] = random.choice([None, 1, "x", [], {}, {"a": 1}, {"a": {"b": "c"}}])
    else:
        told[random.choice(SETTINGS)] = random.choice(VALUES)
    return data


def _numbers(header: dict, data: bytes, random: Random) -> bytes:
    """Values that are none."""
    raw = bytearray(data)
    for _ in range(random.choice([1, 1, 9])):
        if len(raw) >= 4:
            at = random.randrange(0, len(raw) - 3) & ~3
            raw[at : at + 4] = struct.pack("<I", random.choice(BITS))
    return bytes(raw)


def _another(header: dict, data: bytes, random: Random) -> bytes:
    """One more tensor, or many, which the data may have or lack."""
    stem = _chosen(header, random).rsplit(".", 2)[0]
    for i in range(random.choice([1, 1, 1, 300])):
        shape = random.choice([[], [1], [0], [2, 2], [0, 10**12], [64, 2], [2, 64], [1, 64], [2, 2, 3, 3], [4, 64]])
        size = 4 * math.prod(shape)
        header[stem + (str(i) if i else "") + random.choice(ENDS)] = {
            "dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size],
        }  # fmt: skip
        data += random.randbytes(size) if random.random() < 0.5 else bytes(size)
    return data
