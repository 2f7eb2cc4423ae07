"""Tensors of a safetensors file, read when they are asked for. The library maps the file, and what it has read stays in memory until the
file is closed; here only what is held by somebody is."""

from __future__ import annotations

import json
import math
from typing import Any, BinaryIO

import torch
from torch import Tensor

from charforgex.errors import LoraError
from charforgex.lora.state import shown

DTYPES = {  # as safetensors call them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class Streamed:
    """A file that the library has opened and found whole (`safetensors.safe_open`), and the same file, open in binary."""

    def __init__(self, file: Any, binary: BinaryIO):
        self.file, self.binary = file, binary
        binary.seek(0)
        length = int.from_bytes(binary.read(8), "little")
        self.start, self.entries = 8 + length, json.loads(binary.read(length))

    def keys(self) -> list[str]:
        return self.file.keys()

    def metadata(self) -> dict[str, str] | None:
        return self.file.metadata()

    def get_slice(self, key: str) -> Any:
        return self.file.get_slice(key)

    def get_tensor(self, key: str) -> Tensor:
        """Raises LoraError if the file has become shorter."""
        entry, shape = self.entries.get(key, {}), self.file.get_slice(key).get_shape()
        start, end = entry.get("data_offsets", (0, 0))
        dtype = DTYPES.get(entry.get("dtype"))
        if dtype is None or entry["shape"] != shape or end - start != math.prod(shape) * dtype.itemsize or start == end:
            return self.file.get_tensor(key)
        tensor = torch.empty(shape, dtype=dtype)
        self.binary.seek(self.start + start)
        read = self.binary.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        if read != tensor.nbytes:
            raise LoraError(f"{shown(key)} ends after {read} of {tensor.nbytes} bytes: the file has become shorter.")
        return tensor
